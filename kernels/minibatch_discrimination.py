"""Triton kernels of minibatch discrimination: the math is in fastgan/ops/minibatch_discrimination.py.

A program owns BLOCK_I samples i of one kernel k and streams all samples j past them in tiles of BLOCK_J. The differences
of a tile live in registers, one (BLOCK_I, BLOCK_J) matrix per component d (a tuple, so no padding of D to a power of
two), and each thread adds up its own j until one reduction at the end: no atomics, nothing of size B x B, and the same
bits on every run.

Layout: the kernels read m as (K, D, B). In (B, K, D) neighbouring lanes would sit K * D elements apart and a warp would
touch 32 cache lines per load, B / BLOCK_I times over; one transposed copy of O(BKD) makes every load of the O(B^2 K D)
work a single line, and takes any strides. Programs of one k run next to each other and find its D * B values in cache.
Outputs are written once, in the caller's order: the lines that a store leaves partly filled meet in L2.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels import tuning

_WARPS = 4
_BLOCK_J = 32  # lanes of a warp take 32 samples j, warps take different i: the reduction over j stays within a warp
_REGISTERS = 64  # of a thread, for values it keeps per row and component; tiles in flight take about as many again
_CHUNK = 16  # components that a program owns where all of D exceed that; it reads the others again for the distance


@triton.jit
def _place(n, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_I: tl.constexpr):
    """This program's samples i, its kernel k (64-bit: it scales every offset) and its first component."""
    blocks = tl.cdiv(n, BLOCK_I)
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    k = tl.program_id(0) // blocks
    if CHUNK == D:
        return i, k.to(tl.int64), 0
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    return i, (k // CHUNKS).to(tl.int64), k % CHUNKS * CHUNK


@triton.jit
def _load(x, index, k, first, n, D: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """Components first, first + 1, ... of the samples ``index``, as a tuple of CHUNK vectors; 0 past the ends."""
    components = ()
    for d in tl.static_range(CHUNK):
        inside = index < tl.where(first + d < D, n, 0)
        components += (tl.load(x + (k * D + first + d) * n + index, mask=inside, other=0).to(ACC),)
    return components


@triton.jit
def _subtract(rows, columns, CHUNK: tl.constexpr):
    differences = ()
    for d in tl.static_range(CHUNK):
        differences += (rows[d][:, None] - columns[d][None, :],)
    return differences


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)  # PTX compares into numbers; a choice takes predicates and selections


@triton.jit
def _signs(differences, CHUNK: tl.constexpr):
    signs = ()
    for d in tl.static_range(CHUNK):
        signs += (_sign(differences[d]),)
    return signs


@triton.jit
def _similarity(x, differences, i, j, k, n, D: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """e = exp(-||m_i - m_j||_1)."""
    distance = tl.zeros((i.shape[0], j.shape[0]), ACC)
    if CHUNK == D:
        for d in tl.static_range(D):
            distance += tl.abs(differences[d])
    else:
        for d in range(D):
            x_d = x + (k * D + d) * n
            x_i, x_j = tl.load(x_d + i, mask=i < n, other=0).to(ACC), tl.load(x_d + j, mask=j < n, other=0).to(ACC)
            distance += tl.abs(x_i[:, None] - x_j[None, :])
    return tl.exp(-distance)


@triton.jit
def _slope(x, t, signs, tangents, i, j, k, n, D: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """p = sum_d sign(m_i - m_j) (t_i - t_j)."""
    p = tl.zeros((i.shape[0], j.shape[0]), ACC)
    if CHUNK == D:
        columns = _load(t, j, k, 0, n, D, D, ACC)
        for d in tl.static_range(D):
            p += signs[d] * (tangents[d][:, None] - columns[d][None, :])
    else:
        for d in range(D):
            x_d, t_d = x + (k * D + d) * n, t + (k * D + d) * n
            x_i, x_j = tl.load(x_d + i, mask=i < n, other=0).to(ACC), tl.load(x_d + j, mask=j < n, other=0).to(ACC)
            t_i, t_j = tl.load(t_d + i, mask=i < n, other=0).to(ACC), tl.load(t_d + j, mask=j < n, other=0).to(ACC)
            p += _sign(x_i[:, None] - x_j[None, :]) * (t_i[:, None] - t_j[None, :])
    return p


@triton.jit
def _zeros(CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr):
    sums = ()
    for _ in tl.static_range(CHUNK):
        sums += (tl.zeros((BLOCK_I, BLOCK_J), ACC),)
    return sums


@triton.jit
def _add_signed(sums, weight, signs, CHUNK: tl.constexpr):
    updated = ()
    for d in tl.static_range(CHUNK):
        updated += (sums[d] + weight * signs[d],)
    return updated


@triton.jit
def _store_components(out, sums, scale, i, k, first, n, K, D: tl.constexpr, CHUNK: tl.constexpr):
    for d in tl.static_range(CHUNK):
        inside = i < tl.where(first + d < D, n, 0)
        tl.store(out + (i.to(tl.int64) * K + k) * D + first + d, scale * tl.sum(sums[d], 1), mask=inside)


@triton.jit
def forward_kernel(
    x, out, n, K, D: tl.constexpr, CHUNK: tl.constexpr, SELF: tl.constexpr, ACC: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    i, k, first = _place(n, CHUNK, CHUNK, BLOCK_I)  # nothing is kept per component: one program for all chunks
    rows = _load(x, i, k, first, n, D, CHUNK, ACC)
    total = tl.zeros((BLOCK_I, BLOCK_J), ACC)
    for start in range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        differences = _subtract(rows, _load(x, j, k, first, n, D, CHUNK, ACC), CHUNK)
        counts = (j < n)[None, :]
        if not SELF:
            counts = counts & (i[:, None] != j[None, :])
        total += tl.where(counts, _similarity(x, differences, i, j, k, n, D, CHUNK, ACC), 0.0)
    tl.store(out + i.to(tl.int64) * K + k, tl.sum(total, 1), mask=i < n)


@triton.jit
def backward_kernel(
    grad, x, out, n, K, grad_stride_b, grad_stride_k, D: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    i, k, first = _place(n, D, CHUNK, BLOCK_I)
    rows = _load(x, i, k, first, n, D, CHUNK, ACC)
    grad += k * grad_stride_k
    g_i = tl.load(grad + i.to(tl.int64) * grad_stride_b, mask=i < n, other=0).to(ACC)
    sums = _zeros(CHUNK, BLOCK_I, BLOCK_J, ACC)
    for start in range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        differences = _subtract(rows, _load(x, j, k, first, n, D, CHUNK, ACC), CHUNK)
        e = _similarity(x, differences, i, j, k, n, D, CHUNK, ACC)
        g_j = tl.load(grad + j.to(tl.int64) * grad_stride_b, mask=j < n, other=0).to(ACC)
        # The product is masked, not e: an infinite g_i times a masked 0 would be NaN.
        weight = tl.where((j < n)[None, :], (g_i[:, None] + g_j[None, :]) * e, 0.0)
        sums = _add_signed(sums, weight, _signs(differences, CHUNK), CHUNK)
    _store_components(out, sums, -1.0, i, k, first, n, K, D, CHUNK)


@triton.jit
def jvp_kernel(
    t, x, out, n, K, D: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    i, k, first = _place(n, CHUNK, CHUNK, BLOCK_I)
    rows = _load(x, i, k, first, n, D, CHUNK, ACC)
    tangents = _load(t, i, k, first, n, D, CHUNK, ACC)
    total = tl.zeros((BLOCK_I, BLOCK_J), ACC)
    for start in range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        differences = _subtract(rows, _load(x, j, k, first, n, D, CHUNK, ACC), CHUNK)
        e = _similarity(x, differences, i, j, k, n, D, CHUNK, ACC)
        p = _slope(x, t, _signs(differences, CHUNK), tangents, i, j, k, n, D, CHUNK, ACC)
        total += tl.where((j < n)[None, :], e * p, 0.0)
    tl.store(out + i.to(tl.int64) * K + k, -tl.sum(total, 1), mask=i < n)


@triton.jit
def double_backward_kernel(
    v, grad, x, out_grad, out_m, n, K, grad_stride_b, grad_stride_k,
    D: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    i, k, first = _place(n, D, CHUNK, BLOCK_I)
    rows = _load(x, i, k, first, n, D, CHUNK, ACC)
    tangents = _load(v, i, k, first, n, D, CHUNK, ACC)
    grad += k * grad_stride_k
    g_i = tl.load(grad + i.to(tl.int64) * grad_stride_b, mask=i < n, other=0).to(ACC)
    total = tl.zeros((BLOCK_I, BLOCK_J), ACC)
    sums = _zeros(CHUNK, BLOCK_I, BLOCK_J, ACC)
    for start in range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        differences = _subtract(rows, _load(x, j, k, first, n, D, CHUNK, ACC), CHUNK)
        e = _similarity(x, differences, i, j, k, n, D, CHUNK, ACC)
        signs = _signs(differences, CHUNK)
        p = _slope(x, v, signs, tangents, i, j, k, n, D, CHUNK, ACC)
        ep = tl.where((j < n)[None, :], e * p, 0.0)
        total += ep
        g_j = tl.load(grad + j.to(tl.int64) * grad_stride_b, mask=j < n, other=0).to(ACC)
        weight = tl.where((j < n)[None, :], (g_i[:, None] + g_j[None, :]) * ep, 0.0)
        sums = _add_signed(sums, weight, signs, CHUNK)
    if first == 0:  # every chunk's program has the total; one of them writes it
        tl.store(out_grad + i.to(tl.int64) * K + k, -tl.sum(total, 1), mask=i < n)
    _store_components(out_m, sums, 1.0, i, k, first, n, K, D, CHUNK)


def block_shape(B: int, K: int, D: int, vectors: int, programs: int = 1024) -> dict[str, int]:
    """Tile of a problem; ``vectors``: how many values a kernel keeps in registers per row and component.

    More rows per thread reuse each loaded j more often; fewer leave registers for more warps and make more programs of a
    small problem. As many rows as fit the registers, while ``programs`` remain (about eight per multiprocessor).
    """
    chunk = D if D * vectors <= _REGISTERS else _CHUNK
    rows = 8
    while rows > 1 and (rows * chunk * vectors > _REGISTERS or triton.cdiv(B, _WARPS * rows) * K < programs):
        rows //= 2
    return {"CHUNK": chunk, "BLOCK_I": _WARPS * rows, "BLOCK_J": _BLOCK_J, "num_warps": _WARPS}


@functools.lru_cache(maxsize=256)
def tiles(B: int, K: int, D: int, vectors: int, programs: int = 1024) -> list[dict[str, int]]:
    """The rule's tile, and others that may be faster: more or fewer rows per thread, and threads."""
    rule = block_shape(B, K, D, vectors, programs)
    others = [
        rule | {"BLOCK_I": warps * rows, "num_warps": warps}
        for warps in (2, 4, 8)
        for rows in (1, 2, 4, 8)
        if rows == 1 or rows * rule["CHUNK"] * vectors <= 2 * _REGISTERS
    ]
    return [rule, *(tile for tile in others if tile != rule)]


def _transposed(x: Tensor) -> Tensor:
    """Copy of x (B, K, D) as (K, D, B)."""
    return x.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def _check(m: Tensor, tensor: Tensor, dims: int) -> None:
    """Kernels trust these: another shape would have them read past the end."""
    if (tensor.shape, tensor.dtype, tensor.device) != (m.shape[:dims], m.dtype, m.device):
        raise RuntimeError(
            f"minibatch discrimination: a gradient or tangent has shape {tuple(tensor.shape)}, {tensor.dtype} on "
            f"{tensor.device}, expected {tuple(m.shape[:dims])}, {m.dtype} on {m.device}"
        )


def _launch(kernel, m: Tensor, *arguments, vectors: int, per_component: bool, **constants) -> None:
    B, K, D = m.shape
    accumulate = tl.float64 if m.dtype == torch.float64 else tl.float32

    def run(tile):
        chunks = triton.cdiv(D, tile["CHUNK"]) if per_component else 1
        grid = (triton.cdiv(B, tile["BLOCK_I"]) * K * chunks,)
        kernel[grid](*arguments, D=D, ACC=accumulate, **tile, **constants)

    with torch.cuda.device_of(m):
        choice = tiles(B, K, D, vectors, 1024 if m.is_cuda else 1)  # the interpreter runs one program at a time
        tuning.launch(kernel, (B, K, D, m.dtype), m.device, choice, run)


def minibatch_discrimination(m: Tensor, self_term: bool) -> Tensor:
    B, K, _ = m.shape
    out = m.new_empty(B, K)
    if m.numel() == 0:  # D = 0: every distance is 0
        return out.fill_(B if self_term else B - 1)
    _launch(forward_kernel, m, _transposed(m), out, B, K, vectors=1, per_component=False, SELF=self_term)
    return out


def minibatch_discrimination_backward(grad: Tensor, m: Tensor) -> Tensor:
    _check(m, grad, 2)
    B, K, _ = m.shape
    out = m.new_empty(m.shape)
    if m.numel():
        _launch(backward_kernel, m, grad, _transposed(m), out, B, K, *grad.stride(), vectors=2, per_component=True)
    return out


def minibatch_discrimination_jvp(t: Tensor, m: Tensor) -> Tensor:
    _check(m, t, 3)
    B, K, _ = m.shape
    out = m.new_empty(B, K)
    if m.numel() == 0:
        return out.zero_()
    _launch(jvp_kernel, m, _transposed(t), _transposed(m), out, B, K, vectors=3, per_component=False)
    return out


def minibatch_discrimination_double_backward(v: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    _check(m, grad, 2)
    _check(m, v, 3)
    B, K, _ = m.shape
    out_grad, out_m = m.new_empty(B, K), m.new_empty(m.shape)
    if m.numel() == 0:
        return out_grad.zero_(), out_m
    _launch(
        double_backward_kernel, m, _transposed(v), grad, _transposed(m), out_grad, out_m, B, K, *grad.stride(),
        vectors=4, per_component=True,
    )  # fmt: skip
    return out_grad, out_m
