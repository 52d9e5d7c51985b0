"""Which penalty, and from input gradients to its value and to its derivative with respect to them: packs and masks around
the operators of :mod:`fastgan.ops.gradient_penalty`."""

from dataclasses import dataclass, replace

import torch

from fastgan._dtypes import accumulate_dtype
from fastgan.ops import gradient_penalty as penalty_op

#: batch of a critic step -> the penalty taken there
PENALTY_AT = {"real": "r1", "fake": "r2", "gp": "gp"}


@dataclass(frozen=True)
class Form:
    """A penalty as a function of the per-sample norms n_i of N samples.

    ===================  ==================================================================
    ``gradient_penalty``  weight * mean (n - target)^2; one_sided: only where n > target
    ``zero_centered``     weight / 2 * mean n^2 (R1, R2)
    ``power``             weight * mean n^power (WGAN-div)
    ``max``               weight * max n^2
    ===================  ==================================================================

    ``pac``: rows that make up one sample. ``mask``: multiplies the gradient first.
    """

    kind: str
    weight: float = 10.0
    target: float = 1.0
    one_sided: bool = False
    power: float = 2.0
    pac: int = 1
    mask: torch.Tensor | None = None

    def __post_init__(self):
        if self.kind not in penalty_op.KINDS:
            raise ValueError(f"unknown penalty kind {self.kind!r}; known: {', '.join(penalty_op.KINDS)}")
        if self.pac < 1:
            raise ValueError(f"pac must be at least 1, got {self.pac}")
        if self.kind == "power" and self.power < 1:
            raise ValueError(f"power must be at least 1, got {self.power}")

    def with_weight(self, weight):
        return replace(self, weight=weight)


def _samples(grad, form):
    """grad (B, ...), masked, as (N, ...): one gradient per sample."""
    if form.mask is not None:
        grad = grad.to(accumulate_dtype(grad.dtype)) * form.mask
    if form.pac == 1:
        return grad
    if grad.shape[0] % form.pac:
        raise ValueError(f"batch of {grad.shape[0]} rows does not divide into packs of {form.pac}")
    return grad.unflatten(0, (grad.shape[0] // form.pac, form.pac))


def _penalty(samples, form):
    return penalty_op.forward(samples, form.kind, form.weight, form.target, form.one_sided, form.power)


def penalty_value(grad, form):
    """The penalty (scalar) and the norms (N,) of gradients (B, ...), N = B / pac; differentiable."""
    value, norms, *_ = _penalty(_samples(grad, form), form)
    return value, norms


def penalty_and_seed(grad, form):
    """(penalty, norms (N,), w = dP/dgrad, <w_i, g_i> (N,)) of gradients (B, ...)."""
    samples = _samples(grad, form)
    value, norms, factors, seed = _penalty(samples, form)
    w = seed.reshape(grad.shape)
    if form.mask is not None:
        w = (w * form.mask).to(grad.dtype)
    return value, norms, w, factors * norms * norms
