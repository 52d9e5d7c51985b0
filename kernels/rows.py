"""Tensors (N, ...) as N runs of memory, cut into pieces: for kernels that treat samples alike."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._dtypes import accumulate_dtype


@triton.jit
def place(pieces):
    """This program's row and piece, 64-bit: they scale every offset."""
    return (tl.program_id(0) // pieces).to(tl.int64), (tl.program_id(0) % pieces).to(tl.int64)


def shape_of(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def dtype_of(x: Tensor) -> str:
    return x.type().rpartition(".")[2].removesuffix("Tensor")


def check_rows(op: str, name: str, x: Tensor, form: str) -> None:
    """Kernels trust this, as the next: what is not so has them read past the end."""
    if not x.is_floating_point():
        raise RuntimeError(f"fastgan::{op}: {name} is {dtype_of(x)}, expected a floating-point tensor of 16, 32 or 64 bits")
    if x.dim() == 0:
        raise RuntimeError(f"fastgan::{op}: {name} has no dimensions, expected {form}")


def check_factors(op: str, factors: Tensor, name: str, x: Tensor, single: bool = False) -> None:
    """A number for each sample of x, or also one for all, of what x is added up in."""
    if factors.shape != x.shape[:1] and not (single and factors.dim() == 0):
        raise RuntimeError(
            f"fastgan::{op}: factors has shape {shape_of(factors)}, expected {'() or ' * single}one number for each sample of "
            f"{name}, which has shape {shape_of(x)}"
        )
    work = accumulate_dtype(x.dtype)
    if factors.dtype != work or factors.device != x.device:
        raise RuntimeError(
            f"fastgan::{op}: factors is {dtype_of(factors)} on {factors.device}, expected {work} on {x.device}, as {name}"
        )


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


def rows_lie(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Do the rows of x lie as strides say? Its samples may be anywhere."""
    return all(a == b or size == 1 for a, b, size in zip(x.stride()[1:], strides[1:], x.shape[1:], strict=True))


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with its rows laid out as those of ``like``, copied if they aren't."""
    return x if rows_lie(x, like.stride()) else torch.empty_like(like).copy_(x)


def delivered(result: Tensor, work: Tensor) -> Tensor:
    return result if work is result else result.copy_(work)


def pieces_of(x: Tensor, piece: int) -> tuple[int, int]:
    """Elements of a row, and into how many pieces it is cut."""
    length = x[0].numel() if x.shape[0] else 0
    return length, max(1, triton.cdiv(length, piece))
