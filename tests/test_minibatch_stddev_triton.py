"""The Triton kernels of minibatch_stddev as GPUs get them: compiled ahead of time, and executed in PTX emulation."""

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

from fastgan.kernels import minibatch_stddev
from fastgan.ops import references

pytestmark = pytest.mark.gpu_check

TARGETS = triton_targets()
DTYPES = ("fp16", "bf16", "fp32", "fp64")

#: operator -> what its launch of the kernel of columns is specialised for
OPERATORS = {
    "forward": {"TANGENT": False, "WEIGHTS": False, "VALUES": True},
    "backward": {"TANGENT": False, "WEIGHTS": True, "VALUES": False},
    "jvp": {"TANGENT": True, "WEIGHTS": False, "VALUES": True},
    "double_backward": {"TANGENT": True, "WEIGHTS": True, "VALUES": True},
}


def usage_of(kernel, target: GPUTarget, dtype: str, **known):
    types = dict.fromkeys(kernel.arg_names, "i32") | {"eps": "fp64", "parts": "*fp64", "out_parts": "*fp64", "reached": "*fp64"}
    types |= dict.fromkeys(("x", "v", "grad", "out_values", "out_gradient", "out"), f"*{dtype}")
    constants = {"STRIDED": True, "UNBIASED": False, "ACC": tl.float64 if dtype == "fp64" else tl.float32}
    constants |= {"BLOCK": minibatch_stddev._BLOCK, "KEEP": 0}
    arguments = {arg: value for arg, value in (types | constants | known).items() if arg in kernel.arg_names}
    with tempfile.TemporaryDirectory() as folder:
        return triton_usage(compile_triton(kernel, arguments, target, 4), Path(folder))


def resource_rows():
    for arch, target in TARGETS.items():
        for op, flags in OPERATORS.items():
            usage = usage_of(minibatch_stddev.column_kernel, target, "fp32", **flags)
            occupancy = usage.occupancy(int(target.arch), 4) if target.backend == "cuda" else None
            yield f"triton minibatch_stddev {op} column_kernel", arch, usage, occupancy


@pytest.mark.parametrize("keep", [0, minibatch_stddev._KEEP])
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPERATORS)
def test_columns_without_spills(op, dtype, arch, keep):
    usage = usage_of(minibatch_stddev.column_kernel, TARGETS[arch], dtype, **OPERATORS[op], KEEP=keep)
    assert usage.spills == 0
    assert usage.registers <= ((168 if dtype == "fp64" else 128) if keep else 80)
    assert usage.shared <= 1024


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reached", "append"])
def test_appended_channels_without_spills(name, dtype, arch):
    kernel = getattr(minibatch_stddev, name + "_kernel")
    usage = usage_of(kernel, TARGETS[arch], dtype, **({"out": "*fp64"} if name == "reached" else {}))
    assert usage.spills == 0
    assert usage.registers <= 80
    assert usage.shared <= 1024


NAMES = [op for op in references if op.startswith("minibatch_stddev")]
CASES = [((7, 4, 9, 2, 1, 1), torch.float32), ((8, 6, 5, 3, 2, 2, 0), torch.float32), ((3, 300, 1, 1, 0), torch.float32)]
CASES += [((5, 4, 3, 2, 1, 0), dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(op, values):
    results = getattr(minibatch_stddev, op)(*values)
    truth = references[op](*map_tensors(torch.Tensor.double, values))
    for ours, exact in zip(tensors_of(results), tensors_of(truth), strict=True):
        assert ((ours.double() - exact).abs().max() / exact.abs().max()).item() < TOLERANCE[ours.dtype]


@pytest.mark.parametrize("keep", [minibatch_stddev._KEEP, 2])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("op", NAMES)
def test_emulated_ptx(op, shape, dtype, keep, monkeypatch, poisoned):
    monkeypatch.setattr(minibatch_stddev, "_KEEP", keep)
    launches = emulate(monkeypatch, minibatch_stddev)
    check(op, inputs(op, shape, dtype))
    assert len(launches) == {"": 2, "_backward": 2, "_jvp": 2, "_double_backward": 3}[op.removeprefix("minibatch_stddev")]


@pytest.mark.parametrize("op", NAMES)
def test_emulated_channels_last(op, monkeypatch, poisoned):
    emulate(monkeypatch, minibatch_stddev)
    check(
        op,
        map_tensors(
            lambda x: x.contiguous(memory_format=torch.channels_last), inputs(op, (8, 6, 5, 3, 2, 2, 0), torch.float32)
        ),
    )


def test_a_kernel_without_its_bounds_fails(monkeypatch):
    broken(monkeypatch, minibatch_stddev, "column_kernel", "inside = at < positions", "inside = at < positions + 8")
    emulate(monkeypatch, minibatch_stddev)
    with pytest.raises((emulator().KernelFault, AssertionError)):
        check("minibatch_stddev", inputs("minibatch_stddev", (7, 4, 9, 2, 1, 1), torch.float32))


@pytest.mark.parametrize(("keep", "passes", "backward_passes"), [(8, 2, 3), (0, 3, 5)])
def test_counted_traffic(keep, passes, backward_passes, monkeypatch, record_property):
    """Of a group in registers sectors are those that have to move; else they are asked of the caches once per pass over it."""
    monkeypatch.setattr(minibatch_stddev, "_KEEP", keep)
    for op, tensors, asked in (("minibatch_stddev", 2, passes), ("minibatch_stddev_backward", 3, backward_passes)):
        with monkeypatch.context() as patch:
            launches = emulate(patch, minibatch_stddev)
            values = inputs(op, (8, 32, 8, 8, 2, 1, 0), torch.float32)
            getattr(minibatch_stddev, op)(*values)
        traffic, size = Traffic.of(launches), 4 * values[-6].numel()
        record_property(op, (traffic.distinct / size, traffic.sectors / size))
        assert traffic.distinct <= 1.05 * tensors * size
        assert traffic.sectors <= 1.15 * asked * size, traffic.sectors / size
        assert traffic.conflicts <= 1.05
