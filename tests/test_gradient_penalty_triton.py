"""The Triton kernels of gradient_penalty and tangent_combine as GPUs get them: compiled, and executed in PTX emulation."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl
from gpu_tools import Traffic, broken, compile_triton, emulate, emulator, triton_targets, triton_usage
from samples import inputs, map_tensors, tensors_of
from triton.backends.compiler import GPUTarget

from fastgan.kernels import gradient_penalty, tangent_combine
from fastgan.ops import references
from fastgan.ops.gradient_penalty import KINDS

pytestmark = pytest.mark.gpu_check

TARGETS = triton_targets()
DTYPES = ("fp16", "bf16", "fp32", "fp64")


def usage_of(kernel, target: GPUTarget, dtype: str, **known):
    """Of a kernel on tensors of ``dtype``; numbers per sample are of the dtype that sums are of."""
    work = "fp64" if dtype == "fp64" else "fp32"
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("grads", "t", "a"), f"*{dtype}")
    types |= dict.fromkeys(("factors", "out_norms", "out_factors", "out_penalty"), f"*{work}")
    types |= dict.fromkeys(("sums", "weight", "target", "power", "slope"), "fp64") | {"sums": "*fp64"}
    types |= dict.fromkeys(("out", "out_passed", "out_combined"), f"*{dtype}")
    constants = {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "PIECE": 8192, "BLOCK": 1024}
    arguments = {arg: value for arg, value in (types | constants | known).items() if arg in kernel.arg_names}
    with tempfile.TemporaryDirectory() as folder:
        return triton_usage(compile_triton(kernel, arguments, target, 4), Path(folder))


def resource_rows():
    finish = {"KIND": tl.constexpr("gradient_penalty"), "ONE_SIDED": False, "SAMPLES": gradient_penalty._SAMPLES}
    kernels = {
        gradient_penalty.square_sums_kernel: {"out": "*fp64"},
        gradient_penalty.finish_kernel: finish,
        gradient_penalty.scale_kernel: {},
        tangent_combine.combine_kernel: {},
    }
    for arch, target in TARGETS.items():
        for kernel, known in kernels.items():
            usage = usage_of(kernel, target, "fp32", **known)
            occupancy = usage.occupancy(int(target.arch), 4) if target.backend == "cuda" else None
            yield f"triton {kernel.__module__.rpartition('.')[2]} {kernel.__name__}", arch, usage, occupancy


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["square_sums", "scale", "combine"])
def test_streams_without_spills(name, dtype, arch):
    kernel = getattr(tangent_combine if name == "combine" else gradient_penalty, name + "_kernel")
    usage = usage_of(kernel, TARGETS[arch], dtype, **({"out": "*fp64"} if name == "square_sums" else {}))
    assert usage.spills == 0
    assert usage.registers <= 80
    assert usage.shared <= 1024


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_finish_without_spills(kind, arch):
    constants = {"KIND": tl.constexpr(kind), "ONE_SIDED": kind == "gradient_penalty", "SAMPLES": gradient_penalty._SAMPLES}
    usage = usage_of(gradient_penalty.finish_kernel, TARGETS[arch], "fp32", **constants)
    assert usage.spills == 0
    assert usage.registers <= 128


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HALF_DTYPES = (torch.float16, torch.bfloat16, torch.float64)
CASES = [("gradient_penalty", (5, 3, 4, 7, kind), torch.float32) for kind in range(5)]
CASES += [("gradient_penalty", (3, 9001, 1), torch.float32), ("gradient_penalty", (130, 3, 0), torch.float32)]
CASES += [("gradient_penalty", (5, 1500, 0), dtype) for dtype in HALF_DTYPES]
CASES += [("gradient_penalty_backward", (3, 9001, 1), dtype) for dtype in (torch.float32, *HALF_DTYPES)]
CASES += [("tangent_combine", shape, torch.float32) for shape in ((5, 3, 4, 7, 1), (3, 4097, 0), (6, 1))]
CASES += [("tangent_combine", (5, 1500, 1), dtype) for dtype in HALF_DTYPES]


def home(op):
    return tangent_combine if op == "tangent_combine" else gradient_penalty


@pytest.mark.parametrize(("op", "shape", "dtype"), CASES)
def test_emulated_ptx(op, shape, dtype, monkeypatch, poisoned):
    launches = emulate(monkeypatch, home(op))
    values = inputs(op, shape, dtype)
    results = getattr(home(op), op)(*values)
    truth = references[op](*map_tensors(torch.Tensor.double, values))
    for ours, exact in zip(tensors_of(results), tensors_of(truth), strict=True):
        assert ((ours.double() - exact).abs().max() / exact.abs().max()).item() < TOLERANCE[dtype]
    assert len(launches) == (3 if op == "gradient_penalty" else 1)


@pytest.mark.parametrize(("op", "tensors"), [("gradient_penalty", 3), ("gradient_penalty_backward", 2), ("tangent_combine", 4)])
def test_counted_traffic(op, tensors, monkeypatch, record_property):
    """The norms take one read of the gradients, the product another and one write; tangents two reads and two writes."""
    launches = emulate(monkeypatch, home(op))
    values = inputs(op, (4, 3, 64, 64, 1), torch.float32)
    getattr(home(op), op)(*values)
    traffic, least = Traffic.of(launches), tensors * 4 * values[0].numel()
    record_property("traffic", (traffic.distinct / least, traffic.sectors / least))
    assert traffic.distinct <= 1.05 * least
    assert traffic.sectors <= 1.15 * least
    assert traffic.conflicts <= 1.05


@pytest.mark.parametrize(
    ("op", "kernel"), [("gradient_penalty_backward", "scale_kernel"), ("tangent_combine", "combine_kernel")]
)
def test_a_kernel_without_its_bounds_fails(op, kernel, monkeypatch):
    broken(monkeypatch, home(op), kernel, "at < length", "at < length + 1")
    emulate(monkeypatch, home(op))
    with pytest.raises(emulator().KernelFault):
        getattr(home(op), op)(*inputs(op, (3, 33, 1), torch.float32))
