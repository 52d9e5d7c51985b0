r"""Spectral normalisation (Miyato et al. 2018, "Spectral Normalization for GANs"): the specification.

A weight of any rank is the matrix :math:`W` (h, w) that has its dimension ``dim`` as rows and the others, in order, as columns.
One power iteration, in the order of torch's parametrization, or with ``v_first`` in that of torch's hook::

    u <- n(W v),    v <- n(W^T u)          n(x) = x / max(|x|, eps)
    v <- n(W^T u),  u <- n(W v)

Then, with u and v constant, as in torch::

    sigma      =  u^T W v
    normalised =  s W                      s = target / sigma; with at_most, 1 where sigma <= target
    backward   dW = s G + s' <G, W> u v^T  s' = ds/dsigma = -target / sigma^2, or 0 where s is held at 1

Two rules where torch leaves NaN behind. sigma = 0 gives s = 1: a weight of zeros stays zero and its gradient passes. And an
iteration is not taken where a vector it yields is zero or not finite: u and v stay what they were, so that neither a weight
of zeros nor one that has diverged destroys them (the normalised weight does show NaN then).

``spectral_norm_sigma`` does without the normalised weight, and so without writing it.

u, v and sigma are float32 for weights of 16 bits and of the weight's dtype otherwise. ``spectral_norm_multi`` does the same for
a list of weights in one call, sigma being one tensor of all.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgan._dtypes import accumulate_dtype
from fastgan.ops._declare import declare


def _matrix(x: Tensor, dim: int) -> Tensor:
    rows_first = x.to(accumulate_dtype(x.dtype)).movedim(dim, 0)
    return rows_first.flatten(1) if x.dim() > 1 else rows_first.unsqueeze(1)


def _outer(u: Tensor, v: Tensor, shape, dim: int) -> Tensor:
    """u v^T in the weight's shape."""
    rest = [size for i, size in enumerate(shape) if i != dim % len(shape)]
    return torch.outer(u, v).view(u.shape[0], *rest).movedim(0, dim)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(eps)


def _usable(x: Tensor) -> Tensor:
    return x.isfinite().all() & x.any()


def _iterate(matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float, v_first: bool) -> tuple[Tensor, Tensor]:
    for _ in range(n_power_iterations):
        if v_first:
            new_v = _unit(matrix.T @ u, eps)
            new_u = _unit(matrix @ new_v, eps)
        else:
            new_u = _unit(matrix @ v, eps)
            new_v = _unit(matrix.T @ new_u, eps)
        usable = _usable(new_u) & _usable(new_v)
        u, v = torch.where(usable, new_u, u), torch.where(usable, new_v, v)
    return u, v


def _scale(sigma: Tensor, target: float, at_most: bool) -> tuple[Tensor, Tensor, Tensor]:
    """s, ds/dsigma and its derivative."""
    active = ~(sigma <= target) if at_most else sigma != 0
    safe = torch.where(active, sigma, 1.0)
    s = target / safe
    return torch.where(active, s, 1.0), torch.where(active, -s / safe, 0.0), torch.where(active, 2 * s / safe / safe, 0.0)


def sigma_reference(weight, u, v, dim, n_power_iterations, eps, v_first):
    matrix = _matrix(weight, dim)
    new_u, new_v = _iterate(matrix, u, v, n_power_iterations, eps, v_first)
    return new_u.clone(), new_v.clone(), new_u @ (matrix @ new_v)


def forward_reference(weight, u, v, dim, n_power_iterations, eps, v_first, target, at_most):
    new_u, new_v, sigma = sigma_reference(weight, u, v, dim, n_power_iterations, eps, v_first)
    s, _, _ = _scale(sigma, target, at_most)
    return torch.empty_like(weight).copy_(weight.to(sigma.dtype) * s), new_u, new_v, sigma


def backward_reference(grad, weight, u, v, sigma, dim, target, at_most):
    g, w = grad.to(sigma.dtype), weight.to(sigma.dtype)
    s, ds, _ = _scale(sigma, target, at_most)
    return torch.empty_like(weight).copy_(s * g + (ds * (g * w).sum()) * _outer(u, v, weight.shape, dim))


def one_by_one(forward, backward):
    """The kernels on lists of weights that call those on one weight in turn."""

    def multi(weights, u, v, dims, *options):
        each = [forward(*values, *options) for values in zip(weights, u, v, dims, strict=True)]
        normalised, new_u, new_v, sigma = zip(*each, strict=True)
        return list(normalised), list(new_u), list(new_v), torch.stack(sigma)

    def multi_backward(grads, weights, u, v, sigma, dims, *options):
        return [backward(*values, *options) for values in zip(grads, weights, u, v, sigma, dims, strict=True)]

    return multi, multi_backward


