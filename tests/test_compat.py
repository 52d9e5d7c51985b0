"""The projects' penalty functions: their formulas written out here, with the same random draws, against fastgan.compat."""

import warnings

import numpy as np
import pytest
import reference
import torch
from torch import nn

import fastgan
from fastgan import compat
from fastgan.compat import _common

torch.set_num_threads(1)
B = 5


class Critic(nn.Module):
    """One score per image; a dict, two columns, patches, or two scales on request."""

    def __init__(self, form="scores"):
        super().__init__()
        self.form = form
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 1, 1), nn.Tanh())
        self.patches, self.score = nn.Conv2d(4, 1, 1), nn.Linear(4 * 16, 2)

    def forward(self, x, labels=None, eval=False):
        h = self.features(x)
        if self.form == "patches":
            return self.patches(h)
        columns = self.score(h.flatten(1))
        if self.form == "two scales":
            return [columns[:, :1], self.patches(h)]
        if self.form == "columns":
            return columns
        score = columns[:, :1] if labels is None else columns.gather(1, labels[:, None])
        return {"adv_output": score[:, 0], "h": h} if self.form == "dict" else score


def images(requires_grad=False):
    generator = torch.Generator().manual_seed(3)
    real, fake = torch.randn(2, B, 3, 8, 8, generator=generator, dtype=torch.float64)
    return (real.requires_grad_(), fake.requires_grad_()) if requires_grad else (real, fake)


LABELS = torch.tensor([0, 1, 1, 0, 1])


