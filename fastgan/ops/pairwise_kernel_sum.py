r"""Sums of kernels between two sets of points, :math:`\sum_j k(x_i, y_j)`: the specification.

``x`` (N, D), ``y`` (M, D); ``bandwidths`` s and ``weights`` w, both (n,), are constants. A kernel is k = sum_b w_b k_b with::

    kernel               k_b                                    slope h_b                          direction u_ij
    laplacian            exp(-||x - y||_1 / s)                  -k_b / s                           sign(x_i - y_j)
    gaussian             exp(-||x - y||^2 / (2 s^2))            -k_b / s^2                         x_i - y_j
    rational_quadratic   t^-a,  t = 1 + ||x - y||^2 / (2 a s^2) -t^(-a - 1) / s^2                  x_i - y_j
    energy               -||x - y|| / s                         -1 / (s ||x - y||), 0 at x = y     x_i - y_j
    polynomial           (x.y / s + offset)^a                   a / s (x.y / s + offset)^(a - 1)   y_j

where a is ``exponent``, and the derivative of k(x_i, y_j) in x_i is h_ij u_ij, h = sum_b w_b h_b. Four operators::

    forward         f_i  = sum_j k(x_i, y_j)               j = i is left out with exclude_diagonal
    backward        dx_i = sum_j (r_i + c_j) h_ij u_ij     r (N,), c (M,)
    with_gradient   f_i  and  sum_j h_ij u_ij              what the gradient of f_i in x_i is, from one pass over the pairs
    backward_both   dx_i = sum_j g_i h_ij u_ij and dy_j = sum_i g_i h_ij u_ji, from one pass over the pairs

Every kernel is symmetric. With g the gradient of f that of x alone is therefore backward(g, 0, x, y), that of y alone
backward(0, g, y, x), and where x and y are one tensor it is backward(g, g, x, x). Where x alone has a gradient, g_i scales what
with_gradient has found already: nothing is computed twice.

Sign(0) is 0. Equal infinities have distance NaN, others Inf.
"""

import torch
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops._declare import declare

#: kernel -> p of the distance it is a function of; 0: of the scalar product
KERNELS = {"laplacian": 1, "gaussian": 2, "rational_quadratic": 2, "energy": 2, "polynomial": 0}

# Elements of one temporary of the reference: bounds its memory, big enough to hide the Python loop.
_CHUNK = 1 << 21


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both minus the mean of y's finite values: what matrix products cancel is then of the size of the distances."""
    mean = torch.where(y.isfinite(), y, 0).sum(0) / max(1, y.shape[0])
    return x - mean, y - mean


def _similarity(x: Tensor, y: Tensor, kernel: str) -> Tensor:
    """What the kernel is a function of, (N, M): ||x - y||_1, ||x - y|| or x.y, distances from differences."""
    p = KERNELS[kernel]
    return torch.cdist(x, y, p=p, compute_mode="donot_use_mm_for_euclid_dist") if p else x @ y.T


def _value(q: Tensor, kernel: str, s: Tensor, exponent: float, offset: float) -> Tensor:
    if kernel == "laplacian":
        return torch.exp(q / -s)
    if kernel == "gaussian":
        return torch.exp((q / s).square() * -0.5)
    if kernel == "rational_quadratic":
        return (1 + (q / s).square() / (2 * exponent)).pow(-exponent)
    if kernel == "energy":
        return q / -s
    return (q / s + offset).pow(exponent)


def _slope(q: Tensor, kernel: str, s: Tensor, exponent: float, offset: float) -> Tensor:
    if kernel == "laplacian":
        return torch.exp(q / -s) / -s
    if kernel == "gaussian":
        return torch.exp((q / s).square() * -0.5) / -s.square()
    if kernel == "rational_quadratic":
        return (1 + (q / s).square() / (2 * exponent)).pow(-exponent - 1) / -s.square()
    if kernel == "energy":
        return torch.where(q == 0, 0.0, -1 / (s * q))
    return (q / s + offset).pow(exponent - 1) * (exponent / s)


