"""The CUDA C++ kernels of minibatch discrimination in the built extension: slots, resources, and PTX in emulation.

Launches are cut as csrc/cuda/minibatch_discrimination.h cuts them for a GPU: it is plain C++, compiled here.
"""

import ctypes
import math
import re

import numpy as np
import pytest
import torch
from gpu_tools import MULTIPROCESSOR, array, cuda_extension, cuda_ptx, cuda_usage, emulator, plain_cpp
from samples import inputs

from fastgan.ops import references

pytestmark = pytest.mark.gpu_check

WARPS = 4  # of a block of `pairs`
OPERATORS = [op for op in references if op.startswith("minibatch_discrimination")]
# operator -> (Tangent, Components) of the kernel template
TEMPLATE = {"": (0, 0), "_backward": (0, 1), "_jvp": (1, 0), "_double_backward": (1, 1)}
DTYPES = {torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16", torch.float32: "f", torch.float64: "d"}


def parsed(mangled: str) -> tuple[str, str, str, str]:
    """(kernel, operator, dtype, chunk) of a mangled name."""
    kernel, dtype, chunk, *flags = re.search(
        r"\d(pairs|unordered_pairs|add_parts)I(\w+?)(?:Li(\d+)E)?Lb(\d)ELb(\d)E", mangled
    ).groups()
    (op,) = (op for op, template in TEMPLATE.items() if template == tuple(map(int, flags)))
    (name,) = (str(torch_dtype).removeprefix("torch.") for torch_dtype, letters in DTYPES.items() if letters == dtype)
    return kernel, op.strip("_") or "forward", name, chunk


def describe(mangled: str) -> str:
    kernel, op, dtype, chunk = parsed(mangled)
    return f"cuda {kernel} {op} {dtype}" + (f" D<={chunk}" if chunk else "")


def warps_of(mangled: str) -> int:
    return {"pairs": WARPS, "unordered_pairs": 1, "add_parts": 5}[parsed(mangled)[0]]


@pytest.mark.parametrize("op", OPERATORS)
def test_extension_fills_the_cuda_slot(op):
    assert (op, "CUDA") in cuda_extension().slots


# kernel -> registers, bytes of shared memory, warps of a multiprocessor that are resident at least
RESOURCES = {"pairs": (208, 16 << 10, 8), "unordered_pairs": (240, 10 << 10, 8), "add_parts": (56, 0, 32)}


def test_resources():
    usages = {(kernel, arch): usage for (kernel, arch), usage in cuda_usage().items() if "minibatch_discrimination" in kernel}
    assert len({kernel for kernel, _ in usages}) == len(OPERATORS) * len(DTYPES) * 4
    for (kernel, arch), usage in usages.items():
        registers, shared, warps = RESOURCES[parsed(kernel)[0]]
        assert usage.spills == 0, (describe(kernel), arch)
        assert usage.registers <= registers, (describe(kernel), arch)
        assert usage.shared <= shared, (describe(kernel), arch)
        assert usage.occupancy(arch, warps_of(kernel)) * MULTIPROCESSOR[arch][0] >= warps, (describe(kernel), arch)


@pytest.fixture(scope="module")
def program():
    ptxemu = emulator()
    return ptxemu, ptxemu.load(cuda_ptx("unordered_pairs"))


def run(program, op, values, told: int | None = None):
    """Results and counts of the launch that works every pair out twice; ``told``: a wrong B to tell it."""
    ptxemu, loaded = program
    *before, m = (v for v in values if isinstance(v, torch.Tensor))
    (b, k, d), dtype = m.shape, m.dtype
    tangent, components = TEMPLATE[op.removeprefix("minibatch_discrimination")]
    chunk = 8 if d <= 8 else 16
    mangled = f"5pairsI{DTYPES[dtype]}Li{chunk}ELb{tangent}ELb{components}E"
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


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def agree(outputs, op, values, record_property=None):
    """With float64."""
    expected = references[op](*(x.double() if isinstance(x, torch.Tensor) else x for x in values))
    expected = (expected,) if isinstance(expected, torch.Tensor) else expected
    for ours, truth in zip(outputs, expected, strict=True):
        error = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
        if record_property:
            record_property("error", error)
        assert np.isfinite(error)
        assert error < TOLERANCE[ours.dtype]


#: (B, K, D, dtype): D in loads of 16 bytes and not, in one chunk and in several
CASES = [(37, 3, 5), (65, 2, 16), (33, 1, 18), (9, 2, 50), (33, 2, 8), (19, 2, 20)]
CASES = [(*shape, torch.float32) for shape in CASES]
CASES += [(35, 2, 5, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
CASES += [(35, 2, 16, torch.float16), (33, 2, 24, torch.bfloat16), (33, 2, 8, torch.float16), (20, 2, 6, torch.float64)]


@pytest.mark.parametrize(("b", "k", "d", "dtype"), CASES)
@pytest.mark.parametrize("op", OPERATORS)
def test_emulated_ptx(op, b, k, d, dtype, program, record_property):
    values = inputs(op, (b, k, d), dtype)
    agree(run(program, op, values)[0], op, values, record_property)


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


CUT = """
#include "cuda/minibatch_discrimination.h"
using namespace fastgan::minibatch_discrimination;
extern "C" {
int64_t cut(int dtype, int64_t B, int64_t K, int64_t D, bool values, bool gradient, int64_t* told) {
  int x;
  const Pairs pairs{fastgan::Dtype(dtype), B, K, D, &x, &x, &x, values ? &x : nullptr, gradient ? &x : nullptr, true};
  const Cut cut(pairs);
  return told[0] = cut.span, told[1] = cut.scratch, told[2] = cut.units(), told[3] = Cut::adding_warps(pairs), cut.parts;
}
}
"""


@pytest.fixture(scope="session")
def cut(tmp_path_factory):
    """cut(dtype, B, K, D, values, gradient) -> parts, span, bytes of scratch memory, units, warps of a block that adds up"""
    library = plain_cpp(tmp_path_factory.mktemp("cut"), CUT)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

    def call(dtype, b, k, d, values, gradient):
        told = (ctypes.c_int64 * 4)()
        sizes = map(ctypes.c_int64, (b, k, d))
        return library.cut(dtypes.index(dtype), *sizes, ctypes.c_bool(values), ctypes.c_bool(gradient), told), *told

    return call


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("b", "k", "d"),
    [(256, 64, 16), (1024, 64, 16), (1000, 3, 50), (8192, 32, 8), (8192, 1, 16), (33, 4096, 16), (1 << 20, 64, 16)],
)
def test_parts(b, k, d, gradient, cut):
    parts, span, scratch, units, _ = cut(torch.float32, b, k, d, not gradient, gradient)
    tiles = -(-b // 32)
    assert span % 32 == 0
    assert (parts - 1) * span < b <= parts * span
    assert units == parts * (parts + 1) // 2
    assert scratch == 4 * parts * k * (d if gradient else 1) * tiles * 32
    assert scratch <= 48 << 20 or parts <= 4
    # the GPU is full, or parts are as small as they can be, or their sums would take too much memory
    assert units * k >= 1024 or span == 32 or scratch / parts * (parts + 2) > 48 << 20


@pytest.mark.parametrize(("b", "k", "d"), [(64, 50, 5), (32, 1 << 20, 16), (1, 1, 1)])
def test_few_pairs_take_one_launch(b, k, d, cut):
    assert cut(torch.float32, b, k, d, True, True)[0] == 0


def run_once(program, cut, op, values, parts: int, told: int | None = None, span=None, first=None):
    """Results and counts of the two launches that work every pair out once. ``told``, ``span``: wrong, for the first to get;
    ``first``: another program to take it from."""
    ptxemu, loaded = program
    *before, m = (v for v in values if isinstance(v, torch.Tensor))
    (b, k, d), dtype = m.shape, m.dtype
    flags = tangent, components = TEMPLATE[op.removeprefix("minibatch_discrimination")]
    self_term = not (op == "minibatch_discrimination" and not values[-1])
    _, _, _, _, warps = cut(dtype, b, k, d, tangent or not components, components)
    tiles = -(-b // 32)
    right = -(-tiles // parts) * 32
    parts = -(-b // right)
    outputs = {(b, k): tangent or not components, (b, k, d): components}
    outputs = [torch.empty(shape, dtype=dtype) if wanted else None for shape, wanted in outputs.items()]
    sums = (d if components else 0) + (tangent or not components)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    scratch = torch.full((parts, k, sums, tiles * 32), math.nan, dtype=accumulate)  # what nobody writes shows in the results
    kernels = [
        next(name for name in loaded.kernels if f"{kernel}I{DTYPES[dtype]}Lb{flags[0]}ELb{flags[1]}E" in name)
        for kernel in ("15unordered_pairs", "9add_parts")
    ]
    packed = d % (2 if dtype == torch.float64 else 4) == 0
    arguments = [array(x.contiguous()) if x is not None else None for x in (m, *pick(before, tangent, components))]
    arguments += [ptxemu.Buf(array(scratch), out=True)]
    stats = (first or loaded).launch(
        kernels[0], k * parts * (parts + 1) // 2, 32, [*arguments, told or b, k, d, span or right, parts, self_term, packed],
        on_uninit="raise",
    )  # fmt: skip
    results = [ptxemu.Buf(array(x), out=True) if x is not None else None for x in outputs]
    second = loaded.launch(
        kernels[1], k * tiles, 32 * warps, [array(scratch), *results, b, k, d, parts, packed], on_uninit="raise"
    )
    return [x for x in outputs if x is not None], (stats, second), scratch


def pick(before, tangent, components):
    return (before[0] if tangent else None), (before[-1] if components else None)


#: (B, K, D, dtype, parts): one part, parts of a tile and of several, of different sizes; D in loads of 16 bytes and not
ONCE = [
    (65, 2, 16, torch.float32, 3), (100, 1, 5, torch.float32, 2), (37, 2, 18, torch.float32, 1), (40, 1, 8, torch.float16, 2),
    (70, 1, 24, torch.bfloat16, 2), (70, 1, 6, torch.float64, 2), (40, 1, 11, torch.float64, 1),
]  # fmt: skip


@pytest.mark.parametrize(("b", "k", "d", "dtype", "parts"), ONCE)
@pytest.mark.parametrize("op", OPERATORS)
def test_emulated_once(op, b, k, d, dtype, parts, program, cut, record_property):
    values = inputs(op, (b, k, d), dtype)
    agree(run_once(program, cut, op, values, parts)[0], op, values, record_property)


def test_emulated_once_with_self(program, cut):
    (m, self_term) = inputs("minibatch_discrimination", (40, 1, 5), torch.float32)
    for value in (self_term, not self_term):
        agree(run_once(program, cut, "minibatch_discrimination", (m, value), 2)[0], "minibatch_discrimination", (m, value))


@pytest.mark.parametrize(
    ("op", "where"), [(op, x) for op in OPERATORS for x in ("m", "others") if (op, x) != (OPERATORS[0], "others")]
)
def test_once_not_finite(op, where, program, cut):
    """Inf and NaN come out where the reference has them, and nowhere else; equal components among them."""
    values = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs(op, (70, 1, 4), torch.float32)]
    *others, m = (x for x in values if isinstance(x, torch.Tensor))
    m[40, 0, 1] = m[3, 0, 1]
    for x in [m] if where == "m" else others:
        x[3].fill_(math.inf)
        x[50].view(-1)[0] = -math.inf
        x[69].view(-1)[0] = math.nan
    expected = references[op](*values)
    expected = (expected,) if isinstance(expected, torch.Tensor) else expected
    for ours, truth in zip(run_once(program, cut, op, values, 2)[0], expected, strict=True):
        torch.testing.assert_close(ours, truth, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_no_atomics():
    """Sums are in fixed order: the same bits on every run."""
    assert not re.search(r"\b(atom|red)\.", cuda_ptx("unordered_pairs"))


# Both launches, in parts of a tile: instructions of PTX per unordered pair and component of 16, and 32-byte sectors asked of
# L1, to the least. Worked out twice, pairs take 10.5, 25.5, 25.2 and 40.7.
ONCE_COUNTS = {"": (6.8, 4.9), "_backward": (19, 1.6), "_jvp": (15.2, 6.3), "_double_backward": (28, 1.9)}


@pytest.mark.parametrize("op", OPERATORS)
def test_counted_once(op, program, cut, record_property):
    b, d = 256, 16
    values = inputs(op, (b, 1, d), torch.float32)
    outputs, launches, scratch = run_once(program, cut, op, values, parts=8)
    given, results = (sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)) for tensors in (values, outputs))
    distinct = sum(stats.unique_read + stats.unique_written for stats in launches)
    assert distinct == given + 2 * scratch.nbytes + results
    instructions = sum(sum(stats.warp_instr.values()) for stats in launches) * 32 / (b * (b - 1) / 2 * d)
    sectors = sum(32 * kind[3] for stats in launches for kind in stats.glob.values()) / distinct
    passes, ideal = (sum(kind[i] for stats in launches for kind in stats.shared.values()) for i in (4, 5))
    record_property("instructions", instructions)
    record_property("sectors", sectors)
    most = ONCE_COUNTS[op.removeprefix("minibatch_discrimination")]
    assert instructions <= most[0]
    assert sectors <= most[1]
    assert passes <= 1.05 * ideal


@pytest.mark.parametrize("op", OPERATORS)
def test_once_broken(op, program, cut):
    """What the checks above would have to notice."""
    values = inputs(op, (70, 1, 3), torch.float32)
    with pytest.raises(emulator().KernelFault, match="out of bounds"):
        run_once(program, cut, op, values, 2, told=71)
    with pytest.raises(AssertionError):  # samples that no part has
        agree(run_once(program, cut, op, values, 2, span=32)[0], op, values)


def test_once_with_lanes_mixed_up(program, cut):
    """Lanes that add up what is others' to add."""
    ptx, op = cuda_ptx("unordered_pairs"), "minibatch_discrimination_backward"
    head = ptx[: re.search(r"^(\.visible |\.weak )?\.entry", ptx, re.MULTILINE).start()]
    body = re.search(r"^(\.visible |\.weak )?\.entry \w*15unordered_pairsIfLb0ELb1E.*?^}", ptx, re.MULTILINE | re.DOTALL)[0]
    wrong = re.sub(r"(shfl\.sync\.bfly\.b32[^;]*, )4(, 31, -1;)", r"\g<1>2\2", body)
    assert wrong != body
    values = inputs(op, (40, 1, 3), torch.float32)
    with pytest.raises(AssertionError):
        agree(run_once(program, cut, op, values, 2, first=program[0].load(head + wrong))[0], op, values)
