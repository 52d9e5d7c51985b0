"""``compile=True``: the whole step, shared pass included, as one compiled graph.

Dynamo captures the critic's forwards and the loss; its guards decide at every call whether a capture still holds, so that
a changed attribute, mode or shape is noticed. The first call with a capture runs eagerly: it proves what the shared pass
needs proved, on numbers. The second one traces the capture together with the engine's passes into one graph of ATen
operations, which is compiled for gradients without any autograd graph at run time. Buffers are inputs that the graph
changes in place; random numbers come from the global generator in eager order.
"""

import threading
import types
import weakref
from dataclasses import dataclass

import torch
from torch._dynamo import lookup_backend
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan._dtypes import HALF

from . import engine, fallback
from .forward import Forward, Snapshot, owner
from .inputs import interpolate
from .outputs import like_output, score_list

_STEPS = weakref.WeakKeyDictionary()  # critic -> {backend: CompiledStep}
#: random numbers as eager draws them
_OPTIONS = {"inductor": {"config_patches": {"fallback_random": True}}}


class NotCompiled(Exception):
    """This step has to run eagerly; str() says why."""


@dataclass
class Task:
    """One call: what to differentiate, by the names of its batches, "real", "fake" and perhaps "gp"."""

    inputs: dict  # name -> (B, ...), a leaf
    args: dict  # name -> further arguments of the critic
    between: tuple | None  # real, fake, alpha, pac: inputs["gp"] is added to what they give
    forms: dict  # name -> Form of weight 1, or None
    weights: dict  # name -> 0-dim tensor: an input of the graph, so that annealing it does not compile again
    methods: dict  # name -> method, where there is a form

    def key(self):
        return tuple(self.forms.items()), tuple(self.methods.items())


@dataclass
class Outcome:
    """What a step found: scores by batch name (lists), adversarial loss, penalty, norms by batch name, and gradients."""

    scores: dict
    adversarial: torch.Tensor
    penalty: torch.Tensor | None
    norms: dict
    gradients: dict  # id(leaf) -> tensor
    leaves: dict
    used: dict  # batch name -> (method, why)
    checks: list
    note: str = ""


def _scores_and_loss(critic, loss, score_fn, inputs, args, between):
    """What is captured: every forward, in order, and the loss."""
    if not torch.compiler.is_compiling():  # switched off by its environment variable, or under a dispatch mode
        raise NotCompiled("torch.compile is switched off here")
    scores = {}
    for name, x in inputs.items():
        if name == "gp" and between is not None:
            real, fake, alpha, pac = between
            x = interpolate(real, fake, alpha=alpha, pac=pac) + x
        scores[name] = score_list(critic(x, *args[name]), score_fn)
    return loss(like_output(scores["real"]), like_output(scores["fake"])), scores


def differentiate(critic, task, value, scores, traced=False):
    """The :class:`Outcome` from attached scores: the one routine that runs eagerly and is traced. Raises NotCompiled where that
    takes repeating a forward, which a capture cannot."""
    cotangents, constant = _cotangents(value, scores, task)
    forwards, careful = {}, {}
    for name, form in task.forms.items():
        forward = forwards[name] = Forward.captured(critic, task.inputs[name], scores[name], traced)
        if form is not None and task.methods[name] in ("auto", "fused"):
            _, plan = engine.prepare(forward)
            careful[name] = plan.value_dependent
            if task.methods[name] == "auto" and plan.refusal is not None and (fused := fallback.first_order_only(forward)):
                raise NotCompiled(f"{fused} cannot be differentiated twice")
    total, penalty, norms, used = None, None, {}, {}
    for name, form in task.forms.items():
        forward = forwards.pop(name)
        if form is None:
            result = engine.plain(forward, cotangents[name])
        else:
            # the gradient of loss + weight * penalty is weight times that of loss / weight + penalty
            weight = task.weights[name]
            scaled = None if cotangents[name] is None else [c / weight.to(c.dtype) for c in cotangents[name]]
            weights = [1.0] * len(forward.scores)
            why = None if scaled is None else _refusal(forward, careful.get(name), constant)
            if task.methods[name] == "auto" and why:
                result = engine.double_backward(forward, scaled, form, weights, why=why)
            else:
                result = engine.penalised(forward, scaled, form, weights, task.methods[name])
            result.gradients = {k: g * weight.to(g.dtype) for k, g in result.gradients.items()}
            term = result.penalty * weight.to(result.penalty.dtype)
            penalty = term if penalty is None else penalty + term
            norms[name], used[name] = result.norms, (result.method, result.why)
        result.own = set()  # sums are new tensors: what is traced has no memory to add into
        if total is None:
            total = result
        else:
            total.merge(result)
    scores = {name: [s.detach() for s in group] for name, group in scores.items()}
    return Outcome(scores, value.detach(), penalty, norms, total.gradients, total.leaves, used, total.checks)


