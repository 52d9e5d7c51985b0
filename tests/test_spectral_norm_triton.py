"""The Triton kernels of spectral norm as GPUs get them: launches counted, compiled ahead of time, executed in PTX emulation."""

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
from samples import map_tensors, normal, tensors_of

from fastgan.kernels import spectral_norm as kernels
from fastgan.ops import references

pytestmark = pytest.mark.gpu_check

TARGETS = triton_targets()
NVIDIA = {name: target for name, target in TARGETS.items() if target.backend == "cuda"}
DOUBLES = ("squares", "tile_squares", "inner", "eps", "target")


def usage_of(name: str, target, dtype: torch.dtype = torch.float32, warps: int = 4, **known):
    double = dtype == torch.float64
    work = "fp64" if double else "fp32"
    kernel = getattr(kernels, name)
    types = {arg: f"*{'fp64' if arg.removeprefix('out_') in DOUBLES else work}" for arg in kernel.arg_names}
    types |= {"eps": "fp64", "target": "fp64"} | dict.fromkeys(("layers", "addresses", "tiles"), "*i64")
    constants = {"DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "ACC": tl.float64 if double else tl.float32}
    constants |= dict.fromkeys(("FIRST", "ITERATE", "ITERATED", "AT_MOST", "WEIGHTS"), True) | {
        "INDEX": tl.int32,
        "PLAIN": True,
    }
    constants |= {"TOTAL": kernels._REDUCED, "STREAMED": kernels._STREAMED, "V_FIRST": False, "PIECES": 8}
    constants |= {"BLOCK": kernels._REDUCED if name == "reduce_kernel" else kernels._BLOCK}
    constants |= {"ROWS": kernels._ROWS, "COLUMNS": kernels._COLUMNS, "LONG_OWN": kernels._LONG_OWN}
    arguments = {arg: value for arg, value in (types | constants | known).items() if arg in kernel.arg_names}
    with tempfile.TemporaryDirectory() as folder:
        return triton_usage(compile_triton(kernel, arguments, target, warps), Path(folder))


def products_usage(wide: list[int], v_first: bool, plain: bool, target, dtype=torch.float32):
    tiles = sorted({kernels.tile_shape(n, v_first, plain, dtype == torch.float64) for n in wide})
    short = [tile for tile in tiles if tile[0]]
    columns = [tl.constexpr(tuple(tile[i] for tile in short)) for i in range(3)]
    widths = dict(zip(("FULLS", "STEPS", "OWNS"), columns, strict=True))
    warps = kernels.warps(tiles) if target.backend == "cuda" else 16
    long = kernels._LONG if len(short) < len(tiles) else 0
    return usage_of("products_kernel", target, dtype, warps, **widths, LONG=long, V_FIRST=v_first, PLAIN=plain), warps


def resource_rows():
    for arch, target in TARGETS.items():
        for v_first in (False, True):
            usage, warps = products_usage([64, 576, 1152, 4608], v_first, True, target)
            occupancy = usage.occupancy(int(target.arch), warps) if arch in NVIDIA else None
            yield f"triton spectral_norm products_kernel {'v' if v_first else 'u'} first", arch, usage, occupancy
        for name in ("reduce_kernel", "finish_kernel", "inner_kernel", "combine_kernel"):
            usage = usage_of(name, target)
            yield f"triton spectral_norm {name}", arch, usage, usage.occupancy(int(target.arch), 4) if arch in NVIDIA else None


# Where plain and transposed rows differ in what they leave of the registers, the largest tiles decide.
TILES = [(False, True, [1000]), (False, True, [10000]), (False, False, [5000]), (True, False, [2000]), (True, False, [40000])]


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("v_first", [False, True], ids=["u first", "v first"])
def test_tiles_do_not_spill(v_first, arch):
    for first, plain, wide in TILES:
        if first != v_first:
            continue
        usage, warps = products_usage(wide, v_first, plain, TARGETS[arch])
        assert usage.spills == 0, wide
        assert usage.registers * warps * 32 <= 65536, wide
        assert usage.shared <= 16 << 10, wide


@pytest.mark.parametrize(("v_first", "dtype"), [(False, torch.bfloat16), (True, torch.float64)])
def test_all_sizes_in_one_launch_do_not_spill(v_first, dtype):
    usage, _ = products_usage([100, 1000, 40000], v_first, False, NVIDIA["sm_90"], dtype)
    assert usage.spills == 0


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("name", ["reduce_kernel", "finish_kernel", "inner_kernel", "combine_kernel"])
def test_streams_do_not_spill(name, arch):
    usage = usage_of(name, TARGETS[arch])
    assert usage.spills == 0
    assert usage.registers <= 160
    assert usage.shared <= 1024


def layers(shapes, dtype=torch.float32, seed=0):
    """Weights, u, v and dims for shapes and the dimension that is rows."""
    generator = torch.Generator().manual_seed(seed)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weights, u, v, dims = [], [], [], []
    for *shape, dim in shapes:
        weights.append(normal(*shape, dtype=dtype, generator=generator, scale=0.3))
        rows = shape[dim]
        for vectors, n in ((u, rows), (v, weights[-1].numel() // rows)):
            x = normal(n, dtype=work, generator=generator)
            vectors.append(x / x.norm())
        dims.append(dim)
    return weights, u, v, dims


class Recorded:
    """Stands in for a kernel: launches are written down, and nothing runs."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *_, **__: self.launches.append(self.name)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("count", [1, 40])
def test_launches_do_not_grow_with_layers(count, iterations, monkeypatch):
    launches = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Recorded(name, launches))
    weights, u, v, dims = layers([(8 + i, 3, 3, 3, 0) for i in range(count)])
    _, _, _, sigma = kernels.spectral_norm_multi(weights, u, v, dims, iterations, 1e-12, False, 1.0, False)
    assert launches == ["products_kernel", "reduce_kernel", "finish_kernel"] * iterations
    launches.clear()
    kernels.spectral_norm_multi_backward(weights, weights, u, v, sigma, dims, 1.0, False)
    assert launches == ["inner_kernel", "combine_kernel"]


#: shapes with the dimension that is rows; none a multiple of a tile but for the first
FAMILIES = {
    "plain": [(32, 32, 3, 3, 0), (19, 3, 3, 3, 0), (1, 1100, 0), (70, 33, 0), (5, 1, 0)],
    "transposed": [(12, 19, 4, 4, 1), (33, 65, 0), (7, 6, 5, 2)],
    "long": [(3, 8200, 0), (2100, 3, 0)],
}
CASES = [(family, v_first, torch.float32) for family in FAMILIES for v_first in (False, True)]
CASES += [("plain", False, torch.bfloat16), ("transposed", True, torch.float64)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def compare(op, values, results):
    truth = references[op](*map_tensors(torch.Tensor.double, values))
    for ours, exact in zip(tensors_of(results), tensors_of(truth), strict=True):
        error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
        assert error < TOLERANCE[values[0][0].dtype]


@pytest.mark.parametrize(("family", "v_first", "dtype"), CASES)
def test_emulated_forward(family, v_first, dtype, monkeypatch, poisoned):
    launches = emulate(monkeypatch, kernels)
    values = *layers(FAMILIES[family], dtype), 2 if family == "plain" else 1, 1e-12, v_first, 1.5, False
    compare("spectral_norm_multi", values, kernels.spectral_norm_multi(*values))
    assert len(launches) == 3 * values[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_emulated_backward(dtype, monkeypatch, poisoned):
    launches = emulate(monkeypatch, kernels)
    weights, u, v, dims = layers(FAMILIES["plain"] + FAMILIES["transposed"], dtype)
    grads = layers(FAMILIES["plain"] + FAMILIES["transposed"], dtype, seed=1)[0]
    sigma = torch.linspace(0.5, 3, len(weights), dtype=u[0].dtype)
    values = grads, weights, u, v, sigma, dims, 1.5, True
    compare("spectral_norm_multi_backward", values, kernels.spectral_norm_multi_backward(*values))
    assert len(launches) == 2


def test_small_launches_are_spread_over_the_gpu():
    """DCGAN-128's discriminator: its largest weight, read by 32 programs, kept 100 multiprocessors waiting."""
    own = [64, 128, 256, 512, 1024, 1]
    tiles = [kernels.tile_shape(n, False, True, False) for n in (48, 1024, 2048, 4096, 8192, 16384)]
    assert tiles[4][2] == 32
    spread = kernels.spread(tiles, own)
    assert spread[4][2] == 8 and all(a[:2] == b[:2] and b[2] >= min(a[2], 8) for a, b in zip(tiles, spread, strict=True))
    assert kernels.spread(tiles, [64 * n for n in own]) == [kernels.tile_shape(t[0], False, True, False) for t in tiles]


@pytest.mark.parametrize("spread", [False, True], ids=["full", "spread"])
@pytest.mark.parametrize("v_first", [False, True], ids=["u first", "v first"])
def test_counted_traffic(v_first, spread, monkeypatch, record_property):
    monkeypatch.setattr(kernels, "_BUSY", kernels._BUSY if spread else 0)  # 0: as in a launch that fills the GPU
    monkeypatch.setattr(kernels, "forward_plan", kernels.forward_plan.__wrapped__)
    launches = emulate(monkeypatch, kernels)
    shapes = [(64, 64, 3, 3, 0), (128, 128, 3, 3, 0)]
    weights, u, v, dims = layers(shapes)
    _, _, _, sigma = kernels.spectral_norm_multi(weights, u, v, dims, 1, 1e-12, v_first, 1.0, False)
    forward = Traffic.of(launches)
    launches.clear()
    kernels.spectral_norm_multi_backward(layers(shapes, seed=1)[0], weights, u, v, sigma, dims, 1.0, False)
    backward = Traffic.of(launches)
    of_weights, of_vectors = (sum(4 * x.numel() for x in xs) for xs in (weights, u + v))
    # forward: W for the iteration, W and the result; both vectors before and after. backward: G and W, G and the result.
    # Pieces of what is spread are written and read once more, which L2 serves.
    for traffic, least, most in (
        (forward, 3 * of_weights + 2 * of_vectors, (1.1, 1.25) if spread else (1.05, 1.15)),
        (backward, 4 * of_weights + of_vectors, (1.05, 1.15)),
    ):
        record_property("traffic", (traffic.distinct / least, traffic.sectors / least))
        assert traffic.distinct <= most[0] * least
        assert traffic.sectors <= most[1] * least
        assert traffic.conflicts <= 1.05


@pytest.mark.parametrize(("old", "new"), [("(r < rows)[:, None]", "(r <= rows)[:, None]"), ("rows * run", "rows")])
def test_a_kernel_that_goes_astray_fails(old, new, monkeypatch, poisoned):
    broken(monkeypatch, kernels, "_at", old, new)
    emulate(monkeypatch, kernels)
    values = *layers([(6, 70, 3, 1)]), 1, 1e-12, False, 1.5, False
    with pytest.raises((emulator().KernelFault, AssertionError)):
        compare("spectral_norm_multi", values, kernels.spectral_norm_multi(*values))
