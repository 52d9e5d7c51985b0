"""The CUDA C++ kernels of minibatch_stddev: slots, resources, and PTX in emulation.

Launches are cut as csrc/cuda/minibatch_stddev.h cuts them for a GPU: it is plain C++, compiled here.
"""

import ctypes
import re

import pytest
import torch
from gpu_tools import Launch, Memory, Traffic, cuda_extension, cuda_ptx, cuda_usage, emulator, plain_cpp, without_barrier
from samples import inputs, map_tensors, tensors_of

from fastgan.ops import references
from fastgan.ops.minibatch_stddev import like_output, like_x, memory_format

pytestmark = pytest.mark.gpu_check

WARPS, KEPT = 8, 8  # of a block; samples of a group that stay in registers
OPERATORS = [op for op in references if op.startswith("minibatch_stddev")]
# operator -> (Tangent, Weights) of the kernel template
TEMPLATE = {"": (0, 0), "_backward": (0, 1), "_jvp": (1, 0), "_double_backward": (1, 1)}
LETTERS = {torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16", torch.float32: "f", torch.float64: "d"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def describe(mangled: str) -> str | None:
    found = re.search(r"minibatch_stddev.*\d(columns|append|add_shares)I(\d*\w+?)(?:Li(\d)ELi(\d)ELb(\d)ELb(\d)E)?EEv", mangled)
    if not found:
        return None
    kernel, dtype, pack, keep, *flags = found.groups()
    form = ""
    if pack:
        (op,) = (op.strip("_") or "forward" for op, template in TEMPLATE.items() if template == tuple(map(int, flags)))
        form = f" {op} x{pack}" + (" in registers" if keep != "0" else "")
    return f"cuda minibatch_stddev {kernel} {dtype.lstrip('0123456789_')}{form}"


@pytest.mark.parametrize("op", OPERATORS)
def test_extension_fills_the_cuda_slot(op):
    assert (op, "CUDA") in cuda_extension().slots


def test_resources():
    usages = {(kernel, arch): usage for (kernel, arch), usage in cuda_usage().items() if describe(kernel)}
    packs = 2 * len(LETTERS) - 1  # doubles are taken one by one
    assert len({kernel for kernel, _ in usages}) == len(OPERATORS) * packs * 2 + len(LETTERS) * 2
    for (kernel, arch), usage in usages.items():
        columns = "columns" in kernel
        assert usage.spills == 0, (describe(kernel), arch)
        assert usage.registers <= (128 if columns else 40), (describe(kernel), arch)
        assert usage.shared <= 2 << 10, (describe(kernel), arch)
        assert usage.occupancy(arch, WARPS) >= (0.25 if columns else 0.75), (describe(kernel), arch)


class Samples(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("sample", ctypes.c_int64), ("place", ctypes.c_int64)]


class Tensors(ctypes.Structure):
    _fields_ = [(name, Samples) for name in ("x", "v", "grad", "values", "gradient")]


class Problem(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("groups", "size", "larger", "slices", "places", "positions", "run", "channel")]
    _fields_ += [("eps", ctypes.c_double), ("strided", ctypes.c_bool), ("unbiased", ctypes.c_bool)]


CUT = """
#include "cuda/minibatch_stddev.h"
using namespace fastgan::minibatch_stddev;
extern "C" {
int64_t bytes(bool of_problem) { return of_problem ? sizeof(Problem) : sizeof(Tensors); }
int64_t cut(const Problem* problem, const Tensors* tensors, int64_t bytes, int64_t* told) {
  const Cut cut(*problem, *tensors, bytes);
  told[0] = cut.pieces, told[1] = cut.shares, told[2] = cut.adds_before(*tensors), told[3] = cut.parts(*problem, *tensors);
  return told[4] = cut.scratch(*problem, *tensors), cut.pack;
}
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    library = plain_cpp(tmp_path_factory.mktemp("cut"), CUT)
    assert (library.bytes(True), library.bytes(False)) == (ctypes.sizeof(Problem), ctypes.sizeof(Tensors))
    return library


@pytest.fixture(scope="module")
def ptx():
    emulator()
    return cuda_ptx("add_shares")


class Run:
    """An operator's launches, as csrc/cuda makes them; ``ptx``: of some kernels another."""

    def __init__(self, library, ptx, op, values, others=(), positions=0):
        self.others, self.launches = [emulator().load(text) for text in others], []
        if Run.loaded is None:
            Run.loaded = emulator().load(ptx)
        *given, groups, strided, slices, unbiased, eps = values
        *before, x = given
        tangent, weights = TEMPLATE[op.removeprefix("minibatch_stddev")]
        v, grad = before[0] if tangent else None, before[-1] if weights else None
        out_values = None if weights and not tangent else like_output(x, groups, strided, slices)
        gradient = like_x(x) if weights else None
        self.outputs = [z for z in (out_values, gradient) if z is not None]
        last, places = memory_format(x) != torch.contiguous_format, x[0, 0].numel()
        width = x.shape[1] // slices
        self.problem = Problem(
            groups, x.shape[0] // groups, x.shape[0] % groups, slices, places, width * places + positions,
            width if last else width * places + positions, 1 if last else places, eps, strided, unbiased,
        )  # fmt: skip
        told, tensors = (ctypes.c_int64 * 5)(), self.tensors(Memory([*given, *self.outputs]), x, v, grad, out_values, gradient)
        self.pack = library.cut(ctypes.byref(self.problem), ctypes.byref(tensors), ctypes.c_int64(x.element_size()), told)
        self.pieces, shares, adds_before, parts, numbers = told
        units, letters = groups * slices, LETTERS[x.dtype]
        reached = torch.empty(numbers - parts, dtype=torch.float64) if adds_before else None
        parts = torch.empty(parts, dtype=torch.float64)
        if adds_before:
            assert numbers == parts.numel() + units * shares
            self("add_shares", f"I{letters}E", units * shares, [grad, reached, bytes(tensors.grad), shares], [reached])
        form = f"I{letters}Li{self.pack}ELi{KEPT if -(-x.shape[0] // groups) <= KEPT else 0}ELb{tangent}ELb{weights}E"
        arguments = [x, v, grad, reached, out_values, gradient, parts, bytes(tensors), self.pieces, shares]
        self("columns", form, units * self.pieces, arguments, [*self.outputs, parts])
        if out_values is not None:
            assert parts.numel() == units * self.pieces
            arguments = [parts, out_values, bytes(tensors.values), self.pieces, shares]
            self("append", f"I{letters}E", units * shares, arguments, [])

    loaded = None

    @staticmethod
    def tensors(memory, *tensors):
        last = memory_format(tensors[0]) != torch.contiguous_format
        return Tensors(
            *(Samples() if z is None else Samples(memory.address(z), z.stride(0), z.shape[1] if last else 1) for z in tensors)
        )

    def __call__(self, kernel, form, blocks, values, outputs):
        loaded, name = next(
            (p, name) for p in (*self.others, self.loaded) for name in p.kernels if re.search(rf"\d{kernel}{form}", name)
        )
        memory = Memory([x for x in values if isinstance(x, torch.Tensor)], outputs)
        at = next(i for i, value in enumerate(values) if isinstance(value, bytes))
        values = [*values[:at], bytes(self.problem), *values[at:]]
        values = [memory.address(x) if isinstance(x, torch.Tensor) else x for x in values]
        self.launches.append(Launch(kernel, memory.launch(loaded, name, blocks, WARPS * 32, values)))


def check(run: Run, op, values):
    truth = references[op](*map_tensors(torch.Tensor.double, values))
    for ours, exact in zip(run.outputs, tensors_of(truth), strict=True):
        assert (ours.double() - exact).abs().max() <= TOLERANCE[ours.dtype] * exact.abs().max()


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


#: shape as in samples.py -> positions of a thread, pieces of a slice's positions, launches of a backward
CASES = {
    **{(n, 6, 4, 2, 1, 1, 0): (4, 1, 1) for n in range(1, 10)},
    (5, 32, 8, 9, 2, 1, 1): (4, 3, 1),
    (7, 4, 9, 2, 1, 1): (1, 1, 1),
    (8, 6, 5, 3, 2, 2, 0): (1, 1, 1),
    (9, 4, 3, 5, 2, 4, 1): (1, 1, 1),
    (3, 300, 1, 1, 0): (1, 2, 1),
    (19, 5, 8, 2, 1, 0): (4, 1, 1),
    (5, 2, 16, 16, 1, 2, 0): (4, 1, 2),
    (13, 3, 9, 9, 1, 1, 1): (1, 1, 2),
}


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_emulated_ptx(op, shape, library, ptx):
    values = inputs(op, shape, torch.float32)
    run = Run(library, ptx, op, values)
    pack, pieces, backward = CASES[shape]
    assert (run.pack, run.pieces) == (pack, pieces)
    launches = backward if "backward" in op else 1
    assert len(run.launches) == launches + (op != "minibatch_stddev_backward")
    check(run, op, values)


@pytest.mark.parametrize("shape", [(5, 4, 2, 2, 2, 1, 0), (11, 4, 3, 2, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_emulated_dtypes(op, dtype, shape, library, ptx):
    values = inputs(op, shape, dtype)
    run = Run(library, ptx, op, values)
    assert run.pack == (1 if dtype == torch.float64 else 4)
    check(run, op, values)


@pytest.mark.parametrize(
    ("shape", "pack"), [((8, 6, 5, 3, 2, 2, 0), 1), ((6, 16, 5, 3, 2, 4, 1), 4), ((10, 16, 5, 3, 1, 1, 0), 1)], ids=str
)
@pytest.mark.parametrize("op", OPERATORS)
def test_emulated_channels_last(op, shape, pack, library, ptx):
    values = map_tensors(channels_last, inputs(op, shape, torch.float32))
    run = Run(library, ptx, op, values)
    assert run.pack == pack
    check(run, op, values)


def test_addresses_that_do_not_allow_packs(library, ptx):
    """Rows further apart than they are long, and a first one that isn't at a multiple of 16 bytes."""
    (x, *form) = inputs("minibatch_stddev", (4, 6, 4, 2, 1, 1, 0), torch.float32)
    for first, apart, pack in ((0, 52, 4), (1, 52, 1), (0, 53, 1)):
        memory = torch.zeros(first + 4 * apart)
        placed = memory.as_strided(x.shape, (apart, *x.stride()[1:]), first).copy_(x)
        run = Run(library, ptx, "minibatch_stddev", (placed, *form))
        assert run.pack == pack
        check(run, "minibatch_stddev", (x, *form))


def test_equal_samples(library, ptx):
    """Without eps: a deviation of 0, whose derivatives count as 0."""
    for op in OPERATORS:
        *before, x, groups, strided, slices, unbiased, _ = inputs(op, (4, 6, 4, 2, 1, 1, 0), torch.float32)
        values = *before, x[:1].repeat(4, 1, 1, 1), groups, strided, slices, unbiased, 0.0
        run = Run(library, ptx, op, values)
        for ours, truth in zip(run.outputs, tensors_of(references[op](*values)), strict=True):
            torch.testing.assert_close(ours, truth, rtol=0, atol=0)


def test_no_atomics(ptx):
    """Sums are in fixed order: the same bits on every run."""
    assert not re.search(r"\b(atom|red)\.", ptx)


#: operator -> tensors that have to move
MOVES = {"": 2, "_backward": 3, "_jvp": 3, "_double_backward": 4}


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("op", OPERATORS)
def test_counted_traffic(op, group, layout, library, ptx, record_property):
    values = map_tensors(layout, inputs(op, (8, 128, 4, 4, 8 // group, 1, 0), torch.float32))
    traffic = Traffic.of(Run(library, ptx, op, values).launches)
    least = MOVES[op.removeprefix("minibatch_stddev")] * values[-6].nbytes
    record_property("traffic", (traffic.distinct / least, traffic.sectors / least))
    assert traffic.distinct <= 1.05 * least
    # In channels_last rows with a channel more end amid sectors, and of what reaches that channel every element has its own.
    assert traffic.sectors <= (1.15 if layout is torch.Tensor.contiguous else 1.25) * least
    assert traffic.conflicts <= 1.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_counted_traffic_of_dtypes(op, dtype, library, ptx):
    values = inputs(op, (8, 128, 4, 4, 2, 1, 0), dtype)
    traffic = Traffic.of(Run(library, ptx, op, values).launches)
    least = MOVES[op.removeprefix("minibatch_stddev")] * values[-6].nbytes
    assert traffic.distinct <= 1.05 * least
    assert traffic.sectors <= 1.15 * least


@pytest.mark.parametrize("op", OPERATORS)
def test_counted_traffic_of_a_large_group(op, library, ptx, record_property):
    """Sectors are asked of the caches once per pass over the group."""
    values = inputs(op, (16, 64, 4, 4, 1, 1, 0), torch.float32)
    traffic, size = Traffic.of(Run(library, ptx, op, values).launches), values[-6].nbytes
    asked = {"": 3, "_backward": 5, "_jvp": 5, "_double_backward": 8}[op.removeprefix("minibatch_stddev")]
    record_property("traffic", (traffic.distinct / size, traffic.sectors / size))
    assert traffic.distinct <= 1.05 * MOVES[op.removeprefix("minibatch_stddev")] * size
    assert traffic.sectors <= 1.15 * asked * size


def test_a_problem_too_large_fails(library, ptx):
    """What bounds checks are for: more positions than there are."""
    values = inputs("minibatch_stddev", (4, 6, 4, 2, 1, 1, 0), torch.float32)
    with pytest.raises(emulator().KernelFault, match="out of bounds"):
        Run(library, ptx, "minibatch_stddev", values, positions=64)


#: operator -> kernel, which of its barriers
BARRIERS = [
    ("minibatch_stddev", "columnsIfLi4ELi8ELb0ELb0E", 1),
    ("minibatch_stddev", "appendIfE", 1),
    ("minibatch_stddev", "appendIfE", 2),
    ("minibatch_stddev_backward", "columnsIfLi4ELi8ELb0ELb1E", -1),
]


@pytest.mark.parametrize(("op", "kernel", "number"), BARRIERS)
def test_without_a_barrier(op, kernel, number, library, ptx):
    values = inputs(op, (5, 32, 8, 8, 1, 1, 0), torch.float32)
    others = [without_barrier(ptx, kernel, number)]
    with pytest.raises(emulator().KernelFault, match="unordered"):
        Run(library, ptx, op, values, others)
