import copy
import math

import critics
import pytest
import reference
import torch
import torch.nn as nn
from flops import flops

import fastgan
from fastgan import penalties

torch.set_num_threads(1)
EXACT = ("auto", "fused", "jvp", "double_backward")


def small(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Flatten(), nn.Linear(96, 1)
    ).to(dtype)  # fmt: skip


def smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(96, 1)).double()


def pair(b=4, seed=1):
    torch.manual_seed(seed)
    return critics.images(b), critics.images(b)


def compare(critic, ours, textbook, tolerance=1e-12, value_tolerance=1e-10):
    critic.zero_grad()
    value = ours(critic)
    value.backward()
    got = reference.grads(critic)
    critic.zero_grad()
    expected = textbook(critic)
    expected.backward()
    assert value.dim() == 0
    assert abs(value.item() - expected.item()) <= value_tolerance * max(1.0, abs(expected.item()))
    assert reference.error(got, reference.grads(critic)) <= tolerance
    critic.zero_grad()


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("target", [0.0, 0.05, 1.0])
def test_gradient_penalty(method, one_sided, target):
    critic, (real, fake) = small(), pair()
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64)

    def textbook(critic):
        g, _ = reference.gradient(critic, alpha * real + (1 - alpha) * fake)
        excess = reference.norms(g) - target
        return 7.0 * (excess.clamp_min(0) if one_sided else excess).square().mean()

    compare(
        critic,
        lambda c: fastgan.gradient_penalty(
            c, real, fake, alpha=alpha, weight=7.0, target=target, one_sided=one_sided, method=method
        ),
        textbook,
    )


@pytest.mark.parametrize("method", EXACT)
def test_r1_and_r2_carry_the_half(method):
    critic, (real, fake) = small(), pair()

    def textbook(x):
        return lambda c: 3.0 / 2 * reference.gradient(c, x)[0].square().sum((1, 2, 3)).mean()

    compare(critic, lambda c: fastgan.r1_penalty(c, real, weight=3.0, method=method), textbook(real))
    compare(critic, lambda c: fastgan.r2_penalty(c, fake, weight=3.0, method=method), textbook(fake))


def test_alpha_is_drawn_per_sample_with_the_given_generator():
    critic, (real, fake) = small(), pair()
    alpha = torch.rand(4, 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = torch.get_rng_state()
    drawn = fastgan.gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(drawn, fastgan.gradient_penalty(critic, real, fake, alpha=alpha))
    torch.testing.assert_close(drawn, fastgan.gradient_penalty(critic, real, fake, alpha=alpha.view(4)))


def test_alpha_one_is_the_real_batch():
    critic, (real, fake) = small(), pair()
    torch.testing.assert_close(
        fastgan.gradient_penalty(critic, real, fake, alpha=1.0, target=0.0, weight=1.0),
        fastgan.r1_penalty(critic, real, weight=2.0),
    )


def test_the_norm_is_per_sample_not_per_pixel_nor_of_the_batch():
    critic, (real, fake) = small(), pair()
    _value, norms = fastgan.gradient_penalty(critic, real, fake, alpha=0.5, return_norms=True)
    g, _ = reference.gradient(critic, (real + fake) / 2)
    torch.testing.assert_close(norms, g.reshape(4, -1).norm(2, 1).detach())
    assert not norms.requires_grad


@pytest.mark.parametrize("method", EXACT)
def test_zero_gradients_give_zero_not_nan(method):
    critic = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        critic[1].bias.fill_(-100.0)  # dead: the gradient is exactly 0
    real, fake = pair()
    for call in (
        lambda: fastgan.gradient_penalty(critic, real, fake, method=method),
        lambda: fastgan.r1_penalty(critic, real, method=method),
        lambda: penalties.wgan_div_penalty(critic, real, fake, method=method),
        lambda: penalties.max_gradient_penalty(critic, real, fake, method=method),
    ):
        critic.zero_grad()
        call().backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in critic.parameters())