def gradient(output, x):
    (g,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return g


def norms(g):
    return g.flatten(1).norm(2, dim=1)


def lerp(alpha, a, b):
    return (alpha * a + (1 - alpha) * b).detach().requires_grad_()


def rows(n=1):
    return torch.rand(B, n)[..., None, None] if n == 1 else torch.rand(B, 1, 1, 1)


# name -> (form of the critic, ours(D), the project's formula(D)): each of them a scalar


def caogang(D):
    x = lerp(rows(), *images())
    return ((norms(gradient(D(x), x)) - 1) ** 2).mean() * 10


def pytorch_gan(D):
    x = lerp(torch.from_numpy(np.random.random((B, 1, 1, 1))).float(), *images())
    return ((norms(gradient(D(x), x)) - 1) ** 2).mean()


def pytorch_gan_dragan(pixel):
    def formula(D):
        real, _ = images()
        alpha = torch.from_numpy(np.random.random(real.shape)).float()
        x = lerp(alpha, real, real + 0.5 * real.std() * torch.rand(real.shape))
        g = gradient(D(x), x)
        return 10 * (((g.norm(2, dim=1) if pixel else norms(g)) - 1) ** 2).mean()

    return formula


def cyclegan(kind, constant):
    def formula(D):
        real, fake = images()
        x = {"real": real, "fake": fake, "mixed": None}[kind]
        x = lerp(rows(), real, fake) if x is None else x.clone().requires_grad_()
        g = gradient(D(x), x).view(B, -1)
        return (((g + 1e-16).norm(2, dim=1) - constant) ** 2).mean() * 7

    return formula


def studiogan(kind):
    def formula(D):
        real, fake = images()
        if kind == "dra":
            alpha = torch.rand(B, 1, 1, 1)
            x = (real + alpha * (0.5 * real.std() * torch.rand(real.size()))).requires_grad_()
        else:
            x = lerp(rows(), real, fake)
        n = norms(gradient(D(x, LABELS)["adv_output"], x))
        return (n**2).max() if kind == "max" else ((n - 1) ** 2).mean()

    return formula


def connected(scale, center=None, ours=False, call=None):
    """Penalties of an output that exists: scale * mean n^2, or (n - center)^2."""

    def formula(D):
        x, _ = images(True)
        if ours:
            return call(D(x), x)
        n = norms(gradient(D(x), x))
        return scale * (n**2 if center is None else (n - center) ** 2).mean()

    return formula


def mmgen(per, mask, weight=1.0, r1=False):
    def formula(D):
        real, fake = images()
        x = real.clone().requires_grad_() if r1 else lerp(torch.rand(B, 1, 1, 1).to(real), real, fake)
        g = gradient(D(x), x)
        g = g if mask is None else g * mask
        n = g.norm(2, dim=1) if per == "pixel" else norms(g)
        p = (n**2 if r1 else (n - 1) ** 2).mean()
        return weight * (p if mask is None else p / mask.mean())

    return formula


def gan_zoo(D):
    x = lerp(rows(), *images())
    return ((norms(gradient(D(x)[:, 0], x)) - 1) ** 2).sum() * 3


def gan_zoo_r1(D):
    x = images()[0].clone().requires_grad_()
    return (norms(gradient(D(x)[:, 0], x)) ** 2).mean() * 3


def gigagan(D):
    x, _ = images(True)
    first, second = D(x)
    g = gradient(0.5 * first.sum() + 2.0 * second.sum(), x)
    return 4 * ((norms(g) - 0.5) ** 2).mean()


def torchgan(whole, k):
    def formula(D):
        x, _ = images(True)
        g = gradient(D(x), x)
        return (g.norm(2) - k) ** 2 if whole else ((norms(g) - k) ** 2).mean()

    return formula


MASK = (torch.rand(B, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64) > 0.4).double()
via = lambda call, scale, center=None: (  # noqa: E731
    "scores", connected(scale, center, True, call), connected(scale, center)
)  # fmt: skip
STRICT = {"strict_peer": True}
CASES = {
    "caogang": ("scores", lambda D: compat.calc_gradient_penalty(D, *images()), caogang),
    "PyTorch-GAN": ("scores", lambda D: compat.compute_gradient_penalty(D, *images()), pytorch_gan),
    "PyTorch-GAN dragan": (
        "scores",
        lambda D: compat.compute_gradient_penalty(D, images()[0], **STRICT),
        pytorch_gan_dragan(True),
    ),
    "PyTorch-GAN dragan, paper": (
        "scores",
        lambda D: compat.compute_gradient_penalty(D, images()[0]),
        pytorch_gan_dragan(False),
    ),
    "CycleGAN mixed": (
        "patches",
        lambda D: compat.cal_gradient_penalty(D, *images(), "cpu", lambda_gp=7)[0],
        cyclegan("mixed", 1.0),
    ),
    "CycleGAN real": (
        "patches",
        lambda D: compat.cal_gradient_penalty(D, *images(), "cpu", "real", 0.5, 7)[0],
        cyclegan("real", 0.5),
    ),
    "CycleGAN fake": (
        "patches",
        lambda D: compat.cal_gradient_penalty(D, *images(), "cpu", "fake", 1.0, 7)[0],
        cyclegan("fake", 1.0),
    ),
    "StudioGAN": ("dict", lambda D: compat.cal_grad_penalty(images()[0], LABELS, images()[1], D, "cpu"), studiogan("gp")),
    "StudioGAN dra": ("dict", lambda D: compat.cal_dra_penalty(images()[0], LABELS, D, "cpu"), studiogan("dra")),
    "StudioGAN max": (
        "dict",
        lambda D: compat.cal_maxgrad_penalty(images()[0], LABELS, images()[1], D, "cpu"),
        studiogan("max"),
    ),
    "StudioGAN r1": via(lambda y, x: compat.cal_r1_reg(y, x, "cpu"), 0.5),
    "StudioGAN stylegan r1": via(compat.stylegan_cal_r1_reg, 0.5),
    "StudioGAN deriv": via(lambda y, x: compat.cal_deriv(x, y, "cpu").square().flatten(1).sum(1).mean(), 1.0),
    "rosinality": via(compat.d_r1_loss, 1.0),
    "stargan": via(compat.r1_reg, 0.5),
    "GAN_stability": via(lambda y, x: compat.compute_grad2(y, x).mean(), 1.0),
    "R3GAN": via(lambda y, x: compat.ZeroCenteredGradientPenalty(x, y).mean(), 1.0),
    "lucidrains": via(lambda y, x: compat.gradient_penalty(x, y), 10.0, 0.0),
    "lucidrains center": via(lambda y, x: compat.gradient_penalty(x, y, 3, 0.5), 3.0, 0.5),
    "gigagan": (
        "two scales",
        lambda D: (lambda x: compat.gigagan.gradient_penalty(x, D(x), (0.5, 2.0), 4, 0.5))(images(True)[0]),
        gigagan,
    ),
    "GAN_zoo": ("columns", lambda D: compat.WGANGPGradientPenalty(*images(), D, 3), gan_zoo),
    "GAN_zoo r1": ("columns", lambda D: compat.logisticGradientPenalty(images()[0], D, 3), gan_zoo_r1),
    "torchgan": via(lambda y, x: compat.torchgan.wasserstein_gradient_penalty(x, y), 1.0, 1.0),
    "torchgan strict": (
        "scores",
        lambda D: (lambda x: compat.torchgan.wasserstein_gradient_penalty(x, D(x), **STRICT))(images(True)[0]),
        torchgan(True, 1.0),
    ),
    "torchgan dragan strict": (
        "scores",
        lambda D: (lambda x: compat.torchgan.dragan_gradient_penalty(x, D(x), 0.7, **STRICT))(images(True)[0]),
        torchgan(True, 0.7),
    ),
} | {
    f"mmgen {name}{' r1' if r1 else ''}{' masked' if mask is not None else ''}": (
        "scores",
        lambda D, mask=mask, options=options, r1=r1: (
            compat.r1_gradient_penalty_loss(D, images()[0], mask, **options)
            if r1
            else compat.gradient_penalty_loss(D, *images(), mask, **options)
        ),
        mmgen(per, mask, options.get("weight", 1.0), r1),
    )
    for r1 in (False, True)
    for mask in (None, MASK)
    for name, per, options in (
        ("default", "HWC", {}),
        ("strict", "pixel", STRICT),
        ("pixel", "pixel", {"norm_mode": "pixel", "weight": 2.5}),
        ("HWC", "HWC", {"norm_mode": "HWC", **STRICT}),
    )
}


def seed():
    torch.manual_seed(11)
    np.random.seed(11)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*strict_peer")
def test_the_projects_numbers_with_the_projects_draws(name):
    form, ours, formula = CASES[name]
    torch.manual_seed(0)
    D, E = Critic(form).double(), Critic(form).double()
    E.load_state_dict(D.state_dict())
    seed()
    value = ours(D)
    state = torch.get_rng_state(), np.random.get_state()[1]
    seed()
    expected = formula(E)
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    expected.backward()
    if isinstance(value, float):
        assert value == pytest.approx(expected.item(), rel=1e-12)
    else:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0, check_dtype=False)
        value.backward()
    assert reference.error(reference.grads(D), reference.grads(E)) <= 1e-12


