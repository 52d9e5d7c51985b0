"""audit: each trap is found where it is and nowhere else, and nothing is changed by looking."""

import copy

import critics
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan import compat

torch.set_num_threads(1)
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def names(findings):
    return [f.what for f in findings]


def trunk(*middle):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), *middle, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class MovesInEval(nn.Module):
    """Power iteration in every forward, as some libraries' spectral norm."""

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.ones(4), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        with torch.no_grad():
            self.u.copy_(torch.nn.functional.normalize(self.weight @ self.u, dim=0))
        return x * (self.u @ self.weight @ self.u)


def strided_stddev(x):
    y = x.reshape(2, -1, *x.shape[1:])  # raises where 2 does not divide the batch
    return x + y.var(0, unbiased=False).mean()


def frozen(make):
    layer = make(nn.Linear(64, 1))
    with torch.no_grad():  # vectors of another weight
        for name, buffer in layer.named_buffers():
            if name.endswith("u") or name.endswith("v"):
                buffer.copy_(torch.nn.functional.normalize(torch.ones_like(buffer), dim=0))
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), layer).eval()


CRITICS = {
    "batch norm": lambda: trunk(nn.BatchNorm2d(4)),
    "samples interact": lambda: trunk(fastgan.nn.MinibatchStdDev(), nn.Conv2d(5, 4, 1)),
    "fails on a batch of 3": lambda: trunk(Lambda(strided_stddev)),
    "not differentiable twice": lambda: trunk(Lambda(lambda x: torch.nn.functional.hardsigmoid(x))),
    "state moves in eval mode": lambda: trunk(MovesInEval()),
    "spectral norm frozen in eval": lambda: frozen(parametrizations.spectral_norm),
    "torch's spectral norm hook": lambda: nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 8)), nn.LeakyReLU(), nn.Flatten()),
    "parameters in bfloat16": lambda: trunk().bfloat16(),
    "compiled critic": lambda: torch.compile(trunk(), backend="eager"),
}


@pytest.mark.parametrize("what", CRITICS)
def test_critics(what):
    torch.manual_seed(0)
    critic = CRITICS[what]()
    x = X.bfloat16() if "bfloat16" in what else X
    state, modes = copy.deepcopy(critic.state_dict()), [m.training for m in critic.modules()]
    random_state = torch.get_rng_state()
    findings = fastgan.audit(critic, x)
    assert what in names(findings), findings
    also = {"fails on a batch of 3": {"samples interact"}, "compiled critic": {"not differentiable twice"}}.get(what, set())
    assert set(names(findings)) - {what} <= also
    assert all(f.where and f.why and f.way_out for f in findings)
    assert torch.equal(random_state, torch.get_rng_state()) and modes == [m.training for m in critic.modules()]
    assert all(torch.equal(v, state[k]) for k, v in critic.state_dict().items())
    assert all(p.grad is None for p in critic.parameters()) and not x.requires_grad


def test_reentrant_checkpoints():
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trunk()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=True)

    (finding,) = fastgan.audit(Saves(), X)
    assert finding.what == "not differentiable twice" and "use_reentrant=False" in finding.way_out


@pytest.mark.parametrize("name", ["dcgan", "sngan spectral norm", "r3gan"])
def test_sound_critics_have_no_findings(name):
    make = {"dcgan": lambda: critics.DCGAN(4, 16), "r3gan": lambda: critics.R3GAN(4)}.get(name) or critics.SHARED[name]
    size = {"dcgan": 16}.get(name, 32)
    found = fastgan.audit(make(), torch.randn(4, 3, size, size))
    assert found == [] and str(found) == "nothing found"


def test_without_a_batch():
    assert names(fastgan.audit(trunk(nn.BatchNorm2d(4)))) == ["batch norm"]
    assert fastgan.audit(critics.DCGAN(4, 16)) == []
    assert names(fastgan.audit(frozen(spectral_norm))) == ["spectral norm frozen in eval", "torch's spectral norm hook"]
    trained = frozen(spectral_norm).train()
    for _ in range(20):
        trained(X)
    assert names(fastgan.audit(trained.eval())) == ["torch's spectral norm hook"]


# Penalties


