"""The critic step inside somebody's own ``torch.compile``: the textbook formula written with ``torch.func.grad``.

Dynamo follows neither graph nodes nor ``torch.autograd.grad``, so the shared pass cannot run there; double backward, and
forward mode over it, can, and the surrounding compiler fuses them.
"""

import torch

from fastgan._dtypes import accumulate_dtype

from . import fallback
from .outputs import like_output, score_list
from .reduction import PENALTY_AT, penalty_value

WAY_OUT = 'leave method="auto", or call critic_step(..., compile=True) outside torch.compile'


def check_method(method):
    """Raise ValueError for the methods which read the autograd graph of the critic."""
    if method in ("fused", "finite_difference", "jvp"):
        raise ValueError(f'method="{method}" reads or repeats the recorded forward, which torch.compile does not: {WAY_OUT}')


def forward(critic, inputs, args, score_fn, form, scale):
    """(scores, penalty or None, norms or None) of one batch, all differentiable with respect to the parameters."""
    inputs = inputs.detach()
    if form is None:
        return score_list(critic(inputs, *args), score_fn), None, None

    def total(x):
        scores = score_list(critic(x, *args), score_fn)
        return fallback.weighted_sum(scores, [scale] * len(scores)), scores

    g, scores = torch.func.grad(total, has_aux=True)(inputs)
    g = g.to(accumulate_dtype(g.dtype)) / scale if scale != 1.0 else g
    penalty, norms = penalty_value(g, form)
    return scores, penalty, norms


def results(critic, loss, score_fn, forms, parts, scale):
    """Keyword arguments of a CriticStep. ``parts``: (name, inputs, args) of the batches "real", "fake" and perhaps "gp"."""
    scores, norms, penalty = {}, {}, 0.0
    for name, inputs, args in parts:
        scores[name], value, n = forward(critic, inputs, args, score_fn, forms[PENALTY_AT[name]], scale)
        if value is not None:
            penalty = penalty + value
            norms[PENALTY_AT[name]] = n.detach()
    adversarial = loss(like_output(scores["real"]), like_output(scores["fake"])).reshape(())
    penalty = penalty if norms else torch.zeros_like(adversarial)
    return {
        "loss": adversarial + penalty,
        "adversarial": adversarial.detach(),
        "penalty": penalty.detach(),
        "real_scores": like_output([s.detach() for s in scores["real"]]),
        "fake_scores": like_output([s.detach() for s in scores["fake"]]),
        "grad_norms": norms,
        "method": "double_backward" if norms else "backward",
        "why": "inside torch.compile",
    }
