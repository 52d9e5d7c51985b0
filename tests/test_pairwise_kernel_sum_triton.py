"""The Triton kernels of pairwise_kernel_sum as GPUs get them: compiled ahead of time, and executed in PTX emulation."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl
from gpu_tools import Traffic, broken, compile_triton, emulate, triton_targets, triton_usage
from samples import inputs
from triton.backends.compiler import GPUTarget

from fastgan.kernels import pairwise_kernel_sum as kernels
from fastgan.ops import references
from fastgan.ops.pairwise_kernel_sum import KERNELS

pytestmark = pytest.mark.gpu_check

TARGETS = triton_targets()
DTYPES = ("fp16", "bf16", "fp32", "fp64")


def usage_of(name: str, target: GPUTarget, dtype: str, function: str = "gaussian", **known):
    kernel, work = getattr(kernels, name + "_kernel"), "fp64" if dtype == "fp64" else "fp32"
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("x", "y", "row", "column"), f"*{dtype}")
    types |= dict.fromkeys(("bandwidths", "weights", "powers", "out", "slopes", "points", "others", "sums"), f"*{work}")
    constants = {
        "KERNEL": list(KERNELS).index(function),
        "POWER": 3 if function == "polynomial" else 0,
        "P": KERNELS[function],
        "EXCLUDE": True,
    }
    constants |= {"ACC": tl.float64 if dtype == "fp64" else tl.float32}
    constants |= kernels.gather_tile(torch.float64 if dtype == "fp64" else torch.float32) if name == "gather" else kernels._TILE
    arguments = {arg: value for arg, value in (types | constants | known).items() if arg in kernel.arg_names}
    with tempfile.TemporaryDirectory() as folder:
        return triton_usage(compile_triton(kernel, arguments, target, kernels._WARPS), Path(folder))


def resource_rows():
    for arch, target in TARGETS.items():
        for name in ("forward", "slopes", "gather"):
            usage = usage_of(name, target, "fp32", "laplacian")
            occupancy = usage.occupancy(int(target.arch), kernels._WARPS) if target.backend == "cuda" else None
            yield f"triton pairwise_kernel_sum {name}_kernel", arch, usage, occupancy


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("function", KERNELS)
@pytest.mark.parametrize("name", ["forward", "slopes"])
def test_tiles_without_spills(name, function, arch):
    usage = usage_of(name, TARGETS[arch], "fp32", function)
    assert usage.spills == 0
    assert usage.registers <= 144
    assert usage.shared <= 64  # a layout that changes in the loop goes through shared memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["forward", "slopes", "gather"])
def test_every_dtype_without_spills(name, dtype):
    usage = usage_of(name, TARGETS["sm_90"], dtype, "laplacian")
    assert usage.spills == 0
    assert usage.registers <= 255


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("function", ["laplacian", "gaussian"])
def test_gather_without_spills(function, arch):
    usage = usage_of("gather", TARGETS[arch], "fp32", function)
    assert usage.spills == usage.shared == 0
    assert usage.registers <= 192


@pytest.mark.parametrize("name", ["forward", "slopes", "gather"])
def test_sizes_and_strides_of_one(name):
    """The launch makes these compile-time constants, which have fewer methods than values."""
    sizes = ("n", "m", "D", "count", "rows", "row_stride", "column_stride", "stride_i", "stride_j")
    usage_of(name, TARGETS["sm_90"], "fp32", "laplacian", **dict.fromkeys(sizes, 1))


CASES = [(9, 66, 5, form, 0, torch.float32) for form in (0, 1, 3, 4, 5)] + [(35, 35, 3, 0, 1, torch.float32)]
CASES += [(21, 150, 70, form, 0, torch.float32) for form in (0, 2)]  # several tiles in every direction
CASES += [(9, 11, 5, 0, 0, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
@pytest.mark.parametrize("op", [op for op in references if op.startswith("pairwise_kernel_sum")])
def test_emulated_ptx(op, case, monkeypatch, record_property):
    launches = emulate(monkeypatch, kernels)
    values = inputs(op, case[:-1], case[-1])
    got = getattr(kernels, op)(*values)
    expected = references[op](*(v.double() if isinstance(v, torch.Tensor) else v for v in values))
    ran = [launch.kernel for launch in launches]
    assert ran.count("slopes_kernel") == ("backward" in op or "gradient" in op)
    assert ran.count("forward_kernel") == ("backward" not in op)
    assert ("gather_kernel" in ran) == ("slopes_kernel" in ran and values[-4] != "polynomial")
    for ours, truth in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True):
        error = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
        record_property("error", error)
        assert error < {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case[-1]]


# Instructions of PTX per pair and coordinate, addresses included, where strides are not known to be multiples of 16
LIMITS = {
    "laplacian": {"forward_kernel": 5.0, "slopes_kernel": 5.0, "gather_kernel": 8.5},
    "gaussian": {"forward_kernel": 4.0, "slopes_kernel": 4.0, "gather_kernel": 5.0},
}


@pytest.mark.parametrize("function", LIMITS)
def test_counted_instructions_and_traffic(function, monkeypatch, record_property):
    launches = emulate(monkeypatch, kernels)
    n, m, d = 128, 128, 64  # whole tiles
    x, y, grad = torch.randn(n, d), torch.randn(m, d), torch.randn(n)
    options = torch.full((1,), 8.0), torch.ones(1), function, 1.0, 0.0, False
    kernels.pairwise_kernel_sum(x, y, *options)
    kernels.pairwise_kernel_sum_backward_both(grad, x, y, *options)
    assert [launch.kernel for launch in launches] == ["forward_kernel", "slopes_kernel", "gather_kernel", "gather_kernel"]
    for launch in launches:
        instructions = sum(launch.stats.warp_instr.values()) * 32 / (n * m * d)
        record_property(launch.kernel, instructions)
        assert instructions <= LIMITS[function][launch.kernel]
    points, slopes, sums = 4 * (n + m) * d, 4 * n * m, 4 * n * d
    least = {"forward_kernel": points, "slopes_kernel": points + slopes, "gather_kernel": points + slopes + 2 * sums}
    for launch in launches:
        traffic = Traffic.of([launch])
        record_property(launch.kernel + " distinct", traffic.distinct / least[launch.kernel])
        assert traffic.distinct <= 1.05 * least[launch.kernel]
        assert traffic.conflicts <= 1


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("_similarity", "y += stride_y", "y += stride_x"),
        ("_similarity", "q += run", "q = run"),
        ("gather_kernel", "own > other", "own >= other"),
        ("slopes_kernel", "row_stride, mask", "row_stride + 1, mask"),
    ],
)
def test_a_broken_kernel_is_noticed(function, old, new, monkeypatch):
    broken(monkeypatch, kernels, function, old, new)
    emulate(monkeypatch, kernels)
    x, y = torch.randint(0, 3, (9, 40)).float(), torch.randint(0, 3, (150, 40)).float()  # of equal coordinates the sign is 0
    values = torch.randn(9), torch.randn(150), x, y, torch.full((1,), 30.0), torch.ones(1), "laplacian", 1.0, 0.0, False
    expected = references["pairwise_kernel_sum_backward"](*values)
    try:
        got = kernels.pairwise_kernel_sum_backward(*values)
    except Exception as fault:
        assert "KernelFault" in type(fault).__name__, fault
    else:
        assert (got - expected).abs().max() > 1e-3 * expected.abs().max()
