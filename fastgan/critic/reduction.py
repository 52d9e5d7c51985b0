"""From per-sample input gradients to a penalty: norms, value, and the derivative of the value with respect to the
gradients. Plain functions of plain tensors.

Every penalty here depends on the gradient only through q_i = ||g_i||^2 of each sample, so its derivative is a factor
per sample times the gradient itself: dP/dg_i = c_i g_i with c_i = 2 dP/dq_i.
"""

from dataclasses import dataclass, replace

import torch

from fastgan._dtypes import accumulate_dtype

KINDS = ("gradient_penalty", "zero_centered", "power", "max")


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
        if self.kind not in KINDS:
            raise ValueError(f"unknown penalty kind {self.kind!r}; known: {', '.join(KINDS)}")
        if self.pac < 1:
            raise ValueError(f"pac must be at least 1, got {self.pac}")
        if self.kind == "power" and self.power < 1:
            raise ValueError(f"power must be at least 1, got {self.power}")

    def with_weight(self, weight):
        return replace(self, weight=weight)


def square_sums(grad, form):
    """q (N,) = per-sample sum of squares of grad (B, ...), N = B / pac, in at least float32; differentiable."""
    g = grad.to(accumulate_dtype(grad.dtype))
    if form.mask is not None:
        g = g * form.mask
    if g.shape[0] % form.pac:
        raise ValueError(f"batch of {g.shape[0]} rows does not divide into packs of {form.pac}")
    n = g.shape[0] // form.pac
    return g.reshape(n, g.numel() // n if n else 0).square().sum(1)


def norms_of(q):
    """sqrt(q) whose derivative at 0 is 0 instead of infinite."""
    positive = q > 0
    return torch.where(positive, torch.where(positive, q, 1.0).sqrt(), 0.0)


def penalty_value(q, form):
    """The penalty (scalar) and the norms (N,), differentiable in q (N,)."""
    n = norms_of(q)
    if form.kind == "zero_centered":
        return q.mean() * (form.weight / 2), n
    if form.kind == "max":
        return q.amax() * form.weight, n
    if form.kind == "power":
        # through n only where n > 0: the derivative of 0^p is 0
        return n.pow(form.power).mean() * form.weight, n
    excess = n - form.target
    if form.one_sided:
        excess = excess.clamp_min(0)
    return excess.square().mean() * form.weight, n


def seed_factors(q, n, form):
    """c (N,) with dP/dg_i = c_i g_i; the closed form of 2 d(penalty_value)/dq."""
    count = q.shape[0]
    if form.kind == "zero_centered":
        return torch.full_like(q, form.weight / count)
    if form.kind == "max":
        largest = q == q.amax()
        return largest.to(q.dtype) * (2 * form.weight) / largest.sum()
    safe = torch.where(n > 0, n, 1.0)
    if form.kind == "power":
        c = safe.pow(form.power - 2) * (form.power * form.weight / count)
    else:
        excess = n - form.target
        if form.one_sided:
            excess = excess.clamp_min(0)
        c = excess / safe * (2 * form.weight / count)
    return torch.where(n > 0, c, 0.0)


def penalty_and_seed(grad, form):
    """One pass over the gradient: (penalty, norms (N,), c per row (B,), <dP/dg_i, g_i> (N,))."""
    q = square_sums(grad, form)
    value, n = penalty_value(q, form)
    c = seed_factors(q, n, form)
    rows = c.repeat_interleave(form.pac) if form.pac > 1 else c
    return value, n, rows, c * q
