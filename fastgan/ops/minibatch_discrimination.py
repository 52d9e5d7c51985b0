r"""Minibatch discrimination (Salimans et al. 2016, "Improved Techniques for Training GANs", section 3.2): the specification.

With :math:`e_{ijk} = \exp(-\lVert m_{ik} - m_{jk} \rVert_1)` and :math:`s_{ijkd} = \operatorname{sign}(m_{ikd} - m_{jkd})`,
``sign(0) = 0``, all operators work on ``m`` of shape (B, K, D)::

    forward          f_ik    =  sum_j e_ijk                               j = i counts only with self_term
    backward         dm_ikd  = -sum_j (g_ik + g_jk) e_ijk s_ijkd          g: gradient of f, (B, K)
    jvp              t'_ik   = -sum_j e_ijk p_ijk                         t: tangent of m; p_ijk = sum_d s_ijkd (t_ikd - t_jkd)
    double_backward  gg_ik   =  jvp(v, m)_ik                              v: gradient of dm, (B, K, D)
                     gm_ikd  =  sum_j (g_ik + g_jk) e_ijk p_ijk s_ijkd    p of v

The Hessian of sum(g f) is symmetric, so ``gm`` is also the tangent of ``dm`` along ``v``: four operators close every
derivative a penalised critic asks for. The second derivative of the absolute value is taken as 0, as autograd does.

A row of ``m`` that holds Inf has distance Inf (contribution 0) to finite rows, NaN to itself and to equal infinities.
"""

import torch
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops._declare import declare, save_inputs

# Elements of one (rows, B, K, D) temporary of the reference: bounds its memory, big enough to hide the Python loop.
_CHUNK = 1 << 21


def _row_chunks(m: Tensor):
    """Yield (rows, difference, e) with difference (rows, B, K, D) = m_i - m_j and e (rows, B, K)."""
    x = m.to(accumulate_dtype(m.dtype))
    step = max(1, _CHUNK // max(1, x.numel()))
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        difference = x[rows, None] - x
        yield rows, difference, torch.exp(-difference.abs().sum(-1))


def _self_pairs(e: Tensor, rows: slice) -> Tensor:
    """View of the entries j = i of e (rows, B, K), as (K, rows)."""
    return e[:, rows].diagonal(dim1=0, dim2=1)


def _collect(chunks: list[Tensor], like: Tensor, shape) -> Tensor:
    return torch.cat(chunks).to(like.dtype) if chunks else like.new_empty(shape)


def forward_reference(m: Tensor, self_term: bool) -> Tensor:
    chunks = []
    for rows, _, e in _row_chunks(m):
        if not self_term:
            _self_pairs(e, rows).zero_()
        chunks.append(e.sum(1))
    return _collect(chunks, m, m.shape[:2])


def backward_reference(grad: Tensor, m: Tensor) -> Tensor:
    g = grad.to(accumulate_dtype(m.dtype))
    chunks = []
    for rows, difference, e in _row_chunks(m):
        weight = (g[rows, None] + g) * e
        chunks.append(-(weight.unsqueeze(-1) * difference.sign_()).sum(1))
    return _collect(chunks, m, m.shape)


def double_backward_reference(v: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    v, g = v.to(accumulate_dtype(m.dtype)), grad.to(accumulate_dtype(m.dtype))
    grads_grad, grads_m = [], []
    for rows, difference, e in _row_chunks(m):
        sign = difference.sign_()
        ep = e * (sign * (v[rows, None] - v)).sum(-1)
        grads_grad.append(-ep.sum(1))
        grads_m.append((((g[rows, None] + g) * ep).unsqueeze(-1) * sign).sum(1))
    return _collect(grads_grad, m, m.shape[:2]), _collect(grads_m, m, m.shape)


def jvp_reference(t: Tensor, m: Tensor) -> Tensor:
    t = t.to(accumulate_dtype(m.dtype))
    chunks = []
    for rows, difference, e in _row_chunks(m):
        p = (difference.sign_() * (t[rows, None] - t)).sum(-1)
        chunks.append(-(e * p).sum(1))
    return _collect(chunks, m, m.shape[:2])


def _like_output(m: Tensor) -> Tensor:
    return m.new_empty(m.shape[:2])


def _like_m(m: Tensor) -> Tensor:
    return m.new_empty(m.shape)


# Derivatives. Each formula calls the operators below, so it is differentiable in turn.


def _forward_backward(ctx, grad):
    (m,) = ctx.saved_tensors
    return backward(grad, m), None


def _forward_jvp(ctx, t, _):
    (m,) = ctx.saved_tensors
    return jvp(t, m)


def _backward_backward(ctx, v):
    grad, m = ctx.saved_tensors
    return double_backward(v, grad, m)


def _backward_jvp(ctx, t_grad, t_m):
    grad, m = ctx.saved_tensors
    along_grad = None if t_grad is None else backward(t_grad, m)
    along_m = None if t_m is None else double_backward(t_m, grad, m)[1]
    if along_grad is None or along_m is None:
        return along_m if along_grad is None else along_grad
    return along_grad + along_m


def _jvp_backward(ctx, h):
    t, m = ctx.saved_tensors
    return backward(h, m), double_backward(t, h, m)[1]


def _fold_into_kernels(info, in_dims, args):
    """Samples couple within a vmapped element only, kernels never: a vmapped axis is K times as many kernels."""
    folded = []
    for value, dim in zip(args, in_dims, strict=True):
        if isinstance(value, Tensor):
            value = value.unsqueeze(1).expand(-1, info.batch_size, *value.shape[1:]) if dim is None else value.movedim(dim, 1)
            value = value.flatten(1, 2)
        folded.append(value)
    return folded


def _vmap(op):
    def rule(info, in_dims, *args):
        outputs = op()(*_fold_into_kernels(info, in_dims, args))
        split = lambda output: output.unflatten(1, (info.batch_size, -1))  # noqa: E731
        if isinstance(outputs, Tensor):
            return split(outputs), 1
        return tuple(split(output) for output in outputs), (1,) * len(outputs)

    return rule


forward = declare(
    "minibatch_discrimination(Tensor m, bool self_term) -> Tensor",
    reference=forward_reference,
    fake=lambda m, self_term: _like_output(m),
    setup_context=save_inputs,
    backward=_forward_backward,
    jvp=_forward_jvp,
    vmap=_vmap(lambda: forward),
)
backward = declare(
    "minibatch_discrimination_backward(Tensor grad, Tensor m) -> Tensor",
    reference=backward_reference,
    fake=lambda grad, m: _like_m(m),
    setup_context=save_inputs,
    backward=_backward_backward,
    jvp=_backward_jvp,
    vmap=_vmap(lambda: backward),
)
jvp = declare(
    "minibatch_discrimination_jvp(Tensor t, Tensor m) -> Tensor",
    reference=jvp_reference,
    fake=lambda t, m: _like_output(m),
    setup_context=save_inputs,
    backward=_jvp_backward,
    vmap=_vmap(lambda: jvp),
)
double_backward = declare(
    "minibatch_discrimination_double_backward(Tensor v, Tensor grad, Tensor m) -> (Tensor, Tensor)",
    reference=double_backward_reference,
    fake=lambda v, grad, m: (_like_output(m), _like_m(m)),
    vmap=_vmap(lambda: double_backward),
)