@pytest.mark.parametrize("method", ["auto", "fused", "double_backward"])
def test_packed_critic(method):
    torch.manual_seed(0)
    critic = critics.CTGAN(8, 16, dropout=0.0, pac=5).double()
    real, fake = torch.randn(2, 20, 8, dtype=torch.float64)
    alpha = torch.rand(4, 1, dtype=torch.float64).repeat_interleave(5, 0)

    def textbook(c):
        g, _ = reference.gradient(c, alpha * real + (1 - alpha) * fake)
        return 10.0 * (g.reshape(4, 40).norm(2, 1) - 1).square().mean()

    compare(critic, lambda c: fastgan.gradient_penalty(c, real, fake, alpha=alpha, pac=5, method=method), textbook)
    torch.manual_seed(2)
    packed = penalties.interpolate(real, fake, pac=5)
    torch.manual_seed(2)
    drawn = torch.rand(4, 1, dtype=torch.float64).repeat_interleave(5, 0)
    torch.testing.assert_close(packed, drawn * real + (1 - drawn) * fake)
    with pytest.raises(ValueError, match="packs"):
        fastgan.gradient_penalty(critic, real[:7], fake[:7], pac=5)


@pytest.mark.parametrize("method", ["auto", "double_backward"])
def test_masked_penalty(method):
    critic, (real, _) = small(), pair()
    mask = (torch.rand(4, 1, 8, 8) > 0.5).double()
    compare(
        critic,
        lambda c: fastgan.r1_penalty(c, real, mask=mask, method=method),
        lambda c: 5.0 * (reference.gradient(c, real)[0] * mask).square().sum((1, 2, 3)).mean(),
    )


@pytest.mark.parametrize("method", ["auto", "fused", "jvp", "double_backward"])
def test_wgan_div_max_and_dragan(method):
    critic, (real, fake) = small(), pair()
    g = lambda c, x: reference.norms(reference.gradient(c, x)[0])  # noqa: E731
    middle = (real + fake) / 2
    compare(
        critic,
        lambda c: penalties.wgan_div_penalty(c, real, fake, alpha=0.5, method=method),
        lambda c: 2.0 * g(c, middle).pow(6).mean(),
    )
    compare(
        critic,
        lambda c: penalties.max_gradient_penalty(c, real, fake, alpha=0.5, weight=3.0, method=method),
        lambda c: 3.0 * g(c, middle).max().square(),
    )
    noise, alpha = torch.rand_like(real), torch.rand(4, 1, 1, 1, dtype=torch.float64)
    near = alpha * real + (1 - alpha) * (real + 0.5 * real.std() * noise)
    compare(
        critic,
        lambda c: penalties.dragan_penalty(c, real, alpha=alpha, noise=noise, method=method),
        lambda c: 10.0 * (g(c, near) - 1).square().mean(),
    )


@pytest.mark.parametrize("method", ["auto", "double_backward"])
def test_weighted_outputs(method):
    torch.manual_seed(0)
    critic = critics.TwoHeads().double()
    real, _ = pair()

    def textbook(c):
        x = real.clone().requires_grad_(True)
        one, two = c(x)
        (g,) = torch.autograd.grad(0.5 * one.sum() - 2.0 * two.sum(), x, create_graph=True)
        return 5.0 * g.square().sum((1, 2, 3)).mean()

    compare(critic, lambda c: fastgan.r1_penalty(c, real, output_weights=(0.5, -2.0), method=method), textbook)
    with pytest.raises(ValueError, match="output weights"):
        fastgan.r1_penalty(critic, real, output_weights=(1.0,))


def shaped(kind):
    base = small()
    return {
        "(B,)": lambda x: base(x).view(-1),
        "(B, 1)": base,
        "patch": lambda x: base[1](base[0](x)),
        "tuple": lambda x: (base(x), 2 * base(x)),
        "list": lambda x: [base(x), base[1](base[0](x))],
        "dict": lambda x: {"adv_output": base(x), "label": 3},
    }[kind], base


@pytest.mark.parametrize("kind", ["(B,)", "(B, 1)", "patch", "tuple", "list", "dict"])
@pytest.mark.parametrize("method", EXACT)
def test_output_shapes(kind, method):
    function, base = shaped(kind)
    real, fake = pair()
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64)

    def textbook(_):
        g, _ = reference.gradient(
            function, torch.lerp(fake, real, alpha), pick=lambda o: o["adv_output"] if isinstance(o, dict) else o
        )
        return 10.0 * (reference.norms(g) - 1).square().mean()

    compare(base, lambda _: fastgan.gradient_penalty(function, real, fake, alpha=alpha, method=method), textbook)


def test_dict_with_several_tensors_needs_score_fn():
    base, (real, _) = small(), pair()
    critic = lambda x: {"adv_output": base(x), "embed": x.mean()}  # noqa: E731
    with pytest.raises(ValueError, match="score_fn"):
        fastgan.r1_penalty(critic, real)
    value = fastgan.r1_penalty(critic, real, score_fn=lambda out: out["adv_output"])
    torch.testing.assert_close(value, fastgan.r1_penalty(base, real))
    with pytest.raises(TypeError, match="score_fn"):
        fastgan.r1_penalty(lambda x: (base(x), [x]), real)


