"""GraphedCriticStep where there is no GPU: the same numbers, and what it refuses. On GPUs: test_gpu.py."""

import copy

import critics
import pytest
import reference
import torch
from torch import nn

import fastgan
from fastgan.critic import deliver

R12 = {"r1": 1.3, "r2": 0.7, "loss": "relativistic"}
GP = {"gradient_penalty": 10.0, "loss": "wasserstein"}


def batches(seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("case", [R12, GP], ids=["r1+r2", "gp"])
def test_gradients_of_the_critic_step_replace_what_was_there(case):
    ours = nn.Sequential(critics.conv(3, 4), nn.ReLU(), critics.head(4)).double()
    plain = copy.deepcopy(ours)
    step = fastgan.GraphedCriticStep(ours, **case)
    given = {"alpha": torch.rand(4, 1, 1, 1, dtype=torch.float64)} if case is GP else {}
    for seed in (0, 1):
        real, fake = batches(seed)
        plain.zero_grad()
        expected = fastgan.critic_step(plain, real, fake, **given, **case)
        expected.loss.backward()
        result = step(real, fake, **given)
        assert reference.error(reference.grads(ours), reference.grads(plain)) <= 1e-12
        for name in ("loss", "adversarial", "penalty", "real_scores", "fake_scores", "grad_norms"):
            torch.testing.assert_close(getattr(result, name), getattr(expected, name))
        assert not result.loss.requires_grad and result.method == expected.method


def test_conditions_are_given_with_the_batches():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)

        def forward(self, x, label, factor):
            return self.b(torch.relu(self.a(torch.cat([x, label], 1)))) * factor

    ours = Conditional().double()
    plain = copy.deepcopy(ours)
    real, fake, label = torch.randn(3, 4, 3, dtype=torch.float64)
    args = {"real_args": (label, 2.0), "fake_args": (label.flip(0), 2.0)}
    fastgan.GraphedCriticStep(ours, **R12)(real, fake, **args)
    fastgan.critic_step(plain, real, fake, **args, **R12).loss.backward()
    assert reference.error(reference.grads(ours), reference.grads(plain)) <= 1e-12


def test_what_cannot_be_captured_is_refused():
    critic = critics.head(3)
    with pytest.raises(ValueError, match="grad_scaler can't be part of a graph"):
        fastgan.GraphedCriticStep(critic, grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"alpha is given with the batches: step\(real, fake, alpha=\.\.\.\)"):
        fastgan.GraphedCriticStep(critic, gradient_penalty=1.0, alpha=0.5)
    with pytest.raises(TypeError, match="'labels' is none of alpha, real_args"):
        fastgan.GraphedCriticStep(critic)(*batches(), labels=3)


def test_where_nothing_can_be_read_a_failed_check_is_nan():
    """As in a replay; elsewhere it is an error, with .grad as it was."""
    for fails in (False, True):
        p = torch.ones(3, requires_grad=True)
        delivery = deliver.Delivery(
            {id(p): torch.ones(3)}, {id(p): p}, [(torch.tensor(True), "a"), (torch.tensor(not fails), "b")]
        )
        with deliver.unread():
            delivery.attach(torch.tensor(2.0)).backward()
        assert p.grad.isnan().all() == fails
    p.grad = None
    delivery = deliver.Delivery({id(p): torch.ones(3)}, {id(p): p}, [(torch.tensor(False), "samples interact")])
    with pytest.raises(RuntimeError, match="samples interact"):
        delivery.attach(torch.tensor(2.0)).backward()
    assert p.grad is None
