"""Which method ``auto`` takes for a critic, part by part, and why."""

import contextlib
from dataclasses import dataclass

import torch
from torch.autograd.graph import get_gradient_edge

from . import engine, fallback
from .analyse import Refused, op_name
from .forward import Forward, Snapshot, unwrap
from .passes import SharedPass
from .rules import rule_for

__all__ = ["Explanation", "Part", "explain"]


@dataclass(frozen=True)
class Part:
    """One module call (or the functional code between): ``linear`` says if it is piecewise linear in the input."""

    name: str
    kind: str
    linear: bool
    why: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print()`` it.

    ``method``: what ``auto`` takes when loss and penalty meet in one forward (R1, R2). ``penalty_method``: what it
    takes for a penalty alone (WGAN-GP's interpolates), which may be shared under weaker conditions. ``why``,
    ``penalty_why``: the reasons. ``parts``: a :class:`Part` per module call. ``units``: passes over the network for a
    batch with both.
    """

    method: str
    why: str
    penalty_method: str
    penalty_why: str
    parts: tuple
    units: int

    def __str__(self):
        width = max([len(p.name) for p in self.parts] + [4])
        rows = [f"  {p.name:{width}}  {p.kind:20}  {'piecewise linear' if p.linear else p.why}" for p in self.parts]
        return "\n".join(
            [
                f"loss + penalty on one batch: {self.method} ({self.why}), {self.units} passes instead of 6",
                f"penalty alone:               {self.penalty_method} ({self.penalty_why})",
                *rows,
            ]
        )


def explain(critic, *example_inputs, score_fn=None, loss_per_sample=True):
    """Run the critic once on ``example_inputs`` (a batch (B, ...) and further arguments) and say how ``auto`` would
    compute its penalised gradients. Buffers, random state and gradients are left as they were.

    ``loss_per_sample``: False if the loss is curved and acts on several scores of one sample (patches), which cannot
    share. Returns an :class:`Explanation`. Raises TypeError without an example batch; the critic's errors pass through.
    """
    if not example_inputs or not isinstance(example_inputs[0], torch.Tensor):
        raise TypeError("explain needs an example batch: explain(critic, images[, labels, ...])")
    critic = unwrap(critic)
    inputs, *args = example_inputs
    state = Snapshot(critic, inputs.device)
    calls = []
    try:
        with _recorded(critic, calls):
            forward = Forward(critic, inputs, args, score_fn)
    finally:
        state.restore()
    scores = [s for s in forward.scores if s.grad_fn is not None]
    if not scores:
        raise RuntimeError("the critic's scores do not depend on its input: there is no gradient to penalise")
    graph = forward.graph
    x_node = get_gradient_edge(forward.x).node
    plan = engine.judge(graph, scores, x_node)
    parts = tuple(_parts(graph, x_node, calls))
    if plan.refusal is not None:
        only_once = fallback.first_order_only(forward)
        why = plan.refusal + (f"; {only_once} cannot be differentiated twice" if only_once else "")
        method, units = ("jvp", 10) if only_once else (engine.DOUBLE, 6)
        return Explanation(method, why, method, why, parts, units)
    alone = f"piecewise linear in the input; {len(plan.taps)} places where parameters enter"
    problem = None
    if any(s.dim() == 0 or s.shape[0] != forward.samples for s in forward.scores):
        problem = "the scores' first dimension is not the batch"
    elif not loss_per_sample and sum(s.numel() for s in forward.scores) != forward.samples:
        problem = "the loss's derivative differs between the scores of one sample (patches or outputs)"
    else:
        try:
            SharedPass(forward, graph, plan, [1.0] * len(forward.scores)).prove_layouts()
        except Refused as refused:
            problem = str(refused)
    if problem is not None:
        why = problem + "; shared all the same if the loss has one derivative for all scores, as Wasserstein's"
        return Explanation(engine.DOUBLE, why, engine.FUSED, alone, parts, 6)
    several = sum(s.numel() for s in forward.scores) != forward.samples
    condition = "; if the loss is constant over the scores of a sample" if several else ""
    return Explanation(engine.FUSED, f"{alone}; samples proved independent{condition}", engine.FUSED, alone, parts, 4)


@contextlib.contextmanager
def _recorded(critic, calls):
    """Collect (name, kind, graph node of the output) of every call of a module without children."""
    handles = []
    if isinstance(critic, torch.nn.Module):
        for name, module in critic.named_modules():
            if not list(module.children()):

                def hook(module, args, output, name=name):
                    for t in output if isinstance(output, (list, tuple)) else [output]:
                        if isinstance(t, torch.Tensor) and t.grad_fn is not None:
                            calls.append((name or "critic", type(module).__name__, t.grad_fn))

                handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(graph, x_node, calls):
    """Give every input-dependent node to the module call that made it: nodes are in order of execution along each path,
    so a call owns what lies below its output and above the outputs of the calls before it."""
    owner, taken = {}, set()
    for number, (_, _, node) in enumerate(calls):
        stack = [node]
        while stack:
            n = stack.pop()
            if n is None or n in taken or n not in graph.index:
                continue
            taken.add(n)
            owner[n] = number
            stack += [k for k, _ in n.next_functions]
    depends = {x_node}
    problems = {}
    order = []
    for node in graph.nodes:
        if node is not x_node and not any(k in depends for k, _ in node.next_functions):
            continue
        depends.add(node)
        if node is x_node:
            continue
        number = owner.get(node, -1)
        if number not in problems:
            problems[number] = None
            order.append(number)
        if problems[number] is None:
            problems[number] = _problem(graph, node, depends)
    for number in sorted(order, key=lambda k: (k < 0, k)):
        name, kind = calls[number][:2] if number >= 0 else ("functional code", "")
        yield Part(name, kind, problems[number] is None, problems[number] or "")


def _problem(graph, node, depends):
    rule = rule_for(op_name(node.name()))
    if rule is None:
        return f"{node.name()} is not known to be piecewise linear"
    slots = tuple(j for j, (k, _) in enumerate(node.next_functions) if k in depends)
    others = tuple(j for j, (k, _) in enumerate(node.next_functions) if k is not None and k not in depends)
    return rule.refuse(node, slots, others)
