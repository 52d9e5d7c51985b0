"""The textbook formulas, by eager double backward; for the benchmarks and the tests."""

import torch


def listed(scores):
    return list(scores) if isinstance(scores, (list, tuple)) else [scores]


def gradient(critic, x, args=(), pick=lambda out: out):
    """grad of sum D at a fresh leaf, with graph, and the scores."""
    x = x.detach().clone().requires_grad_(True)
    scores = pick(critic(x, *args))
    (g,) = torch.autograd.grad(sum(s.sum() for s in listed(scores)), x, create_graph=True)
    return g, scores


def norms(g, pac=1):
    """(N,) norms of N packs of ``pac`` rows."""
    return g.reshape(g.shape[0] // pac, -1).norm(2, dim=1)


def step(critic, real, fake, loss, gp=0.0, r1=0.0, r2=0.0, alpha=None, target=1.0, one_sided=False, real_args=(),
         fake_args=(), pick=lambda out: out, pac=1):  # fmt: skip
    """The eager critic step: returns (loss, adversarial, penalty), all differentiable."""
    penalty = 0.0
    found = []
    for x, weight, args in ((real, r1, real_args), (fake, r2, fake_args)):
        if weight:
            g, scores = gradient(critic, x, args, pick)
            penalty = penalty + weight / 2 * g.square().sum() / (g.shape[0] // pac)
        else:
            scores = pick(critic(x.detach(), *args))
        found.append(scores)
    adversarial = loss(*found)
    if gp:
        g, _ = gradient(critic, torch.lerp(fake.detach(), real.detach(), alpha), real_args, pick)
        excess = norms(g, pac) - target
        penalty = penalty + gp * (excess.clamp_min(0) if one_sided else excess).square().mean()
    return adversarial + penalty, adversarial, penalty
