"""Triton kernels of sums of kernels over pairs: the math is in fastgan/ops/pairwise_kernel_sum.py.

A warp has a tile of BLOCK_I points x against BLOCK_J points y: what the kernel is a function of lives in registers,
coordinates are streamed past it from transposed copies (D, N), of which neighbouring lanes read neighbouring y and all lanes
the same x. Both are loaded as (BLOCK_I, 1) and (1, BLOCK_J): a vector that is given its second dimension later has a layout
of its own, and every step of the loop would wait twice for all threads to change it. Copies are padded to whole tiles, so
that no load has a mask.

Forward, a program goes through its share of all y and leaves one sum per x: no atomics, the same bits on every run. Backward,
slopes times cotangents go to a scratch matrix of bounded size; a second kernel, whose lanes are coordinates, sums what they
make of these, or a matrix product does (p = 0).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops.pairwise_kernel_sum import KERNELS

_WARPS = 1
_TILE = {"BLOCK_I": 8, "BLOCK_J": 128}  # 12 loads for 32 pairs of each thread, 116 registers
_GATHER = {"BLOCK_I": 16, "BLOCK_D": 64, "RUN": 16}  # of doubles half as wide
# Positions in KERNELS; the polynomial is the last.
_LAPLACIAN, _GAUSSIAN, _RATIONAL_QUADRATIC, _ENERGY = (tl.constexpr(k) for k in range(4))
_COORDINATES = tl.constexpr(32)  # of a run
_PROGRAMS = 1 << 14  # some hundred for each multiprocessor, which holds seventeen
_DEGREES = 16  # largest integer power that is taken as products
_CHUNK = 1 << 24  # slopes of one scratch matrix


@triton.jit
def _similarity(x, y, i, j, stride_x, stride_y, D, P: tl.constexpr, ACC: tl.constexpr):
    """||x_i - y_j||_1, ||x_i - y_j||^2 or x_i . y_j."""
    q = tl.zeros((i.shape[0], j.shape[0]), ACC)
    for start in range(0, D, _COORDINATES):  # sums of few, then of those: fewer roundings at full size
        run = tl.zeros((i.shape[0], j.shape[0]), ACC)
        for _ in range(start, tl.minimum(start + _COORDINATES, D)):
            own = tl.load(x + i[:, None]).to(ACC)
            other = tl.load(y + j[None, :]).to(ACC)
            if P == 0:
                run += own * other
            elif P == 1:
                run += tl.abs(own - other)
            else:
                run += (own - other) * (own - other)
            x += stride_x
            y += stride_y
        q += run
    return q


@triton.jit
def _power(t, POWER: tl.constexpr):
    result = tl.full(t.shape, 1.0, t.dtype)
    for _ in tl.static_range(POWER):
        result *= t
    return result


@triton.jit
def _mixture(q, bandwidths, weights, powers, count, KERNEL: tl.constexpr, POWER: tl.constexpr, SLOPE: tl.constexpr):
    """sum_b w_b k_b of q, or of the slopes h_b; powers: exponent, offset."""
    total = tl.zeros(q.shape, q.dtype)
    for b in range(count):
        inverse, w = 1 / tl.load(bandwidths + b), tl.load(weights + b)
        if KERNEL == _LAPLACIAN:
            k = w * tl.exp(-(q * inverse))
            total += -inverse * k if SLOPE else k
        elif KERNEL == _GAUSSIAN:
            k = w * tl.exp(q * (-0.5 * inverse * inverse))
            total += -(inverse * inverse) * k if SLOPE else k
        elif KERNEL == _RATIONAL_QUADRATIC:
            a = tl.load(powers)
            t = 1 + q * (inverse * inverse / (2 * a))
            k = w / _power(t, POWER) if POWER else w * tl.exp(-a * tl.log(t))
            total += -k / t * (inverse * inverse) if SLOPE else k
        elif KERNEL == _ENERGY:
            root = tl.sqrt(q)
            if SLOPE:
                total += tl.where(q == 0, 0.0, -w * inverse / tl.where(q == 0, 1.0, root))
            else:
                total += -w * inverse * root
        else:
            t = q * inverse + tl.load(powers + 1)
            if SLOPE:
                total += w * tl.load(powers) * inverse * _power(t, POWER - 1)
            else:
                total += w * _power(t, POWER)
    return total


@triton.jit
def forward_kernel(
    x, y, bandwidths, weights, powers, out, n, m, D, stride_x, stride_y, count, share,
    KERNEL: tl.constexpr, POWER: tl.constexpr, P: tl.constexpr, EXCLUDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out (programs along y, n): sums over ``share`` points y each."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * share
    total = tl.zeros((BLOCK_I,), ACC)
    for start in range(first, tl.minimum(first + share, m), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        q = _similarity(x, y, i, j, stride_x, stride_y, D, P, ACC)
        k = _mixture(q, bandwidths, weights, powers, count, KERNEL, POWER, False)
        counts = (j < m)[None, :]
        if EXCLUDE:
            counts = counts & (i[:, None] != j[None, :])
        total += tl.sum(tl.where(counts, k, 0.0), 1)
    tl.store(out + tl.program_id(1).to(tl.int64) * n + i, total, mask=i < n)


@triton.jit
def slopes_kernel(
    x, y, row, column, bandwidths, weights, powers, out, start, n, m, D, stride_x, stride_y, count, row_stride, column_stride,
    KERNEL: tl.constexpr, POWER: tl.constexpr, P: tl.constexpr, EXCLUDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out (rows, stride_y): (row_i + column_j) h_ij of the points x from ``start`` on, the padding included."""
    local = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    i, j = start + local, tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    q = _similarity(x, y, i, j, stride_x, stride_y, D, P, ACC)
    h = _mixture(q, bandwidths, weights, powers, count, KERNEL, POWER, True)
    r = tl.load(row + i.to(tl.int64) * row_stride, mask=i < n, other=0).to(ACC)
    c = tl.load(column + j.to(tl.int64) * column_stride, mask=j < m, other=0).to(ACC)
    h *= r[:, None] + c[None, :]
    if EXCLUDE:
        h = tl.where(i[:, None] != j[None, :], h, 0.0)
    tl.store(out + local.to(tl.int64)[:, None] * stride_y + j[None, :], h)


