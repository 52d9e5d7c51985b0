"""Gradient penalties in Triton: fastgan/ops/gradient_penalty.py has the formulas.

Three launches: sums of squares of pieces of rows, whose number follows from the shape alone; one program that adds them up in
order and does all that comes per sample in double; and the product with the factors. No atomics: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.kernels.rows import (
    check_factors,
    check_rows,
    delivered,
    has_dense_rows,
    laid_out_as,
    output_like,
    pieces_of,
    place,
)
from fastgan.ops.gradient_penalty import KINDS

_PIECE = 8192  # elements of a row per program
_BLOCK = 1024
_SAMPLES = 128  # samples at a time in the program that finishes


@triton.jit
def square_sums_kernel(
    grads, out, stride, length, pieces, ACC: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[row, piece] = sum of squares of that piece; few per lane, and lanes in double."""
    row, piece = place(pieces)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, PIECE, BLOCK):
        at = piece * PIECE + start + tl.arange(0, BLOCK)
        value = tl.load(grads + row * stride + at, mask=at < length, other=0).to(ACC)
        total += value * value
    tl.store(out + row * pieces + piece, tl.sum(total.to(tl.float64), 0))


@triton.jit
def _squared_norms(sums, samples, count, pieces):
    q = tl.zeros([samples.shape[0]], tl.float64)
    for piece in range(pieces):
        q += tl.load(sums + samples.to(tl.int64) * pieces + piece, mask=samples < count, other=0)
    return q


@triton.jit
def finish_kernel(
    sums, out_penalty, out_norms, out_factors, count, pieces, weight: tl.float64, target: tl.float64, power: tl.float64,
    KIND: tl.constexpr, ONE_SIDED: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Norms, factors and the penalty; one program."""
    mean = weight / tl.maximum(count, 1).to(tl.float64)
    largest, reached, undefined = tl.full([], 0, tl.float64), tl.full([], 0, tl.float64), tl.full([], 0, tl.int32)
    if KIND == "max":
        for start in range(0, count, SAMPLES):
            q = _squared_norms(sums, start + tl.arange(0, SAMPLES), count, pieces)
            undefined += tl.sum((q != q).to(tl.int32), 0)
            largest = tl.maximum(largest, tl.max(q, 0))
        largest = tl.where(undefined > 0, float("nan"), largest)
        for start in range(0, count, SAMPLES):
            i = start + tl.arange(0, SAMPLES)
            reached += tl.sum(((_squared_norms(sums, i, count, pieces) == largest) & (i < count)).to(tl.float64), 0)
    total = tl.zeros([SAMPLES], tl.float64)
    for start in range(0, count, SAMPLES):
        i = start + tl.arange(0, SAMPLES)
        q = _squared_norms(sums, i, count, pieces)
        n = tl.sqrt(q)
        if KIND == "zero_centered":
            value, factor = q / 2, q * 0 + mean
        elif KIND == "max":
            value, factor = q * 0, tl.where(q == largest, 2 * weight / tl.maximum(reached, 1), 0)
        elif KIND == "power":
            value = tl.exp(power * tl.log(n))
            factor = tl.exp((power - 2) * tl.log(n)) * (power * mean)
        else:
            excess = n - target
            if ONE_SIDED:
                excess = tl.where(excess < 0, 0, excess)
            value, factor = excess * excess, excess / n * (2 * mean)
        total += tl.where(i < count, value, 0)
        tl.store(out_norms + i, n, mask=i < count)
        tl.store(out_factors + i, tl.where(n == 0, 0, factor), mask=i < count)
    tl.store(out_penalty, weight * largest if KIND == "max" else mean * tl.sum(total, 0))


@triton.jit
def scale_kernel(grads, factors, out, stride, out_stride, length, pieces, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """out = factors[row] * grads"""
    row, piece = place(pieces)
    factor = tl.load(factors + row)
    for start in range(0, PIECE, BLOCK):
        at = piece * PIECE + start + tl.arange(0, BLOCK)
        value = tl.load(grads + row * stride + at, mask=at < length, other=0).to(factors.dtype.element_ty)
        tl.store(out + row * out_stride + at, value * factor, mask=at < length)


def gradient_penalty(grads, kind, weight, target, one_sided, power):
    check_rows("gradient_penalty", "grads", grads, "(N, ...)")
    if kind not in KINDS:
        raise RuntimeError(f"fastgan::gradient_penalty: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    rows = grads if has_dense_rows(grads) else grads.contiguous()
    count, (length, pieces) = grads.shape[0], pieces_of(grads, _PIECE)
    work = accumulate_dtype(grads.dtype)
    sums = grads.new_empty(count * pieces, dtype=torch.float64)
    penalty, norms, factors = (grads.new_empty(size, dtype=work) for size in ((), count, count))
    with torch.cuda.device_of(grads):
        if count:
            square_sums_kernel[(count * pieces,)](
                rows, sums, rows.stride(0), length, pieces,
                ACC=tl.float64 if work == torch.float64 else tl.float32, PIECE=_PIECE, BLOCK=_BLOCK,
            )  # fmt: skip
        finish_kernel[(1,)](
            sums, penalty, norms, factors, count, pieces, float(weight), float(target), float(power),
            KIND=kind, ONE_SIDED=one_sided, SAMPLES=_SAMPLES,
        )  # fmt: skip
    return penalty, norms, factors, _scaled(grads, factors)


def gradient_penalty_backward(grads: Tensor, factors: Tensor) -> Tensor:
    check_rows("gradient_penalty_backward", "grads", grads, "(N, ...)")
    check_factors("gradient_penalty_backward", factors, "grads", grads)
    return _scaled(grads, factors)


def _scaled(grads: Tensor, factors: Tensor) -> Tensor:
    result, out = output_like(grads)
    length, pieces = pieces_of(grads, _PIECE)
    if result.numel():
        source = laid_out_as(grads, out)
        with torch.cuda.device_of(grads):
            scale_kernel[(grads.shape[0] * pieces,)](
                source, factors.contiguous(), out, source.stride(0), out.stride(0), length, pieces, PIECE=_PIECE, BLOCK=_BLOCK
            )
    return delivered(result, out)
