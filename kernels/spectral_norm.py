"""Spectral norm in Triton: fastgan/ops/spectral_norm.py has the mathematics.

A weight is taken as rows: where ``dim`` is not its first dimension a permuted copy is. Three kernels: W x (by rows), W^T x (by
columns), and the elementwise s A + k u v^T. Whatever needs a whole vector, norms and sigma, is plain torch between them, on
the device: nothing waits for the host.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops.spectral_norm import _scale, _usable, one_by_one


@triton.jit
def _row_products(w, x, out, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out_r = sum_c w_rc x_c."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_C], out.dtype.element_ty)
    for start in range(0, columns, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        value = tl.load(w + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0).to(out.dtype.element_ty)
        total += value * tl.load(x + c, mask=c < columns, other=0)[None, :]
    tl.store(out + r, tl.sum(total, 1), mask=r < rows)


@triton.jit
def _column_products(w, x, out, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out_c = sum_r w_rc x_r."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], out.dtype.element_ty)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        value = tl.load(w + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0).to(out.dtype.element_ty)
        total += value * tl.load(x + r, mask=r < rows, other=0)[:, None]
    tl.store(out + c, tl.sum(total, 0), mask=c < columns)


@triton.jit
def _combine(a, s, k, u, v, out, rows, columns, RANK_ONE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = s a + k u v^T, the second term with RANK_ONE only; s and k are scalars in memory."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = r.to(tl.int64)[:, None] * columns + c[None, :]
    value = tl.load(a + at, mask=inside, other=0).to(u.dtype.element_ty) * tl.load(s)
    if RANK_ONE:
        left = tl.load(k) * tl.load(u + r, mask=r < rows, other=0)
        value += left[:, None] * tl.load(v + c, mask=c < columns, other=0)[None, :]
    tl.store(out + at, value, mask=inside)


def _blocks(rows: int, columns: int) -> dict[str, int]:
    return {
        "BLOCK_R": min(16, triton.next_power_of_2(max(1, rows))),
        "BLOCK_C": min(256, triton.next_power_of_2(max(1, columns))),
    }


def _matrix(x: Tensor, dim: int) -> Tensor:
    rows_first = x.movedim(dim, 0)
    return rows_first.reshape(x.shape[dim], math.prod(rows_first.shape[1:])).contiguous()


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    (rows, columns), blocks = matrix.shape, _blocks(*matrix.shape)
    out = x.new_empty(rows)
    if rows:
        _row_products[(triton.cdiv(rows, blocks["BLOCK_R"]),)](matrix, x.contiguous(), out, rows, columns, **blocks)
    return out


def _transposed_times(matrix: Tensor, x: Tensor) -> Tensor:
    (rows, columns), blocks = matrix.shape, _blocks(*matrix.shape)
    out = x.new_empty(columns)
    if columns:
        _column_products[(triton.cdiv(columns, blocks["BLOCK_C"]),)](matrix, x.contiguous(), out, rows, columns, **blocks)
    return out


def _combined(a: Tensor, s: Tensor, k: Tensor, u: Tensor, v: Tensor, like: Tensor, dim: int, rank_one: bool) -> Tensor:
    """s a + k u v^T for a matrix, in the shape and layout of ``like``."""
    (rows, columns), blocks = a.shape, _blocks(*a.shape)
    out = torch.empty_like(a)
    if a.numel():
        grid = triton.cdiv(rows, blocks["BLOCK_R"]), triton.cdiv(columns, blocks["BLOCK_C"])
        _combine[grid](a, s, k, u.contiguous(), v.contiguous(), out, rows, columns, rank_one, **blocks)
    rest = [size for i, size in enumerate(like.shape) if i != dim % like.dim()]
    return torch.empty_like(like).copy_(out.view(rows, *rest).movedim(0, dim))


def _unit(x: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return (wide / torch.linalg.vector_norm(wide).clamp_min(eps)).to(x.dtype)


def _iterated(matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations, eps, v_first):
    """u, v and sigma."""
    for _ in range(n_power_iterations):
        if v_first:
            new_v = _unit(_transposed_times(matrix, u), eps)
            new_u = _unit(_times(matrix, new_v), eps)
        else:
            new_u = _unit(_times(matrix, v), eps)
            new_v = _unit(_transposed_times(matrix, new_u), eps)
        usable = _usable(new_u) & _usable(new_v)
        u, v = torch.where(usable, new_u, u), torch.where(usable, new_v, v)
    return u.clone(), v.clone(), u @ _times(matrix, v)


def spectral_norm_sigma(weight, u, v, dim, n_power_iterations, eps, v_first):
    return _iterated(_matrix(weight, dim), u, v, n_power_iterations, eps, v_first)


def spectral_norm(weight, u, v, dim, n_power_iterations, eps, v_first, target, at_most):
    matrix = _matrix(weight, dim)
    new_u, new_v, sigma = _iterated(matrix, u, v, n_power_iterations, eps, v_first)
    s, _, _ = _scale(sigma, target, at_most)
    return _combined(matrix, s, s, u, v, weight, dim, False), new_u, new_v, sigma


def spectral_norm_backward(grad, weight, u, v, sigma, dim, target, at_most):
    g, matrix = _matrix(grad, dim), _matrix(weight, dim)
    s, ds, _ = _scale(sigma, target, at_most)
    work = accumulate_dtype(weight.dtype)
    inner = (g.to(work) * matrix.to(work)).sum()
    return _combined(g, s, ds * inner, u, v, weight, dim, True)


spectral_norm_multi, spectral_norm_multi_backward = one_by_one(spectral_norm, spectral_norm_backward)
