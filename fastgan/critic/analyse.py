"""Reading the autograd graph of a critic: is it piecewise linear in its input, and where do parameters enter?

The graph is walked from the scores to the leaves. Nodes that depend on the input must be known to be (piecewise)
linear in it; a node where something input-dependent meets something parameter-dependent is *tapped*: it will
contribute a parameter gradient. The result is a :class:`Plan`, written in node positions so that it serves every
later graph with the same signature. The signature holds the whole graph: names, edges, shapes, dtypes and every saved
attribute that is not a tensor (dims, shifts, strides, slopes).
"""

import math
from dataclasses import dataclass, field

import torch

from .rules import VALUE_DEPENDENT, MatMul, has_kink, rule_for

ACCUMULATE = "torch::autograd::AccumulateGrad"


def op_name(name):
    """Name of the operation behind a graph node, or None for nodes that are not ATen operations."""
    if name == "_DDPSinkBackward":
        return "Clone"
    cut = name.rfind("Backward")
    return name[:cut] if cut > 0 and name[cut + 8 :].isdigit() else None


_KINDS = {}


def _kind(node):
    """(name, names of saved attributes that are not tensors) of a node; tensors also have a ``_raw_saved_`` twin."""
    cls = type(node)
    known = _KINDS.get(cls)
    if known is None:
        name = node.name()
        if op_name(name) is None:
            return name, ()  # a user's Function (refused anyway) or a generic class shared by several operations
        every = set(dir(node))
        known = _KINDS[cls] = (
            name,
            tuple(a for a in sorted(every) if a.startswith("_saved_") and "_raw" + a not in every and a != "_saved_tensors"),
        )
    return known


_ATOMS = frozenset((int, float, str, bool, type(None), torch.dtype))


def _hashable(value):
    if value.__class__ in _ATOMS:
        return value
    if isinstance(value, (list, tuple)):
        return tuple([_hashable(v) for v in value])
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


class Graph:
    """The nodes above some outputs, inputs first, and their signature."""

    def __init__(self, outputs):
        self.nodes = nodes = []
        stack = [(o.grad_fn, False) for o in reversed(outputs) if o.grad_fn is not None]
        seen, edges = set(), {}
        while stack:
            node, done = stack.pop()
            if done:
                nodes.append(node)
                continue
            if node in seen:
                continue
            seen.add(node)
            stack.append((node, True))
            edges[node] = nexts = node.next_functions
            for child, _ in nexts:
                if child is not None and child not in seen:
                    stack.append((child, False))
        self.index = index = {node: i for i, node in enumerate(nodes)}
        self.next = [tuple((index[k] if k is not None else -1, nr) for k, nr in edges[node]) for node in nodes]

    def largest(self):
        """Elements of the largest tensor that a node yields."""
        return max((math.prod(m.shape) for node in self.nodes for m in node._input_metadata), default=0)

    def signature(self, outputs, x):
        parts = []
        for node, nexts in zip(self.nodes, self.next, strict=False):
            name, attributes = _kind(node)
            parts.append(
                (
                    name,
                    nexts,
                    tuple([(tuple(m.shape), m.dtype) for m in node._input_metadata]),
                    tuple([_hashable(getattr(node, a)) for a in attributes]),
                )
            )
        outs = tuple((self.index.get(o.grad_fn, -1), o.output_nr, tuple(o.shape)) for o in outputs)
        return tuple(parts), outs, tuple(x.shape), x.dtype, x.device


@dataclass
class Instruction:
    """One input-dependent node: where its tangents come from and where parameters enter."""

    position: int
    op: str
    rule: object
    x_slots: tuple  # positions in next_functions that depend on the input
    sources: tuple  # (node position, output number) of those
    p_slots: tuple  # positions that depend on parameters only
    tapped: bool = False
    tap: int = -1
    feeds: object = None  # the product with a parameter that alone reads this activation
    gives_back: tuple | None = None  # saved activations large enough to be worth freeing early; None: not known yet


