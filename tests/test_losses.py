import pytest
import torch
import torch.nn.functional as F

from fastgan import losses

bce = F.binary_cross_entropy_with_logits


def scores(b=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(b, generator=g, dtype=dtype, requires_grad=True) for _ in range(2)]


REFERENCE = {
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda f, r: -f.mean()),
    "minimax": (
        lambda r, f: bce(r, torch.ones_like(r)) + bce(f, torch.zeros_like(f)),
        lambda f, r: torch.log(1 - torch.sigmoid(f)).mean(),
    ),
    "non_saturating": (
        lambda r, f: bce(r, torch.ones_like(r)) + bce(f, torch.zeros_like(f)),
        lambda f, r: bce(f, torch.ones_like(f)),
    ),
    "least_squares": (
        lambda r, f: 0.5 * (r - 1).pow(2).mean() + 0.5 * f.pow(2).mean(),
        lambda f, r: 0.5 * (f - 1).pow(2).mean(),
    ),
    "hinge": (lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda f, r: -f.mean()),
    "relativistic": (
        lambda r, f: -torch.log(torch.sigmoid(r - f)).mean(),
        lambda f, r: -torch.log(torch.sigmoid(f - r)).mean(),
    ),
    "relativistic_average": (
        lambda r, f: bce(r - f.mean(), torch.ones_like(r)) + bce(f - r.mean(), torch.zeros_like(f)),
        lambda f, r: bce(f - r.mean(), torch.ones_like(f)) + bce(r - f.mean(), torch.zeros_like(r)),
    ),
}


@pytest.mark.parametrize("name", losses.names())
def test_both_sides_match_the_textbook(name):
    real, fake = scores()
    critic, generator = REFERENCE[name]
    torch.testing.assert_close(getattr(losses, name)(real, fake), critic(real, fake))
    torch.testing.assert_close(getattr(losses, name + "_generator")(fake, real), generator(fake, real))
    ours = torch.autograd.grad(losses.get(name)(real, fake), (real, fake))
    torch.testing.assert_close(ours, torch.autograd.grad(critic(real, fake), (real, fake)))


@pytest.mark.parametrize("name", losses.names())
def test_gradients(name):
    assert torch.autograd.gradcheck(losses.get(name).function, scores())


@pytest.mark.parametrize("name", [n for n in losses.names() if losses.get(n).separable])
def test_separable_losses_are_the_sum_of_their_terms(name):
    loss, (real, fake) = losses.get(name), scores()
    torch.testing.assert_close(loss.real_term(real) + loss.fake_term(fake), loss(real, fake))


@pytest.mark.parametrize("name", [n for n in losses.names() if losses.get(n).mean_of_samples])
def test_means_of_samples_can_be_split(name):
    loss, (real, fake) = losses.get(name), scores(6)
    parts = sum(loss(real[k : k + 2], fake[k : k + 2]) / 3 for k in (0, 2, 4))
    torch.testing.assert_close(parts, loss(real, fake))


def test_several_outputs_add_up_and_half_precision_is_reduced_in_float32():
    real, fake = scores()
    torch.testing.assert_close(
        losses.hinge([real, 2 * real], [fake, fake]), losses.hinge(real, fake) + losses.hinge(2 * real, fake)
    )
    assert losses.hinge(real.half(), fake.half()).dtype == torch.float32


def test_errors_say_what_to_do():
    real, fake = scores()
    with pytest.raises(ValueError, match="unknown loss"):
        losses.get("wgan")
    with pytest.raises(TypeError, match="callable"):
        losses.get(3)
    with pytest.raises(ValueError, match="real_scores"):
        losses.relativistic_generator(fake)
    with pytest.raises(ValueError, match="one shape"):
        losses.relativistic(real, fake[:3])
    with pytest.raises(TypeError, match="scores"):
        losses.wasserstein({"a": real}, fake)
    assert losses.get(losses.hinge) is losses.get("hinge")


# --- beside the game -------------------------------------------------------------------------------------------------


def two(*shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=g, dtype=dtype, requires_grad=True) for _ in range(2)]


PAIRS = {
    "l1": (lambda a, b: losses.reconstruction(a, b), lambda a, b: (a - b).abs().sum() / a.numel()),
    "l2": (lambda a, b: losses.reconstruction(a, b, "l2"), lambda a, b: (a - b).pow(2).sum() / a.numel()),
    "charbonnier": (
        lambda a, b: losses.reconstruction(a, b, "charbonnier"),
        lambda a, b: torch.sqrt((a - b) ** 2 + 1e-6).sum() / a.numel(),
    ),
    "cycle": (losses.cycle, lambda a, b: (a - b).abs().sum() / a.numel()),
    "identity": (losses.identity, lambda a, b: (a - b).abs().sum() / a.numel()),
    "kl": (
        losses.kl,
        lambda m, lv: (
            sum(
                torch.distributions.kl_divergence(
                    torch.distributions.Normal(m[i], (lv[i] / 2).exp()), torch.distributions.Normal(0.0, 1.0)
                ).sum()
                for i in range(len(m))
            )
            / len(m)
        ),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_pairs_match_the_textbook(name):
    ours, textbook = PAIRS[name]
    for shape in ((5, 3), (1, 2, 3, 3), (4,)):
        a, b = two(*shape)
        torch.testing.assert_close(ours(a, b), textbook(a, b))
    assert torch.autograd.gradcheck(ours, two(3, 2)) and torch.autograd.gradgradcheck(ours, two(3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_half_precision_pairs_are_reduced_in_float32(name, dtype):
    a, b = (t.detach().to(dtype) for t in two(64, 300))
    value = PAIRS[name][0](a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), PAIRS[name][1](a.double(), b.double()), rtol=1e-6, atol=0)


def test_kl_keeps_its_digits_near_the_prior():
    value = losses.kl(torch.zeros(2, 3), torch.full((2, 3), 1e-4))  # 1/2 sum of lv^2 / 2, to this order
    torch.testing.assert_close(value, torch.tensor(3 * 1e-8 / 4), rtol=1e-2, atol=0)


def test_auxiliary_is_cross_entropy():
    logits, label = two(5, 4)[0], torch.tensor([0, 3, 1, 1, 2])
    expected = -sum((logits[i].exp() / logits[i].exp().sum()).log()[label[i]] for i in range(5)) / 5
    torch.testing.assert_close(losses.auxiliary(logits, label), expected)
    assert torch.autograd.gradcheck(lambda x: losses.auxiliary(x, label), logits)
    assert losses.auxiliary(logits.half(), label).dtype == torch.float32


def test_errors_of_the_losses_beside_the_game():
    a, b = two(5, 4)
    for function in (losses.reconstruction, losses.cycle, losses.identity, losses.kl):
        with pytest.raises(ValueError, match="one shape"):
            function(a, b[:1])
        with pytest.raises(TypeError, match="floating-point"):
            function(a, torch.zeros(5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="charbonnier"):
        losses.reconstruction(a, b, "huber")
    with pytest.raises(ValueError, match="classes"):
        losses.auxiliary(a[0], torch.tensor(0))
    with pytest.raises(ValueError, match="one a row"):
        losses.auxiliary(a, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64"):
        losses.auxiliary(a, torch.zeros(5))
    with pytest.raises(TypeError, match="logits"):
        losses.auxiliary([1.0], torch.zeros(1, dtype=torch.int64))