def _tiles(x: Tensor, y: Tensor, function, bandwidths, weights, kernel, exponent, offset, exclude_diagonal, room: int):
    """Yield (rows, t) with t (rows, M) = sum_b w_b function of the tile's pairs; ``room``: elements that a pair takes."""
    step = max(1, _CHUNK // max(1, room * y.shape[0]))
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        q = _similarity(x[rows], y, kernel)
        total = torch.zeros_like(q)
        for s, w in zip(bandwidths.unbind(), weights.unbind(), strict=True):
            total += w * function(q, kernel, s, exponent, offset)
        if exclude_diagonal:
            total[:, rows].diagonal().zero_()
        yield rows, total


def forward_reference(x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal) -> Tensor:
    wide, others = (z.to(accumulate_dtype(x.dtype)) for z in (x, y))
    out = wide.new_empty(x.shape[0])
    for rows, k in _tiles(wide, others, _value, bandwidths, weights, kernel, exponent, offset, exclude_diagonal, 1):
        out[rows] = k.sum(1)
    return out.to(x.dtype)


def backward_reference(row, column, x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal) -> Tensor:
    row, column, wide, others = (z.to(accumulate_dtype(x.dtype)) for z in (row, column, x, y))
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    p = KERNELS[kernel]
    a, b = _centred(wide, others) if p == 2 else (wide, others)
    room = x.shape[1] if p == 1 else 1
    for rows, h in _tiles(wide, others, _slope, bandwidths, weights, kernel, exponent, offset, exclude_diagonal, room):
        h = h * (row[rows, None] + column)
        if p == 1:
            out[rows] = (h.unsqueeze(-1) * (a[rows, None] - b).sign_()).sum(1)
        elif p == 2:
            out[rows] = h.sum(1, keepdim=True) * a[rows] - h @ b
        else:
            out[rows] = h @ b
    return out.to(x.dtype)


def backward_both_reference(grad, x, y, *options) -> tuple[Tensor, Tensor]:
    return (
        backward_reference(grad, grad.new_zeros(y.shape[0]), x, y, *options),
        backward_reference(grad.new_zeros(y.shape[0]), grad, y, x, *options),
    )


def with_gradient_reference(x, y, *options) -> tuple[Tensor, Tensor]:
    work = accumulate_dtype(x.dtype)
    ones, zeros = x.new_ones(x.shape[0], dtype=work), x.new_zeros(y.shape[0], dtype=work)
    return forward_reference(x, y, *options), backward_reference(ones, zeros, x.to(work), y.to(work), *options)


def _setup_context(ctx, inputs, output):
    x, y, bandwidths, weights, *ctx.options = inputs
    ctx.one = x is y
    ctx.save_for_backward(x, y, bandwidths, weights)


def _gradients(grad, x, y, one: bool, wanted, options) -> tuple:
    if one:
        return backward(grad, grad, x, x, *options), None
    wanted_x, wanted_y, *_ = wanted
    if wanted_x and wanted_y:
        return backward_both(grad, x, y, *options)
    of_x = backward(grad, grad.new_zeros(y.shape[0]), x, y, *options) if wanted_x else None
    return of_x, backward(grad.new_zeros(y.shape[0]), grad, y, x, *options) if wanted_y else None


def _forward_backward(ctx, grad):
    x, y, *mixture = ctx.saved_tensors
    options = *mixture, *ctx.options
    return *_gradients(grad, x, y, ctx.one, ctx.needs_input_grad, options), *(None,) * len(options)


def _with_gradient_setup(ctx, inputs, output):
    _setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.gradient = output[1].detach()


def _with_gradient_backward(ctx, grad, _):
    x, y, *mixture = ctx.saved_tensors
    options = *mixture, *ctx.options
    if grad is None:
        of_x = of_y = None
    elif torch.is_grad_enabled() or ctx.one or ctx.needs_input_grad[1]:  # what was found is a constant to a second derivative
        of_x, of_y = _gradients(grad, x, y, ctx.one, ctx.needs_input_grad, options)
    else:
        of_x, of_y = (ctx.gradient * grad[:, None]).to(x.dtype), None
    return of_x, of_y, *(None,) * len(options)


_OPTIONS = "Tensor bandwidths, Tensor weights, str kernel, float exponent, float offset, bool exclude_diagonal"

forward = declare(
    f"pairwise_kernel_sum(Tensor x, Tensor y, {_OPTIONS}) -> Tensor",
    reference=forward_reference,
    fake=lambda x, *_: x.new_empty(x.shape[0]),
    setup_context=_setup_context,
    backward=_forward_backward,
)
backward = declare(
    f"pairwise_kernel_sum_backward(Tensor row, Tensor column, Tensor x, Tensor y, {_OPTIONS}) -> Tensor",
    reference=backward_reference,
    fake=lambda row, column, x, *_: x.new_empty(x.shape),
)
backward_both = declare(
    f"pairwise_kernel_sum_backward_both(Tensor grad, Tensor x, Tensor y, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=backward_both_reference,
    fake=lambda grad, x, y, *_: (x.new_empty(x.shape), y.new_empty(y.shape)),
)
with_gradient = declare(
    f"pairwise_kernel_sum_with_gradient(Tensor x, Tensor y, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=with_gradient_reference,
    fake=lambda x, *_: (x.new_empty(x.shape[0]), x.new_empty(x.shape, dtype=accumulate_dtype(x.dtype))),
    setup_context=_with_gradient_setup,
    backward=_with_gradient_backward,
)