def _refusal(forward, value_dependent, constant):
    """Why a method that was exact for these values may not be for others, or None. Eagerly every step is looked at."""
    if value_dependent:
        return "it could mix samples depending on values, which a compiled step cannot look at"
    if not constant and sum(s.numel() for s in forward.scores) != forward.samples:
        return "the loss's derivative may differ between the scores of one sample (patches or outputs)"
    return None


def _cotangents(value, scores, task):
    """Derivatives of the loss with respect to each batch's scores, and whether they are free of the scores' values."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ValueError("the loss must return a scalar tensor")
    flat = scores["real"] + scores["fake"]
    wanted = [s for s in flat if s.requires_grad]
    grads = [None] * len(wanted)
    if value.requires_grad and wanted:
        grads = torch.autograd.grad(value, wanted, torch.ones_like(value), create_graph=True, allow_unused=True)
    constant = not any(g is not None and g.requires_grad for g in grads)
    grads = iter(grads)
    found = []
    for s in flat:
        g = next(grads) if s.requires_grad else None
        g = torch.zeros_like(s) if g is None else g.detach()
        found.append(g.float() if g.dtype in HALF else g)
    n = len(scores["real"])
    return {"real": found[:n], "fake": found[n:], "gp": None}, constant


def _reason(error):
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


class CompiledStep:
    """The compiled steps of one critic with one backend."""

    def __init__(self, backend):
        self.backend, self.options = lookup_backend(backend), _OPTIONS.get(backend, {})
        # Dynamo counts captures per code object: each critic gets its own
        function = types.FunctionType(_scores_and_loss.__code__.replace(), globals(), "critic_step")
        self.captured = torch.compile(function, backend=self.capture, fullgraph=True, dynamic=False)
        self.problems = {}  # (code of the loss, penalties) -> why it cannot be captured
        self.lock = threading.Lock()

    def __call__(self, critic, loss, score_fn, task):
        """Raises NotCompiled, with nothing run, where the critic or the loss cannot be captured."""
        key = getattr(loss.function, "__code__", loss.function), task.key()
        if key in self.problems:
            raise NotCompiled(self.problems[key])
        with self.lock, torch.enable_grad():
            self.critic, self.task, self.capture_in_use, self.before, self.outcome = critic, task, None, None, None
            try:
                value, scores = self.captured(critic, loss, score_fn, task.inputs, task.args, task.between)
                if self.outcome is not None:
                    return self.outcome
                return self.capture_in_use.eagerly(task, value, scores)
            except NotCompiled as why:
                if self.before is not None:
                    self.before.restore()
                    self.problems[key] = str(why)
                raise
            except Exception as error:
                if self.capture_in_use is not None:
                    raise  # it was captured, and running it failed
                if type(error).__name__ == "FailOnRecompileLimitHit":
                    raise NotCompiled("more shapes or settings than torch._dynamo.config.recompile_limit") from error
                self.problems[key] = _reason(error)
                raise NotCompiled(self.problems[key]) from error
            finally:
                self.critic = self.task = self.capture_in_use = self.before = self.outcome = None

    def capture(self, module, example_inputs):
        """Dynamo's backend."""
        return Capture(self, module).run


class Capture:
    """One graph captured by Dynamo, and what became of each kind of task on it."""

    def __init__(self, step, module):
        self.step, self.module = weakref.proxy(step), module
        self.outputs = None  # of a run on its way to eagerly()
        self.places = None  # label -> position among the outputs
        self.used = {}  # task's key -> {batch name: (method that served, why)}
        self.programs = {}  # task's key -> Program
        self.problems = {}  # task's key -> why there is none

    def run(self, *args):
        """In place of the captured graph: its outputs, attached to autograd's graph for :meth:`eagerly`, or detached with
        the outcome left in ``step.outcome``."""
        step, key = self.step, self.step.task.key()
        step.capture_in_use = self
        if key in self.used and key not in self.programs and key not in self.problems:
            try:
                self.programs[key] = Program(self, step.task, args, self.used[key])
            except Exception as error:
                self.problems[key] = _reason(error)
        if key in self.programs:
            step.outcome, outputs = self.programs[key](step.task, args)
            return outputs
        if key not in self.used and key not in self.problems:
            step.before = Snapshot(step.critic, args[0].device)  # this run may show that it can't serve
        self.outputs = self.module(*args)
        return self.outputs

    def eagerly(self, task, value, scores):
        """The step on attached outputs; remembers where they stood and which methods served."""
        by_id, self.outputs = {id(t): k for k, t in enumerate(self.outputs)}, None
        labelled = {"value": value} | {(name, k): s for name, group in scores.items() for k, s in enumerate(group)}
        outcome, key = differentiate(self.module, task, value, scores), task.key()
        if not all(id(t) in by_id for t in labelled.values()):
            self.problems[key] = "scores or loss do not depend on the inputs"
        elif key not in self.problems and bool((outcome.adversarial + (outcome.penalty or 0.0)).isfinite()):
            # infinite scores or gradients prove nothing, neither for nor against a method: the next step is the first one then
            self.places = {label: by_id[id(t)] for label, t in labelled.items()}
            self.used[key] = outcome.used
        outcome.note = f"; run eagerly: {self.problems.get(key, 'the first step of its kind')}"
        return outcome


