"""Random critics against float64 double backward.

Critics are drawn from layers of all kinds: those the shared pass serves, curved ones, ones that couple samples, shared
modules, branches and odd score shapes. Whatever method is chosen, gradients must be right; and for critics made of
piecewise linear layers only, the shared pass must have been chosen.
"""

import random

import critics
import pytest
import reference
import torch
import torch.nn as nn
import torch.nn.functional as F

import fastgan
from fastgan import losses

torch.set_num_threads(1)
SEEDS = 560
CHUNK = 20

PLAIN = [
    lambda r, c: nn.Conv2d(c, c, r.choice([1, 3]), padding="same"),
    lambda r, c: nn.Conv2d(c, c, 3, 1, r.choice([1, 2]), dilation=r.choice([1, 2]), groups=r.choice([1, 2, c])),
    lambda r, c: nn.Conv2d(c, 2 * c, 3, 2, 1, bias=r.random() < 0.5),
    lambda r, c: nn.ConvTranspose2d(c, c, 3, 1, 1, groups=r.choice([1, 2])),
    lambda r, c: nn.utils.parametrizations.spectral_norm(nn.Conv2d(c, c, 3, 1, 1)),
    lambda r, c: nn.utils.parametrizations.weight_norm(nn.Conv2d(c, c, 3, 1, 1)),
    lambda r, c: critics.EqualConv(c, c, 3, padding=1),
    lambda r, c: nn.ReLU(inplace=r.random() < 0.5),
    lambda r, c: nn.LeakyReLU(0.2, inplace=r.random() < 0.5),
    lambda r, c: nn.LeakyReLU(0.1),
    lambda r, c: nn.PReLU(r.choice([1, c])),
    lambda r, c: nn.Hardtanh(),
    lambda r, c: nn.RReLU(),
    lambda r, c: nn.Dropout(0.2),
    lambda r, c: nn.Dropout2d(0.2),
    lambda r, c: critics.Lambda(lambda x: x.abs()),
    lambda r, c: critics.Lambda(lambda x: F.interpolate(x, size=6, mode=r.choice(["nearest", "bilinear", "bicubic"]))),
    lambda r, c: critics.Lambda(lambda x: F.pad(x, (1, 0, 0, 1), mode=r.choice(["constant", "reflect", "replicate"]))),
    lambda r, c: critics.Lambda(lambda x: x.roll(1, 2).flip(3)),
    lambda r, c: critics.Lambda(lambda x: torch.cat([x, -F.relu(x)], 1)),
    lambda r, c: critics.Lambda(lambda x: x.permute(0, 1, 3, 2) * 0.5 - 0.1),
    lambda r, c: critics.Lambda(lambda x: torch.maximum(x, 0.3 * x.flip(1))),
    lambda r, c: critics.Lambda(lambda x: x.sort(1).values),
    lambda r, c: critics.WithParameter(torch.rand(c, 1, 1) + 0.5, lambda x, p: x * p),
    lambda r, c: critics.WithParameter(torch.rand(c, 1, 1) + 0.5, lambda x, p: x / p + p),
    lambda r, c: critics.WithParameter(torch.randn(c, c), lambda x, p: torch.einsum("bchw,cd->bdhw", x, p)),
    lambda r, c: critics.WithParameter(torch.randn(1, 1, 1, 1), lambda x, p: torch.where(x > 0, x, p)),
    lambda r, c: nn.BatchNorm2d(c).eval(),
    lambda r, c: nn.MaxPool2d(2, 1),
    lambda r, c: nn.AvgPool2d(2, 1),
    lambda r, c: nn.AdaptiveAvgPool2d(3),
    lambda r, c: critics.Lambda(lambda x: x.mean(3, keepdim=True) + x),
]
CURVED = [
    lambda r, c: nn.SiLU(),
    lambda r, c: nn.Softplus(),
    lambda r, c: nn.InstanceNorm2d(c, affine=True),
    lambda r, c: nn.GroupNorm(1, c),
    lambda r, c: nn.BatchNorm2d(c),
    lambda r, c: critics.Lambda(critics.minibatch_stddev),
    lambda r, c: critics.Lambda(lambda x: x * x.sigmoid().mean((2, 3), keepdim=True)),
    lambda r, c: critics.WithParameter(torch.randn(1), lambda x, p: x + p * x.square()),
]
COUPLED = [
    lambda r, c: critics.Lambda(lambda x: x - x.mean(0, keepdim=True)),
    lambda r, c: critics.Lambda(lambda x: x + 0.3 * x.roll(1, 0)),
    lambda r, c: critics.Lambda(lambda x: x + 0.01 * x.flip(0)),
    lambda r, c: critics.Lambda(lambda x: torch.maximum(x, x.amax(0, keepdim=True) * 0.5)),
    lambda r, c: critics.Lambda(lambda x: x + 0.2 * x[torch.tensor([2, 0, 1, 3])]),
]


