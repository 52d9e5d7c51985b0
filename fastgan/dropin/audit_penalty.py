"""Traps of penalty functions, found by calling them with critics whose gradient is known."""

import sys

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastgan.dropin.findings import Finding


class _Probe(nn.Module):
    """A critic whose gradient is known: row i's is ``scale * rows[i] * weight``. Its output has the form of a real critic's."""

    def __init__(self, shape, like, rows=None, scale=1.0, curved=False):
        super().__init__()
        size = torch.Size(shape[1:]).numel()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=torch.float64))
        self.scale, self.rows, self.curved, self.like, self.seen = scale, rows, curved, like, []
        with torch.no_grad():
            self.weight /= self.weight.norm()

    def forward(self, x, *args, **kwargs):
        self.seen.append(x.detach())
        x = x.double().flatten(1)
        score = ((x * self.weight).square().sum(1) if self.curved else x @ self.weight)[:, None] * self.scale
        if self.rows is not None:
            score = score * self.rows[: x.shape[0], None]

        def like(t):
            if not (isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim()):
                return t
            return score.view(-1, *(1,) * (t.dim() - 1)) if t.dim() > 1 else score[:, 0]

        return score if self.like is None else pytree.tree_map(like, self.like)


def _call(penalty, critic, real, fake):
    with torch.enable_grad():
        result = penalty(critic, real, fake)
    return result[0] if isinstance(result, (tuple, list)) else result


def findings(penalty, shape, like):
    """Findings about ``penalty(critic, real, fake)`` on batches of ``shape``; ``like``: an output of the critic it is for."""
    shape = (max(shape[0], 3), *shape[1:])
    before, numpy = torch.get_rng_state(), sys.modules.get("numpy")  # which some take alpha from
    numpys = numpy and numpy.random.get_state()
    try:
        yield from _probed(penalty, shape, like)
    except Exception as error:
        yield Finding(
            "could not be probed", "penalty", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "audit calls penalty(critic, real, fake): wrap one of another signature in a lambda",
        )  # fmt: skip
    finally:
        torch.set_rng_state(before)
        if numpys:
            numpy.random.set_state(numpys)


