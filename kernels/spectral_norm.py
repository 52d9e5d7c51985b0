"""Spectral norm in Triton: fastgan/ops/spectral_norm.py has the mathematics.

All weights of a call share their launches: three for a power iteration with the normalised weights, two for a backward, however
many layers there are. A program looks up in a table which piece of which layer is its own; the tables follow from the
shapes alone and stay on the device, as do those of addresses, which repeat from step to step.

One iteration meets W once. With its rows as *own* dimension and its columns as *full* (u first; v first the other way round) a
program holds a tile of some own and all full indices in registers, takes the products y of the own ones with the vector at
hand, and adds y times the tile to a piece of the other vector::

    products   y = W_own full,  piece = sum over own of (y / scale) W_own, scale a power of two about max |y|: nothing overflows
    reduce     x = sum over pieces of scale / |y| piece, what the iteration yields before it is normalised; sums of its squares
    finish     the own vector y / |y|, the full one x / |x|, sigma = |x|; out = s W

Sums over programs are of numbers in memory, in order and in double: no atomics, the same bits on every run.
"""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._dtypes import accumulate_dtype

_WIDTHS = (128, 512, 1024, 2048, 8192, 16384)  # sizes of the full dimension that a tile is compiled for
_TILE = 8192  # elements of a tile, half of it in double; twice of it for the longest rows
_OWN_ROWS, _OWN_COLUMNS = 32, 128  # own indices of a program, at least: a piece costs 2 / own of the tile's traffic
_BUSY, _FEWEST = 264, 8  # programs that keep a large GPU busy: where there are fewer, so few own indices will do
_LONG, _LONG_OWN = 512, 16  # full and own indices at a time where registers don't hold all: such weights are read twice
_REDUCED = 128  # full indices of a program that adds pieces up
_STREAMED, _BLOCK = 4096, 1024  # elements of a program that goes through memory, and at a time
_ROWS, _COLUMNS = 32, 128  # of a program that needs to know them

_FIELDS = tl.constexpr(9)  # numbers per layer: rows, columns, run, and where its blocks, pieces, vectors and tiles are
_ADDRESSES = tl.constexpr(6)  # per layer: weight, u, v, result, new u, new v


@triton.jit
def _pointer(addresses, layer, which, DTYPE: tl.constexpr):
    return tl.load(addresses + layer * _ADDRESSES + which).to(tl.pointer_type(DTYPE))


@triton.jit
def _size(of_layer, INDEX: tl.constexpr):
    """rows, columns and run, in the integers that place an element."""
    return tl.load(of_layer).to(INDEX), tl.load(of_layer + 1).to(INDEX), tl.load(of_layer + 2).to(INDEX)


@triton.jit
def _product(a, b):
    """a b, rounded: fused with the first addition of a reduction, lanes that ought to agree would differ by the last bit."""
    return a * b + 0.0


