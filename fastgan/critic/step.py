"""The critic step: loss and penalties of one discriminator update, gradients included."""

from dataclasses import dataclass, field

import torch

from fastgan._dtypes import HALF

from .. import losses
from . import engine, fallback, traced
from . import joint as joining
from .deliver import Delivery, once
from .forward import Forward, unwrap
from .inputs import check_batch, check_pair, interpolate, scale_of
from .outputs import like_output
from .reduction import PENALTY_AT, Form, penalty_value
from .replicas import Replica, refuse_sharded

__all__ = ["CriticStep", "critic_step"]


@dataclass
class CriticStep:
    """What :func:`critic_step` returns.

    ``loss``: scalar; ``loss.backward()``, once, delivers the parameter gradients. ``adversarial``, ``penalty``: its two
    parts, detached scalars. ``real_scores``, ``fake_scores``: detached, a tensor or a list as the critic returned them.
    ``grad_norms``: per-sample input-gradient norms (B,) of the penalties in use, by "r1", "r2", "gp". ``method``: how
    penalised gradients were computed; ``why``: for each penalty, the reason.
    """

    loss: torch.Tensor
    adversarial: torch.Tensor
    penalty: torch.Tensor
    real_scores: torch.Tensor | list
    fake_scores: torch.Tensor | list
    grad_norms: dict = field(default_factory=dict)
    method: str = "backward"
    why: str = ""

    def backward(self):
        """Short for ``loss.backward()``."""
        self.loss.backward()


