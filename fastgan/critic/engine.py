"""Choosing and running a way to the gradients of one penalised forward."""

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from fastgan._dtypes import HALF

from . import fallback
from .analyse import Graph, Plan, Refused, analyse
from .forward import leaves_of, owner
from .passes import (
    SamplesCoupled,
    SharedPass,
    check_tangents,
    push_to_leaves,
    share_saved,
)
from .reduction import penalty_and_seed

METHODS = ("auto", "fused", "jvp", "finite_difference", "double_backward")
FUSED, DOUBLE = "fused", "double_backward"

_PLANS = weakref.WeakKeyDictionary()  # critic -> {signature: Plan}
_PLANS_PER_CRITIC = 64
_REPEATED = weakref.WeakKeyDictionary()  # critic -> could "auto" not do without repeating its forwards, the last time?
# critic -> {situation: [why each penalty is to take double backward, steps since that is believed; below 0: not yet]}
_REFUSED = weakref.WeakKeyDictionary()
_SURE, _BELIEVED = 3, 64  # steps until that is believed, and after which it is looked into again: a critic may change


# One penalty on a multilayer perceptron with fewer multiply-adds: what the shared pass saves in arithmetic (a sixth to a fifth)
# is less than what it costs in Python. Measured on CPU at 64 to 512 features and rows, where both meet at 18 to 24 million.
SLIGHT = 1 << 24
SLIGHT_SURE = 16  # steps of a kind that make it a training loop
SLIGHT_WHY = "so few multiply-adds that the shared pass would not pay; compile=True is faster than either"


@dataclass
class Gradients:
    """Finished gradients of one forward: value of the penalty, norms (N,), gradients by id(leaf), leaves by id."""

    penalty: torch.Tensor | None
    norms: torch.Tensor | None
    gradients: dict
    leaves: dict
    method: str
    why: str
    checks: list = field(default_factory=list)
    own: set | None = None  # keys whose gradient's memory is nobody else's

    def merge(self, other):
        """Add another forward's gradients to these, which are used up."""
        self.leaves.update(other.leaves)
        self.checks += other.checks
        if self.own is None:
            # autograd may hand one tensor to several leaves: only memory that occurs once may be added into
            pointers = [g.untyped_storage().data_ptr() for g in self.gradients.values()]
            self.own = {
                key
                for key, g in self.gradients.items()
                if g.is_contiguous() and pointers.count(g.untyped_storage().data_ptr()) == 1
            }
        for key in list(other.gradients):
            grad = other.gradients.pop(key)
            known = self.gradients.get(key)
            if known is not None and key in self.own and known.dtype == grad.dtype:
                known.add_(grad)
            else:
                self.gradients[key] = grad if known is None else known + grad
                if known is not None:
                    self.own.add(key)


def check_method(method):
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def may_repeat(critic, method):
    """Must a forward be recorded such that it can be run again? Under "auto" for a critic that is not known yet, too."""
    if method != "auto":
        return method in ("jvp", "finite_difference")
    anchor = owner(critic)
    return anchor is None or _REPEATED.get(anchor, True)


def _remember(critic, repeated):
    anchor = owner(critic)
    if anchor is not None:
        _REPEATED[anchor] = repeated


def remember_refusals(critic, situation, whys, sure=None):
    """A step took double backward for all its penalties, for reasons in the critic's graph, or might as well have; None: no.
    ``sure``: after how many such steps that is believed."""
    anchor = owner(critic)
    if anchor is not None:
        known = _REFUSED.setdefault(anchor, {})
        _, steps = known.pop(situation, (None, -(_SURE if sure is None else sure)))
        if whys is not None:
            known[situation] = [whys, steps + 1]
            if len(known) > _PLANS_PER_CRITIC:
                del known[next(iter(known))]


def refusals(critic, situation):
    """The reasons, where there is no use in looking for others; None where there may be."""
    anchor = owner(critic)
    known = None if anchor is None else _REFUSED.get(anchor, {}).get(situation)
    if known is None or known[1] < 0:
        return None
    known[1] += 1
    if known[1] > _BELIEVED:
        known[1] = -1
        return None
    return known[0]


def forward_mode_instead(forward):
    """Has "auto" to take forward mode where the shared pass is not allowed: why, or '' where double backward serves."""
    fused = fallback.first_order_only(forward)
    _remember(forward.critic, bool(fused))
    return fused and forward.snapshot and f"{fused} cannot be differentiated twice"


