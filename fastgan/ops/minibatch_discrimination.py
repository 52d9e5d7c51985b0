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
from fastgan.ops._closed import declare_closed

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


def _like_output(m: Tensor, *_) -> Tensor:
    return m.new_empty(m.shape[:2])


def _like_m(m: Tensor) -> Tensor:
    return m.new_empty(m.shape)


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


forward, backward, jvp, double_backward = declare_closed(
    "minibatch_discrimination",
    "bool self_term",
    derivative_options="",
    references=(forward_reference, backward_reference, jvp_reference, double_backward_reference),
    like_output=_like_output,
    like_input=_like_m,
    vmap=_vmap,
)
