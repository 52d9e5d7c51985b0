"""Triton kernels of sums of kernels over pairs: the math is in fastgan/ops/pairwise_kernel_sum.py.

A tile is BLOCK_I points x against BLOCK_J points y: what the kernel is a function of lives in registers, coordinates are
streamed past it from transposed copies (D, N), in which neighbouring lanes read neighbouring words. Forward, a program goes
through its share of all y and leaves one sum per x: no atomics, the same bits on every run.

Backward, slopes times cotangents of some rows of x go to a scratch matrix of bounded size. What they make of the coordinates is
a matrix product (p = 2 and products), or a sum of signs (p = 1), which a second kernel takes with lanes being coordinates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops.pairwise_kernel_sum import KERNELS, _centred

_TILE = {"BLOCK_I": 64, "BLOCK_J": 32}  # 64 x 64 spills registers on AMD and in double precision
# Positions in KERNELS; the polynomial is the last.
_LAPLACIAN, _GAUSSIAN, _RATIONAL_QUADRATIC, _ENERGY = (tl.constexpr(k) for k in range(4))
_WARPS = 4
_COORDINATES = tl.constexpr(32)  # of a run
_SIGNS = {"BLOCK_I": 16, "BLOCK_D": 64, "RUN": 16}
_PROGRAMS = 1024  # about eight for each multiprocessor
_DEGREES = 16  # largest integer power that is taken as products
_CHUNK = 1 << 24  # slopes of one scratch matrix


@triton.jit
def _similarity(x, y, i, j, n, m, D, P: tl.constexpr, ACC: tl.constexpr):
    """||x_i - y_j||_1, ||x_i - y_j||^2 or x_i . y_j."""
    q = tl.zeros((i.shape[0], j.shape[0]), ACC)
    x, y = x + i, y + j
    for start in range(0, D, _COORDINATES):  # sums of few, then of those: fewer roundings at full size
        run = tl.zeros((i.shape[0], j.shape[0]), ACC)
        for _ in range(start, tl.minimum(start + _COORDINATES, D)):
            own = tl.load(x, mask=i < n, other=0).to(ACC)[:, None]
            other = tl.load(y, mask=j < m, other=0).to(ACC)[None, :]
            if P == 0:
                run += own * other
            elif P == 1:
                run += tl.abs(own - other)
            else:
                run += (own - other) * (own - other)
            x += n
            y += m
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
        s, w = tl.load(bandwidths + b), tl.load(weights + b)
        if KERNEL == _LAPLACIAN:
            k = w * tl.exp(-(q / s))
            total += -k / s if SLOPE else k
        elif KERNEL == _GAUSSIAN:
            k = w * tl.exp(-(q / (2 * s * s)))
            total += -k / (s * s) if SLOPE else k
        elif KERNEL == _RATIONAL_QUADRATIC:
            a = tl.load(powers)
            t = 1 + q / (2 * a * s * s)
            k = w / _power(t, POWER) if POWER else w * tl.exp(-a * tl.log(t))
            total += -k / (t * s * s) if SLOPE else k
        elif KERNEL == _ENERGY:
            root = tl.sqrt(q)
            if SLOPE:
                total += tl.where(q == 0, 0.0, -w / (s * tl.where(q == 0, 1.0, root)))
            else:
                total += -w / s * root
        else:
            t = q / s + tl.load(powers + 1)
            if SLOPE:
                total += w * tl.load(powers) / s * _power(t, POWER - 1)
            else:
                total += w * _power(t, POWER)
    return total


@triton.jit
def forward_kernel(
    x, y, bandwidths, weights, powers, out, n, m, D, count, share,
    KERNEL: tl.constexpr, POWER: tl.constexpr, P: tl.constexpr, EXCLUDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out (programs along y, n): sums over ``share`` points y each."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * share
    total = tl.zeros((BLOCK_I,), ACC)
    for start in range(first, tl.minimum(first + share, m), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        k = _mixture(_similarity(x, y, i, j, n, m, D, P, ACC), bandwidths, weights, powers, count, KERNEL, POWER, False)
        counts = (j < m)[None, :]
        if EXCLUDE:
            counts = counts & (i[:, None] != j[None, :])
        total += tl.sum(tl.where(counts, k, 0.0), 1)
    tl.store(out + tl.program_id(1).to(tl.int64) * n + i, total, mask=i < n)


@triton.jit
def slopes_kernel(
    x, y, row, column, bandwidths, weights, powers, out, start, rows, n, m, D, count, row_stride, column_stride,
    KERNEL: tl.constexpr, POWER: tl.constexpr, P: tl.constexpr, EXCLUDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out (rows, m): (row_i + column_j) h_ij of the points x from ``start`` on."""
    local = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    i, j = start + local, tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    h = _mixture(_similarity(x, y, i, j, n, m, D, P, ACC), bandwidths, weights, powers, count, KERNEL, POWER, True)
    r = tl.load(row + i.to(tl.int64) * row_stride, mask=i < n, other=0).to(ACC)
    c = tl.load(column + j.to(tl.int64) * column_stride, mask=j < m, other=0).to(ACC)
    h *= r[:, None] + c[None, :]
    if EXCLUDE:
        h = tl.where(i[:, None] != j[None, :], h, 0.0)
    inside = (local < rows)[:, None] & (j < m)[None, :]
    tl.store(out + local.to(tl.int64)[:, None] * m + j[None, :], h, mask=inside)