def test_ctgans_packs_as_function_and_method():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.seq = nn.Sequential(nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(8, 1))

        def forward(self, x):
            return self.seq(x.view(-1, 12))

        calc_gradient_penalty = compat.ctgan.calc_gradient_penalty

    torch.manual_seed(0)
    D, E = Packed().double(), Packed().double()
    E.load_state_dict(D.state_dict())
    real, fake = torch.randn(2, 12, 4, dtype=torch.float64)
    torch.manual_seed(1)
    value = D.calc_gradient_penalty(real, fake.requires_grad_(), "cpu", 3, 5)
    value.backward()
    assert fake.grad is None
    torch.manual_seed(1)
    x = lerp(torch.rand(4, 1, 1).repeat(1, 3, 4).view(-1, 4), real, fake)
    expected = ((gradient(E(x), x).view(-1, 12).norm(2, dim=1) - 1) ** 2).mean() * 5
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert reference.error(reference.grads(D), reference.grads(E)) <= 1e-12
    torch.manual_seed(1)
    torch.testing.assert_close(compat.ctgan.calc_gradient_penalty(D, real, fake, pac=3, lambda_=5), value)


def test_what_is_returned():
    D = Critic("patches").double()
    real, fake = images()
    assert compat.cal_gradient_penalty(D, real, fake, "cpu", lambda_gp=0.0) == (0.0, None)
    penalty, gradients = compat.cal_gradient_penalty(D, real, fake, "cpu")
    assert penalty.dim() == 0 and gradients.shape == (B, 3 * 64) and gradients.requires_grad
    torch.autograd.grad(gradients.square().sum(), D.features[0].weight)
    assert not real.requires_grad and not fake.requires_grad
    with pytest.raises(NotImplementedError, match="'both', expected \"real\""):
        compat.cal_gradient_penalty(D, real, fake, "cpu", type="both")
    with pytest.raises(NotImplementedError, match="'C', expected \"pixel\""):
        compat.gradient_penalty_loss(D, real, fake, norm_mode="C")
    x = real.clone().requires_grad_()
    assert compat.compute_grad2(D(x), x).shape == compat.ZeroCenteredGradientPenalty(x, D(x)).shape == (B,)
    with pytest.raises(RuntimeError, match="requires_grad_"):
        compat.compute_grad2(D(real), real)


