"""Tensors (N, ...) as N runs of memory, cut into pieces: for kernels that treat samples alike."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def place(pieces):
    """This program's row and piece, 64-bit: they scale every offset."""
    return (tl.program_id(0) // pieces).to(tl.int64), (tl.program_id(0) % pieces).to(tl.int64)


def has_dense_rows(x: Tensor) -> bool:
    """Is each x[i] one run of memory, in whichever order of dimensions?"""
    run = 1
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(1, x.dim()) if x.shape[d] != 1):
        if stride != run:
            return False
        run *= size
    return True


def output_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """A result like ``x``, and what to write to, which is contiguous where the result's rows are scattered."""
    result = torch.empty_like(x)
    return result, result if has_dense_rows(result) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with its rows laid out as those of ``like``, copied if they aren't."""
    same = all(a == b or size == 1 for a, b, size in zip(x.stride()[1:], like.stride()[1:], x.shape[1:], strict=True))
    return x if same else torch.empty_like(like).copy_(x)


def delivered(result: Tensor, work: Tensor) -> Tensor:
    return result if work is result else result.copy_(work)


def pieces_of(x: Tensor, piece: int) -> tuple[int, int]:
    """Elements of a row, and into how many pieces it is cut."""
    length = x[0].numel() if x.shape[0] else 0
    return length, max(1, triton.cdiv(length, piece))
