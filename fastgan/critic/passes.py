"""The shared pass: delta down, tangents up, one merged weight gradient on the way.

With g_i = dD_i/dx, w_i = dPenalty/dg_i and s_i = dLoss/dD_i held fixed, the total parameter gradient is that of
sum_i s_i D_i + <D', w>. For a critic that is piecewise linear in its input it needs delta (the cotangents of sum_i D_i)
and the tangents t of w, and at every product of a parameter with an activation a one gradient, delta x (s_i a + t).
Four passes over the network where double backward takes six.
"""

import contextlib

import torch
from torch.autograd.graph import GradientEdge

from fastgan._dtypes import HALF, accumulate_dtype
from fastgan.ops import tangent_combine

from .analyse import Refused
from .fallback import seed_like
from .probe import find_layouts, spread

# The tangent pass ends in the change of the scores along w, which must be <g_i, w_i>. Rounding of a deep critic stays
# well below these; coupled samples are off by tenths.
CHECK_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


WORTH_FREEING = 1 << 16  # elements; less is freed as fast as it is found
# Devices where one kernel makes an activation's tangent and the weight gradient's operand: 16 bytes an element in one launch,
# not 24 in two, at one activation's memory more. On CPUs, where both are made in place, that was measured to gain nothing.
COMBINE_ON = ("cuda",)


class SamplesCoupled(RuntimeError):
    """A critic that had been proved to treat samples independently did not do so in this step."""


def combine(t, a, factor, reuse):
    """factor * a + t, into t's memory if ``reuse``. ``factor``: a float, or a tensor that broadcasts over a."""
    if isinstance(factor, float):
        return t.add_(a, alpha=factor) if reuse else torch.add(t, a, alpha=factor)
    return t.addcmul_(a, factor) if reuse else torch.addcmul(t, a, factor)


# --- the pass --------------------------------------------------------------------------------------------------------