multi_reference, multi_backward_reference = one_by_one(forward_reference, backward_reference)


def _like_outputs(weight, u, v, *_):
    return torch.empty_like(weight), torch.empty_like(u), torch.empty_like(v), u.new_empty(())


def _like_outputs_multi(weights, u, v, *_):
    return [[torch.empty_like(x) for x in xs] for xs in (weights, u, v)] + [u[0].new_empty(len(u))]


# Derivatives in plain torch but for the first, which is an operator: differentiable as often as one likes.


def _tangent(t, weight, u, v, sigma, dim, target, at_most):
    """Tangents of normalised and of sigma along t: also the gradient of <x, backward> with respect to grad, for t = x."""
    along = u @ (_matrix(t, dim) @ v)
    s, ds, _ = _scale(sigma, target, at_most)
    return (s * t.to(sigma.dtype) + (ds * along) * weight.to(sigma.dtype)).to(weight.dtype), along


def _sigma_gradient(grad_sigma, weight, u, v, dim):
    return (grad_sigma * _outer(u, v, weight.shape, dim)).to(weight.dtype)


def _gradient(grad, grad_sigma, weight, u, v, sigma, dim, target, at_most):
    """With respect to the weight, of both differentiable results; either gradient may be None."""
    of_weight = None if grad is None else backward(grad, weight, u, v, sigma, dim, target, at_most)
    if grad_sigma is None:
        return of_weight
    of_sigma = _sigma_gradient(grad_sigma, weight, u, v, dim)
    return of_sigma if of_weight is None else of_weight + of_sigma


def _second_gradients(x, grad, weight, u, v, sigma, dim, target, at_most):
    """Of <x, backward> with respect to grad, weight and sigma."""
    of_grad, along = _tangent(x, weight, u, v, sigma, dim, target, at_most)
    x, g, w = (y.to(sigma.dtype) for y in (x, grad, weight))
    _, ds, dds = _scale(sigma, target, at_most)
    return of_grad, (ds * along * g).to(weight.dtype), ds * (x * g).sum() + dds * along * (g * w).sum()


def _forward_setup(ctx, inputs, output):
    ctx.options = inputs[3], *inputs[7:]
    saved = inputs[0], *output[1:]
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, grad, _u, _v, grad_sigma):
    return _gradient(grad, grad_sigma, *ctx.saved_tensors, *ctx.options), *(None,) * 8


def _forward_jvp(ctx, t, *_):
    normalised, sigma = _tangent(t, *ctx.saved_tensors, *ctx.options)
    return normalised, None, None, sigma


def _backward_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.save_for_forward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward_backward(ctx, x):
    of_grad, of_weight, of_sigma = _second_gradients(x, *ctx.saved_tensors, *ctx.options)
    return of_grad, of_weight, None, None, of_sigma, None, None, None


def _backward_jvp(ctx, t_grad, t_weight, _u, _v, t_sigma, *_):
    grad, weight, u, v, sigma = ctx.saved_tensors
    dim, target, at_most = ctx.options
    g, w = grad.to(sigma.dtype), weight.to(sigma.dtype)
    s, ds, dds = _scale(sigma, target, at_most)
    inner = (g * w).sum()
    direct, along = torch.zeros_like(g), torch.zeros_like(sigma)  # the tangent is direct + along u v^T
    if t_grad is not None:
        direct, along = direct + s * t_grad, along + ds * (t_grad * w).sum()
    if t_weight is not None:
        along = along + ds * (g * t_weight).sum()
    if t_sigma is not None:
        direct, along = direct + t_sigma * ds * g, along + t_sigma * dds * inner
    return (direct + along * _outer(u, v, weight.shape, dim)).to(weight.dtype)


def _sigma_setup(ctx, inputs, output):
    ctx.dim = inputs[3]
    saved = inputs[0], *output[:2]
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.mark_non_differentiable(*output[:2])


def _sigma_backward(ctx, _u, _v, grad_sigma):
    return _sigma_gradient(grad_sigma, *ctx.saved_tensors, ctx.dim), *(None,) * 6


def _sigma_jvp(ctx, t, *_):
    _, u, v = ctx.saved_tensors
    return None, None, u @ (_matrix(t, ctx.dim) @ v)