@triton.jit
def gather_kernel(
    slopes, points, others, sums, n, m, D, stride_i, stride_j,
    P: tl.constexpr, ACC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """sums (n, D) += sum_j slopes_ij u, u = sign(points_i - others_j) or points_i - others_j."""
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = i[:, None] * D + d[None, :]
    inside = (i < n)[:, None] & (d < D)[None, :]
    own = tl.load(points + place, mask=inside, other=0)
    total = tl.load(sums + place, mask=inside, other=0)
    for start in range(0, m, RUN):  # sums of few, then of those: fewer roundings at full size
        run = tl.zeros((BLOCK_I, BLOCK_D), ACC)
        for _ in range(start, tl.minimum(start + RUN, m)):
            slope = tl.load(slopes + i[:, None] * stride_i)
            other = tl.load(others + d[None, :], mask=(d < D)[None, :], other=0)
            if P == 1:  # of which PTX has an instruction each, where a choice would need predicates
                run += slope * ((own > other).to(ACC) - (own < other).to(ACC))
            else:
                run += slope * (own - other)
            slopes += stride_j
            others += D
        total += run
    tl.store(sums + place, total, mask=inside)


def _accumulate(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _constants(kernel: str, exponent: float, exclude_diagonal: bool, dtype: torch.dtype) -> dict:
    if kernel == "polynomial" and exponent not in range(1, _DEGREES + 1):
        raise RuntimeError(
            f"pairwise_kernel_sum: the polynomial's exponent is {exponent}, expected an integer from 1 to {_DEGREES}; "
            f"with fastgan.use_backend('reference') it may be any"
        )
    return {
        "KERNEL": list(KERNELS).index(kernel),
        "POWER": int(exponent) if exponent in range(1, _DEGREES + 1) else 0,  # 0: no such integer
        "P": KERNELS[kernel],
        "EXCLUDE": exclude_diagonal,
        "ACC": _accumulate(dtype),
        "num_warps": _WARPS,
    } | _TILE


def _check(x: Tensor, y: Tensor, *cotangents: tuple[Tensor, Tensor]) -> None:
    """Kernels trust these: another shape would have them read past the end."""
    if x.dim() != 2 or y.dim() != 2 or (x.shape[1], x.dtype, x.device) != (y.shape[1], y.dtype, y.device):
        raise RuntimeError(
            f"pairwise_kernel_sum: x is {tuple(x.shape)}, {x.dtype} on {x.device}, y {tuple(y.shape)}, {y.dtype} on "
            f"{y.device}, expected (N, D) and (M, D), dtype and device alike"
        )
    for cotangent, points in cotangents:
        if cotangent.shape != points.shape[:1] or cotangent.device != points.device:
            raise RuntimeError(
                f"pairwise_kernel_sum: a gradient has shape {tuple(cotangent.shape)} on {cotangent.device}, expected "
                f"{tuple(points.shape[:1])} on {points.device}"
            )


def _powers(bandwidths: Tensor, exponent: float, offset: float) -> Tensor:
    """On the device without a copy to it, which a CUDA graph could not hold."""
    return torch.stack([bandwidths.new_full((), value) for value in (exponent, offset)])


def gather_tile(dtype: torch.dtype) -> dict:
    return _GATHER | ({"BLOCK_D": 32} if dtype == torch.float64 else {})


def _round_up(size: int, step: int) -> int:
    return triton.cdiv(size, step) * step


def _transposed(points: Tensor) -> Tensor:
    """(D, N), padded to whole tiles."""
    n, d = points.shape
    if n % _TILE["BLOCK_J"] == 0:
        return points.T.contiguous()
    copy = points.new_zeros(d, _round_up(n, _TILE["BLOCK_J"]))
    copy[:, :n] = points.T
    return copy


def pairwise_kernel_sum(x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal) -> Tensor:
    _check(x, y)
    (n, d), m = x.shape, y.shape[0]
    if n == 0 or m == 0:
        return x.new_zeros(n)
    blocks_x, blocks_y = triton.cdiv(n, _TILE["BLOCK_I"]), triton.cdiv(m, _TILE["BLOCK_J"])
    programs = min(blocks_y, max(1, _PROGRAMS // blocks_x))
    share = triton.cdiv(blocks_y, programs) * _TILE["BLOCK_J"]
    programs = triton.cdiv(m, share)
    out = x.new_empty(programs, n, dtype=accumulate_dtype(x.dtype))
    mixture = bandwidths.contiguous(), weights.contiguous(), _powers(bandwidths, exponent, offset)
    across = _transposed(x)
    down = across if y is x else _transposed(y)
    with torch.cuda.device_of(x):
        forward_kernel[blocks_x, programs](
            across, down, *mixture, out, n, m, d, across.shape[1], down.shape[1], bandwidths.shape[0], share,
            **_constants(kernel, exponent, exclude_diagonal, x.dtype),
        )  # fmt: skip
    return out.sum(0).to(x.dtype)


def _gather(p: int, slopes: Tensor, points: Tensor, others: Tensor, sums: Tensor) -> None:
    """To sums (n, D) what slopes (n, m) make of n points and m others; slopes have rows to whole tiles behind them."""
    if p == 0:
        sums.addmm_(slopes, others)
        return
    (n, d), tile = points.shape, gather_tile(sums.dtype)
    gather_kernel[triton.cdiv(n, tile["BLOCK_I"]), triton.cdiv(d, tile["BLOCK_D"])](
        slopes, points, others, sums, n, others.shape[0], d, *slopes.stride(), P=p, ACC=_accumulate(sums.dtype),
        num_warps=_WARPS, **tile,
    )  # fmt: skip


def _sweep(
    row,
    column,
    x,
    y,
    bandwidths,
    weights,
    kernel,
    exponent,
    offset,
    exclude_diagonal,
    both: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of the scratch matrix are points y and its columns x, which is the order that the sums of x read fastest."""
    (n, d), m, p = x.shape, y.shape[0], KERNELS[kernel]
    work = accumulate_dtype(x.dtype)
    of_x, of_y = x.new_zeros(n, d, dtype=work), y.new_zeros(m if both else 0, d, dtype=work)
    if n == 0 or m == 0 or d == 0:
        return of_x.to(dtype or x.dtype), of_y.to(x.dtype)
    points = x.to(work).contiguous()
    others = points if y is x else y.to(work).contiguous()
    across = _transposed(x)
    down = across if y is x else _transposed(y)
    mixture = bandwidths.contiguous(), weights.contiguous(), _powers(bandwidths, exponent, offset)
    constants = _constants(kernel, exponent, exclude_diagonal, x.dtype)
    width = across.shape[1]
    step = _round_up(min(m, max(1, _CHUNK // width)), _GATHER["BLOCK_I"])
    scratch = x.new_empty(step, width, dtype=work)
    with torch.cuda.device_of(x):
        for start in range(0, m, step):
            some = slice(start, min(start + step, m))
            rows = _round_up(some.stop - start, _GATHER["BLOCK_I"])
            slopes_kernel[rows // _TILE["BLOCK_I"], width // _TILE["BLOCK_J"]](
                down, across, column, row, *mixture, scratch, start, m, n, d, down.shape[1], width,
                bandwidths.shape[0], column.stride(0), row.stride(0), **constants,
            )  # fmt: skip
            slopes = scratch[: some.stop - start, :n]
            _gather(p, slopes.T, points, others[some], of_x)
            if both:
                _gather(p, slopes, others[some], points, of_y[some])
    return of_x.to(dtype or x.dtype), of_y.to(x.dtype)


def pairwise_kernel_sum_backward(row, column, x, y, *options) -> Tensor:
    _check(x, y, (row, x), (column, y))
    return _sweep(row, column, x, y, *options, both=False)[0]


def pairwise_kernel_sum_backward_both(grad, x, y, *options) -> tuple[Tensor, Tensor]:
    _check(x, y, (grad, x))
    return _sweep(grad, grad.new_zeros(y.shape[0]), x, y, *options, both=True)


def pairwise_kernel_sum_with_gradient(x, y, *options) -> tuple[Tensor, Tensor]:
    value, work = pairwise_kernel_sum(x, y, *options), accumulate_dtype(x.dtype)
    ones, zeros = x.new_ones(x.shape[0], dtype=work), x.new_zeros(y.shape[0], dtype=work)
    return value, _sweep(ones, zeros, x, y, *options, both=False, dtype=work)[0]