@triton.jit
def _total(values, first, count, BLOCK: tl.constexpr):
    """The sum of ``count`` doubles, in an order that count alone decides."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + first + at, mask=at < count, other=0)
    return tl.sum(total, 0)


@triton.jit
def _dot(a, b, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        left = tl.load(a + at, mask=at < count, other=0).to(tl.float64)
        total += left * tl.load(b + at, mask=at < count, other=0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _binade(x, ACC: tl.constexpr):
    """The power of two at or below x > 0: dividing by it is exact. 1 for 0 and what is too small to be divided by."""
    if tl.float64 == ACC:
        power = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    else:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0, power, 1.0)


@triton.jit
def _at(weight, rows, columns, run, r, c, PLAIN: tl.constexpr):
    """Addresses and mask of a tile; a row's elements lie ``run`` at a time, rows * run apart, or PLAIN: side by side."""
    if PLAIN:
        place = weight + (r * columns)[:, None] + c[None, :]
    else:
        place = weight + (r * run)[:, None] + (c // run * (rows * run) + c % run)[None, :]
    return place, (r < rows)[:, None] & (c < columns)[None, :]


@triton.jit
def _own_and_full(weight, rows, columns, run, own, full, V_FIRST: tl.constexpr, PLAIN: tl.constexpr):
    if V_FIRST:
        place, inside = _at(weight, rows, columns, run, full, own, PLAIN)
    else:
        place, inside = _at(weight, rows, columns, run, own, full, PLAIN)
    return place, inside


@triton.jit
def _products_in_registers(
    weight, vector, y_out, part, scales, squares, rows, columns, run, first, block,
    V_FIRST: tl.constexpr, PLAIN: tl.constexpr, ITERATE: tl.constexpr, ACC: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    OWN_AXIS: tl.constexpr = 1 if V_FIRST else 0
    FULL_AXIS: tl.constexpr = 0 if V_FIRST else 1
    owned, wide = (columns, rows) if V_FIRST else (rows, columns)
    full = tl.arange(0, FULL)
    KEPT: tl.constexpr = STEP >= 4  # else no registers are left to keep the vector in, and it comes from L1 again
    kept = tl.load(vector + full, mask=full < wide, other=0) if KEPT else 0
    square = tl.full([], 0, tl.float64)
    scale = tl.full([], 0, ACC)
    total = tl.zeros([FULL, STEP] if V_FIRST else [STEP, FULL], ACC)
    for step in range(0, OWN, STEP):
        own = first + step + tl.arange(0, STEP)
        where, inside = _own_and_full(weight, rows, columns, run, own, full, V_FIRST, PLAIN)
        w = tl.load(where, mask=inside, other=0).to(ACC)
        others = kept if KEPT else tl.load(vector + full, mask=full < wide, other=0)
        y = tl.sum(_product(w, tl.expand_dims(others, OWN_AXIS)), FULL_AXIS)
        tl.store(y_out + own, y, mask=own < owned)
        if ITERATE:
            square += tl.sum(_product(y.to(tl.float64), y.to(tl.float64)), 0)
            larger = tl.maximum(scale, tl.max(tl.abs(y), 0))
            old, new = _binade(scale, ACC), _binade(larger, ACC)
            total = total * tl.where(scale > 0, old / new, 1.0) + w * tl.expand_dims(y / new, FULL_AXIS)
            scale = larger
    if ITERATE:
        tl.store(squares + block, square)
        tl.store(scales + block, _binade(scale, ACC))
        tl.store(part + full, tl.sum(total, OWN_AXIS), mask=full < wide)


@triton.jit
def _products_in_two_passes(
    weight, vector, y_out, part, scales, squares, rows, columns, run, first, block,
    V_FIRST: tl.constexpr, PLAIN: tl.constexpr, ITERATE: tl.constexpr, ACC: tl.constexpr,
    OWN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    OWN_AXIS: tl.constexpr = 1 if V_FIRST else 0
    FULL_AXIS: tl.constexpr = 0 if V_FIRST else 1
    owned, wide = (columns, rows) if V_FIRST else (rows, columns)
    own = first + tl.arange(0, OWN)
    total = tl.zeros([FULL, OWN] if V_FIRST else [OWN, FULL], ACC)
    for start in range(0, wide, FULL):
        full = start + tl.arange(0, FULL)
        where, inside = _own_and_full(weight, rows, columns, run, own, full, V_FIRST, PLAIN)
        others = tl.expand_dims(tl.load(vector + full, mask=full < wide, other=0), OWN_AXIS)
        total += tl.load(where, mask=inside, other=0).to(ACC) * others
    y = tl.sum(total, FULL_AXIS)
    tl.store(y_out + own, y, mask=own < owned)
    if ITERATE:
        scale = _binade(tl.max(tl.abs(y), 0), ACC)
        tl.store(squares + block, tl.sum(_product(y.to(tl.float64), y.to(tl.float64)), 0))
        tl.store(scales + block, scale)
        by = tl.expand_dims(y / scale, FULL_AXIS)
        for start in range(0, wide, FULL):
            full = start + tl.arange(0, FULL)
            where, inside = _own_and_full(weight, rows, columns, run, own, full, V_FIRST, PLAIN)
            w = tl.load(where, mask=inside, other=0).to(ACC)
            tl.store(part + full, tl.sum(_product(w, by), OWN_AXIS), mask=full < wide)


@triton.jit
def products_kernel(
    layers, addresses, tiles, out_y, out_parts, out_scales, out_squares,
    DTYPE: tl.constexpr, ACC: tl.constexpr, V_FIRST: tl.constexpr, FIRST: tl.constexpr, ITERATE: tl.constexpr,
    PLAIN: tl.constexpr, INDEX: tl.constexpr, FULLS: tl.constexpr, STEPS: tl.constexpr, OWNS: tl.constexpr,
    LONG: tl.constexpr, LONG_OWN: tl.constexpr,
):  # fmt: skip
    """A block of own indices: their products, its piece of the other vector, and sums over the block."""
    program = tl.program_id(0)
    layer, first = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1).to(INDEX)
    of_layer = layers + layer * _FIELDS
    rows, columns, run = _size(of_layer, INDEX)
    block = program - tl.load(of_layer + 3)
    wide = rows if V_FIRST else columns
    weight = _pointer(addresses, layer, 0, DTYPE)
    vector = _pointer(addresses, layer, (1 if V_FIRST else 2) + (0 if FIRST else 3), ACC)
    part = out_parts + tl.load(of_layer + 5) + block * wide
    y_out = out_y + tl.load(of_layer + 6)
    for k in tl.static_range(len(FULLS)):
        fits = wide <= FULLS[k]
        if k > 0:
            fits = fits & (wide > FULLS[k - 1])
        if fits:
            _products_in_registers(
                weight, vector, y_out, part, out_scales, out_squares, rows, columns, run, first, program,
                V_FIRST, PLAIN, ITERATE, ACC, OWNS[k], STEPS[k], FULLS[k],
            )  # fmt: skip
    if LONG > 0:
        too_long = wide >= 0
        if len(FULLS) > 0:
            too_long = wide > FULLS[len(FULLS) - 1]
        if too_long:
            _products_in_two_passes(
                weight, vector, y_out, part, out_scales, out_squares, rows, columns, run, first, program,
                V_FIRST, PLAIN, ITERATE, ACC, LONG_OWN, LONG,
            )  # fmt: skip


@triton.jit
def reduce_kernel(
    layers, tiles, parts, scales, squares, out_x, out_tile_squares, eps: tl.float64,
    V_FIRST: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Some full indices: the sum of their pieces over the norm of the own vector, and of the squares of that."""
    program = tl.program_id(0)
    layer, first = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1)
    of_layer = layers + layer * _FIELDS
    wide = tl.load(of_layer + (0 if V_FIRST else 1))
    first_block, blocks = tl.load(of_layer + 3), tl.load(of_layer + 4)
    norm = tl.maximum(tl.sqrt(_total(squares, first_block, blocks, BLOCK)), eps)
    part = parts + tl.load(of_layer + 5)
    full = first + tl.arange(0, BLOCK)
    total = tl.zeros([PIECES, BLOCK], ACC)
    for start in range(0, blocks, PIECES):
        piece = start + tl.arange(0, PIECES)
        by = (tl.load(scales + first_block + piece, mask=piece < blocks, other=0).to(tl.float64) / norm).to(ACC)
        inside = (piece < blocks)[:, None] & (full < wide)[None, :]
        total += tl.load(part + piece[:, None] * wide + full[None, :], mask=inside, other=0) * by[:, None]
    x = tl.sum(total, 0)
    tl.store(out_x + tl.load(of_layer + 7) + full, x, mask=full < wide)
    tl.store(out_tile_squares + program, tl.sum(tl.where(full < wide, x.to(tl.float64) * x.to(tl.float64), 0), 0))


@triton.jit
def _write_vector(old, new, source, norm, usable, first, count, STREAMED: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, STREAMED, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        value = tl.load(old + at, mask=at < count, other=0)
        if usable:
            value = (tl.load(source + at, mask=at < count, other=0).to(tl.float64) / norm).to(value.dtype)
        tl.store(new + at, value, mask=at < count)


@triton.jit
def finish_kernel(
    layers, addresses, tiles, y, x, squares, tile_squares, out_sigma, eps: tl.float64, target: tl.float64,
    DTYPE: tl.constexpr, ACC: tl.constexpr, V_FIRST: tl.constexpr, FIRST: tl.constexpr, ITERATED: tl.constexpr,
    AT_MOST: tl.constexpr, WEIGHTS: tl.constexpr, TOTAL: tl.constexpr, STREAMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some elements of s W; of u and v those of the same numbers. Every program of a layer finds the same sigma."""
    program = tl.program_id(0)
    layer, first = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1)
    of_layer = layers + layer * _FIELDS
    rows, columns = tl.load(of_layer), tl.load(of_layer + 1)
    first_block, blocks = tl.load(of_layer + 3), tl.load(of_layer + 4)
    own_count, full_count = (columns, rows) if V_FIRST else (rows, columns)
    own_source, full_source = y + tl.load(of_layer + 6), x + tl.load(of_layer + 7)
    own, full, full_square = tl.full([], 1, tl.float64), tl.full([], 1, tl.float64), tl.full([], 0, tl.float64)
    usable = tl.full([], 0, tl.int1)
    if ITERATED:
        own_square = _total(squares, first_block, blocks, TOTAL)
        full_square = _total(tile_squares, tl.load(of_layer + 8), tl.cdiv(full_count, TOTAL), TOTAL)
        own, full = tl.maximum(tl.sqrt(own_square), eps), tl.maximum(tl.sqrt(full_square), eps)
        # neither 0 nor infinite nor NaN
        usable = (own_square > 0) & (own_square < float("inf")) & (full_square > 0) & (full_square < float("inf"))
    sigma = full_square / full
    if not usable:
        own_vector = _pointer(addresses, layer, (2 if V_FIRST else 1) + (0 if FIRST else 3), ACC)
        sigma = _dot(own_vector, own_source, own_count, TOTAL)
    sigma = sigma.to(ACC)
    if first == 0:
        tl.store(out_sigma + layer, sigma)
    if first < tl.maximum(rows, columns):
        u, v = _pointer(addresses, layer, 1 if FIRST else 4, ACC), _pointer(addresses, layer, 2 if FIRST else 5, ACC)
        new_u, new_v = _pointer(addresses, layer, 4, ACC), _pointer(addresses, layer, 5, ACC)
        if V_FIRST:
            _write_vector(u, new_u, full_source, full, usable, first, rows, STREAMED, BLOCK)
            _write_vector(v, new_v, own_source, own, usable, first, columns, STREAMED, BLOCK)
        else:
            _write_vector(u, new_u, own_source, own, usable, first, rows, STREAMED, BLOCK)
            _write_vector(v, new_v, full_source, full, usable, first, columns, STREAMED, BLOCK)
    if WEIGHTS:
        s, _ = _scale_of(sigma, target, AT_MOST, ACC)
        weight, out = _pointer(addresses, layer, 0, DTYPE), _pointer(addresses, layer, 3, DTYPE)
        for start in range(0, STREAMED, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            inside = at < rows * columns
            tl.store(out + at, tl.load(weight + at, mask=inside, other=0).to(ACC) * s, mask=inside)


@triton.jit
def _scale_of(sigma, target, AT_MOST: tl.constexpr, ACC: tl.constexpr):
    """s and ds/dsigma."""
    goal = tl.full([], target, ACC)
    if AT_MOST:
        active = (sigma > goal) | (sigma != sigma)
    else:
        active = sigma != 0
    s = goal / tl.where(active, sigma, 1.0)
    return tl.where(active, s, 1.0), tl.where(active, -s / tl.where(active, sigma, 1.0), 0.0)


@triton.jit
def inner_kernel(
    layers, addresses, tiles, out_inner, DTYPE: tl.constexpr, ACC: tl.constexpr, STREAMED: tl.constexpr, BLOCK: tl.constexpr
):
    """Some elements of <G, W>."""
    program = tl.program_id(0)
    layer, first = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1)
    count = tl.load(layers + layer * _FIELDS) * tl.load(layers + layer * _FIELDS + 1)
    weight, grad = _pointer(addresses, layer, 0, DTYPE), _pointer(addresses, layer, 4, DTYPE)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, STREAMED, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(grad + at, mask=inside, other=0).to(ACC)
        total += g * tl.load(weight + at, mask=inside, other=0).to(ACC)
    tl.store(out_inner + program, tl.sum(total.to(tl.float64), 0))


@triton.jit
def combine_kernel(
    layers, addresses, tiles, inner, sigmas, target: tl.float64,
    DTYPE: tl.constexpr, ACC: tl.constexpr, AT_MOST: tl.constexpr, TOTAL: tl.constexpr, STREAMED: tl.constexpr,
    PLAIN: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A rectangle of s G + s' <G, W> u v^T."""
    program = tl.program_id(0)
    layer, at = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1)
    of_layer = layers + layer * _FIELDS
    rows, columns, run = _size(of_layer, INDEX)
    across = tl.cdiv(columns, COLUMNS)
    at = at.to(INDEX)
    r, c = at // across * ROWS + tl.arange(0, ROWS), at % across * COLUMNS + tl.arange(0, COLUMNS)
    s, ds = _scale_of(tl.load(sigmas + layer), target, AT_MOST, ACC)
    k = ds * _total(inner, tl.load(of_layer + 8), tl.cdiv(rows * columns, STREAMED), TOTAL).to(ACC)
    u, v = _pointer(addresses, layer, 1, ACC), _pointer(addresses, layer, 2, ACC)
    grad, out = _pointer(addresses, layer, 4, DTYPE), _pointer(addresses, layer, 3, DTYPE)
    source, inside = _at(grad, rows, columns, run, r, c, PLAIN)
    where, inside = _at(out, rows, columns, run, r, c, PLAIN)
    left = k * tl.load(u + r, mask=r < rows, other=0)
    right = tl.load(v + c, mask=c < columns, other=0)
    value = tl.load(source, mask=inside, other=0).to(ACC) * s + left[:, None] * right[None, :]
    tl.store(where, value, mask=inside)


def _upload(numbers: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device, without waiting for it; and the copy's source, which has to outlive the copy."""
    on_gpu = device.type == "cuda"
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu)
    return host.to(device, non_blocking=True), host


@functools.lru_cache(maxsize=1024)
def _uploaded(numbers: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    return _upload(numbers, device)


_captured: list[tuple[Tensor, Tensor]] = []  # tables that CUDA graphs read: a graph is replayed for as long as it likes


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """``numbers`` as int64 on the device; the same numbers are sent once per stream, which orders the copy before their use."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(_upload(numbers, device))
        return _captured[-1][0]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _uploaded(numbers, device, stream)[0]


def addresses(columns: list[list[Tensor]], device: torch.device) -> Tensor:
    """Of the tensors of each layer, at most _ADDRESSES.value columns of them."""
    rows = zip(*columns, strict=True)
    fill = (0,) * (_ADDRESSES.value - len(columns))
    return table(tuple(number for row in rows for number in (*(x.data_ptr() for x in row), *fill)), device)


@dataclass(frozen=True)
class Tiles:
    """What each program of a launch takes: (layer, first) pairs; None where there is nothing to do."""

    numbers: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.numbers) // 2


def _tiles(counts: list[int], steps: list[int]) -> Tiles:
    return Tiles(
        tuple(
            number
            for layer, (n, step) in enumerate(zip(counts, steps, strict=True))
            for first in range(0, n, step)
            for number in (layer, first)
        )
    )


def warps(tiles) -> int:
    """Of a program that holds a tile, for 16 of its elements per lane; AMD's have twice the lanes."""
    return 32 if any(full * step > _TILE for full, step, _ in tiles) and torch.version.hip is None else 16


def plain(shapes) -> bool:
    """Are all rows runs of memory?"""
    return all(columns == run for _, columns, run in shapes)


def tile_shape(wide: int, v_first: bool, plain: bool, double: bool) -> tuple[int, int, int]:
    """(full, step, own) of the tile for a full dimension of ``wide``: full is 0 where registers don't hold all of it.

    With v first a tile is ``step`` columns wide: with too few of them a sector of memory would be asked for too often.
    """
    elements = _TILE // 2 if double else _TILE
    most = elements // 4 if v_first else elements * 2 if plain else elements
    for full in _WIDTHS:
        if wide <= full <= most:
            step = max(1, elements // full)
            return full, step, max(_OWN_COLUMNS if v_first else _OWN_ROWS, step)
    return 0, _LONG_OWN, _LONG_OWN


def spread(tiles: list[tuple[int, int, int]], own: list[int]) -> list[tuple[int, int, int]]:
    """Fewer own indices to a program, where all layers together make too few of them; first where a program reads most."""
    while sum(triton.cdiv(n, tile[2]) for n, tile in zip(own, tiles, strict=True)) < _BUSY:
        reads = {t: max(min(n, t[2]) for n, tile in zip(own, tiles, strict=True) if tile == t) * t[0] for t in set(tiles)}
        some = [t for t in reads if t[0] and t[2] >= 2 * max(_FEWEST, t[1])]
        if not some:
            break
        most = max(some, key=lambda t: (reads[t], t))
        tiles = [(t[0], t[1], t[2] // 2) if t == most else t for t in tiles]
    return tiles


@dataclass(frozen=True)
class Plan:
    """Tables and sizes of scratch memory for a list of shapes (rows, columns, run)."""

    layers: tuple[int, ...]
    products: Tiles
    reduced: Tiles
    streamed: Tiles  # all elements
    vectors: Tiles  # as many as the longer of u and v has
    tiles: tuple[tuple[int, int, int], ...]  # shapes that products are compiled for
    sizes: tuple[int, int, int]  # of y, x and the pieces


@functools.lru_cache(maxsize=256)
def forward_plan(shapes: tuple[tuple[int, int, int], ...], v_first: bool, double: bool) -> Plan:
    own = [columns if v_first else rows for rows, columns, _ in shapes]
    wide = [rows if v_first else columns for rows, columns, _ in shapes]
    tiles = spread([tile_shape(n, v_first, plain(shapes), double) for n in wide], own)
    blocks = [triton.cdiv(n, tile[2]) for n, tile in zip(own, tiles, strict=True)]
    layers, first, piece, y, x, reduced = [], 0, 0, 0, 0, 0
    for i, shape in enumerate(shapes):
        layers += [*shape, first, blocks[i], piece, y, x, reduced]
        first, piece, y, x = first + blocks[i], piece + blocks[i] * wide[i], y + own[i], x + wide[i]
        reduced += triton.cdiv(wide[i], _REDUCED)
    # one program at least for each layer, even an empty one: somebody has to write sigma
    elements = [max(rows * columns, rows, columns, 1) for rows, columns, _ in shapes]
    vectors = [max(rows, columns, 1) for rows, columns, _ in shapes]
    each = [_STREAMED] * len(shapes)
    return Plan(
        tuple(layers),
        _tiles(own, [tile[2] for tile in tiles]),
        _tiles(wide, [_REDUCED] * len(shapes)),
        _tiles(elements, each),
        _tiles(vectors, each),
        tuple(sorted(set(tiles))),
        (y, x, piece),
    )


@functools.lru_cache(maxsize=256)
def backward_plan(shapes: tuple[tuple[int, int, int], ...]) -> Plan:
    layers, first = [], 0
    for rows, columns, run in shapes:
        layers += [rows, columns, run, 0, 0, 0, 0, 0, first]
        first += triton.cdiv(rows * columns, _STREAMED)
    streamed = _tiles([rows * columns for rows, columns, _ in shapes], [_STREAMED] * len(shapes))
    rectangles = [triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _COLUMNS) for rows, columns, _ in shapes]
    return Plan(tuple(layers), _tiles(rectangles, [1] * len(shapes)), Tiles(()), streamed, Tiles(()), (), (0, 0, 0))


def _shape(x: Tensor, dim: int) -> tuple[int, int, int]:
    """(rows, columns, run): ``x``, contiguous, is a matrix with ``dim`` as rows, of which ``run`` elements lie together."""
    dim %= x.dim()
    rows, run = x.shape[dim], math.prod(x.shape[dim + 1 :])
    return rows, math.prod(x.shape[:dim]) * run, max(1, run)


def _dtypes(weight: Tensor) -> dict:
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
    return {"DTYPE": names[weight.dtype], "ACC": tl.float64 if weight.dtype == torch.float64 else tl.float32}


def _indexing(shapes) -> dict:
    """How kernels that go by rows and columns find an element."""
    return {
        "PLAIN": plain(shapes),
        "INDEX": tl.int32 if all(max(1, rows) * columns + 2 * _TILE < 1 << 31 for rows, columns, _ in shapes) else tl.int64,
    }


def _result(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _delivered(out: Tensor, like: Tensor) -> Tensor:
    return out if like.is_contiguous() else torch.empty_like(like).copy_(out)


def _forward(weights, u, v, dims, n_power_iterations, eps, v_first, target=None, at_most=False):
    """Lists of normalised weights (of None without a target), u and v; sigma as one tensor. All weights have one dtype."""
    work, device = accumulate_dtype(weights[0].dtype), weights[0].device
    for name, vectors in (("u", u), ("v", v)):
        if any(x.dtype != work for x in vectors):
            raise ValueError(f"spectral_norm: {name} has to be {work} for weights of {weights[0].dtype}")
    dense, u, v = ([x.contiguous() for x in xs] for xs in (weights, u, v))
    new_u, new_v = ([torch.empty_like(x) for x in xs] for xs in (u, v))
    outs = dense if target is None else [_result(x) for x in dense]
    shapes = tuple(_shape(*one) for one in zip(weights, dims, strict=True))
    plan = forward_plan(shapes, v_first, work == torch.float64)
    layers, pointers = table(plan.layers, device), addresses([dense, u, v, outs, new_u, new_v], device)
    wide = [shape for shape in plan.tiles if shape[0]]
    long = len(wide) < len(plan.tiles)
    y, x, parts, scales = (u[0].new_empty(n) for n in (*plan.sizes, plan.products.count))
    squares, tile_squares = (u[0].new_empty(n, dtype=torch.float64) for n in (plan.products.count, plan.reduced.count))
    sigma = u[0].new_empty(len(weights))
    common = {**_dtypes(weights[0]), "V_FIRST": v_first}
    widths = {"FULLS": tuple(t[0] for t in wide), "STEPS": tuple(t[1] for t in wide), "OWNS": tuple(t[2] for t in wide)}
    for iteration in range(max(1, n_power_iterations)):
        last, iterate, first = iteration >= n_power_iterations - 1, n_power_iterations > 0, iteration == 0
        if plan.products.count:
            products_kernel[(plan.products.count,)](
                layers, pointers, table(plan.products.numbers, device), y, parts, scales, squares,
                **common, **widths, **_indexing(shapes), FIRST=first, ITERATE=iterate,
                LONG=_LONG if long else 0, LONG_OWN=_LONG_OWN, num_warps=warps(plan.tiles),
            )  # fmt: skip
        if iterate and plan.reduced.count:
            reduce_kernel[(plan.reduced.count,)](
                layers, table(plan.reduced.numbers, device), parts, scales, squares, x, tile_squares, eps,
                V_FIRST=v_first, ACC=common["ACC"], BLOCK=_REDUCED, PIECES=8, num_warps=4,
            )  # fmt: skip
        write = last and target is not None
        tiles = plan.streamed if write else plan.vectors
        finish_kernel[(tiles.count,)](
            layers, pointers, table(tiles.numbers, device), y, x, squares, tile_squares, sigma,
            eps, 1.0 if target is None else target,
            **common, FIRST=first, ITERATED=iterate, AT_MOST=at_most, WEIGHTS=write, TOTAL=_REDUCED, STREAMED=_STREAMED,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    normalised = [None if target is None else _delivered(out, like) for out, like in zip(outs, weights, strict=True)]
    return normalised, new_u, new_v, sigma


def _backward(grads, weights, u, v, sigma, dims, target, at_most):
    device = weights[0].device
    dense, dense_grads, u, v = ([x.contiguous() for x in xs] for xs in (weights, grads, u, v))
    outs = [_result(x) for x in dense]
    shapes = tuple(_shape(*one) for one in zip(weights, dims, strict=True))
    plan = backward_plan(shapes)
    if plan.streamed.count:
        layers, pointers = table(plan.layers, device), addresses([dense, u, v, outs, dense_grads], device)
        inner = u[0].new_empty(plan.streamed.count, dtype=torch.float64)
        common = {**_dtypes(weights[0]), "STREAMED": _STREAMED, "num_warps": 4}
        inner_kernel[(plan.streamed.count,)](
            layers, pointers, table(plan.streamed.numbers, device), inner, **common, BLOCK=_BLOCK
        )  # fmt: skip
        combine_kernel[(plan.products.count,)](
            layers, pointers, table(plan.products.numbers, device), inner, sigma.contiguous(), target,
            **common, **_indexing(shapes), AT_MOST=at_most, TOTAL=_REDUCED, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return [_delivered(out, like) for out, like in zip(outs, weights, strict=True)]


def _by_dtype(weights: list[Tensor]) -> list[list[int]]:
    """Which weights go together: launches know one dtype and one device."""
    found = defaultdict(list)
    for i, weight in enumerate(weights):
        found[weight.dtype, weight.device].append(i)
    return list(found.values())


def spectral_norm_multi(weights, u, v, dims, *options):
    groups = _by_dtype(weights)
    with torch.cuda.device_of(weights[0]):
        if len(groups) == 1:
            return _forward(weights, u, v, dims, *options)
        results = [[None] * len(weights) for _ in range(4)]
        for group in groups:
            pick = lambda values: [values[i] for i in group]  # noqa: B023, E731
            for into, part in zip(results, _forward(*map(pick, (weights, u, v, dims)), *options), strict=True):
                for i, value in zip(group, part, strict=True):
                    into[i] = value
        common = u[0].dtype
        return *results[:3], torch.stack([sigma.to(common) for sigma in results[3]])


def spectral_norm_multi_backward(grads, weights, u, v, sigma, dims, target, at_most):
    result = [None] * len(weights)
    with torch.cuda.device_of(weights[0]):
        for group in _by_dtype(weights):
            pick = lambda values: [values[i] for i in group]  # noqa: B023, E731
            of_group = sigma if len(group) == len(weights) else torch.stack(pick(sigma)).to(u[group[0]].dtype)
            parts = _backward(*map(pick, (grads, weights, u, v)), of_group, pick(dims), target, at_most)
            for i, part in zip(group, parts, strict=True):
                result[i] = part
    return result


def spectral_norm(weight, u, v, dim, *options):
    (normalised,), (new_u,), (new_v,), sigma = spectral_norm_multi([weight], [u], [v], [dim], *options)
    return normalised, new_u, new_v, sigma[0]


def spectral_norm_sigma(weight, u, v, dim, n_power_iterations, eps, v_first):
    _, (new_u,), (new_v,), sigma = spectral_norm_multi([weight], [u], [v], [dim], n_power_iterations, eps, v_first)
    return new_u, new_v, sigma[0]


def spectral_norm_backward(grad, weight, u, v, sigma, dim, target, at_most):
    return spectral_norm_multi_backward([grad], [weight], [u], [v], sigma.reshape(1), [dim], target, at_most)[0]