@triton.jit
def signs_kernel(
    slopes,
    points,
    others,
    before,
    out,
    n,
    m,
    D,
    stride_i,
    stride_j,
    ACC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    """out (n, D) = before + sum_j slopes_ij sign(points_i - others_j)."""
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = i[:, None] * D + d[None, :]
    inside = (i < n)[:, None] & (d < D)[None, :]
    own = tl.load(points + place, mask=inside, other=0).to(ACC)
    total = tl.zeros((BLOCK_I, BLOCK_D), ACC)
    slopes, others = slopes + i * stride_i, others + d
    for start in range(0, m, RUN):  # sums of few, then of those: fewer roundings at full size
        run = tl.zeros((BLOCK_I, BLOCK_D), ACC)
        for _ in range(start, tl.minimum(start + RUN, m)):
            slope = tl.load(slopes, mask=i < n, other=0)[:, None]
            other = tl.load(others, mask=d < D, other=0).to(ACC)[None, :]
            run += slope * tl.where(own > other, 1.0, tl.where(own < other, -1.0, 0.0))
            slopes += stride_j
            others += D
        total += run
    total += tl.load(before + place, mask=inside, other=0)
    tl.store(out + place, total, mask=inside)


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
    with torch.cuda.device_of(x):
        forward_kernel[blocks_x, programs](
            x.T.contiguous(), y.T.contiguous(), *mixture, out, n, m, d, bandwidths.shape[0], share,
            **_constants(kernel, exponent, exclude_diagonal, x.dtype),
        )  # fmt: skip
    return out.sum(0).to(x.dtype)


def _gather_signs(slopes: Tensor, points: Tensor, others: Tensor, before: Tensor) -> Tensor:
    out = torch.empty_like(before)
    n, d = points.shape
    signs_kernel[triton.cdiv(n, _SIGNS["BLOCK_I"]), triton.cdiv(d, _SIGNS["BLOCK_D"])](
        slopes if slopes.is_contiguous() else slopes.T,
        points, others, before, out, n, others.shape[0], d, *slopes.stride(), ACC=_accumulate(before.dtype),
        num_warps=_WARPS, **_SIGNS,
    )  # fmt: skip
    return out


def _gather(p: int, slopes: Tensor, points: Tensor, others: Tensor, before: Tensor) -> Tensor:
    """before (n, D) plus what slopes (n, m) make of n points and m others."""
    if p == 1:
        return _gather_signs(slopes, points, others, before)
    if p == 0:
        return torch.addmm(before, slopes, others)
    points, others = _centred(points, others)
    return before + (slopes.sum(1, keepdim=True) * points - slopes @ others)


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
    (n, d), m, p = x.shape, y.shape[0], KERNELS[kernel]
    work = accumulate_dtype(x.dtype)
    of_x, of_y = x.new_zeros(n, d, dtype=work), y.new_zeros(m if both else 0, d, dtype=work)
    if n == 0 or m == 0 or d == 0:
        return of_x.to(dtype or x.dtype), of_y.to(x.dtype)
    points, others = x.to(work).contiguous(), y.to(work).contiguous()
    x, y = x.T.contiguous(), y.T.contiguous()
    mixture = bandwidths.contiguous(), weights.contiguous(), _powers(bandwidths, exponent, offset)
    constants = _constants(kernel, exponent, exclude_diagonal, x.dtype)
    step = min(n, max(_TILE["BLOCK_I"], _CHUNK // m))
    scratch = x.new_empty(step, m, dtype=work)
    with torch.cuda.device_of(x):
        for start in range(0, n, step):
            rows = min(step, n - start)
            slopes = scratch[:rows]
            slopes_kernel[triton.cdiv(rows, _TILE["BLOCK_I"]), triton.cdiv(m, _TILE["BLOCK_J"])](
                x, y, row, column, *mixture, slopes, start, rows, n, m, d, bandwidths.shape[0], row.stride(0), column.stride(0),
                **constants,
            )  # fmt: skip
            some = slice(start, start + rows)
            of_x[some] = _gather(p, slopes, points[some], others, of_x[some])
            if both:
                of_y = _gather(p, slopes.T, others, points[some], of_y)
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
