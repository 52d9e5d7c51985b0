"""The CUDA C++ kernels of spectral norm: slots, checks of arguments, resources, and PTX in emulation.

Launches are made with the tables that csrc/cuda/spectral_norm.h makes for a GPU: it is plain C++, compiled here.
"""

import ctypes
import math
import re
from types import SimpleNamespace

import pytest
import torch
from gpu_tools import Launch, Memory, Traffic, cuda_extension, cuda_ptx, cuda_usage, emulator, plain_cpp, without_barrier
from samples import map_tensors, normal, tensors_of

import fastgan
from fastgan.ops import references

pytestmark = pytest.mark.gpu_check

OPERATORS = [op for op in references if op.startswith("spectral_norm")]
KERNELS = ("products", "reduce", "finish", "inner", "combine")
WARPS = 8
LIMIT = 99 << 10  # bytes of shared memory that a block can have on every architecture from sm_80 on
LETTERS = {torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16", torch.float32: "f", torch.float64: "d"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def describe(mangled: str) -> str | None:
    found = re.search(rf"spectral_norm.*\d({'|'.join(KERNELS)})I(\w+?)EEv", mangled)
    return found and f"cuda spectral_norm {found[1]} {found[2].lstrip('0123456789_')}"


@pytest.mark.parametrize("op", OPERATORS)
def test_extension_fills_the_cuda_slot(op):
    assert (op, "CUDA") in cuda_extension().slots


def test_resources():
    usages = {(kernel, arch): usage for (kernel, arch), usage in cuda_usage().items() if describe(kernel)}
    assert len({kernel for kernel, _ in usages}) == 4 * len(LETTERS) + 2
    for (kernel, arch), usage in usages.items():
        assert usage.spills == 0, (describe(kernel), arch)
        assert usage.registers <= (120 if "products" in kernel else 56), (describe(kernel), arch)
        assert usage.shared <= 4 << 10, (describe(kernel), arch)  # beside what launches ask for
        assert usage.occupancy(arch, WARPS) >= (0.25 if "products" in kernel else 0.5), (describe(kernel), arch)


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("weight", "grad", "u", "v", "out", "new_u", "new_v", "sigma", "scratch")]
    _fields_ += [(name, ctypes.c_int32) for name in ("rows", "columns", "run", "inner", "own", "chunk", "tiles")]
    _fields_ += [("first", ctypes.c_uint32 * 3)]


class Layers(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("layer", Layer * 128)]


TABLES = """
#include "cuda/spectral_norm.h"
using namespace fastgan::spectral_norm;
extern "C" {
int64_t bytes() { return sizeof(Layers); }
int64_t tiles(Layer* layer, bool v_first, int64_t size, int64_t limit) { return choose_tiles(*layer, v_first, size, limit); }
void spread_out(Layers* layers, bool v_first) {
  std::vector<Layer> all(layers->layer, layers->layer + layers->count);
  spread(all, v_first);
  std::copy(all.begin(), all.end(), layers->layer);
}
int64_t scratch(Layer* layer, bool v_first, bool in_double) {
  return in_double ? Scratch<double>::bytes(*layer, v_first) : Scratch<float>::bytes(*layer, v_first);
}
int64_t blocks(Layer* layer, int kernel, bool v_first, bool write, int64_t size) {
  const int64_t of[] = {layer->product_blocks(v_first), layer->reduce_blocks(v_first), layer->finish_blocks(write),
                        layer->inner_blocks(), layer->rectangles(int(size))};
  return of[kernel];
}
}
"""


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    loaded = plain_cpp(tmp_path_factory.mktemp("tables"), TABLES)
    assert loaded.bytes() == ctypes.sizeof(Layers)
    return loaded


def matrix(weight: torch.Tensor, dim: int) -> dict[str, int]:
    """Of a weight that is contiguous, or channels_last with its first dimension as rows."""
    dim %= weight.dim()
    rows = weight.shape[dim]
    columns, run = math.prod(weight.shape[:dim] + weight.shape[dim + 1 :]), max(1, weight.shape[dim + 1 :].numel())
    if weight.is_contiguous():
        return {"rows": rows, "columns": columns, "run": run, "inner": columns}
    assert dim == 0
    assert weight.is_contiguous(memory_format=torch.channels_last)
    return {"rows": rows, "columns": columns, "run": run, "inner": weight.shape[1]}