@pytest.mark.parametrize("method", ["auto", "jvp", "double_backward"])
def test_inputs_may_be_non_leaf_or_require_gradients_and_are_not_touched(method):
    critic, (real, fake) = small(), pair()
    real.requires_grad_(True)
    parent = torch.randn_like(fake).requires_grad_(True)
    made = fake * parent
    before = real.detach().clone(), made.detach().clone()
    fastgan.gradient_penalty(critic, real, made, method=method).backward()
    fastgan.r1_penalty(critic, real, method=method).backward()
    assert real.grad is None and parent.grad is None and real.requires_grad
    assert torch.equal(real, before[0]) and torch.equal(made, before[1])
    plain = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    fastgan.r1_penalty(critic, plain, method=method)
    assert not plain.requires_grad


class Stateful(nn.Module):
    """Dropout, batch statistics and spectral norm: everything a forward moves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, 2, 1)),
            nn.BatchNorm2d(6),
            nn.Softplus(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.utils.spectral_norm(nn.Linear(96, 1)),
        ).double()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("method", ["auto", "jvp", "finite_difference", "double_backward"])
def test_buffers_and_random_state_move_exactly_once(method):
    ours, eager = Stateful(), Stateful()
    real, _ = pair()
    torch.manual_seed(7)
    fastgan.r1_penalty(ours, real, method=method).backward()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    g, _ = reference.gradient(eager, real)
    (5.0 * g.square().sum((1, 2, 3)).mean()).backward()
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b in zip(ours.named_buffers(), eager.buffers(), strict=False):
        assert torch.equal(a, b), name
    assert reference.error(reference.grads(ours), reference.grads(eager)) < (1e-4 if method == "finite_difference" else 1e-12)


def test_finite_difference_on_smooth_critics():
    critic, (real, fake) = smooth(), pair()
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    compare(
        critic,
        lambda c: fastgan.gradient_penalty(c, real, fake, alpha=alpha, method="finite_difference"),
        lambda c: fastgan.gradient_penalty(c, real, fake, alpha=alpha, method="double_backward"),
        tolerance=1e-6,
    )
    critic, real, fake = critic.float(), real.float(), fake.float()
    compare(
        critic,
        lambda c: fastgan.r1_penalty(c, real, method="finite_difference"),
        lambda c: fastgan.r1_penalty(c, real, method="double_backward"),
        tolerance=2e-3,
        value_tolerance=1e-5,
    )


@pytest.mark.parametrize(
    "kink",
    [
        lambda x: torch.relu(x),
        lambda x: nn.functional.leaky_relu(x, 0.2),
        lambda x: nn.LeakyReLU(0.1, inplace=True)(x * 1.0),
        lambda x: x.abs(),
        lambda x: x.clamp_min(0),
        lambda x: nn.functional.max_pool2d(x, 2),
        lambda x: torch.where(x > 0, x, 0.2 * x),
        lambda x: nn.functional.selu(x),
        lambda x: torch.maximum(x, -x),
    ],
)
def test_finite_difference_refuses_kinks(kink):
    conv, (real, _) = nn.Conv2d(3, 4, 3).double(), pair()
    critic = lambda x: kink(conv(x)).flatten(1).sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="kinks"):
        fastgan.r1_penalty(critic, real, method="finite_difference")
    fastgan.r1_penalty(critic, real, method="finite_difference", force=True)


def test_finite_difference_refuses_a_hidden_kink():
    torch.manual_seed(0)
    conv, (real, _) = nn.Conv2d(3, 4, 3).double(), pair()
    critic = lambda x: ((conv(x) * 1e9) * (conv(x) > 0)).flatten(1).sum(1).sin()  # noqa: E731
    with pytest.raises(ValueError, match="smooth"):
        fastgan.r1_penalty(critic, real, method="finite_difference")


class SelfAttention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_flash_attention_takes_forward_mode_by_itself():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Dropout(0.3), critics.conv(3, 3), SelfAttention(), critics.LazyHead()).double()
    real = critics.images(size=4)

    def penalty(kernel, **options):
        torch.manual_seed(5)
        with torch.nn.attention.sdpa_kernel(kernel):
            critic(real)
            value = fastgan.r1_penalty(critic, real, **options)
        return value, torch.get_rng_state()

    flash, math = torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH
    for _ in range(2):
        compare(critic, lambda _: penalty(flash)[0], lambda _: penalty(math, method="double_backward")[0])
        assert torch.equal(penalty(flash)[1], penalty(math, method="double_backward")[1])
    with pytest.raises(RuntimeError, match="differentiated twice"):
        penalty(flash, method="double_backward")


def test_fused_says_why_not():
    with pytest.raises(RuntimeError, match="Silu"):
        fastgan.r1_penalty(smooth(), pair()[0], method="fused")


def test_backward_works_once_and_once_only():
    critic, (real, _) = small(), pair()
    value = fastgan.r1_penalty(critic, real)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        value.backward()
    value = fastgan.r1_penalty(critic, real)
    with pytest.raises(RuntimeError, match="create_graph"):
        value.backward(create_graph=True)


def test_scaled_and_accumulated_with_other_losses():
    critic, (real, _) = small(), pair()
    compare(
        critic,
        lambda c: 3.0 * fastgan.r1_penalty(c, real) + c(real).mean(),
        lambda c: 3.0 * fastgan.r1_penalty(c, real, method="double_backward") + c(real).mean(),
    )


def test_no_grad_gives_the_value_only():
    critic, (real, _) = small(), pair()
    with torch.no_grad():
        value = fastgan.r1_penalty(critic, real)
    assert not value.requires_grad
    torch.testing.assert_close(value, fastgan.r1_penalty(critic, real).detach())


def test_frozen_critic():
    critic, (real, _) = small().requires_grad_(False), pair()
    value = fastgan.r1_penalty(critic, real)
    assert not value.requires_grad and value > 0


def test_grad_scaler_scales_the_inner_gradient():
    critic, (real, _) = small(torch.float32), pair()
    real = real.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    compare(
        critic,
        lambda c: fastgan.r1_penalty(c, real, grad_scaler=scaler),
        lambda c: fastgan.r1_penalty(c, real, method="double_backward"),
        tolerance=1e-5,
        value_tolerance=1e-5,
    )
    compare(
        critic,
        lambda c: fastgan.r1_penalty(c, real, grad_scaler=scaler, method="double_backward"),
        lambda c: fastgan.r1_penalty(c, real, method="double_backward"),
        tolerance=1e-5,
        value_tolerance=1e-5,
    )


def test_path_length_penalty():
    torch.manual_seed(0)
    mapping, synthesis = (
        nn.Linear(4, 6).double(),
        nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Unflatten(1, (3, 2, 2))),
    )
    synthesis = synthesis.double()
    z, noise, mean = torch.randn(5, 4).double(), torch.randn(5, 3, 2, 2).double() / 2, torch.tensor(0.3).double()

    def textbook(mean):
        w = mapping(z)
        (g,) = torch.autograd.grad((synthesis(w) * noise).sum(), w, create_graph=True)
        lengths = g.square().sum(1).sqrt()
        centre = mean + 0.01 * (lengths.mean() - mean)
        return 2.0 * (lengths - centre).square().mean(), centre

    expected, centre = textbook(mean.clone())
    parameters = [*mapping.parameters(), *synthesis.parameters()]
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    value = penalties.path_length_penalty(synthesis, mapping(z), mean=mean, noise=noise)
    got = torch.autograd.grad(value, parameters, allow_unused=True)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(mean, centre.detach())
    assert reference.error(got, want) < 1e-12
    assert penalties.path_length_penalty(synthesis, torch.randn(5, 6).double()).requires_grad
    with pytest.raises(ValueError, match="double backward"):
        penalties.path_length_penalty(synthesis, mapping(z), method="jvp")


def test_path_length_penalty_in_half_precision():
    torch.manual_seed(0)
    synthesis = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Unflatten(1, (3, 2, 2)))
    w, noise = torch.randn(5, 6), 1e-8 * torch.randn(5, 3, 2, 2)  # gradients of this size are 0 in float16
    found = []
    for enabled in (True, False):
        synthesis.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            value, lengths = penalties.path_length_penalty(synthesis, w, noise=noise, grad_scaler=scaler, return_norms=True)
        assert lengths.shape == (5,) and not lengths.requires_grad
        found.append((value.detach(), lengths))
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("kind", ["gradient_penalty", "wgan_gp", "r1", "r2", "zero_centered", "wgan_div", "max", "dragan"])
def test_penalty_from_output(kind):
    critic, (real, _) = small(), pair()
    x = real.clone().requires_grad_(True)
    value = penalties.penalty_from_output(critic(x), x, kind=kind)
    n = reference.norms(reference.gradient(critic, real)[0])
    expected = {
        "r1": lambda: 5 * n.square().mean(),
        "r2": lambda: 5 * n.square().mean(),
        "zero_centered": lambda: 5 * n.square().mean(),
        "wgan_div": lambda: 10 * n.pow(6).mean(),
        "max": lambda: 10 * n.max().square(),
    }.get(kind, lambda: 10 * (n - 1).square().mean())()
    torch.testing.assert_close(value, expected)
    (g,) = torch.autograd.grad(value, x)  # differentiable like the user's own formula
    assert g.shape == x.shape


def test_double_backward_skips_the_zeros():
    """Forward, backward and the double backward's two: 4 units, of which eager PyTorch makes 6."""
    critic, x = critics.DCGAN(8, 16), torch.randn(4, 3, 16, 16)
    unit = flops(lambda: critic(x))

    def connected():
        leaf = x.clone().requires_grad_()
        fastgan.penalty_from_output(critic(leaf), leaf, kind="r1").backward()

    assert flops(connected) / unit <= 4.1
    assert flops(lambda: fastgan.r1_penalty(critic, x, method="double_backward").backward()) / unit <= 4.1