def test_gan_zoo_runs_backward_only_when_asked():
    D = Critic("columns").double()
    value = compat.WGANGPGradientPenalty(*images(), D, 10.0, backward=False)
    assert type(value) is float and all(p.grad is None for p in D.parameters())
    assert type(compat.logisticGradientPenalty(images()[0], D, 10.0)) is float
    assert D.features[0].weight.grad is not None


def test_gan_zoos_stddev():
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    std = (x.view(2, 4, 3, 4, 4).var(1) + 1e-8).sqrt().mean((1, 2, 3))
    expected = torch.cat([x, std.repeat_interleave(4)[:, None, None, None].expand(8, 1, 4, 4)], 1)
    torch.testing.assert_close(compat.gan_zoo.miniBatchStdDev(x), expected)


def test_backward_as_these_trainers_call_it():
    D, E = Critic().double(), Critic().double()
    E.load_state_dict(D.state_dict())
    for critic, keep in ((D, True), (E, False)):
        seed()
        loss = critic(images()[1]).mean()
        penalty = compat.calc_gradient_penalty(critic, *images())
        penalty.backward(retain_graph=keep)
        loss.backward()
    assert reference.error(reference.grads(D), reference.grads(E)) == 0


def test_gigagan_scaled():
    D = Critic("two scales")
    x = images()[0].float().requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    torch.testing.assert_close(
        compat.gigagan.gradient_penalty(x, D(x), scaler=scaler), compat.gigagan.gradient_penalty(x, D(x)), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        compat.gigagan.gradient_penalty(x, D(x), (1.0, 0.0)), compat.gradient_penalty(x, D(x)[0]), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda D, **o: compat.compute_gradient_penalty(D, images()[0], **o),
        lambda D, **o: compat.gradient_penalty_loss(D, *images(), **o),
        lambda D, **o: compat.r1_gradient_penalty_loss(D, images()[0], **o),
        lambda D, **o: (lambda x: compat.torchgan.wasserstein_gradient_penalty(x, D(x), **o))(images(True)[0]),
        lambda D, **o: (lambda x: compat.torchgan.dragan_gradient_penalty(x, D(x), **o))(images(True)[0]),
    ],
)
def test_where_the_project_is_wrong_the_default_warns_once(call, monkeypatch):
    monkeypatch.setattr(_common, "_warned", set())
    D = Critic().double()
    with pytest.warns(UserWarning, match="strict_peer=True reproduces") as caught:
        seed()
        value = call(D)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(D)
        seed()
        torch.testing.assert_close(call(D, strict_peer=False), value)
        seed()
        strict = call(D, strict_peer=True)
    assert abs(strict - value) > 0.01 * abs(value), "the two differ, or there would be nothing to warn of"


def test_top_level_names():
    assert fastgan.compat is compat
    names = """calc_gradient_penalty compute_gradient_penalty cal_gradient_penalty cal_grad_penalty cal_dra_penalty
    cal_maxgrad_penalty cal_r1_reg stylegan_cal_r1_reg d_r1_loss r1_reg compute_grad2 gradient_penalty
    ZeroCenteredGradientPenalty WGANGPGradientPenalty logisticGradientPenalty gradient_penalty_loss r1_gradient_penalty_loss"""
    for name in names.split():
        assert getattr(compat, name).__doc__
        assert name in compat.__doc__