class Kernels:
    """Launches as launch_forward and launch_backward in csrc/cuda/spectral_norm.cu make them. ``spread``: tiles are, as in a
    launch that doesn't fill the GPU; without it, blocks are as in one that does."""

    def __init__(self, tables, loaded, limit: int = LIMIT, spread: bool = True):
        self.tables, self.loaded, self.launches, self.limit, self.spread = tables, loaded, [], limit, spread

    def layers(self, columns: dict[str, list], dims, scratch: list[torch.Tensor], memory: Memory, v_first: bool, size: int):
        layers, shared = Layers(count=len(dims)), 0
        for i, dim in enumerate(dims):
            layer = layers.layer[i]
            for name, value in matrix(columns["weight"][i], dim).items():
                setattr(layer, name, value)
            for name, tensors in columns.items():
                setattr(layer, name, memory.address(tensors[i]))
            shared = max(shared, self.tables.tiles(ctypes.byref(layer), v_first, size, self.limit))
            if scratch:
                layer.scratch = memory.address(scratch[i])
        if self.spread:
            self.tables.spread_out(ctypes.byref(layers), v_first)
        return layers, shared

    def launch(self, kernel: int, dtype, tensors, outputs, layers, shared: int, *arguments, v_first=False, write=False):
        size, blocks = dtype.itemsize, 0
        for i in range(layers.count):
            layers.layer[i].first[kernel % 3] = blocks
            blocks += self.tables.blocks(ctypes.byref(layers.layer[i]), kernel, v_first, write, size)
        if kernel == 1 and dtype != torch.float64:
            dtype = torch.float32
        mangled = f"{KERNELS[kernel]}I{LETTERS[dtype]}E"
        (name,) = (name for name in self.loaded.kernels if mangled in name)
        if blocks:
            memory = Memory(tensors, outputs)
            stats = memory.launch(self.loaded, name, blocks, WARPS * 32, [bytes(layers), *arguments], shared)
            self.launches.append(Launch(KERNELS[kernel], stats))

    def forward(self, weights, u, v, dims, iterations, eps, v_first, target, at_most, write=True):
        dtype, size = weights[0].dtype, weights[0].element_size()
        new_u, new_v, outs = ([torch.empty_like(x) for x in xs] for xs in (u, v, weights))
        sigma = u[0].new_empty(len(weights))
        columns = {"weight": weights, "u": u, "v": v, "out": outs, "new_u": new_u, "new_v": new_v, "sigma": list(sigma)}
        tensors = [x for xs in columns.values() for x in xs]
        layers, _ = self.layers(columns, dims, [], Memory(tensors), v_first, size)  # of these, only how much scratch they take
        scratch = [
            torch.full((self.tables.scratch(ctypes.byref(layers.layer[i]), v_first, size == 8) // 8,), torch.nan).double()
            for i in range(len(weights))
        ]
        tensors += scratch
        layers, shared = self.layers(columns, dims, scratch, Memory(tensors), v_first, size)
        for iteration in range(max(1, iterations)):
            first, last, iterate = iteration == 0, iteration >= iterations - 1, iterations > 0
            self.launch(0, dtype, tensors, [], layers, shared, v_first, first, iterate, v_first=v_first)
            if iterate:
                self.launch(1, dtype, tensors, [], layers, 0, v_first, eps, v_first=v_first)
            writes = last and write
            outputs = [*outs, sigma, *(new_u + new_v if first else [])]
            options = v_first, first, iterate, writes, eps, target, at_most
            self.launch(2, dtype, tensors, outputs, layers, 0, *options, v_first=v_first, write=writes)
        return outs if write else None, new_u, new_v, sigma

    def backward(self, grads, weights, u, v, sigma, dims, target, at_most):
        dtype, outs = weights[0].dtype, [torch.empty_like(x) for x in weights]
        columns = {"weight": weights, "grad": grads, "u": u, "v": v, "out": outs, "sigma": list(sigma)}
        scratch = [torch.full((256,), torch.nan).double() for _ in weights]
        tensors = [x for xs in columns.values() for x in xs] + scratch
        layers, _ = self.layers(columns, dims, scratch, Memory(tensors), False, dtype.itemsize)
        self.launch(3, dtype, tensors, scratch, layers, 0)
        self.launch(4, dtype, tensors, outs, layers, 0, target, at_most)
        return outs


@pytest.fixture(scope="session")
def program():
    return emulator().load(cuda_ptx("products"))


@pytest.fixture
def kernels(tables, program):
    return Kernels(tables, program)


def samples(shapes, dtype=torch.float32, seed=0):
    """Weights, u, v and dims for shapes and the dimension that is rows; that given as "last", channels_last and rows first."""
    generator = torch.Generator().manual_seed(seed)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weights, u, v, dims = [], [], [], []
    for *shape, dim in shapes:
        weight = normal(*shape, dtype=dtype, generator=generator, scale=0.3)
        if dim == "last":
            weight, dim = weight.contiguous(memory_format=torch.channels_last), 0
        weights.append(weight)
        for vectors, n in ((u, shape[dim]), (v, math.prod(shape[:dim] + shape[dim + 1 :]))):
            x = normal(n, dtype=work, generator=generator)
            vectors.append(x / x.norm().clamp_min(1e-12))
        dims.append(dim)
    return weights, u, v, dims


#: none a multiple of a tile, but for the first
FAMILIES = {
    "plain": [(32, 32, 3, 3, 0), (19, 3, 3, 3, 0), (1, 1100, 0), (70, 33, 0), (5, 1, 0), (9, 3000, 0)],
    "transposed": [(12, 19, 4, 4, 1), (33, 65, 0), (7, 6, 5, 2), (150, 2, 3, 3, 1)],
    "channels_last": [(12, 20, 3, 3, "last"), (9, 5, 2, 3, "last")],
    "long": [(3, 9000, 0), (1700, 9, 0)],
    "empty": [(4, 0, 0), (0, 3, 0), (4, 8, 0)],
}
CASES = [(family, v_first, torch.float32) for family in FAMILIES for v_first in (False, True)]
CASES += [("plain", False, torch.float16), ("transposed", True, torch.float64), ("plain", True, torch.bfloat16)]
CASES += [("transposed", False, torch.float16), ("channels_last", True, torch.bfloat16), ("plain", False, torch.float64)]


def compare(op, values, results):
    truth = references[op](*map_tensors(torch.Tensor.double, values))
    for ours, exact in zip(tensors_of(results), tensors_of(truth), strict=True):
        if exact.numel():
            error = ((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
            assert error < TOLERANCE[values[0][0].dtype]


@pytest.mark.parametrize(("family", "v_first", "dtype"), CASES)
def test_emulated_forward(family, v_first, dtype, kernels):
    if family == "long":  # so that these count as long
        kernels.limit = 48 << 10
    values = *samples(FAMILIES[family], dtype), 2 if family == "plain" else 1, 1e-12, v_first, 1.5, False
    compare("spectral_norm_multi", values, kernels.forward(*values))
    assert len(kernels.launches) == 3 * values[4]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", LETTERS, ids=str)
def test_emulated_backward(family, dtype, kernels):
    weights, u, v, dims = samples(FAMILIES[family], dtype)
    grads = samples(FAMILIES[family], dtype, seed=1)[0]
    sigma = torch.linspace(0.5, 3, len(weights), dtype=u[0].dtype)
    values = grads, weights, u, v, sigma, dims, 1.5, True
    compare("spectral_norm_multi_backward", values, kernels.backward(*values))
    assert len(kernels.launches) == 2


def test_small_launches_are_spread_over_the_gpu(tables):
    """DCGAN-128's discriminator: its largest weight, read by 32 blocks, kept 100 multiprocessors waiting."""
    shapes = [(64, 48), (128, 1024), (256, 2048), (512, 4096), (1024, 8192), (1, 16384)]
    weights, memory = [torch.empty(shape) for shape in shapes], SimpleNamespace(address=torch.Tensor.data_ptr)
    for spread in (False, True):
        made, _ = Kernels(tables, None, spread=spread).layers({"weight": weights}, [0] * 6, [], memory, False, 4)
        blocks = [tables.blocks(ctypes.byref(made.layer[i]), 0, False, True, 4) for i in range(6)]
        assert (sum(blocks) >= 264, blocks[4] >= 128) == (spread, spread)


@pytest.mark.parametrize("spread", [False, True], ids=["full", "spread"])
@pytest.mark.parametrize("v_first", [False, True], ids=["u first", "v first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counted_traffic(dtype, v_first, spread, kernels, record_property):
    kernels.spread = spread
    shapes = [(64, 64, 3, 3, 0), (128, 128, 3, 3, 0)]
    weights, u, v, dims = samples(shapes, dtype)
    _, _, _, sigma = kernels.forward(weights, u, v, dims, 1, 1e-12, v_first, 1.0, False)
    forward = list(kernels.launches)
    kernels.launches.clear()
    kernels.backward(samples(shapes, dtype, seed=1)[0], weights, u, v, sigma, dims, 1.0, False)
    of_weights, of_vectors = (sum(x.nbytes for x in xs) for xs in (weights, u + v))
    # forward: W for the iteration, W and the result; both vectors before and after. backward: G and W, G and the result.
    # Pieces of what is spread are written and read once more, which L2 serves.
    for launches, least, most in (
        (forward, 3 * of_weights + 2 * of_vectors, (1.2, 1.3) if spread else (1.05, 1.15)),
        (kernels.launches, 4 * of_weights + of_vectors, (1.05, 1.15)),
    ):
        traffic = Traffic.of(launches)
        record_property("traffic", (traffic.distinct / least, traffic.sectors / least))
        assert traffic.distinct <= most[0] * least
        assert traffic.sectors <= most[1] * least
        assert traffic.conflicts <= 1.05


# Instructions of PTX per element of the weight; of `products`, the most of which are no arithmetic, and of the others together.
@pytest.mark.parametrize(("v_first", "most"), [(False, 28), (True, 31)], ids=["u first", "v first"])
def test_counted_instructions(v_first, most, kernels, record_property):
    kernels.spread = False
    weights, u, v, dims = samples([(256, 576, 0)])
    kernels.forward(weights, u, v, dims, 1, 1e-12, v_first, 1.0, False)
    products, *others = (sum(launch.stats.warp_instr.values()) * 32 / weights[0].numel() for launch in kernels.launches)
    record_property("instructions", (products, others))
    assert products <= most
    assert sum(others) <= 18


def test_the_longest_rows_are_read_once_where_memory_allows(tables):
    """13824 columns, of BigGAN-128's discriminator, on A100 and later; on smaller GPUs and beyond in two passes."""
    layer = Layer(rows=1536, columns=13824, run=13824, inner=13824)
    for limit, chunk in ((163 << 10, 13824), (99 << 10, 640)):
        shared = tables.tiles(ctypes.byref(layer), False, 4, limit - 128)
        assert layer.chunk == chunk
        assert shared <= limit - 128


@pytest.mark.parametrize("v_first", [False, True], ids=["u first", "v first"])
def test_what_cannot_be_iterated_stays(v_first, kernels):
    """Zeros, NaN and infinity leave u and v as they were, layer by layer; so do no iterations."""
    shapes = [(6, 40, 0)] * 4
    weights, u, v, dims = samples(shapes)
    weights[0].zero_(), weights[1][2].fill_(torch.nan), weights[2][3].fill_(torch.inf)
    values = weights, u, v, dims, 1, 1e-12, v_first, 1.5, False
    outs, new_u, new_v, sigma = kernels.forward(*values)
    for i in range(3):
        assert torch.equal(new_u[i], u[i])
        assert torch.equal(new_v[i], v[i])
    assert not outs[0].any()
    assert not sigma[1:3].isfinite().any()
    compare(
        "spectral_norm_multi", ([weights[3]], [u[3]], [v[3]], [0], *values[4:]), ([outs[3]], [new_u[3]], [new_v[3]], sigma[3:])
    )
    values = weights[3:], u[3:], v[3:], [0], 0, 1e-12, v_first, 1.5, True
    compare("spectral_norm_multi", values, kernels.forward(*values))


def test_nothing_overflows(kernels):
    weights, u, v, dims = samples([(70, 33, 0)])
    weights[0].mul_(1e30)
    values = weights, u, v, dims, 1, 1e-12, False, 1.0, False
    compare("spectral_norm_multi", values, kernels.forward(*values))


def test_sigma_alone_writes_no_weight(kernels):
    weights, u, v, dims = samples(FAMILIES["channels_last"])
    nothing, *results = kernels.forward(weights, u, v, dims, 1, 1e-12, True, 1.0, False, write=False)
    assert nothing is None
    each = zip(weights, u, v, strict=True)
    truth = [references["spectral_norm_sigma"](*map(torch.Tensor.double, one), 0, 1, 1e-12, True) for one in each]
    for ours, exact in zip(zip(*results[:2], results[2], strict=True), truth, strict=True):
        for x, y in zip(ours, exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


# Of `products`, in the order of PTX: between a tile's arrival and its use, and between its products and their use.
@pytest.mark.parametrize("number", [1, 4])
def test_without_a_barrier_it_fails(number, tables, program):
    broken = emulator().load(without_barrier(cuda_ptx("products"), "8productsIf", number))

    class Program:
        kernels = program.kernels

        def launch(self, name, *arguments, **options):
            return (broken if "productsIf" in name else program).launch(name, *arguments, **options)

    with pytest.raises(emulator().KernelFault, match="unordered accesses"):
        Kernels(tables, Program()).forward(*samples([(40, 700, 0)]), 1, 1e-12, False, 1.5, False)


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_a_layer_larger_than_its_weight_fails(name, kernels, monkeypatch):
    told = matrix(torch.empty(6, 40), 0)
    told[name] += 1
    monkeypatch.setitem(globals(), "matrix", lambda weight, dim: told)
    with pytest.raises(emulator().KernelFault, match="out of bounds"):
        kernels.forward(*samples([(6, 40, 0)]), 1, 1e-12, False, 1.5, False)


def in_the_cuda_slot(op: str, *arguments):
    """Calls what the extension registered for CUDA: on CPU tensors checks of arguments can fail, but nothing can run."""
    cuda_extension()
    with fastgan.use_backend("cuda"):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return getattr(torch.ops.fastgan, op).default.redispatch(keys, *arguments)


OPTIONS = 1, 1e-12, False, 1.0, False
BAD = [
    (lambda w, u, v: (w, v, v, 0, *OPTIONS), r"u has shape \(6\), expected \(4,\) for a weight of shape \(4, 6\)"),
    (lambda w, u, v: (w, u, v.double(), 0, *OPTIONS), "v is Double, expected a tensor of Float"),
    (lambda w, u, v: (w, u, v, 2, *OPTIONS), r"dim is 2, out of range for a weight of shape \(4, 6\)"),
    (lambda w, u, v: (w.int(), u, v, 0, *OPTIONS), "weight is Int, expected a floating-point tensor"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_errors(wrong, message):
    weight, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    with pytest.raises(RuntimeError, match=message):
        in_the_cuda_slot("spectral_norm", *wrong(weight, u, v))


def test_errors_of_lists_and_gradients():
    weight, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    with pytest.raises(RuntimeError, match="there are 1 weights, and lists of other lengths"):
        in_the_cuda_slot("spectral_norm_multi", [weight], [u], [v, v], [0], *OPTIONS)
    with pytest.raises(RuntimeError, match="weights is empty"):
        in_the_cuda_slot("spectral_norm_multi", [], [], [], [], *OPTIONS)
    with pytest.raises(RuntimeError, match=r"grad has shape \(4, 5\), expected one like weight, \(4, 6\)"):
        in_the_cuda_slot("spectral_norm_backward", weight[:, :5], weight, u, v, torch.tensor(1.0), 0, 1.0, False)
    with pytest.raises(RuntimeError, match="sigma has to be of u's dtype"):
        in_the_cuda_slot("spectral_norm_backward", weight, weight, u, v, torch.ones(2), 0, 1.0, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    weight, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    with pytest.raises(RuntimeError, match=r"(?i)cuda|accelerator"):
        in_the_cuda_slot("spectral_norm", weight, u, v, 0, *OPTIONS)