def test_penalty_from_output_errors():
    critic, (real, _) = small(), pair()
    with pytest.raises(RuntimeError, match="requires_grad_"):
        penalties.penalty_from_output(critic(real), real, kind="r1")
    with pytest.raises(RuntimeError, match="depend"):
        penalties.penalty_from_output(critic(real), real.clone().requires_grad_(True), kind="r1")
    with pytest.raises(ValueError, match="kind"):
        penalties.penalty_from_output(critic(real), real, kind="r3")


def test_bad_arguments():
    critic, (real, fake) = small(), pair()
    with pytest.raises(ValueError, match="method"):
        fastgan.r1_penalty(critic, real, method="fast")
    with pytest.raises(ValueError, match="one shape"):
        fastgan.gradient_penalty(critic, real, fake[:2])
    with pytest.raises(ValueError, match="non-empty"):
        fastgan.r1_penalty(critic, real[:0])
    with pytest.raises(TypeError, match="floating"):
        fastgan.r1_penalty(critic, real.long())
    with pytest.raises(ValueError, match="broadcast"):
        fastgan.gradient_penalty(critic, real, fake, alpha=torch.rand(3, 1, 1, 1))
    for method in EXACT:
        with pytest.raises(RuntimeError, match="depend"):
            fastgan.r1_penalty(lambda x: critic(torch.ones_like(x)), real, method=method)


