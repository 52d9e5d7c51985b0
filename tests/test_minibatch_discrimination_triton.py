"""The Triton kernels of minibatch discrimination as GPUs get them: compiled ahead of time, and executed in PTX emulation."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl
from gpu_tools import broken, compile_triton, emulate, emulator, triton_targets, triton_usage
from samples import inputs
from triton.backends.compiler import GPUTarget

from fastgan.kernels import minibatch_discrimination as kernels
from fastgan.ops import references

pytestmark = pytest.mark.gpu_check

# kernel -> values it keeps per row and component, as its launcher says
KERNELS = {"forward_kernel": 1, "backward_kernel": 2, "jvp_kernel": 3, "double_backward_kernel": 4}
TARGETS = triton_targets()
NVIDIA = {name: target for name, target in TARGETS.items() if target.backend == "cuda"}


def arguments(name: str, components: int, dtype: str = "fp32", **known) -> dict:
    """Of a kernel for a large problem; ``known``: integers that the launch specialises on, as it does for 1."""
    kernel, integers = getattr(kernels, name), ("n", "K", "grad_stride_b", "grad_stride_k")
    types = {arg: "i32" if arg in integers else f"*{dtype}" for arg in kernel.arg_names}
    constants = {"D": components, "ACC": tl.float64 if dtype == "fp64" else tl.float32, "SELF": False}
    constants |= kernels.block_shape(1024, 64, components, KERNELS[name]) | known
    return types | {arg: value for arg, value in constants.items() if arg in kernel.arg_names}


def usage_of(name: str, components: int, target: GPUTarget, dtype: str = "fp32"):
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_triton(getattr(kernels, name), arguments(name, components, dtype), target, kernels._WARPS)
        return triton_usage(compiled, Path(folder))


def resource_rows():
    for components in (5, 16):
        for name in KERNELS:
            for arch, target in TARGETS.items():
                usage = usage_of(name, components, target)
                occupancy = usage.occupancy(int(target.arch), kernels._WARPS) if arch in NVIDIA else None
                yield f"triton {name} D={components}", arch, usage, occupancy


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("components", [5, 16])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name, components, arch):
    usage = usage_of(name, components, TARGETS[arch])
    assert usage.spills == 0
    assert usage.registers <= (96 if components == 5 else 168)
    assert usage.shared <= 1024


@pytest.mark.parametrize("name", KERNELS)
def test_more_components_than_registers(name):
    assert usage_of(name, 100, NVIDIA["sm_90"]).spills == 0


@pytest.mark.parametrize("name", KERNELS)
def test_double_precision_does_not_spill(name):
    assert usage_of(name, 5, NVIDIA["sm_90"], "fp64").spills == 0


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_and_strides_of_one(name):
    """The launch makes these compile-time constants, which have fewer methods than values."""
    ones = {"n": 1, "K": 1, "grad_stride_b": 1, "grad_stride_k": 1}
    compile_triton(getattr(kernels, name), arguments(name, 3, **ones), NVIDIA["sm_90"], kernels._WARPS)


CASES = [(37, 3, 5, torch.float32), (65, 2, 8, torch.float32), (33, 1, 18, torch.float32), (9, 2, 66, torch.float32)]
CASES += [(35, 2, 5, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]


@pytest.mark.parametrize(("b", "k", "d", "dtype"), CASES)
@pytest.mark.parametrize("op", [op for op in references if op.startswith("minibatch_discrimination")])
def test_emulated_ptx(op, b, k, d, dtype, monkeypatch, record_property):
    name = (op.removeprefix("minibatch_discrimination").lstrip("_") or "forward") + "_kernel"
    launches = emulate(monkeypatch, kernels)
    values = inputs(op, (b, k, d), dtype)
    got = getattr(kernels, op)(*values)
    expected = references[op](*(v.double() if isinstance(v, torch.Tensor) else v for v in values))
    assert [launch.kernel for launch in launches] == [name]
    for ours, truth in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True):
        error = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
        record_property("error", error)
        assert error < {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("op", [op for op in references if op.startswith("minibatch_discrimination")])
def test_every_tile_that_may_be_tuned_to(op, monkeypatch):
    launches = emulate(monkeypatch, kernels)
    values = inputs(op, (70, 1, 5), torch.float32)
    expected = references[op](*(v.double() if isinstance(v, torch.Tensor) else v for v in values))
    left = []

    def one_after_another(kernel, shape, device, tiles, run):
        if not launches:
            left.extend(tiles)
        run(left.pop())

    monkeypatch.setattr(kernels.tuning, "launch", one_after_another)
    while left or not launches:
        got = getattr(kernels, op)(*values)
        for ours, truth in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True):
            assert (ours.double() - truth).abs().max() <= 2e-6 * truth.abs().max(), left
    assert len(launches) > 6


def test_a_kernel_without_its_bounds_fails(monkeypatch):
    broken(monkeypatch, kernels, "forward_kernel", "mask=i < n", "mask=i < n + 1")
    emulate(monkeypatch, kernels)
    with pytest.raises(emulator().KernelFault, match="out of bounds"):
        kernels.minibatch_discrimination(torch.randn(37, 1, 5), True)