def plan_for(forward):
    """(graph, plan) of a recorded forward; the plan comes from the cache if this critic left the same graph before."""
    scores = [s for s in forward.scores if s.grad_fn is not None]
    graph = forward.graph
    x_node = get_gradient_edge(forward.x).node
    anchor = owner(forward.critic)
    if anchor is None:
        return graph, judge(graph, scores, x_node)
    plans = _PLANS.setdefault(anchor, OrderedDict())
    key = graph.signature(scores, forward.x)
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = judge(graph, scores, x_node)
        if len(plans) > _PLANS_PER_CRITIC:
            plans.popitem(last=False)
    else:
        plans.move_to_end(key)
    return graph, plan


def prepare(forward):
    """Look at a forward right after it ran, and let it give back what the shared pass will not need."""
    forward.prepared = graph, plan = plan_for(forward)
    if plan.refusal is None:
        share_saved(graph, plan)
        _remember(forward.critic, False)
    return graph, plan


def judge(graph, scores, x_node):
    """A fresh :class:`Plan` of a graph, also refusing saved tensors that are packed by somebody else's hooks."""
    plan = analyse(graph, scores, x_node)
    if plan.refusal is None:
        for ins in plan.instructions:
            node = graph.nodes[ins.position]
            for name in ins.rule.saves:
                raw = getattr(node, "_raw_saved_" + name, None)
                if raw is not None and getattr(raw, "unpack_hook", None) is not None:
                    plan.refusal = "saved tensors are recomputed or moved by hooks (activation checkpointing)"
                    return plan
    return plan


def forget_plans(critic=None):
    """Drop the cached proofs of one critic, or of all."""
    for known in (_PLANS, _REFUSED):
        known.clear() if critic is None else known.pop(owner(critic), None)


def sample_factor(cotangents, weights, scores, always_per_sample=False, checks=None):
    """s with dLoss/dscore = s_i * weight for every score of sample i: None, a float if s is the same for all, or (N,).

    Raises Refused where the loss's derivative differs between a sample's scores: then one cotangent cannot serve both
    the loss and the penalty. ``always_per_sample``: (N,) in any case. ``checks``: where values cannot be read
    now, a list that receives (bool tensor, message) instead.
    """
    if cotangents is None:
        return None
    ratios = [c.detach() / w for c, w in zip(cotangents, weights, strict=False)]
    ratios = [r.float() if r.dtype in HALF else r for r in ratios]
    if ratios[0].device.type == "cpu" and not always_per_sample:
        lowest, highest = min(r.min() for r in ratios).item(), max(r.max() for r in ratios).item()
        if lowest == highest:
            return lowest
    n = scores[0].shape[0] if scores[0].dim() else 1
    if any(s.dim() == 0 or s.shape[0] != n for s in scores):
        raise Refused("the scores' first dimension is not the batch")
    s = ratios[0].reshape(n, -1)[:, 0]
    if len(ratios) > 1 or ratios[0].numel() != n:
        room = 4 * torch.finfo(s.dtype).eps
        why = "the loss's derivative differs between the scores of one sample (patches or outputs)"
        for r in ratios:
            alike = ~((r.reshape(n, -1) - s[:, None]).abs() > room * s[:, None].abs()).any()  # NaN passes, and stays NaN
            if checks is not None:
                checks.append((alike, why))
            elif not bool(alike):
                raise Refused(why)
    return s


def shared_pass(forward, cotangents, form, weights, scale=1.0):
    """:class:`Gradients` by the shared pass; raises Refused, with nothing changed, where it is not allowed."""
    graph, plan = forward.prepared or prepare(forward)
    if plan.refusal is not None:
        raise Refused(plan.refusal)
    checks = []
    s = sample_factor(cotangents, weights, forward.scores, forward.always_per_sample, checks if forward.traced else None)
    if plan.coupled is not None and isinstance(s, torch.Tensor):
        raise Refused(plan.coupled)
    leaves = forward.leaves()
    run = SharedPass(forward, graph, plan, weights, scale)
    try:
        penalty, norms, run.seed, inner = penalty_and_seed(run.delta(), form)
        per_sample = isinstance(s, torch.Tensor)
        if per_sample:
            try:
                run.prove_layouts()
            except Refused as refused:
                if refused.lasting:
                    plan.coupled = str(refused)
                raise
        release = plan.trusted and not plan.value_dependent
        tangents = run.tangents(s, release)
        per_sample = per_sample and inner.shape[0] == forward.samples
        told = True
        if any(t is not None for t in tangents):
            fine, judged, tolerance = check_tangents(tangents, weights, inner, per_sample, run.up)
            message = (
                f"samples interact in a way that depends on values: the scores' change along the penalty's direction "
                f"is off by more than {tolerance:g}"
            )
            if forward.traced or fine.device.type != "cpu":
                checks.append((fine, message + '; use method="double_backward"'))
            elif not bool(fine):
                if release:
                    plan.refusal = message
                    raise SamplesCoupled(message + '; call again, or use method="double_backward"')
                raise Refused(message)
            else:
                told = bool(judged)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, SamplesCoupled) or plan.trusted:
            raise
        plan.refusal = f"the shared pass failed on this graph ({type(error).__name__}: {error})"
        raise Refused(plan.refusal) from error
    if cotangents is not None:
        on_x = {ins.position for ins in plan.instructions}
        constant = [k for k, o in enumerate(forward.scores) if graph.index.get(o.grad_fn) not in on_x]
        run.add_outputs([(forward.scores[k], cotangents[k]) for k in constant])
    gradients = push_to_leaves(run.edges, leaves)
    plan.trusted = plan.trusted or told
    why = f"piecewise linear in the input; {len(plan.taps)} places where parameters enter"
    if cotangents is not None:
        why += "; samples proved independent" if isinstance(s, torch.Tensor) else "; one loss derivative for all scores"
    return Gradients(penalty, norms, gradients, leaves, FUSED, why, checks)