def test_labels_and_other_arguments():
    torch.manual_seed(0)
    critic, (real, fake) = critics.Projection().double(), pair()
    y, alpha = torch.tensor([0, 1, 2, 1]), torch.rand(4, 1, 1, 1, dtype=torch.float64)

    def textbook(c):
        g, _ = reference.gradient(c, torch.lerp(fake, real, alpha), (y,))
        return 10.0 * (reference.norms(g) - 1).square().mean()

    for method in EXACT:
        compare(
            critic,
            lambda c, m=method: fastgan.gradient_penalty(c, real, fake, args=(y,), alpha=alpha, method=m),
            textbook,
        )


def test_single_sample_and_channels_last():
    critic, (real, _) = small(), pair()
    for x in (real[:1], real.contiguous(memory_format=torch.channels_last), real[:1].expand(4, 3, 8, 8)):
        compare(
            critic,
            lambda c, x=x: fastgan.r1_penalty(c, x),
            lambda c, x=x: fastgan.r1_penalty(c, x, method="double_backward"),
        )


def test_lazy_schedule():
    lazy = penalties.LazySchedule(16)
    assert [lazy.weight(k, 2.0) for k in (0, 1, 15, 16)] == [32.0, 0.0, 0.0, 32.0]
    lr, betas = lazy.adam(2e-3, (0.0, 0.99))
    assert math.isclose(lr, 2e-3 * 16 / 17) and betas == (0.0, 0.99 ** (16 / 17))
    with pytest.raises(ValueError):
        penalties.LazySchedule(0)


def test_copy_of_a_critic_is_judged_on_its_own():
    critic, (real, _) = small(), pair()
    fastgan.r1_penalty(critic, real)
    other = copy.deepcopy(critic)
    other[1] = nn.SiLU()
    with pytest.raises(RuntimeError, match="Silu"):
        fastgan.r1_penalty(other, real, method="fused")