class SharedPass:
    """One penalised forward on its way through the shared pass.

    ``weights``: the penalty looks at the gradient of sum_k weights[k] * scores[k].sum(). ``scale``: a power of two by
    which half-precision cotangents are multiplied so that they do not underflow; results are unscaled in float32.
    """

    def __init__(self, forward, graph, plan, weights, scale=1.0):
        self.forward, self.graph, self.plan, self.weights = forward, graph, plan, weights
        self.scale = scale
        self.down = 2.0 ** (torch.tensor(scale).log2().div(2).floor().item()) if scale != 1.0 else 1.0
        self.up = scale / self.down
        self.deltas = [None] * len(plan.taps)
        self.seed = None  # dPenalty/dgradient, (B, ...): given between delta() and tangents(), which uses it up

    def _backward(self, factors=None, to=None):
        """Cotangents of the weighted sum of scores, each sample's times its factor, at the input or at another edge."""
        outputs, seeds = [], []
        for score, weight in zip(self.forward.scores, self.weights, strict=False):
            if score.grad_fn is None or self.graph.index.get(score.grad_fn) is None:
                continue
            seed = seed_like(score, weight * self.down)
            if factors is not None:
                seed = seed * factors.view([-1] + [1] * (score.dim() - 1)).to(score.dtype)
            outputs.append(score)
            seeds.append(seed)
        return torch.autograd.grad(outputs, self.forward.x if to is None else to, seeds, retain_graph=True)[0]

    def _to_input(self):
        """Gradient of the weighted sum of scores with respect to the input."""
        entry = self.plan.entry
        if entry is None:
            return self._backward()
        node = self.graph.nodes[entry.position]
        self.deltas[entry.tap] = self._backward(to=GradientEdge(node, 0))
        with torch.no_grad():
            return entry.rule.input_gradient(node, self.deltas[entry.tap])

    def delta(self):
        """Gradient of the weighted sum of scores with respect to the input, in float32 or better, unscaled."""
        handles = []
        for tap in self.plan.taps:

            def hook(grad_outputs, k=tap.tap):
                self.deltas[k] = grad_outputs[0]

            handles.append(self.graph.nodes[tap.position].register_prehook(hook))
        try:
            g = self._to_input()
        finally:
            for handle in handles:
                handle.remove()
        if self.down != 1.0:
            g = g.to(accumulate_dtype(g.dtype)) / self.down
        return g

    def prove_layouts(self):
        """Find out numerically where the batch index is at each tap; raises Refused if samples are coupled."""
        if self.plan.layouts is None:
            if self.plan.coupled is not None:
                raise Refused(self.plan.coupled)
            self.plan.layouts = find_layouts(self.graph.nodes, self.plan.taps, self._backward, self.forward.samples)
        return self.plan.layouts

    def tangents(self, s, release):
        """Parameter gradients at the graph's edges, and the tangents of the scores.

        ``s``: None (no adversarial term), a float (the same for all samples) or (N,).
        ``release``: give saved activations back to the allocator as soon as nothing here needs them.
        """
        plan, nodes = self.plan, self.graph.nodes
        self.edges, self.combined = {}, {}
        w, self.seed = self.seed, None
        w = w * self.up if self.up != 1.0 else w
        env = {(plan.x_position, 0): (w.to(self.forward.x.dtype), True)}
        del w
        left = dict(plan.uses)
        if s is not None:
            s = s * self.up if self.up != 1.0 else s
        with torch.no_grad():
            for ins in plan.instructions:
                self._step(nodes[ins.position], ins, env, left, s, release)
            return [
                env[(self.graph.index[o.grad_fn], o.output_nr)][0]
                if (self.graph.index.get(o.grad_fn), o.output_nr) in env
                else None
                for o in self.forward.scores
            ]

    def _step(self, node, ins, env, left, s, release):
        values, reuse = [], []
        for source in ins.sources:
            left[source] -= 1
            value, owned = env[source]
            values.append(value)
            reuse.append(owned and left[source] == 0)
            if left[source] == 0:
                del env[source]
        if all(v is None for v in values):
            produced = [None] * len(node._input_metadata)
        elif ins.feeds is not None and s is not None and (pair := self._activation(node, ins, values[0], s)) is not None:
            passed, self.combined[ins.feeds.tap] = pair
            produced = [passed]
        else:
            if self._grows(ins, values[0]):
                self._parameters(node, ins, values[0], False, s)
            produced = self._tangent(node, ins, values, reuse)
        if ins.tapped and self.deltas[ins.tap] is not None:
            # the tangent may be overwritten unless the output is a view of it
            spare = reuse[0] and ins.rule.fresh and ins.rule.has_product(ins)
            self._parameters(node, ins, values[0], spare, s)
        for nr, t in enumerate(produced):
            if t is not None and left.get((ins.position, nr), 0):
                env[(ins.position, nr)] = (t, ins.rule.fresh or (ins.rule.hands_on and reuse[0]))
            elif left.get((ins.position, nr), 0):
                env[(ins.position, nr)] = (None, False)
        if ins.gives_back is None:
            ins.gives_back = tuple(name for name in ins.rule.saves if _saved_size(node, name) >= WORTH_FREEING)
        if release:
            for name in ins.gives_back:
                drop_saved(node, name)

    def _grows(self, ins, t):
        """Is a product's output larger than its operand's tangent? Then less memory is alive at once if the cotangent of the
        output is used up before the output's tangent is made; else if that tangent is made first, and the operand's
        overwritten."""
        return ins.tapped and t is not None and self.deltas[ins.tap] is not None and t.numel() < self.deltas[ins.tap].numel()

    def _activation(self, node, ins, t, s):
        """The tangent of an activation and the operand of the weight gradient behind it in one pass over memory; None where
        that does not apply."""
        reader = ins.feeds
        if t.device.type not in COMBINE_ON or self.deltas[reader.tap] is None:
            return None
        a = reader.rule.operand(self.graph.nodes[reader.position], reader)
        if a.shape != t.shape or a.dtype != t.dtype or t.dtype in HALF:
            return None
        if not isinstance(s, torch.Tensor):
            s = torch.full((), s, dtype=t.dtype, device=t.device)
        elif self.plan.layouts[reader.tap][1] != (0, True, 1):
            return None
        return tangent_combine.forward(t, a, s.to(t.dtype), ins.rule.slope(node))

    def _tangent(self, node, ins, values, reuse):
        if len(values) == 1 or all(v is not None for v in values):
            keep = [r and not (ins.tapped and ins.rule.has_product(ins)) for r in reuse]
            return ins.rule.tangent(node, ins, values, keep)
        filled = [
            torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) if v is None else v
            for v, m in ((v, self.graph.nodes[k]._input_metadata[nr]) for v, (k, nr) in zip(values, ins.sources, strict=False))
        ]
        return ins.rule.tangent(node, ins, filled, [False] * len(filled))

    def _parameters(self, node, ins, t, spare, s):
        d, rule = self.deltas[ins.tap], ins.rule
        self.deltas[ins.tap] = None
        layouts = self.plan.layouts[ins.tap] if isinstance(s, torch.Tensor) else None
        if rule.has_product(ins):
            u = self.combined.pop(ins.tap, None)
            if u is not None:
                self._put(node, rule.weight_gradients(node, ins, d, u))
            elif s is None:
                if t is not None:
                    self._put(node, rule.weight_gradients(node, ins, d, t))
            else:
                a = rule.operand(node, ins)
                factor = s if layouts is None else spread(s, a, layouts[1])
                if t is None:
                    self._put(node, rule.weight_gradients(node, ins, d, a * _like(factor, a)))
                elif d.dtype in HALF:
                    # in one sum the smaller term would be rounded away: two gradients, added in float32
                    self._put(node, rule.weight_gradients(node, ins, d, t))
                    self._put(node, rule.weight_gradients(node, ins, d, (a * _like(factor, a)).to(d.dtype)))
                else:
                    self._put(node, rule.weight_gradients(node, ins, d, combine(t, a, _like(factor, a), spare)))
        if s is not None:
            factor = s if layouts is None else spread(s, d, layouts[0])
            d = d.float() if d.dtype in HALF else d
            self._put(node, rule.bias_gradients(node, ins, d, _like(factor, d)))

    def _put(self, node, grads):
        for slot, grad in grads.items():
            edge = node.next_functions[slot]
            grad = grad.float() if grad.dtype in HALF else grad
            if self.scale != 1.0:
                grad = grad / self.scale
            known = self.edges.get(edge)
            self.edges[edge] = grad if known is None else known + grad

    def add_outputs(self, pairs):
        """(score, cotangent) pairs of scores that do not depend on the input: they still have a loss."""
        for score, cotangent in pairs:
            if score.grad_fn is not None:
                edge = (score.grad_fn, score.output_nr)
                known = self.edges.get(edge)
                self.edges[edge] = cotangent if known is None else known + cotangent