def critic_step(
    critic, real, fake, *, loss="wasserstein", gradient_penalty=0.0, target=1.0, one_sided=False, alpha=None,
    generator=None, r1=0.0, r2=0.0, real_args=(), fake_args=(), interpolate_args=None, score_fn=None, joint="auto",
    grad_scaler=None, microbatch=None, compile=False, method="auto", pac=1, force=False,
):  # fmt: skip
    """One penalised critic update: loss(D(real), D(fake)) + R1 + R2 + gradient penalty, with exact parameter gradients.

    Arguments
    ---------
    ``critic``: callable of a batch, ``critic(x, *args)``; a module, a DDP-wrapped module, a function.
    ``real``, ``fake``: (B, ...) floating point; detached. One shape if ``gradient_penalty`` is used.
    ``loss``: a name from :mod:`fastgan.losses` or a callable(real_scores, fake_scores) -> scalar.
    ``gradient_penalty``: weight of mean (||grad D(x^)|| - target)^2 at interpolates; ``target``, ``one_sided``,
    ``alpha``, ``generator``, ``pac`` as in :func:`fastgan.penalties.gradient_penalty`.
    ``r1``, ``r2``: weights of weight / 2 * mean ||grad D||^2 at the reals and at the fakes.
    ``real_args``, ``fake_args``, ``interpolate_args`` (default ``real_args``): further arguments of the critic.
    ``score_fn``: picks the scores out of the critic's output.
    ``joint``: True runs real and fake as one batch (one spectral-norm update, one set of batch statistics). False runs them
    one after the other, which is how the textbook formula moves buffers and random state. "auto" does so too until it has
    seen that the critic, a module without forward hooks, moves nothing, and proved that its samples are independent and the
    scores of one batch those of two (:mod:`fastgan.critic.joint`); then it joins small batches, which is faster and takes
    more memory: 0.7 to 0.8 of what the textbook formula peaks at, where False takes half.
    ``grad_scaler``: a :class:`torch.amp.GradScaler`: penalised cotangents are computed at its scale and unscaled in
    float32. Scale the loss with it as usual.
    ``microbatch``: samples to run at a time; for losses that are means over samples. Buffers then move once a part.
    ``compile``: True, or the name of a ``torch.compile`` backend, compiles the whole step: forwards, loss and all passes.
    The first step with given shapes runs eagerly, the second compiles. A critic or loss that cannot be captured, a
    GradScaler, ``joint=True``, ``microbatch`` and the methods "jvp" and "finite_difference" run eagerly, and ``why``
    says so. A critic wrapped by :func:`torch.compile` is accepted and its original module is run. Inside somebody's
    own ``torch.compile``, also with ``fullgraph=True``, the step is double backward by ``torch.func.grad``.
    ``method``: "auto", "fused", "double_backward", "jvp", "finite_difference" (``force``: even where it refuses).

    Forwards count as real, fake, interpolates, in this order, each with its own spectral-norm update, batch statistics
    and dropout masks. ``.loss.backward()`` delivers gradients that are complete when this returns; where everything is
    double backward and small, it is PyTorch's own backward.

    Raises ValueError, TypeError for unsuitable arguments, RuntimeError for ``method="fused"`` where that is not exact.

    Gulrajani et al., 2017 (gradient penalty); Mescheder et al., 2018 (R1, R2); Huang et al., "The GAN is dead; long
    live the GAN!", 2024 (both at once).
    """
    engine.check_method(method)
    check_batch("real", real)
    check_batch("fake", fake)
    if gradient_penalty:
        check_pair(real, fake)
    if joint not in (True, False, "auto"):
        raise ValueError(f'joint must be True, False or "auto", got {joint!r}')
    for name, value in (("gradient_penalty", gradient_penalty), ("r1", r1), ("r2", r2)):
        if value < 0:
            raise ValueError(f"{name} is a weight and cannot be negative, got {value}")
    critic = unwrap(critic)
    refuse_sharded(critic)
    step = _Step(
        replica=Replica(critic),
        loss=losses.get(loss),
        score_fn=score_fn,
        method=method,
        scale=scale_of(grad_scaler),
        force=force,
    )
    interpolate_args = real_args if interpolate_args is None else interpolate_args
    forms = {
        "r1": Form("zero_centered", r1, pac=pac) if r1 else None,
        "r2": Form("zero_centered", r2, pac=pac) if r2 else None,
        "gp": Form("gradient_penalty", gradient_penalty, target, one_sided, pac=pac) if gradient_penalty else None,
    }
    if torch.compiler.is_compiling():
        traced.check_method(method)
        if joint is True or microbatch is not None:
            raise ValueError(f"joint=True and microbatch do not work inside torch.compile: {traced.WAY_OUT}")
        batches = [("real", real, tuple(real_args)), ("fake", fake, tuple(fake_args))]
        if gradient_penalty:
            between = interpolate(real, fake, alpha=alpha, generator=generator, pac=pac)
            batches.append(("gp", between, tuple(interpolate_args)))
        return CriticStep(**traced.results(step.critic, step.loss, score_fn, forms, batches, step.scale))
    note = ""
    if compile:
        from .compiled import NotCompiled  # imports Dynamo, which takes a while

        state = generator and generator.get_state()
        try:
            if joint is True or microbatch is not None:
                raise NotCompiled("joint=True and microbatch are not compiled")
            args = {"real": tuple(real_args), "fake": tuple(fake_args), "gp": tuple(interpolate_args)}
            return step.run_compiled(compile, real, fake, args, forms, alpha, generator)
        except NotCompiled as why:
            note = f"; run eagerly: {why}"
            if generator:
                generator.set_state(state)
    parts = _parts(step.loss, real, fake, real_args, fake_args, interpolate_args, alpha, microbatch, pac)
    for part in parts:
        step.run(part, forms, joint, generator, pac)
    return step.finish(note)


@dataclass
class _Part:
    """Samples that are run together, and their share of the batch."""

    real: torch.Tensor
    fake: torch.Tensor
    real_args: tuple
    fake_args: tuple
    interpolate_args: tuple
    alpha: object
    share: float


def _parts(loss, real, fake, real_args, fake_args, interpolate_args, alpha, size, pac):
    b = real.shape[0]
    if size is None or size >= max(b, fake.shape[0]):
        return [_Part(real, fake, real_args, fake_args, interpolate_args, alpha, 1.0)]
    if size < 1 or size % pac:
        raise ValueError(f"microbatch must be a positive multiple of pac={pac}, got {size}")
    if not loss.mean_of_samples:
        raise ValueError(f"microbatch needs a loss that is a mean over samples, and {loss.name} is not known to be one")
    if fake.shape[0] != b:
        raise ValueError(f"microbatch needs equally many reals and fakes, got {b} and {fake.shape[0]}")

    def cut(value, rows):
        return value[rows] if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == b else value

    parts = []
    for start in range(0, b, size):
        rows = slice(start, min(start + size, b))
        args = [tuple(cut(a, rows) for a in group) for group in (real_args, fake_args, interpolate_args)]
        share = (rows.stop - rows.start) / b
        parts.append(_Part(real[rows], fake[rows], *args, cut(alpha, rows), share))
    return parts


