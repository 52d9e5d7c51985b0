r"""Penalties on per-sample gradients: norms, value, and the derivative of the value. The specification.

``grads`` (N, ...) holds one gradient per sample. With :math:`q_i = \lVert g_i \rVert^2` and :math:`n_i = \sqrt{q_i}`::

    kind                penalty P                     factors c_i
    gradient_penalty    weight   mean e_i^2           2 weight e_i / (N n_i)     e = n - target; one_sided: max(0, n - target)
    zero_centered       weight/2 mean q_i             weight / N
    power               weight   mean n_i^power       weight power n_i^(power - 2) / N
    max                 weight   max q_i              2 weight / (how many share the largest q) where it is reached, else 0

    forward    (P, n, c, dP/dg)         dP/dg_i = c_i g_i
    backward   factors_i g_i            with c dP/dg, with other factors dn/dg and dc/dg: one product for all derivatives

Whoever wants a penalty wants its derivative too, and gets it while each gradient is still in cache.

A zero gradient has norm 0, factor 0 and derivative 0 where the textbook's norm has NaN. P, n and c are float32 for gradients of
16 bits and of the gradients' dtype otherwise; no samples have the penalty 0.
"""

import torch
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops._declare import declare, save_inputs

KINDS = ("gradient_penalty", "zero_centered", "power", "max")


def _rows(x: Tensor) -> Tensor:
    x = x.to(accumulate_dtype(x.dtype))
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _columns(per_sample: Tensor, like: Tensor) -> Tensor:
    """(N,) as a tensor that broadcasts over ``like`` (N, ...)."""
    return per_sample.view([-1] + [1] * (like.dim() - 1))


def _unless_zero(n: Tensor, value) -> Tensor:
    """``value`` of the norms, 0 for those that are 0."""
    zero = n == 0
    return torch.where(zero, 0.0, value(torch.where(zero, 1.0, n)))


def norms_of(q: Tensor) -> Tensor:
    """sqrt(q) whose derivative at 0 is 0 instead of infinite."""
    return _unless_zero(q, torch.sqrt)


def _penalty(q, n, kind, weight, target, one_sided, power):
    """P and c."""
    count = max(1, q.shape[0])
    if kind == "zero_centered":
        return q.sum() * (weight / 2 / count), _unless_zero(n, lambda n: torch.full_like(n, weight / count))
    if kind == "max":
        largest = q.amax() if q.numel() else q.sum()
        reached = q == largest
        shared = reached.to(q.dtype) / reached.sum().clamp_min(1)
        return largest * weight, _unless_zero(n, lambda _: shared * (2 * weight))
    if kind == "power":
        factors = _unless_zero(n, lambda n: n.pow(power - 2) * (power * weight / count))
        return n.pow(power).sum() * (weight / count), factors
    excess = (n - target).clamp_min(0) if one_sided else n - target
    return excess.square().sum() * (weight / count), _unless_zero(n, lambda n: excess / n * (2 * weight / count))


def forward_reference(grads, kind, weight, target, one_sided, power):
    if kind not in KINDS:
        raise ValueError(f"gradient_penalty: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    q = _rows(grads).square().sum(1)
    n = norms_of(q)
    penalty, factors = _penalty(q, n, kind, weight, target, one_sided, power)
    return penalty, n, factors, backward_reference(grads, factors)


def backward_reference(grads: Tensor, factors: Tensor) -> Tensor:
    scaled = grads.to(factors.dtype) * _columns(factors, grads)
    return torch.empty_like(grads).copy_(scaled)


# Derivatives: sums over a row, and the same product again.


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    return (_rows(a) * _rows(b)).sum(1)


def _slope(n: Tensor, kind, weight, target, one_sided, power) -> Tensor:
    """dc/dn / n, so that dc_i/dg_i = slope_i g_i."""
    count = max(1, n.shape[0])
    if kind == "power":
        return _unless_zero(n, lambda n: n.pow(power - 4) * (power * (power - 2) * weight / count))
    if kind == "gradient_penalty":
        slope = _unless_zero(n, lambda n: (2 * weight * target / count) / (n * n * n))
        return torch.where(n > target, slope, 0.0) if one_sided else slope
    return torch.zeros_like(n)


def _is_one(x: Tensor) -> bool:
    """Known to be 1 without waiting for a device and without a value entering somebody's trace."""
    plain = (
        type(x) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )
    return plain and x.device.type == "cpu" and not torch.is_grad_enabled() and x.item() == 1


def _forward_setup(ctx, inputs, output):
    ctx.form = inputs[1:]
    ctx.seed = output[3].detach()
    saved = inputs[0], output[1], output[2]
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, of_penalty, of_norms, of_factors, of_seed):
    grads, n, factors = ctx.saved_tensors
    seed, ctx.seed = ctx.seed, None  # handed out once: who gets a gradient may write to it
    if of_norms is of_factors is of_seed is None and seed is not None and _is_one(of_penalty):
        return seed, *(None,) * 5
    rows, direct = [], None
    if of_penalty is not None:
        rows.append(of_penalty * factors)
    if of_norms is not None:
        rows.append(of_norms * _unless_zero(n, torch.reciprocal))
    if of_factors is not None:
        rows.append(of_factors * _slope(n, *ctx.form))
    if of_seed is not None:
        rows.append(_row_dots(of_seed, grads) * _slope(n, *ctx.form))
        direct = backward(of_seed, factors)
    along = backward(grads, sum(rows[1:], rows[0])) if rows else None
    return along if direct is None else along + direct, *(None,) * 5


def _forward_jvp(ctx, t, *_):
    grads, n, factors = ctx.saved_tensors
    dots = _row_dots(t, grads)
    of_factors = dots * _slope(n, *ctx.form)
    of_seed = backward(t, factors) + backward(grads, of_factors)
    return (factors * dots).sum(), dots * _unless_zero(n, torch.reciprocal), of_factors, of_seed


def _backward_backward(ctx, v):
    grads, factors = ctx.saved_tensors
    return backward(v, factors), _row_dots(v, grads)


def _backward_jvp(ctx, t_grads, t_factors):
    grads, factors = ctx.saved_tensors
    parts = [] if t_grads is None else [backward(t_grads, factors)]
    if t_factors is not None:
        parts.append(backward(grads, t_factors))
    return sum(parts[1:], parts[0])


def _like_outputs(grads, *_):
    work = accumulate_dtype(grads.dtype)
    per_sample = grads.new_empty(grads.shape[:1], dtype=work)
    return grads.new_empty((), dtype=work), per_sample, torch.empty_like(per_sample), torch.empty_like(grads)


forward = declare(
    "gradient_penalty(Tensor grads, str kind, float weight, float target, bool one_sided, float power)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=forward_reference,
    fake=_like_outputs,
    setup_context=_forward_setup,
    backward=_forward_backward,
    jvp=_forward_jvp,
)
backward = declare(
    "gradient_penalty_backward(Tensor grads, Tensor factors) -> Tensor",
    reference=backward_reference,
    fake=lambda grads, factors: torch.empty_like(grads),
    setup_context=save_inputs,
    backward=_backward_backward,
    jvp=_backward_jvp,
)