def _like(factor, t):
    return factor.to(t.dtype) if isinstance(factor, torch.Tensor) else factor


def push_to_leaves(edges, leaves):
    """{id(leaf): gradient} from gradients at graph edges, through whatever makes effective weights out of leaves
    (spectral norm, weight norm, equalised learning rate, casts, embeddings)."""
    found, inner, grads = {}, [], []
    for (node, nr), grad in edges.items():
        # through autocast's copies by hand: autograd would round the float32 sum to the copy's dtype first
        while node.name() in ("ToCopyBackward0", "TBackward0") and grad.dtype == torch.float32:
            below, below_nr = node.next_functions[0]
            if below._input_metadata[below_nr].device != grad.device:
                break
            grad = grad.t() if node.name() == "TBackward0" else grad
            node, nr = below, below_nr
        leaf = getattr(node, "variable", None) if node.name() == "torch::autograd::AccumulateGrad" else None
        if leaf is not None:
            add_gradient(found, leaf, grad)
        else:
            inner.append(GradientEdge(node, nr))
            grads.append(grad.to(node._input_metadata[nr].dtype))
    if inner:
        wanted = list(leaves.values())
        # the graph of the weights may belong to the user too (a label embedding made outside): keep it
        for leaf, grad in zip(
            wanted, torch.autograd.grad(inner, wanted, grads, retain_graph=True, allow_unused=True), strict=False
        ):
            if grad is not None:
                add_gradient(found, leaf, grad)
    return found


def add_gradient(found, leaf, grad):
    """found[id(leaf)] += grad."""
    known = found.get(id(leaf))
    found[id(leaf)] = grad if known is None else known + grad


