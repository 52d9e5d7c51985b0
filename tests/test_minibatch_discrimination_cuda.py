"""The CUDA C++ kernels of minibatch discrimination in the built extension: slots, resources, and PTX in emulation."""

import re

import numpy as np
import pytest
import torch
from gpu_tools import array, cuda_extension, cuda_ptx, cuda_usage, emulator
from samples import inputs

from fastgan.ops import references

pytestmark = pytest.mark.gpu_check

WARPS = 4
OPERATORS = [op for op in references if op.startswith("minibatch_discrimination")]
# operator -> (Tangent, Components) of the kernel template
TEMPLATE = {"": (0, 0), "_backward": (0, 1), "_jvp": (1, 0), "_double_backward": (1, 1)}
DTYPES = {torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16", torch.float32: "f", torch.float64: "d"}


def describe(mangled: str) -> str:
    dtype, chunk, *template = re.search(r"pairsI(\w+?)Li(\d+)ELb(\d)ELb(\d)E", mangled).groups()
    (op,) = (op for op, flags in TEMPLATE.items() if flags == tuple(map(int, template)))
    (name,) = (str(torch_dtype).removeprefix("torch.") for torch_dtype, letters in DTYPES.items() if letters == dtype)
    return f"cuda {op.strip('_') or 'forward'} {name} D<={chunk}"


@pytest.mark.parametrize("op", OPERATORS)
def test_extension_fills_the_cuda_slot(op):
    assert (op, "CUDA") in cuda_extension().slots


def test_resources():
    usages = {(kernel, arch): usage for (kernel, arch), usage in cuda_usage().items() if "pairs" in kernel}
    assert len({kernel for kernel, _ in usages}) == len(OPERATORS) * len(DTYPES) * 2
    for (kernel, arch), usage in usages.items():
        assert usage.spills == 0, (describe(kernel), arch)
        assert usage.registers <= 208, (describe(kernel), arch)
        assert usage.shared <= 16 << 10, (describe(kernel), arch)


@pytest.fixture(scope="module")
def program():
    ptxemu = emulator()
    return ptxemu, ptxemu.load(cuda_ptx("pairs"))


def run(program, op, values, told: int | None = None):
    """Results and counts of the launch that csrc/cuda/minibatch_discrimination.cu makes; ``told``: a wrong B to tell it."""
    ptxemu, loaded = program
    *before, m = (v for v in values if isinstance(v, torch.Tensor))
    (b, k, d), dtype = m.shape, m.dtype
    tangent, components = TEMPLATE[op.removeprefix("minibatch_discrimination")]
    chunk = 8 if d <= 8 else 16
    mangled = f"pairsI{DTYPES[dtype]}Li{chunk}ELb{tangent}ELb{components}E"
    (kernel,) = (name for name in loaded.kernels if mangled in name)
    v, grad = (before[0] if tangent else None), (before[-1] if components else None)
    outputs = {(b, k): tangent or not components, (b, k, d): components}
    outputs = [torch.empty(shape, dtype=dtype) if wanted else None for shape, wanted in outputs.items()]
    arguments = [array(x.contiguous()) if x is not None else None for x in (m, v, grad)]
    arguments += [ptxemu.Buf(array(x), out=True) if x is not None else None for x in outputs]
    packed = d % (2 if dtype == torch.float64 else 4) == 0
    blocks = -(-b // 32) * k * (-(-d // chunk) if components else 1)
    stats = loaded.launch(kernel, blocks, WARPS * 32, [*arguments, told or b, k, d, 0, packed], on_uninit="raise")
    return [x for x in outputs if x is not None], stats


#: (B, K, D, dtype): D in loads of 16 bytes and not, in one chunk and in several
CASES = [(37, 3, 5), (65, 2, 16), (33, 1, 18), (9, 2, 50), (33, 2, 8), (19, 2, 20)]
CASES = [(*shape, torch.float32) for shape in CASES]
CASES += [(35, 2, 5, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
CASES += [(35, 2, 16, torch.float16), (33, 2, 24, torch.bfloat16), (33, 2, 8, torch.float16), (20, 2, 6, torch.float64)]


@pytest.mark.parametrize(("b", "k", "d", "dtype"), CASES)
@pytest.mark.parametrize("op", OPERATORS)
def test_emulated_ptx(op, b, k, d, dtype, program, record_property):
    values = inputs(op, (b, k, d), dtype)
    outputs, _ = run(program, op, values)
    expected = references[op](*(x.double() if isinstance(x, torch.Tensor) else x for x in values))
    expected = (expected,) if isinstance(expected, torch.Tensor) else expected
    for ours, truth in zip(outputs, expected, strict=True):
        error = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
        record_property("error", error)
        assert np.isfinite(error)
        assert error < {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


# Instructions of PTX, all told, per pair and component of 16: at least 3 (5, 6 and 9) of them compute, absolute values counted,
# which GPUs take with the addition.
INSTRUCTIONS = {"": 6, "_backward": 14, "_jvp": 14, "_double_backward": 22}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_counted(op, dtype, program, record_property):
    b, k, d = 128, 1, 16
    values = inputs(op, (b, k, d), dtype)
    outputs, stats = run(program, op, values)
    assert stats.unique_read + stats.unique_written == sum(x.nbytes for x in values if isinstance(x, torch.Tensor)) + sum(
        x.nbytes for x in outputs
    )
    instructions = sum(stats.warp_instr.values()) * 32 / (b * b * k * d)
    passes, ideal = (sum(kind[i] for kind in stats.shared.values()) for i in (4, 5))
    record_property("instructions", instructions)
    assert instructions <= INSTRUCTIONS[op.removeprefix("minibatch_discrimination")]
    assert passes <= 1.05 * ideal


@pytest.mark.parametrize("op", OPERATORS)
def test_an_argument_too_large_fails(op, program):
    with pytest.raises(emulator().KernelFault, match="out of bounds"):
        run(program, op, inputs(op, (33, 1, 3), torch.float32), told=34)
