"""tangent_combine in Triton: fastgan/ops/tangent_combine.py has the formulas. One launch, two reads and two writes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.kernels.rows import check_factors, check_rows, delivered, laid_out_as, output_like, pieces_of, place, shape_of

_PIECE = 4096  # elements of a sample per program
_BLOCK = 1024


@triton.jit
def combine_kernel(
    t, a, factors, out_passed, out_combined, t_stride, a_stride, factor_stride, out_stride, length, pieces, slope: tl.float64,
    ACC: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, piece = place(pieces)
    factor, below = tl.load(factors + row * factor_stride), tl.full([], slope, ACC)
    for start in range(0, PIECE, BLOCK):
        at = piece * PIECE + start + tl.arange(0, BLOCK)
        inside = at < length
        tangent = tl.load(t + row * t_stride + at, mask=inside, other=0).to(ACC)
        activation = tl.load(a + row * a_stride + at, mask=inside, other=0).to(ACC)
        passed = tl.where(activation > 0, tangent, tangent * below)
        tl.store(out_passed + row * out_stride + at, passed, mask=inside)
        tl.store(out_combined + row * out_stride + at, factor * activation + passed, mask=inside)


def tangent_combine(t: Tensor, a: Tensor, factors: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    check_rows("tangent_combine", "t", t, "(B, ...)")
    if a.shape != t.shape or a.dtype != t.dtype or a.device != t.device:
        raise RuntimeError(
            f"fastgan::tangent_combine: a has shape {shape_of(a)}, expected one like t, {shape_of(t)}, of its dtype and on its "
            "device"
        )
    check_factors("tangent_combine", factors, "t", t, single=True)
    (passed, first), (combined, second) = output_like(t), output_like(t)
    length, pieces = pieces_of(t, _PIECE)
    if t.numel():
        t, a = laid_out_as(t, first), laid_out_as(a, first)
        with torch.cuda.device_of(t):
            combine_kernel[(t.shape[0] * pieces,)](
                t, a, factors, first, second, t.stride(0), a.stride(0), factors.stride(0) if factors.dim() else 0,
                first.stride(0), length, pieces, float(slope), PIECE=_PIECE, BLOCK=_BLOCK,
                ACC=tl.float64 if accumulate_dtype(t.dtype) == torch.float64 else tl.float32,
            )  # fmt: skip
    return delivered(passed, first), delivered(combined, second)