class Program:
    """Captured forwards, loss and all passes of the engine as one compiled function of tensors."""

    def __init__(self, capture, task, args, used):
        module, places = capture.module, capture.places
        self.places, self.batches = places, list(task.inputs)
        roots = {name: next(k for k, a in enumerate(args) if a is x) for name, x in task.inputs.items()}
        self.weighted, self.used = list(task.weights), used
        methods = {name: method for name, (method, _) in used.items()}
        needs_grad = [a.requires_grad for a in args]
        n = len(self.weighted)

        def whole(*flat):
            leaves = [t.detach().requires_grad_(True) if g else t for t, g in zip(flat[n:], needs_grad, strict=True)]
            with torch.enable_grad():
                outputs = module(*leaves)
                scores = self.scores_in(outputs)
                inputs = {name: leaves[k] for name, k in roots.items()}
                weights = dict(zip(self.weighted, flat[:n], strict=True))
                traced = Task(inputs, {}, None, task.forms, weights, methods)
                outcome = differentiate(module, traced, outputs[places["value"]], scores, traced=True)
            position = {id(leaf): k for k, leaf in enumerate(leaves)}
            self.targets = [position[key] for key in outcome.gradients]
            self.messages = [message for _, message in outcome.checks]
            self.count = len(outputs)
            return [
                *(o.detach() for o in outputs),
                *([] if outcome.penalty is None else [outcome.penalty.detach()]),
                *(norms.detach() for norms in outcome.norms.values()),
                *(flag for flag, _ in outcome.checks),
                *(g.detach().contiguous() for g in outcome.gradients.values()),
            ]

        flat = [*task.weights.values(), *args]
        with torch.no_grad():
            # attributes of the captured module are its constants, and stay what they are
            graph = make_fx(whole, tracing_mode="fake", _allow_non_fake_inputs=True)(*[t.detach() for t in flat])
        self.device = args[roots["real"]].device.type
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            self.function = capture.step.backend(graph, flat, **capture.step.options)
        torch.clear_autocast_cache()  # of what was traced

    def scores_in(self, outputs):
        """By batch name."""
        scores = {name: [] for name in self.batches}
        for label, place in self.places.items():
            if label != "value":
                scores[label[0]].append(outputs[place])
        return scores

    def __call__(self, task, args):
        """(Outcome, outputs of the captured graph)."""
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            found = iter(self.function(*task.weights.values(), *args))
        outputs = [next(found) for _ in range(self.count)]
        penalty = next(found) if self.weighted else None
        norms = {name: next(found) for name in self.weighted}
        checks = [(next(found), message) for message in self.messages]
        leaves = {id(args[k]): args[k] for k in self.targets}
        gradients = {id(args[k]): next(found) for k in self.targets}
        value = outputs[self.places["value"]]
        return Outcome(self.scores_in(outputs), value, penalty, norms, gradients, leaves, self.used, checks), outputs


def step_for(critic, backend):
    """The :class:`CompiledStep` of a critic; raises NotCompiled for one that is not a module's, ValueError for a backend that
    does not exist."""
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(
            f"compile={backend!r} is no backend of torch.compile; known: {', '.join(torch._dynamo.list_backends())}"
        )
    anchor = owner(critic)
    if not isinstance(anchor, torch.nn.Module):
        raise NotCompiled(f"the critic must be a module or a module's method, not {type(critic).__name__}")
    steps = _STEPS.setdefault(anchor, {})
    if backend not in steps:
        steps[backend] = CompiledStep(backend)
    return steps[backend]