def _batches(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def _probed(penalty, shape, like):
    real, fake = _batches(shape)
    fake.requires_grad_()
    critic = _Probe(shape, like, scale=2.0, curved=True)
    value = _call(penalty, critic, real, fake)
    if isinstance(value, float):
        return  # it has run backward itself: nothing to look at
    if not value.requires_grad:
        yield Finding(
            "no gradient", "penalty", "the penalty does not depend on the critic's parameters: it trains nothing",
            "torch.autograd.grad(..., create_graph=True), and no .item() or .detach() on the way",
        )  # fmt: skip
        return
    value.backward()
    if fake.grad is not None and bool(fake.grad.isfinite().all()):
        yield Finding(
            "gradients reach the generator", "penalty",
            "the penalty's graph goes on into the fakes: memory and time for gradients that nobody wants",
            "fake.detach()",
        )  # fmt: skip
    if real.requires_grad:
        yield Finding(
            "changes its arguments", "penalty", "requires_grad_ on the caller's batch: later forwards record graphs for it",
            "x = real.detach().requires_grad_()",
        )  # fmt: skip
    yield from _norm(penalty, shape, like)
    yield from _zero(penalty, shape, like)
    yield from _alpha(penalty, shape, like)
    smaller = (shape[0] - 1, *shape[1:])
    try:
        _call(penalty, _Probe(smaller, like), *_batches(smaller))
    except Exception as error:
        yield Finding(
            "fixed batch size", "penalty", f"the last, smaller batch of an epoch raises: {str(error).splitlines()[0]}",
            "real.shape[0] instead of a constant",
        )  # fmt: skip


def _lowest(penalty, shape, like, rows):
    """The least value of the penalty over all scales of the gradient, in units of its value at 0: 0 where all norms that it
    takes are equal. None if it is not of the form mean (n - k)^2 with k > 0.

    From scales far above any target, where a one-sided penalty too is a parabola, which a fourth scale has to lie on.
    """
    values = []
    for scale in (4.0, 6.0, 8.0, 10.0):
        state = torch.get_rng_state()
        values.append(float(_call(penalty, _Probe(shape, like, rows, scale), *_batches(shape)).detach()))
        torch.set_rng_state(state)
    system = torch.tensor([[s * s, s, 1.0] for s in (4.0, 6.0, 8.0)], dtype=torch.float64)
    a, b, c = torch.linalg.solve(system, torch.tensor(values[:3], dtype=torch.float64)).tolist()
    if a <= 0 or c <= 1e-3 * a or abs(100 * a + 10 * b + c - values[3]) > 1e-3 * abs(values[3]):
        return None
    return 1 - b * b / (4 * a * c)


def _norm(penalty, shape, like):
    same = _lowest(penalty, shape, like, None)
    if same is None:
        return
    if same > 5e-3:
        yield Finding(
            "norm per pixel", "penalty",
            "samples of equal gradient norm are penalised differently: the norm is not taken over all of a sample's gradient "
            "(norm(2, dim=1) without flattening)",
            "grad.flatten(1).norm(2, dim=1), or fastgan.gradient_penalty",
        )  # fmt: skip
        return
    different = _lowest(penalty, shape, like, torch.linspace(1.0, 2.0, shape[0], dtype=torch.float64))
    if different is not None and different < 5e-3:
        yield Finding(
            "norm of the whole batch", "penalty",
            "samples of different gradient norms are not told apart: one norm is taken of all of them together",
            "grad.flatten(1).norm(2, dim=1), or fastgan.gradient_penalty",
        )  # fmt: skip


def _zero(penalty, shape, like):
    critic = _Probe(shape, like, scale=0.0)
    value = _call(penalty, critic, *_batches(shape))
    value.backward()
    bad = not bool(value.isfinite()) or (critic.weight.grad is not None and not bool(critic.weight.grad.isfinite().all()))
    if bad:
        yield Finding(
            "no eps under the root", "penalty",
            "where a sample's gradient is 0, the penalty's gradient is NaN and spoils all weights",
            "grad.norm(), or (squares.sum() + 1e-12).sqrt(), or fastgan.gradient_penalty",
        )  # fmt: skip


def _alpha(penalty, shape, like):
    critic = _Probe(shape, like)
    state = torch.get_rng_state()
    zeros, ones = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    draws = []
    for _ in range(8):
        critic.seen.clear()
        _call(penalty, critic, zeros.clone(), ones.clone())
        draws += [x.double() for x in critic.seen if x.shape == torch.Size(shape)]
    torch.set_rng_state(state)
    moving = [x.flatten(1) for x in draws if not bool(torch.isin(x, torch.tensor([0.0, 1.0], dtype=x.dtype)).all())]
    if not moving:
        return  # no interpolates
    if any(bool((x < -1e-6).any() | (x > 1 + 1e-6).any()) for x in moving):
        yield Finding(
            "alpha outside [0, 1]", "penalty", "points beyond the line between real and fake are penalised (a normal draw?)",
            "torch.rand, not torch.randn",
        )  # fmt: skip
    if any(bool((x - x[:, :1]).abs().max() > 1e-6) for x in moving):
        yield Finding(
            "alpha per element", "penalty", "each element has its own alpha: the points do not lie between a real and a fake",
            "alpha of shape (B, 1, ..., 1)",
        )  # fmt: skip
    elif all(bool((x - x[:1]).abs().max() < 1e-9) for x in moving):
        yield Finding(
            "one alpha for the batch", "penalty", "all samples are mixed alike: the points cover the space between less well",
            "alpha of shape (B, 1, ..., 1)",
        )  # fmt: skip