class Random(nn.Module):
    """A chain of random layers with residual connections, one of them possibly run twice, and a score."""

    def __init__(self, seed):
        super().__init__()
        r = random.Random(seed)
        self.kind = r.choices(["plain", "curved", "coupled", "both"], [6, 2, 2, 1])[0]
        depth = r.randint(2, 6)
        wild = {"plain": [], "curved": [CURVED], "coupled": [COUPLED], "both": [CURVED, COUPLED]}[self.kind]
        spots = r.sample(range(depth + len(wild)), len(wild))
        layers, self.residual = [nn.Conv2d(3, 4, 3, 1, 1)], set()
        x = torch.zeros(4, 3, 6, 6)
        x = layers[0](x)
        k = 0
        while len(layers) < depth + len(wild) + 1:
            pool = wild[spots.index(k)] if k in spots else PLAIN
            k += 1
            for _ in range(50):
                try:
                    layer = r.choice(pool)(r, x.shape[1])
                    with torch.no_grad():
                        y = layer(x.clone())
                except (RuntimeError, ValueError):
                    continue  # does not fit here
                if getattr(layer, "inplace", False) and not isinstance(layers[-1], nn.Conv2d):
                    continue  # would overwrite what the layer before has saved
                if y.shape[1] <= 16 and y.numel() <= 4000:
                    break
            else:
                break
            inplace = getattr(layer, "inplace", False)
            if y.shape == x.shape and not inplace and r.random() < 0.25:
                self.residual.add(len(layers))
            layers.append(layer)
            x = y
        self.layers = nn.ModuleList(layers)
        self.twice = r.randrange(1, len(layers)) if r.random() < 0.2 else None
        self.form = r.choice(["linear", "linear", "mean", "column", "patch", "list", "scaled"])
        self.out = nn.Linear(x[0].numel(), 1)
        self.map = nn.Conv2d(x.shape[1], 1, 1)

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            y = layer(x)
            if k in self.residual:
                y = y + x
            if k == self.twice and y.shape == x.shape and not getattr(layer, "inplace", False):
                y = layer(y)
            x = y
        if self.form == "linear":
            return self.out(x.flatten(1)).view(-1)
        if self.form == "column":
            return self.out(x.flatten(1))
        if self.form == "mean":
            return self.map(F.leaky_relu(x, 0.2)).mean((1, 2, 3))
        if self.form == "patch":
            return self.map(x)
        if self.form == "list":
            return [self.out(x.flatten(1)).view(-1), self.map(x)]
        return self.out(x.flatten(1)).view(-1) * 3.0 - 1.0


def one(seed):
    r = random.Random(seed + 1)
    pair = []
    for _ in range(2):
        torch.manual_seed(seed)
        pair.append(Random(seed).double())
    ours, eager = pair
    case = r.choice(
        [
            {"r1": 1.0, "r2": 0.5},
            {"r1": 2.0},
            {"gradient_penalty": 10.0, "one_sided": r.random() < 0.3},
            {"r1": 0.3, "r2": 1.0, "gradient_penalty": 1.0},
        ]
    )
    loss = r.choice(losses.names())
    torch.manual_seed(seed)
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    for step in range(2):
        # other images in the second step: a cached proof meets new numbers
        real, fake = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
        ours.zero_grad()
        eager.zero_grad()
        torch.manual_seed(seed + step)
        got = fastgan.critic_step(ours, real, fake, loss=loss, alpha=alpha, **case)
        got.loss.backward()
        state = torch.get_rng_state()
        torch.manual_seed(seed + step)
        want = reference.step(
            eager, real, fake, losses.get(loss), gp=case.get("gradient_penalty", 0.0), r1=case.get("r1", 0.0),
            r2=case.get("r2", 0.0), alpha=alpha, one_sided=case.get("one_sided", False),
        )  # fmt: skip
        want[0].backward()
        what = f"seed {seed} step {step} {ours.kind} {ours.form} {loss} {case} {got.method}: {got.why}\n{ours}"
        assert torch.equal(state, torch.get_rng_state()), what
        # deep chains of unnormalised layers can grow: compare with the size of the loss
        torch.testing.assert_close(got.loss, want[0], rtol=1e-9, atol=1e-9, msg=what)
        if any(bool((n < 1e-9).any()) for n in got.grad_norms.values()):
            continue  # the score does not depend on the input but for rounding (a mean after batch norm): all is noise
        error = reference.error(reference.grads(ours), reference.grads(eager))
        assert error <= 1e-12, f"{error} {what}"
        for a, b in zip(ours.buffers(), eager.buffers(), strict=False):
            if a.is_cuda:  # batch statistics are summed up in no fixed order
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=what)
            else:
                assert torch.equal(a, b), what
    return ours, loss, got


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_random_critics(start):
    for seed in range(start, start + CHUNK):
        ours, _, got = one(seed)
        shareable = ours.kind == "plain" and ours.form not in ("patch", "list")
        if shareable and "cannot be told apart" not in got.why:
            assert got.method == "fused", f"seed {seed}: {got.why}\n{ours}"


def test_enough_of_every_kind_is_drawn():
    kinds = [Random(seed).kind for seed in range(60)]
    assert {"plain", "curved", "coupled", "both"} == set(kinds)
