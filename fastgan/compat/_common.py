"""What the projects' functions share: how inputs are mixed, whose norm is taken, and the warning where a project is wrong."""

import warnings

import torch

from fastgan.critic import fallback
from fastgan.critic.forward import Forward, unwrap
from fastgan.critic.inputs import weights_for
from fastgan.critic.outputs import score_list
from fastgan.critic.reduction import Form, penalty_value
from fastgan.penalties import penalise

_warned: set[str] = set()


def warn_once(function: str, peer: str, ours: str) -> None:
    """Say that a project takes another norm than the paper that its function is named after."""
    if function not in _warned:
        _warned.add(function)
        warnings.warn(
            f"{function}: the original takes {peer}; this takes {ours}, as the paper says. "
            f"strict_peer=True reproduces the original, strict_peer=False keeps this silent",
            stacklevel=4,
        )


def is_strict(strict_peer: bool | None, function: str, peer: str, ours: str = "the norm of each sample's gradient") -> bool:
    """Whether to reproduce the project; None, the default, means no, with a warning."""
    if strict_peer is None:
        warn_once(function, peer, ours)
    return bool(strict_peer)


def mix(real, fake, alpha):
    """alpha * real + (1 - alpha) * fake, rounded as these projects round it."""
    return alpha * real.detach() + (1 - alpha) * fake.detach()


def per_sample_alpha(real, *rest: int, to=None):
    """Uniform (B, *rest) from the CPU's generator, whatever the device, as a tensor that broadcasts against real."""
    alpha = torch.rand(real.shape[0], *rest).to(real.device if to is None else to)
    return alpha.view(-1, *(1,) * (real.dim() - 1))


def at(critic, inputs, form: Form, *, args=(), score_fn=None, per="sample"):
    """The penalty of ``critic`` at ``inputs``, with norms per "sample", per "pixel" (over dimension 1) or of the "batch"."""
    if per == "pixel":
        return of_gradient(gradient(critic, inputs, args, score_fn), form, per)
    if per == "batch":
        form = Form(form.kind, form.weight, form.target, pac=inputs.shape[0])
    return penalise(critic, inputs, args, form, score_fn=score_fn)


def gradient(critic, inputs, args=(), score_fn=None):
    """dD/dinputs with its graph."""
    forward = Forward(unwrap(critic), inputs, args, score_fn)
    return fallback.input_gradient(forward, weights_for(forward.scores, None), create_graph=True)


def gradient_of(output, inputs):
    """The same of an output that exists already. Raises RuntimeError if it does not depend on the inputs."""
    if not inputs.requires_grad:
        raise RuntimeError("the images do not require gradients: call requires_grad_() on them before the critic's forward")
    scores = score_list(output)
    forward = Forward.captured(None, inputs, scores, traced=False)
    return fallback.input_gradient(forward, weights_for(scores, None), create_graph=True)


def of_gradient(g, form: Form, per="sample"):
    """The penalty of a gradient (B, ...), differentiable."""
    if per == "pixel":
        if form.mask is not None:
            g, form = g * form.mask, Form(form.kind, form.weight, form.target)
        g = g.movedim(1, -1).reshape(-1, g.shape[1])
    return penalty_value(g, form)[0]


def squared_norms(output, inputs):
    """(B,): the squared norm of each sample's gradient."""
    return penalty_value(gradient_of(output, inputs), Form("zero_centered"))[1].square()
