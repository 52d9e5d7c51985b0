"""The CUDA C++ kernels that stream, of gradient_penalty and tangent_combine: slots, resources, and PTX in emulation."""

import re
import struct

import pytest
import torch
from gpu_tools import Launch, Memory, Traffic, cuda_extension, cuda_ptx, cuda_usage, emulator
from samples import inputs, map_tensors, tensors_of

from fastgan.ops import references
from fastgan.ops.gradient_penalty import KINDS

pytestmark = pytest.mark.gpu_check

OPERATORS = ("gradient_penalty", "gradient_penalty_backward", "tangent_combine")
WARPS, ELEMENTS = 8, 8192  # of a block, as csrc/cuda/cuda.h and launch.h have them
LETTERS = {torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16", torch.float32: "f", torch.float64: "d"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def describe(mangled: str) -> str | None:
    found = "spectral_norm" not in mangled and re.search(r"\d(combine|square_sums|finish|scale)I(\w+?)(?:Li(\d+))?E", mangled)
    return found and f"cuda {found[1]} {found[2].lstrip('0123456789_')} x{found[3] or 1}"


@pytest.mark.parametrize("op", OPERATORS)
def test_extension_fills_the_cuda_slot(op):
    assert (op, "CUDA") in cuda_extension().slots


def test_resources():
    usages = {(kernel, arch): usage for (kernel, arch), usage in cuda_usage().items() if describe(kernel)}
    assert len({kernel for kernel, _ in usages}) == 3 * 2 * len(LETTERS) + 2
    for (kernel, arch), usage in usages.items():
        assert usage.spills == 0, (describe(kernel), arch)
        assert usage.registers <= 72, (describe(kernel), arch)
        assert usage.occupancy(arch, WARPS) >= 0.5, (describe(kernel), arch)


class Program:
    """Launches by kernel, type and pack, as the functions in csrc/cuda make them."""

    def __init__(self):
        self.loaded = [emulator().load(cuda_ptx(kernel)) for kernel in ("square_sums", r"combineI\w+?Li")]
        self.launches = []

    def __call__(self, kernel: str, dtype, pack: int | None, blocks: int, values: list, outputs: list):
        mangled = f"{kernel}I{LETTERS[dtype]}" + (f"Li{pack}E" if pack else "E")
        ((loaded, name),) = ((loaded, name) for loaded in self.loaded for name in loaded.kernels if mangled in name)
        memory = Memory([x for x in values if isinstance(x, torch.Tensor)], outputs)
        values = [memory.address(x) if isinstance(x, torch.Tensor) else x for x in values]
        self.launches.append(Launch(kernel, memory.launch(loaded, name, blocks, WARPS * 32, values)))


@pytest.fixture(scope="module")
def program():
    return Program()


def pack_of(x: torch.Tensor, packed: bool) -> int:
    return 16 // x.element_size() if packed else 1


def run(program, op, values, packed):
    x, work = values[0], torch.float64 if values[0].dtype == torch.float64 else torch.float32
    rows, length = x.shape[0], x[0].numel()
    pieces, pack, out = -(-length // ELEMENTS), pack_of(x, packed), torch.empty_like(x)
    if op == "tangent_combine":
        t, a, factors, slope = values
        second, own = torch.empty_like(t), 1 if factors.dim() else 0
        arguments = [t, a, factors, out, second, length, length, own, length, length, pieces, slope]
        program("combine", x.dtype, pack, rows * pieces, arguments, [out, second])
        return out, second
    if op == "gradient_penalty_backward":
        arguments = [x, values[1], out, length, 1, length, length, pieces]
        program("scale", x.dtype, pack, rows * pieces, arguments, [out])
        return out
    _, kind, weight, target, one_sided, power = values
    sums, penalty, norms, factors = (
        x.new_empty(n, dtype=d) for n, d in ((rows * pieces, torch.float64), (1, work), (rows, work), (rows, work))
    )
    program("square_sums", x.dtype, pack, rows * pieces, [x, sums, length, length, pieces], [sums])
    form = struct.pack("i4xdd?7xdd", KINDS.index(kind), weight, target, one_sided, power, float(rows))
    program("finish", work, None, 1, [sums, penalty, norms, factors, rows, pieces, form], [penalty, norms, factors])
    return penalty[0], norms, factors, run(program, "gradient_penalty_backward", (x, factors), packed)


CASES = [("gradient_penalty", (5, 3, 4, 7, kind), torch.float32, True) for kind in range(5)]
CASES += [("gradient_penalty", (3, 9001, 1), torch.float32, False), ("gradient_penalty", (300, 4, 0), torch.float32, True)]
CASES += [("tangent_combine", shape, torch.float32, False) for shape in ((5, 3, 4, 7, 1), (3, 8195, 0), (6, 1))]
CASES += [
    (op, (3, 1504, 1), dtype, packed)
    for op in ("gradient_penalty", "tangent_combine")
    for dtype in (torch.float16, torch.bfloat16, torch.float64)
    for packed in (False, True)
]
CASES += [("tangent_combine", (1, 8203, 1), torch.bfloat16, True)]  # ends in less than a pack


@pytest.mark.parametrize(("op", "shape", "dtype", "packed"), CASES)
def test_emulated_ptx(op, shape, dtype, packed, program):
    values = inputs(op, shape, dtype)
    results = run(program, op, values, packed)
    truth = references[op](*map_tensors(torch.Tensor.double, values))
    for ours, exact in zip(tensors_of(results), tensors_of(truth), strict=True):
        assert ((ours.double() - exact).abs().max() / exact.abs().max()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize(("op", "tensors"), [("gradient_penalty", 3), ("tangent_combine", 4)])
def test_counted_traffic(op, tensors, program, record_property):
    program.launches.clear()
    values = inputs(op, (4, 3, 64, 64, 1), torch.float32)
    run(program, op, values, True)
    traffic, least = Traffic.of(program.launches), tensors * 4 * values[0].numel()
    record_property("traffic", (traffic.distinct / least, traffic.sectors / least))
    assert traffic.distinct <= 1.05 * least
    assert traffic.sectors <= 1.15 * least
    assert traffic.conflicts <= 1.05


def test_an_argument_too_large_fails(program):
    """What bounds checks are for: one element more than there is."""
    x, factors = inputs("gradient_penalty_backward", (1, 33, 1), torch.float32)
    out = torch.empty_like(x)
    with pytest.raises(emulator().KernelFault, match="out of bounds"):
        program("scale", x.dtype, 1, 1, [x, factors, out, 34, 1, 34, 34, 1], [out])