def _multi_setup(ctx, inputs, output):
    weights, dims = inputs[0], inputs[3]
    count = len(weights)
    ctx.dims, ctx.options = dims, inputs[7:]
    ctx.save_for_backward(*weights, *output[count:])
    ctx.save_for_forward(*weights, *output[count:])
    ctx.mark_non_differentiable(*output[count:-1])
    ctx.set_materialize_grads(False)


def _multi_saved(ctx):
    *vectors, sigma = ctx.saved_tensors
    count = len(vectors) // 3
    return vectors[:count], vectors[count : 2 * count], vectors[2 * count :], sigma


def _multi_gradients(grads, grad_sigma, weights, u, v, sigma, dims, options) -> list[Tensor | None]:
    """``_gradient`` for lists; any gradient may be None."""
    # A layer whose result went unused takes no part; what is left is one call again.
    used = [i for i, grad in enumerate(grads) if grad is not None]
    result: list[Tensor | None] = [None] * len(weights)
    if len(used) == len(weights):
        result = multi_backward(grads, weights, u, v, sigma, dims, *options)
    elif used:
        pick = lambda values: [values[i] for i in used]  # noqa: E731
        parts = multi_backward(pick(grads), pick(weights), pick(u), pick(v), sigma[used], pick(dims), *options)
        for i, part in zip(used, parts, strict=True):
            result[i] = part
    if grad_sigma is not None:
        for i, weight in enumerate(weights):
            part = _sigma_gradient(grad_sigma[i], weight, u[i], v[i], dims[i])
            result[i] = part if result[i] is None else result[i] + part
    return result


def _multi_backward(ctx, *grads_out):
    grads, grad_sigma = grads_out[: len(ctx.dims)], grads_out[-1]
    of_weights = _multi_gradients(grads, grad_sigma, *_multi_saved(ctx), ctx.dims, ctx.options)
    return of_weights, [None] * len(grads), [None] * len(grads), *(None,) * 6


def _multi_jvp(ctx, tangents, *_):
    weights, u, v, sigma = _multi_saved(ctx)
    tangents = [torch.zeros_like(w) if t is None else t for t, w in zip(tangents, weights, strict=True)]
    pairs = [_tangent(*each, *ctx.options) for each in zip(tangents, weights, u, v, sigma, ctx.dims, strict=True)]
    normalised, along = zip(*pairs, strict=True)
    return *normalised, *(None,) * (2 * len(weights)), torch.stack(along)


def _multi_backward_setup(ctx, inputs, output):
    grads, weights, u, v, sigma, ctx.dims, *ctx.options = inputs
    ctx.save_for_backward(*grads, *weights, *u, *v, sigma)


def _multi_backward_backward(ctx, *xs):
    *lists, sigma = ctx.saved_tensors
    count = len(xs)
    grads, weights, u, v = (lists[i * count : (i + 1) * count] for i in range(4))
    each = [_second_gradients(*values, *ctx.options) for values in zip(xs, grads, weights, u, v, sigma, ctx.dims, strict=True)]
    of_grads, of_weights, of_sigma = zip(*each, strict=True)
    return list(of_grads), list(of_weights), [None] * count, [None] * count, torch.stack(of_sigma), None, None, None


_OPTIONS = "float target, bool at_most"
_STEPS = "int n_power_iterations, float eps, bool v_first"
_ITERATION = f"{_STEPS}, {_OPTIONS}"

forward = declare(
    f"spectral_norm(Tensor weight, Tensor u, Tensor v, int dim, {_ITERATION}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=forward_reference,
    fake=_like_outputs,
    setup_context=_forward_setup,
    backward=_forward_backward,
    jvp=_forward_jvp,
)
sigma_alone = declare(
    f"spectral_norm_sigma(Tensor weight, Tensor u, Tensor v, int dim, {_STEPS}) -> (Tensor, Tensor, Tensor)",
    reference=sigma_reference,
    fake=lambda weight, u, v, *_: _like_outputs(weight, u, v)[1:],
    setup_context=_sigma_setup,
    backward=_sigma_backward,
    jvp=_sigma_jvp,
)
backward = declare(
    f"spectral_norm_backward(Tensor grad, Tensor weight, Tensor u, Tensor v, Tensor sigma, int dim, {_OPTIONS}) -> Tensor",
    reference=backward_reference,
    fake=lambda grad, weight, *_: torch.empty_like(weight),
    setup_context=_backward_setup,
    backward=_backward_backward,
    jvp=_backward_jvp,
)
multi = declare(
    f"spectral_norm_multi(Tensor[] weights, Tensor[] u, Tensor[] v, int[] dims, {_ITERATION})"
    " -> (Tensor[], Tensor[], Tensor[], Tensor)",
    reference=multi_reference,
    fake=_like_outputs_multi,
    setup_context=_multi_setup,
    backward=_multi_backward,
    jvp=_multi_jvp,
)
multi_backward = declare(
    "spectral_norm_multi_backward(Tensor[] grads, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, int[] dims, "
    f"{_OPTIONS}) -> Tensor[]",
    reference=multi_backward_reference,
    fake=lambda grads, weights, *_: [torch.empty_like(weight) for weight in weights],
    setup_context=_multi_backward_setup,
    backward=_multi_backward_backward,
)


