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