def _saved_size(node, name):
    saved = getattr(node, "_saved_" + name, None) if hasattr(node, "_raw_saved_" + name) else None
    return 0 if saved is None else saved.numel()


def drop_saved(node, name):
    """Give a node's saved activation back. Its graph cannot be walked again after this."""
    raw = getattr(node, "_raw_saved_" + name, None)
    if raw is None:
        return
    try:
        raw.register_hooks(_forget, _gone)
    except RuntimeError:
        # packed already: by share_saved, or by somebody else's hooks, which are not ours to free
        packed = getattr(raw, "data", None)
        if isinstance(packed, _Stored):
            packed.tensor = None


def _forget(tensor):
    return None


def _gone(packed):
    raise RuntimeError("this critic's activations were already given back; run its forward again")


def share_saved(graph, plan):
    """Give memory back which the forward keeps without need, right after it ran.

    LeakyReLU saves its input, of which only the sign counts; its output has the same and is saved anyway by the
    convolution or product that reads it. Pooling saves its input, of which only the shape counts. Positions of what is
    worth it are found once per plan.
    """
    if plan.aliases is None:
        readers = {}

        def large(ins, name):
            return _saved_size(graph.nodes[ins.position], name) >= WORTH_FREEING

        for ins in plan.instructions:
            if ins.op in ("Convolution", "Addmm", "Mm") and ins.rule.has_product(ins) and len(ins.x_slots) == 1:
                readers.setdefault(ins.sources[0], ins)
        plan.aliases = [
            (ins.position, ins.rule.masked_by_output, readers[(ins.position, 0)])
            for ins in plan.instructions
            if ins.rule.masked_by_output and (ins.position, 0) in readers and large(ins, ins.rule.masked_by_output)
        ]
        plan.shapes = [
            (ins.position, ins.rule.needs_shape_of)
            for ins in plan.instructions
            if ins.rule.needs_shape_of and large(ins, ins.rule.needs_shape_of)
        ]
    for position, name, reader in plan.aliases:
        node = graph.nodes[position]
        raw = getattr(node, "_raw_saved_" + name, None)
        if raw is None or node._saved_negative_slope < 0:
            continue  # the in-place form keeps its output already
        _replace(raw, reader.rule.operand(graph.nodes[reader.position], reader).detach())
    for position, name in plan.shapes:
        node = graph.nodes[position]
        saved = getattr(node, "_saved_" + name)
        if saved.is_contiguous():
            _replace(getattr(node, "_raw_saved_" + name), saved.new_zeros(()).expand(saved.shape))


def _replace(raw, tensor):
    box = _Stored(tensor)
    with contextlib.suppress(RuntimeError):  # packed by somebody else's hooks
        raw.register_hooks(lambda _: box, _Stored.get)


class _Stored:
    """A saved tensor replaced by one that serves as well."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor):
        self.tensor, self.version = tensor, tensor._version

    def get(self):
        if self.tensor is None:
            _gone(self)
        if self.tensor._version != self.version:
            raise RuntimeError("an activation needed for the gradient was modified in place after the critic's forward")
        return self.tensor


def check_tangents(tangents, weights, expected, per_sample, scale=1.0):
    """(True tensor if the scores' change along w is <g_i, w_i> for each sample, or in total; whether that could be told;
    the tolerance).

    ``scale``: what the tangents were multiplied by. Changes below a dtype's normal numbers are not judged, nor are infinite
    ones and NaN: the gradients show those, as eager's do, and a GradScaler waits for them.
    """
    total, tolerance, floor = None, 0.0, 0.0
    for t, weight in zip(tangents, weights, strict=False):
        if t is None:
            continue
        tolerance = max(tolerance, CHECK_TOLERANCE.get(t.dtype, 2e-3))
        floor = max(floor, torch.finfo(t.dtype).tiny * t.numel() * abs(weight) / scale)
        t = t.to(expected.dtype)
        t = t.reshape(t.shape[0], -1).sum(1) if per_sample else t.sum()
        t = t if weight == scale else t * (weight / scale)
        total = t if total is None else total + t
    expected = expected if per_sample else expected.sum()
    off = (total - expected).norm()
    judged = off.isfinite()
    return (off <= tolerance * expected.norm() + floor) | ~judged, judged, tolerance