class _Step:
    """Running sums over the parts of a step."""

    def __init__(self, replica, loss, score_fn, method, scale, force):
        self.replica, self.critic, self.loss, self.score_fn = replica, unwrap(replica.module), loss, score_fn
        self.method, self.scale, self.force = method, scale, force
        self.total = None
        self.adversarial, self.penalty = 0.0, 0.0
        self.scores = {"real": [], "fake": []}
        self.norms = {}
        self.used = {}
        self.live = None  # the loss, where its graph waits for backward
        # Did all penalties so far take double backward for good, and the largest activation of theirs; would it be as well
        self.refused, self.largest, self.slight = True, 0, True

    def forward(self, inputs, args, penalised, shared=True):
        """``shared``: may the shared pass come to work on it?"""
        replayable = shared and penalised and engine.may_repeat(self.critic, self.method)
        with self.replica.forward():
            forward = Forward(self.critic, inputs, args, self.score_fn, penalised=penalised, replayable=replayable)
        if shared and penalised and self.method in ("auto", "fused"):
            engine.prepare(forward)  # before the next batch is forwarded
        return forward

    def run(self, part, forms, joint, generator, pac):
        if joint is True:
            self._joint(part, forms)
        elif whys := self._refusals(part, forms):
            return self._textbook(part, forms, generator, pac, whys)
        else:
            key = self._may_join(part, forms) if joint == "auto" else None
            both = joining.joint_forward(self.critic, key, part.real, part.fake, self.score_fn)
            if both is not None:
                self._joint(part, forms, both)
            else:
                joining.run_apart(self.critic, key, part.real.device, lambda: self._apart(part, forms))
        if forms["gp"] is not None:
            inputs = interpolate(part.real, part.fake, alpha=part.alpha, generator=generator, pac=pac)
            forward = self.forward(inputs, part.interpolate_args, True)
            self._penalised("gp", forward, None, forms["gp"], part.share)
        if joint is not True and self.used:
            whys = sure = None
            if self.refused and self.largest <= joining.LARGEST:  # beyond, memory counts for more than time
                whys = {key: why for key, (_, why) in self.used.items()}
            elif self.slight and self.method == "auto" and sum(form is not None for form in forms.values()) == 1:
                whys, sure = dict.fromkeys(self.used, engine.SLIGHT_WHY), engine.SLIGHT_SURE
            engine.remember_refusals(self.critic, self._situation(part, forms), whys, sure)

    def _situation(self, part, forms):
        used = tuple(name for name, form in forms.items() if form is not None)
        return tuple(part.real.shape), tuple(part.fake.shape), self.loss.name, self.method, used

    def _refusals(self, part, forms):
        """Why each penalty takes double backward, where all of them do, step after step; else None. Not for a part of a batch,
        which is there to save memory, and not under DDP, whose reducer is to be prepared once a step."""
        if part.share == 1.0 and self.replica.ddp is None and self.method in ("auto", engine.DOUBLE):
            return engine.refusals(self.critic, self._situation(part, forms))

    def _textbook(self, part, forms, generator, pac, whys):
        """Loss and penalties as eager PyTorch has them, in one graph that waits for backward: the least to do where they share
        nothing. Its activations are in memory all at once."""
        forwards = {
            name: self.forward(getattr(part, name), getattr(part, name + "_args"), forms[key] is not None, shared=False)
            for name, key in (("real", "r1"), ("fake", "r2"))
        }
        for name, forward in forwards.items():
            self.scores[name].append(forward.detached())
        if forms["gp"] is not None:
            inputs = interpolate(part.real, part.fake, alpha=part.alpha, generator=generator, pac=pac)
            forwards["gp"] = self.forward(inputs, part.interpolate_args, True, shared=False)
        with torch.enable_grad():
            total = _value(self.loss, [forwards["real"].scores, forwards["fake"].scores], 1.0)
            self.adversarial = self.adversarial + total.detach()
            for name, forward in forwards.items():
                key = PENALTY_AT[name]
                if forms[key] is None:
                    continue
                weights = [1.0] * len(forward.scores)
                gradient = fallback.input_gradient(forward, weights, self.scale, create_graph=True)
                penalty, norms = penalty_value(gradient, forms[key])
                total = total + penalty
                self.penalty = self.penalty + penalty.detach()
                self.norms.setdefault(key, []).append(norms.detach())
                self.used[key] = engine.DOUBLE, whys[key]
        self.live = once(total)

    def _may_join(self, part, forms):
        r1, r2 = forms["r1"], forms["r2"]
        alike = (r1 is None) == (r2 is None) and (r1 is None or r1.weight == r2.weight)
        if (
            self.replica.ddp is not None
            or not alike
            or part.real_args
            or part.fake_args
            or self.method not in ("auto", "fused")
        ):
            return None
        return joining.situation(self.critic, part.real, part.fake, self.score_fn)

    def _apart(self, part, forms):
        share = part.share
        if self.loss.separable:
            # one batch is finished, and its memory free, before the next is forwarded
            for name, term in (("real", self.loss.real_term), ("fake", self.loss.fake_term)):
                forward = self.forward(getattr(part, name), getattr(part, name + "_args"), forms[PENALTY_AT[name]] is not None)
                value, (cotangents,) = _derivatives(term, [forward.detached()], share)
                self.adversarial = self.adversarial + value
                self._branch(name, forward, cotangents, forms, share)
                del forward
        else:
            forwards = {
                name: self.forward(getattr(part, name), getattr(part, name + "_args"), forms[PENALTY_AT[name]] is not None)
                for name in ("real", "fake")
            }
            value, pair = _derivatives(self.loss, [forwards["real"].detached(), forwards["fake"].detached()], share)
            self.adversarial = self.adversarial + value
            for name, cotangents in zip(("real", "fake"), pair, strict=False):
                self._branch(name, forwards.pop(name), cotangents, forms, share)

    def _joint(self, part, forms, forward=None):
        r1, r2 = forms["r1"], forms["r2"]
        if (r1 is None) != (r2 is None) or (r1 is not None and r1.weight != r2.weight):
            raise ValueError("joint=True runs real and fake as one batch: r1 and r2 must be equal")
        if part.real.shape[0] != part.fake.shape[0]:
            raise ValueError("joint=True needs equally many reals and fakes")
        if forward is None:
            args = tuple(
                torch.cat([r, f]) if isinstance(r, torch.Tensor) and r.dim() else r
                for r, f in zip(part.real_args, part.fake_args, strict=False)
            )
            forward = self.forward(torch.cat([part.real.detach(), part.fake.detach()]), args, r1 is not None)
        # not at the number of rows: a packed critic has fewer scores
        halves = list(zip(*(s.tensor_split(2) for s in forward.detached()), strict=True))
        value, pair = _derivatives(self.loss, halves, part.share)
        self.adversarial = self.adversarial + value
        for name, half in zip(("real", "fake"), halves, strict=True):
            self.scores[name].append(list(half))
        cotangents = [torch.cat([r, f]) for r, f in zip(*pair, strict=False)]
        if r1 is None:
            self._add(engine.plain(forward, cotangents, self.scale))
            return
        # a mean over 2 B samples at twice the weight: the sum of both means
        norms = self._penalised("r1+r2", forward, cotangents, r1.with_weight(2 * r1.weight), part.share)
        half = norms.shape[0] // 2
        self.norms.setdefault("r1", []).append(norms[:half])
        self.norms.setdefault("r2", []).append(norms[half:])

    def _branch(self, name, forward, cotangents, forms, share):
        self.scores[name].append(forward.detached())
        form = forms[PENALTY_AT[name]]
        if form is None:
            self._add(engine.plain(forward, cotangents, self.scale))
        else:
            self._penalised(PENALTY_AT[name], forward, cotangents, form, share)

    def _penalised(self, key, forward, cotangents, form, share):
        weights = [1.0] * len(forward.scores)
        form = form.with_weight(form.weight * share)
        found = engine.penalised(forward, cotangents, form, weights, self.method, self.scale, self.force)
        self.penalty = self.penalty + found.penalty
        if key != "r1+r2":
            self.norms.setdefault(key, []).append(found.norms)
        self.used[key] = (found.method, found.why)
        if self.method == engine.DOUBLE or (found.method == engine.DOUBLE and forward.prepared[1].refusal is not None):
            self.largest = max(self.largest, forward.graph.largest())
        else:
            self.refused = False
            self.slight &= found.method == engine.FUSED and forward.prepared[1].multiply_adds < engine.SLIGHT
        self._add(found)
        return found.norms

    def _add(self, found):
        if self.total is None:
            self.total = found
        else:
            self.total.merge(found)

    def run_compiled(self, compile, real, fake, args, forms, alpha, generator):
        """The step as one compiled graph; raises NotCompiled, with nothing run, where there is none."""
        from . import compiled
        from .compiled import NotCompiled

        if self.method in ("jvp", "finite_difference"):
            raise NotCompiled(f'method="{self.method}" repeats the forward')
        if self.scale != 1.0:
            raise NotCompiled("a GradScaler's scale changes as training goes on")
        if self.replica.moves_buffers():
            raise NotCompiled("DistributedDataParallel broadcasts buffers before each forward")
        program = compiled.step_for(self.critic, "inductor" if compile is True else compile)
        inputs = {"real": real.detach(), "fake": fake.detach()}
        between = None
        if forms["gp"] is not None:
            pac = forms["gp"].pac
            if generator is None:  # drawn inside, after the forwards: the order of random numbers is eager's
                between = (real.detach(), fake.detach(), alpha, pac)
                inputs["gp"] = real.new_zeros(()).expand(real.shape)
            else:
                inputs["gp"] = interpolate(real, fake, alpha=alpha, generator=generator, pac=pac)
        forms = {name: forms[PENALTY_AT[name]] for name in inputs}
        used = [name for name, form in forms.items() if form is not None]
        for name in used:
            inputs[name].requires_grad_(True)
        weights = {name: torch.tensor(forms[name].weight, dtype=torch.float64) for name in used}
        task = compiled.Task(
            inputs,
            {name: args[name] for name in inputs},
            between,
            {name: form if form is None else form.with_weight(1.0) for name, form in forms.items()},
            weights,
            dict.fromkeys(used, self.method),
        )
        found = program(self.critic, self.loss, self.score_fn, task)
        self.adversarial, self.penalty = found.adversarial, 0.0 if found.penalty is None else found.penalty
        self.scores = {name: [found.scores[name]] for name in ("real", "fake")}
        self.norms = {PENALTY_AT[name]: [norms.detach()] for name, norms in found.norms.items()}
        self.used = {PENALTY_AT[name]: how for name, how in found.used.items()}
        self.total = engine.Gradients(None, None, found.gradients, found.leaves, "", "", found.checks)
        return self.finish(found.note)

    def finish(self, note=""):
        adversarial = torch.as_tensor(self.adversarial)
        penalty = self.penalty if isinstance(self.penalty, torch.Tensor) else torch.zeros_like(adversarial)
        loss = self.live
        if loss is None:
            delivery = Delivery(self.total.gradients, self.total.leaves, self.total.checks)
            loss = self.replica.finish(delivery.attach(adversarial + penalty))
        methods = list(dict.fromkeys(m for m, _ in self.used.values()))
        return CriticStep(
            loss=loss,
            adversarial=adversarial,
            penalty=penalty,
            real_scores=_joined(self.scores["real"]),
            fake_scores=_joined(self.scores["fake"]),
            grad_norms={k: v[0] if len(v) == 1 else torch.cat(v) for k, v in self.norms.items()},
            method="backward" if not methods else methods[0] if len(methods) == 1 else "mixed",
            why=("; ".join(f"{key}: {m} ({why})" for key, (m, why) in self.used.items()) or "no penalty in use") + note,
        )


def _joined(parts):
    return like_output([torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=False)])


def _value(function, groups, share):
    """A loss of groups of scores, times share: a scalar."""
    value = function(*(like_output(group) for group in groups))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ValueError("the loss must return a scalar tensor")
    return value.reshape(()) * share if share != 1.0 else value.reshape(())


def _derivatives(function, groups, share):
    """Value of a loss of groups of scores, times share, and its derivative with respect to each score."""
    with torch.enable_grad():
        leaves = [[s.detach().requires_grad_(True) for s in group] for group in groups]
        value = _value(function, leaves, share)
        flat = [s for group in leaves for s in group]
        grads = torch.autograd.grad(value, flat, allow_unused=True) if value.requires_grad else [None] * len(flat)
    found = iter(
        torch.zeros_like(s) if g is None else (g.float() if g.dtype in HALF else g) for s, g in zip(flat, grads, strict=False)
    )
    return value.detach(), [[next(found) for _ in group] for group in leaves]