@dataclass
class Plan:
    """What was found out about one graph. ``refusal``: why the shared pass is not allowed (None: it is)."""

    refusal: str | None = None
    refused_node: int | None = None
    instructions: list = field(default_factory=list)
    taps: list = field(default_factory=list)
    uses: dict = field(default_factory=dict)  # how many instructions read each tangent
    x_position: int = -1
    entry: Instruction | None = None  # a convolution that alone reads the input, and whose few channels have a faster gradient
    value_dependent: bool = False  # holds an operation that could mix samples depending on values
    multiply_adds: float = math.inf  # of one forward, where parameters enter in matrix products only
    kinks: tuple = ()  # nodes whose derivative jumps
    opaque: tuple = ()  # nodes that are not ATen operations
    coupled: str | None = None  # why scores of different samples are not independent
    layouts: list | None = None  # per tap, where the batch index lives; None: not proved yet
    trusted: bool = False  # ran once with its graph kept, so saved tensors may be given back as they are used
    aliases: list | None = None  # saved tensors that others can stand in for; None: not looked for yet
    shapes: list | None = None  # saved tensors of which only the shape is used


class Refused(Exception):
    """The shared pass cannot be used; str() says why. ``lasting``: the same graph will be refused again."""

    def __init__(self, why, lasting=False):
        super().__init__(why)
        self.lasting = lasting


def analyse(graph, outputs, x_node):
    """The :class:`Plan` of a graph. Never raises for a critic: a refusal is part of the plan."""
    plan = Plan()
    if x_node not in graph.index:
        plan.refusal = "the scores do not depend on the input"
        return plan
    plan.x_position = graph.index[x_node]
    on_x, on_p, kinks, opaque = {plan.x_position}, set(), [], []
    for i, node in enumerate(graph.nodes):
        if i == plan.x_position:
            continue
        nexts = graph.next[i]
        name = node.name()
        if name == ACCUMULATE:
            on_p.add(i)
            continue
        x_slots = tuple(j for j, (k, _) in enumerate(nexts) if k in on_x)
        if any(k in on_p for k, _ in nexts):
            on_p.add(i)
        if not x_slots:
            continue
        on_x.add(i)
        p_slots = tuple(j for j, (k, _) in enumerate(nexts) if k in on_p and k not in on_x)
        op = op_name(name)
        if op is None:
            opaque.append(name)
        elif has_kink(op, node):
            kinks.append(name)
        if plan.refusal is not None:
            continue
        if op in VALUE_DEPENDENT:
            plan.value_dependent = True
        rule = rule_for(op)
        reason = f"{name} is not known to be piecewise linear" if rule is None else rule.refuse(node, x_slots, p_slots)
        if reason is not None:
            shape = tuple(node._input_metadata[0].shape) if node._input_metadata else ()
            plan.refusal, plan.refused_node = f"{reason} (output shape {shape})", i
            continue
        ins = Instruction(i, op, rule, x_slots, tuple(nexts[j] for j in x_slots), p_slots)
        ins.tapped = bool(p_slots)
        if rule.mixes_rows(x_slots):
            plan.value_dependent = True
        for source in ins.sources:
            plan.uses[source] = plan.uses.get(source, 0) + 1
        if ins.tapped:
            ins.tap = len(plan.taps)
            plan.taps.append(ins)
        plan.instructions.append(ins)
    plan.kinks, plan.opaque = tuple(dict.fromkeys(kinks)), tuple(dict.fromkeys(opaque))
    if plan.refusal is None and all(isinstance(tap.rule, MatMul) for tap in plan.taps):
        plan.multiply_adds = sum(tap.rule.multiply_adds(graph.nodes[tap.position], tap) for tap in plan.taps)
    by_position = {ins.position: ins for ins in plan.instructions}
    for ins in plan.instructions:
        source = ins.sources[0]
        if ins.tapped and len(ins.sources) == 1 and plan.uses[source] == 1 and ins.rule.has_product(ins):
            activation = by_position.get(source[0])
            if activation is not None and activation.rule.slope(graph.nodes[source[0]]) is not None:
                activation.feeds = ins
    readers = [ins for ins in plan.instructions if (plan.x_position, 0) in ins.sources]
    if len(readers) == 1 and readers[0].tapped and readers[0].op == "Convolution":
        reader = readers[0]
        plan.entry = reader if reader.rule.reads_few_channels(graph.nodes[reader.position]) else None
    for o in outputs:
        if o.grad_fn is None:
            continue
        source = (graph.index[o.grad_fn], o.output_nr)
        if source[0] in on_x:
            plan.uses[source] = plan.uses.get(source, 0) + 1
    return plan
