"""The other exact ways to a penalised gradient, and the inexact one.

``double_backward``: what eager PyTorch does, on a forward that exists already.
``jvp``: the penalty's gradient is that of the derivative of sum D along w = dPenalty/dg, held constant; forward mode
gives this derivative, and one ordinary backward, taken outside the dual level, its gradient. Works where an operation
has forward-mode but no second-order reverse derivatives.
``finite_difference``: the same derivative as a central difference. Needs first-order backward only; wrong on kinks.
"""

from functools import reduce
from operator import add

import torch
import torch.autograd.forward_ad as forward_ad

from fastgan._dtypes import HALF, accumulate_dtype

from . import second_order
from .analyse import Graph, analyse, op_name
from .forward_mode import WRONG_TANGENTS, Composed
from .reduction import penalty_value


def weighted_sum(scores, weights):
    """sum_k weights[k] * scores[k].sum(), in at least float32."""
    sums = ((s.float() if s.dtype in HALF else s).sum() for s in scores)
    return reduce(add, (s if w == 1.0 else s * w for s, w in zip(sums, weights, strict=False)))


def seed_like(score, value):
    """A cotangent of this value everywhere; beyond the dtype's range it is inf, which a GradScaler looks for, not an error."""
    return torch.full_like(score, value, dtype=accumulate_dtype(score.dtype)).to(score.dtype)


def input_gradient(forward, weights, scale=1.0, create_graph=False):
    """Gradient of the weighted sum of scores with respect to the input; float32 if scaled."""
    if create_graph and not forward.traced:
        second_order.note(forward.scores, [forward.x], forward.critic)
    scores, seeds = [], []
    for s, w in zip(forward.scores, weights, strict=False):
        if s.requires_grad:
            scores.append(s)
            seeds.append(seed_like(s, w * scale))
    g = None
    if scores:
        # allow_unused: a clearer error than autograd's
        (g,) = torch.autograd.grad(scores, forward.x, seeds, create_graph=create_graph, retain_graph=True, allow_unused=True)
    if g is None:
        raise RuntimeError("the critic's scores do not depend on its input: there is no gradient to penalise")
    return g.to(accumulate_dtype(g.dtype)) / scale if scale != 1.0 else g


def differentiable_penalty(forward, form, weights, scale=1.0):
    """(penalty, norms (N,)) with the double-backward graph attached."""
    refuse_first_order_only(forward)
    with torch.enable_grad():
        g = input_gradient(forward, weights, scale, create_graph=True)
        return penalty_value(g, form)


def first_order_only(forward):
    """Names of the graph's fused attention, whose kernels have no second derivative; '' if there are none."""
    nodes = forward.graph.nodes
    return ", ".join(sorted({n.name() for n in nodes if n.name().startswith("ScaledDotProduct")}))


def refuse_first_order_only(forward):
    """Raise RuntimeError for fused attention, of which PyTorch would say only later that it cannot be done."""
    fused = first_order_only(forward)
    if fused:
        raise RuntimeError(
            f"{fused} cannot be differentiated twice: run the critic under "
            'torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use method="jvp", which writes attention out and is exact, or '
            'method="finite_difference"'
        )


def gradients_of(outputs, leaves, scale=1.0, seeds=None):
    """{id(leaf): gradient} by ordinary backward of scalars, or of outputs with these cotangents, scaled already."""
    if not leaves or not any(o.requires_grad for o in outputs):
        return {}
    wanted = list(leaves.values())
    if seeds is None and scale != 1.0:
        outputs = [o * scale for o in outputs]
    grads = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
    return {
        id(leaf): (g if scale == 1.0 else g.to(torch.float32 if g.dtype in HALF else g.dtype) / scale)
        for leaf, g in zip(wanted, grads, strict=False)
        if g is not None
    }


def adversarial_term(scores, cotangents):
    """A scalar whose gradient is that of the loss: scores times the loss's derivative with respect to them."""
    return sum((s.float() if s.dtype in HALF else s).mul(c).sum() for s, c in zip(scores, cotangents, strict=False))


def directional_jvp(forward, w, weights):
    """d/de of the weighted sum of scores at x + e w by forward mode, differentiable with respect to the leaves."""
    with forward.replay() as run, torch.enable_grad():
        with forward_ad.dual_level(), Composed():
            scores = run(forward_ad.make_dual(forward.x.detach(), w))
            tangents = [forward_ad.unpack_dual(s).tangent for s in scores]
        slope = weighted_sum(*zip(*[(t, k) for t, k in zip(tangents, weights, strict=False) if t is not None], strict=False))
    if slope.grad_fn is not None:
        wrong = {node.name() for node in Graph([slope]).nodes if op_name(node.name()) in WRONG_TANGENTS}
        if wrong:
            raise RuntimeError(
                f"forward mode through {', '.join(sorted(wrong))} has wrong gradients in PyTorch, and this call could "
                'not be replaced: use method="auto"'
            )
    return slope


def refuse_kinks(forward):
    """Raise ValueError if central differences are wrong, or cannot be judged, for this critic."""
    scores = [s for s in forward.scores if s.grad_fn is not None]
    plan = analyse(forward.graph, scores, torch.autograd.graph.get_gradient_edge(forward.x).node)
    if plan.kinks:
        raise ValueError(
            "finite differences are wrong for critics with kinks (relative errors of order 1): found "
            f'{", ".join(plan.kinks)}; use method="auto", or force=True if you know better'
        )
    if plan.opaque:
        raise ValueError(
            f"finite differences need a smooth critic and {', '.join(plan.opaque)} cannot be looked into; "
            'use method="auto", or force=True if you know that it is smooth'
        )


def difference_step(x, w):
    """h of a central difference in direction w: the cube root of the rounding unit balances truncation against
    cancellation; measured in units of the input's own size."""
    unit = torch.finfo(x.dtype if x.dtype not in HALF else torch.float32).eps ** (1 / 3)
    longest = w.flatten(1).norm(dim=1).amax()
    size = x.detach().flatten(1).float().norm(dim=1).mean().to(longest.dtype)
    return unit * size.clamp_min(1.0) / longest.clamp_min(torch.finfo(longest.dtype).tiny)


def directional_difference(forward, w, weights):
    """The derivative of :func:`directional_jvp` as a central difference; its graph is first order."""
    h = difference_step(forward.x, w)
    x = forward.x.detach()
    with forward.replay() as run, torch.enable_grad():
        ahead = run(x + (h * w).to(x.dtype))
        behind = run(x - (h * w).to(x.dtype))
    return (weighted_sum(ahead, weights) - weighted_sum(behind, weights)) / (2 * h.detach())


def refuse_wrong_slope(slope, expected):
    """Raise ValueError if the difference quotient disagrees with the derivative, which is known: <w, g>."""
    if bool((slope - expected).abs() > 0.02 * expected.abs() + torch.finfo(expected.dtype).tiny):
        raise ValueError(
            f"the difference quotient is {slope.item():.6g} where the derivative is {expected.item():.6g}: this critic "
            'is not smooth at the scale of the step (a mask such as x * (x > 0)?); use method="auto", or force=True'
        )
