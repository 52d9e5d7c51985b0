"""Real and fake as one batch: where it is proved to change nothing, and the traps where it would."""

import copy
import random

import critics
import numpy as np
import pytest
import reference
import torch
import torch.nn as nn

import fastgan
from fastgan import losses
from fastgan.critic import joint

MODES = [{"r1": 1.0, "r2": 1.0, "loss": "relativistic"}, {"gradient_penalty": 10.0, "loss": "wasserstein"}, {"loss": "hinge"}]
STEPS = 4  # apart and watched, proved, joined, joined


SIZES = set()


class Seen(nn.Module):
    """Notes, outside of the module, how large the batches are that arrive."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        SIZES.add(len(x))
        return self.critic(x)


def module(function):
    """A module that looks like one with a forward of its own: unlike a module that holds a function it may be joined."""
    return type("Module", (nn.Module,), {"function": staticmethod(function), "forward": lambda self, x: self.function(x)})


def sizes_of_steps(critic, real, fake, steps=STEPS, after=lambda k, critics: None, **mode):
    """Runs our steps and the textbook's side by side on fresh batches; the sizes of the batches of our last step."""
    ours, eager, seen = critic, copy.deepcopy(critic), Seen(critic)
    loss, weights = losses.get(mode["loss"]), [mode.get(name, 0.0) for name in ("gradient_penalty", "r1", "r2")]
    for k in range(steps):
        SIZES.clear()
        r, f = real.roll(k, 0) + 0.1 * k, fake * (1 + k)
        alpha = torch.rand(len(r), *[1] * (r.dim() - 1), dtype=r.dtype)
        states = []
        for module in (seen, eager):
            module.zero_grad()
            torch.manual_seed(k), random.seed(k), np.random.seed(k)
            if module is seen:
                step = fastgan.critic_step(seen, r, f, alpha=alpha, **mode)
                step.loss.backward()
                value = step.loss
            else:
                value, *_ = reference.step(eager, r, f, loss, *weights, alpha)
                value.backward()
            states.append((value.detach(), torch.get_rng_state(), random.getstate(), str(np.random.get_state())))
        torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-10, atol=1e-12)
        assert torch.equal(states[0][1], states[1][1]) and states[0][2:] == states[1][2:], "random state"
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
        for (name, a), b in zip(ours.named_buffers(), eager.buffers(), strict=True):
            assert torch.equal(a, b), name
        after(k, (ours, eager))
    return set(SIZES)


def batches(*shape, b=4):
    return torch.randn(2, b, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


JOINED = {
    "DCGAN": (lambda: critics.DCGAN(4, 16), (3, 16, 16)),
    "SNGAN": (lambda: critics.SNGAN(4), (3, 32, 32)),
    "R3GAN": (lambda: critics.R3GAN(4), (3, 32, 32)),
    "CTGAN": (lambda: critics.CTGAN(8, 16).eval(), (8,)),
    "batch norm eval": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)).eval(), (8,)),
}


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["loss"])
@pytest.mark.parametrize("name", JOINED)
def test_quiet_critics_of_independent_samples_are_run_once(name, mode):
    torch.manual_seed(0)
    make, shape = JOINED[name]
    sizes = sizes_of_steps(make().double(), *batches(*shape), **mode)
    assert sizes == ({8, 4} if "gradient_penalty" in mode else {8})


def linear(middle):
    return lambda: nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.2), middle(), nn.Linear(5, 1))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x / self.calls


class Logging(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, x):
        self.features.append(len(x))
        return x * len(self.features)


TRAPS = {
    "dropout": linear(lambda: nn.Dropout(0.5)),
    "batch norm": linear(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.ReLU())),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 1)
    ),
    "detached statistics": linear(module(lambda x: x / x.detach().std())),
    "size of the batch": linear(module(lambda x: x / len(x))),
    "place in the batch": linear(module(lambda x: x * torch.arange(len(x), dtype=x.dtype)[:, None])),
    "neighbours": linear(module(lambda x: x + 0.1 * x.roll(1, 0))),
    "faint mean": linear(module(lambda x: x + 1e-4 * x.mean(0))),
    "fixed batch": linear(module(lambda x: x.view(4, 5) * 2)),
    "counter": linear(Counting),
    "log": linear(Logging),
    "python's random": linear(module(lambda x: x * random.random())),
    "numpy's random": linear(module(lambda x: x * float(np.random.rand()))),
    "sorting": linear(module(lambda x: x + x[x[:, 0].argsort()])),
}


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.random = random.Random(0)

    def forward(self, x):
        return x * self.random.choice([1, 1, 1, 2])


def test_generators_and_functions_that_a_module_holds_are_never_drawn_from_in_vain():
    for middle in (OwnGenerator, lambda: critics.Lambda(lambda x: x)):
        critic = linear(middle)().double()
        assert sizes_of_steps(critic, *batches(6), steps=6, **MODES[2]) == {4}
    assert joint.hides_state(OwnGenerator()) and not joint.hides_state(nn.Conv2d(3, 3, 3))


def test_a_module_of_plain_data_is_joined():
    assert sizes_of_steps(linear(module(lambda x: x * 2))().double(), *batches(6), **MODES[2]) == {8}


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["loss"])
@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_run_apart_and_stay_exact(name, mode):
    torch.manual_seed(0)
    assert sizes_of_steps(TRAPS[name]().double(), *batches(6), **mode) == {4}


def test_hooks_see_two_batches():
    critic, seen = linear(nn.Identity)().double(), []
    critic[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    sizes_of_steps(critic, *batches(6), **MODES[0])
    assert set(seen) == {4}


def test_a_critic_that_changes_is_run_apart_again():
    def switch(k, pair):
        if k == 3:
            for critic in pair:
                critic.train()

    critic = linear(lambda: nn.Dropout(0.5))().double().eval()
    assert sizes_of_steps(critic, *batches(6), steps=4, **MODES[0]) == {8}
    assert sizes_of_steps(critic, *batches(6), steps=6, after=switch, **MODES[0]) == {4}


class Switched(nn.Module):
    mix = 0.0

    def forward(self, x):
        return x + self.mix * x.roll(1, 0) if self.mix else x


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["loss"])
def test_an_attribute_that_makes_samples_interact_is_noticed(mode):
    def switch(k, pair):
        if k == 3:
            for critic in pair:
                critic[2].mix = 0.5

    assert sizes_of_steps(linear(Switched)().double(), *batches(6), steps=6, after=switch, **mode) == {4}


def test_unequal_weights_and_large_batches_are_run_apart(monkeypatch):
    critic = linear(nn.Identity)().double()
    assert sizes_of_steps(critic, *batches(6), r1=1.0, r2=2.0, loss="hinge") == {4}
    monkeypatch.setattr(joint, "LARGEST", 10)
    assert sizes_of_steps(critic, *batches(6), **MODES[0]) == {4}


def test_joint_false_never_joins():
    assert 8 not in sizes_of_steps(linear(nn.Identity)().double(), *batches(6), joint=False, **MODES[0])