def double_backward(forward, cotangents, form, weights, scale=1.0, why="asked for"):
    """:class:`Gradients` by eager double backward on the same forward."""
    leaves = forward.leaves()
    penalty, norms = fallback.differentiable_penalty(forward, form, weights, scale)
    total = penalty
    if cotangents is not None:
        total = total + fallback.adversarial_term(forward.scores, cotangents)
    gradients = fallback.gradients_of([total], leaves, scale)
    return Gradients(penalty.detach(), norms.detach(), gradients, leaves, DOUBLE, why)


def directional(forward, cotangents, form, weights, method, scale=1.0, force=False):
    """:class:`Gradients` by a derivative along w = dPenalty/dg: "jvp" or "finite_difference"."""
    if method == "finite_difference" and not force:
        fallback.refuse_kinks(forward)
    g = fallback.input_gradient(forward, weights, scale)
    penalty, norms, w, inner = penalty_and_seed(g, form)
    result = plain(forward, cotangents, scale)
    if method == "jvp":
        slope = fallback.directional_jvp(forward, w, weights)
    else:
        slope = fallback.directional_difference(forward, w, weights)
        if not force:
            fallback.refuse_wrong_slope(slope.detach(), inner.sum())
    leaves = forward.leaves() | leaves_of(Graph([slope]).nodes)
    try:
        gradients = fallback.gradients_of([slope], leaves, scale)
    except CheckpointError as error:
        raise RuntimeError(
            f'method="{method}" cannot cross activation checkpointing, whose recomputation has no tangents: '
            'use method="double_backward" or "finite_difference", or switch checkpointing off'
        ) from error
    along = Gradients(penalty, norms, gradients, leaves, method, "asked for")
    along.merge(result)
    return along


def plain(forward, cotangents, scale=1.0):
    """:class:`Gradients` of the loss alone."""
    if cotangents is None:
        return Gradients(None, None, {}, {}, "backward", "no loss")
    leaves = forward.leaves()
    scores = [
        (s, c * scale if scale != 1.0 else c) for s, c in zip(forward.scores, cotangents, strict=False) if s.requires_grad
    ]
    gradients = fallback.gradients_of([s for s, _ in scores], leaves, scale, [c.to(s.dtype) for s, c in scores])
    return Gradients(None, None, gradients, leaves, "backward", "no penalty on this batch")


def penalised(forward, cotangents, form, weights, method="auto", scale=1.0, force=False):
    """:class:`Gradients` of loss and penalty of one forward by the given method."""
    if method in ("jvp", "finite_difference"):
        return directional(forward, cotangents, form, weights, method, scale, force)
    if method == DOUBLE:
        return double_backward(forward, cotangents, form, weights, scale)
    try:
        return shared_pass(forward, cotangents, form, weights, scale)
    except Refused as refused:
        if method == FUSED:
            raise RuntimeError(f'method="fused" is not exact for this critic: {refused}') from refused
        why = str(refused)
    if only_once := forward_mode_instead(forward):
        found = directional(forward, cotangents, form, weights, "jvp", scale)
        found.why = f"{why}; {only_once}"
        return found
    return double_backward(forward, cotangents, form, weights, scale, why)


__all__ = ["METHODS", "Gradients", "Plan", "check_method", "forget_plans", "penalised", "plain", "plan_for"]