def correct(critic, real, fake):
    x = torch.lerp(
        fake.detach(), real.detach(), torch.rand(len(real), *(1,) * (real.dim() - 1), dtype=real.dtype)
    ).requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return 10 * ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def variant(*, alpha=None, detach=True, create_graph=True, reduce=None, mark=False, size=None):
    def penalty(critic, real, fake):
        if mark:
            real.requires_grad_()
        b, ones = size or len(real), (1,) * (real.dim() - 1)
        a = alpha(real) if alpha else torch.rand(b, *ones, dtype=real.dtype)
        x = a * real + (1 - a) * fake
        x = x.detach().requires_grad_() if detach else x
        if not x.requires_grad:
            x.requires_grad_()
        y = critic(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
        return 10 * ((reduce(g) if reduce else g.flatten(1).norm(2, dim=1)) - 1).square().mean()

    return penalty


def tensor_norm(strict):
    def penalty(critic, real, fake):
        alpha = torch.rand(len(real), *(1,) * (real.dim() - 1))
        x = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
        return compat.torchgan.wasserstein_gradient_penalty(x, critic(x), strict_peer=strict)

    return penalty


PENALTIES = {
    "norm per pixel": variant(reduce=lambda g: g.norm(2, dim=1)),
    "norm of the whole batch": variant(reduce=lambda g: g.norm(2)),
    "no eps under the root": variant(reduce=lambda g: g.square().flatten(1).sum(1).sqrt()),
    "alpha outside [0, 1]": variant(alpha=lambda r: torch.randn(len(r), 1, 1, 1, dtype=r.dtype)),
    "alpha per element": variant(alpha=torch.rand_like),
    "one alpha for the batch": variant(alpha=lambda r: torch.rand(1).item()),
    "gradients reach the generator": variant(detach=False),
    "no gradient": variant(create_graph=False),
    "changes its arguments": variant(mark=True),
    "fixed batch size": variant(size=4),
}


@pytest.mark.parametrize("what", PENALTIES)
def test_penalties(what):
    critic = trunk()
    random_state = torch.get_rng_state()
    findings = fastgan.audit(critic, X, penalty=PENALTIES[what])
    assert names(findings) == [what], findings
    assert findings[0].where == "penalty" and "penalty" in str(findings)
    assert torch.equal(random_state, torch.get_rng_state())
    assert names(fastgan.audit(penalty=PENALTIES[what])) == [what]


SOUND = {
    "correct": correct,
    "fastgan": fastgan.gradient_penalty,
    "one-sided": lambda c, r, f: fastgan.gradient_penalty(c, r, f, one_sided=True, target=0.5, weight=1.0),
    "r1": lambda c, r, f: fastgan.r1_penalty(c, r),
    "max": fastgan.max_gradient_penalty,
    "wgan-div": fastgan.wgan_div_penalty,
    "caogang": compat.calc_gradient_penalty,
    "PyTorch-GAN": compat.compute_gradient_penalty,
    "CycleGAN": lambda c, r, f: compat.cal_gradient_penalty(c, r, f, "cpu"),
    "rosinality": lambda c, r, f: (lambda x: compat.d_r1_loss(c(x), x))(r.clone().requires_grad_()),
    "float32": lambda c, r, f: correct(c, r.float(), f.float()),
    "eps": variant(reduce=lambda g: (g.square().flatten(1).sum(1) + 1e-4).sqrt()),
    "paper": tensor_norm(False),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_penalties_have_no_findings(name):
    findings = fastgan.audit(penalty=SOUND[name])
    assert names(findings) == [], findings


@pytest.mark.parametrize(
    ("penalty", "what"),
    [
        (tensor_norm(True), "norm of the whole batch"),
        (lambda c, r, f: compat.gradient_penalty_loss(c, r, f, strict_peer=True), "norm per pixel"),
        (lambda c, r, f: compat.compute_gradient_penalty(c, r, strict_peer=True), "norm per pixel"),
    ],
)
def test_what_the_projects_do(penalty, what):
    assert names(fastgan.audit(penalty=penalty)) == [what]


def test_outputs_in_the_form_of_the_critics():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trunk()

        def forward(self, x, labels=None, eval=False):
            return {"adv_output": self.inner(x)[:, 0]}

    labels = torch.zeros(4, dtype=torch.long)
    penalty = lambda D, real, fake: compat.cal_grad_penalty(real, labels[: len(real)], fake, D, "cpu")  # noqa: E731
    assert fastgan.audit(Dict(), X, penalty=penalty) == []


def test_penalties_that_cannot_be_probed_say_so():
    (finding,) = fastgan.audit(penalty=lambda critic, real: None)
    assert finding.what == "could not be probed" and "lambda" in finding.way_out and "TypeError" in finding.why


def test_arguments():
    with pytest.raises(TypeError, match="a critic, a penalty, or both"):
        fastgan.audit()
    with pytest.raises(TypeError, match="a function goes to penalty="):
        fastgan.audit(correct)