def _plain_eager() -> bool:
    """Nothing is active that has to see the operators themselves."""
    return not (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
    )


# What layers call. autograd's time per tensor is what small layers take, so in plain eager mode it gets the normalised weights
# alone: not u, v and sigma, which no layer differentiates. Those are constants that nothing else refers to, so backward
# finds them on ctx: save_for_backward would only wrap them, and take them out again.


class _One(torch.autograd.Function):
    @staticmethod
    def forward(ctx, computed, options, weight):
        normalised, *ctx.constants = computed
        ctx.options = options
        ctx.save_for_backward(weight)
        return normalised

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        u, v, sigma = ctx.constants
        if torch.is_grad_enabled() or not _plain_eager():  # to be differentiated in turn: sigma depends on the weight
            sigma = u @ (_matrix(weight, ctx.options[0]) @ v)
            return None, None, backward(grad, weight, u, v, sigma, *ctx.options)
        with torch._C._AutoDispatchBelowAutograd():
            return None, None, backward(grad, weight, u, v, sigma, *ctx.options)


class _Many(torch.autograd.Function):
    @staticmethod
    def forward(ctx, computed, dims, options, *weights):
        normalised, *ctx.constants = computed
        ctx.dims, ctx.options = dims, options
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        return tuple(normalised)

    @staticmethod
    def backward(ctx, *grads):
        weights, (u, v, sigma) = ctx.saved_tensors, ctx.constants
        if torch.is_grad_enabled() or not _plain_eager():
            each = [a @ (_matrix(w, dim) @ b) for w, a, b, dim in zip(weights, u, v, ctx.dims, strict=True)]
            of_weights = _multi_gradients(grads, None, weights, u, v, torch.stack(each), ctx.dims, ctx.options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                of_weights = _multi_gradients(grads, None, weights, u, v, sigma, ctx.dims, ctx.options)
        return None, None, None, *of_weights


# Function.apply minus its look for torch.func transforms
_apply_one, _apply_many = (super(torch.autograd.Function, function).apply for function in (_One, _Many))


def _for_compiler(weight, u, v, dim, n_power_iterations, eps, v_first, target, at_most):
    """The compiler fuses a product with what uses it and with changes of layout, and its derivative likewise: an operator, it
    would be a pass over the weight of its own each time. The power iteration is what it can't do in one pass."""
    u, v, sigma = sigma_alone(weight, u, v, dim, n_power_iterations, eps, v_first)
    active = ~(sigma <= target) if at_most else sigma != 0
    # A quotient's derivative is of what came out, which has the layout of its gradient.
    return (weight.to(sigma.dtype) / torch.where(active, sigma / target, 1.0)).to(weight.dtype), u, v, sigma


def normalise_one(weight: Tensor, u: Tensor, v: Tensor, dim: int, *iteration) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``forward`` with a sigma that is a constant."""
    if not _plain_eager():
        *found, sigma = (_for_compiler if torch.compiler.is_compiling() else forward)(weight, u, v, dim, *iteration)
        return *found, sigma.detach()
    with torch._C._AutoDispatchBelowAutograd():
        computed = forward(weight, u, v, dim, *iteration)
    if weight.requires_grad and torch.is_grad_enabled():
        return _apply_one(computed, (dim, *iteration[3:]), weight), *computed[1:]
    return computed


def normalise_many(weights: list[Tensor], u: list[Tensor], v: list[Tensor], dims: list[int], *iteration):
    """(normalised, u, v), lists: ``multi`` without sigma."""
    if not _plain_eager():
        return multi(weights, u, v, dims, *iteration)[:3]
    with torch._C._AutoDispatchBelowAutograd():
        computed = multi(weights, u, v, dims, *iteration)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*weights):
        return _apply_many(computed, dims, iteration[3:], *weights), *computed[1:3]
    return computed[:3]
