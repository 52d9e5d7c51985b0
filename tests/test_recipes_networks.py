"""What each recipe is named for does what its paper says: metrics of a short run would not always miss it."""

import dataclasses

import pytest
import torch
from torch.nn import functional

for needed in ("matplotlib", "rich", "safetensors", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)

from fastgan import recipes  # noqa: E402
from fastgan.recipes import minibatch, r3gan, sagan, stylegan  # noqa: E402
from fastgan.training import data, networks  # noqa: E402
from fastgan.training.trainer import Trainer  # noqa: E402


def trainer(name, spec="digits", **changed):
    kind = recipes.get(name)
    known = {field.name for field in dataclasses.fields(kind.Options)}
    chosen = kind.Options(**{key: value for key, value in ({"width": 8, "z_dim": 8} | changed).items() if key in known})
    return Trainer(kind, chosen, data.load(spec, 8), batch_size=8, steps=3)


def test_wgan_keeps_its_critics_weights_small():
    trained = trainer("wgan")
    trained.step()
    assert max(p.abs().max() for p in trained.raw["critic"].parameters()) <= 0.01
    assert max(p.abs().max() for p in trained.raw["generator"].parameters()) > 0.05


@pytest.mark.parametrize("name, fast", [("sngan", True), ("sngan", False), ("sagan", True)])
def test_normalised_weights_have_a_norm_of_one(name, fast):
    critic = trainer(name, fast=fast).raw["critic"]
    image, label = torch.randn(4, 1, 8, 8), [torch.arange(4)] * (name == "sagan")
    for _ in range(200):
        critic(image, *label)
    critic.eval()
    weights = [m.weight for m in critic.modules() if hasattr(m, "parametrizations")]
    assert len(weights) > 5
    for weight in weights:
        torch.testing.assert_close(torch.linalg.matrix_norm(weight.flatten(1), 2), torch.tensor(1.0), atol=0.02, rtol=0)
    assert networks.normalised(critic) == 1


def test_other_weights_are_not_taken_for_normalised_ones():
    halves = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Conv2d(3, 3, 1))
    torch.nn.init.eye_(halves[0].weight)
    torch.nn.init.constant_(halves[1].weight, 0.5)  # of norm 1.5
    assert networks.normalised(halves) == 0.5 and networks.normalised(halves, 0.6) == 1


def test_attention_gathers_from_everywhere():
    torch.manual_seed(0)
    attention, x = sagan.SelfAttention(16).eval(), torch.randn(2, 16, 4, 4)
    assert torch.equal(attention(x), x), "the gain starts at 0"
    torch.nn.init.constant_(attention.gain, 0.5)
    query, key, value = attention.project(x).flatten(2).split([2, 2, 8], 1)
    share = torch.einsum("bci,bcj->bij", query, key).softmax(2)
    gathered = torch.einsum("bij,bcj->bci", share, value).unflatten(2, (4, 4))
    torch.testing.assert_close(attention(x), x + 0.5 * attention.out(gathered))
    moved = x.clone()
    moved[..., 0, 0] += 1
    assert (attention(moved) - attention(x)).abs().amax(1).min() > 1e-5, "a corner matters at every position"


def test_demodulated_convolutions_have_a_weight_for_each_sample():
    torch.manual_seed(0)
    layer, x, style = stylegan.StyledConv(6, 5, 4, adain=False), torch.randn(3, 6, 8, 8), torch.randn(3, 4)
    weight = layer.conv.weight * layer.style(style)[:, None, :, None, None]
    weight = weight / weight.square().sum((2, 3, 4), keepdim=True).sqrt()
    want = [functional.conv2d(image[None], own, padding=1) for image, own in zip(x, weight, strict=True)]
    torch.testing.assert_close(layer(x, style), stylegan.activation(torch.cat(want)), atol=1e-5, rtol=1e-5)
    assert (layer(x, style) - layer(x, 7 * style)).abs().max() > 1e-3
    torch.nn.init.constant_(layer.noise, 1.0)
    assert (layer(x, style) - layer(x, style)).abs().max() > 0.1, "noise is drawn anew"


def test_adain_gives_each_channel_the_styles_mean_and_deviation():
    layer, x, style = stylegan.StyledConv(6, 5, 4, adain=True), torch.randn(3, 6, 8, 8), torch.randn(3, 4)
    gain, shift = layer.style(style).chunk(2, 1)
    out = layer(x, style)
    torch.testing.assert_close(out.mean((2, 3)), shift, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((2, 3), unbiased=False), (1 + gain).abs(), atol=1e-2, rtol=1e-2)


def test_styles_are_mixed_and_truncated():
    recipe = trainer("stylegan", mixing=1.0).recipe
    styles = recipe.styles(6)
    layers = styles.shape[1]
    for row in styles:
        changes = [i for i in range(1, layers) if not torch.equal(row[i], row[i - 1])]
        assert len(changes) == 1, "one latent for the coarse layers and one for the fine"
    recipe.options.mixing = 0.0
    assert all(torch.equal(row[0], other) for row in recipe.styles(6) for other in row)
    recipe.options.truncation = 0.0
    assert (recipe.sample(2).diff(dim=0)).abs().max() < 1e-5, "all of the mean style (and no noise yet)"


def test_minibatch_scores_depend_on_the_rest_of_the_batch():
    critic = trainer("minibatch", "ring").raw["critic"]
    x = torch.randn(16, 2)
    assert (critic(x)[:1] - critic(torch.cat([x[:1], x[:1].expand(15, 2)]))[:1]).abs() > 1e-6


def test_smoothed_labels_are_those_of_cross_entropy(monkeypatch):
    recipe, found = trainer("minibatch", "ring", smooth=0.9).recipe, {}
    monkeypatch.setattr(recipe, "critic_step", lambda critic, real, fake, loss, **_: found.update(loss=loss))
    recipe.critic_loss({"image": torch.randn(4, 2)})
    real, fake = torch.randn(2, 4, 1)
    entropy = functional.binary_cross_entropy_with_logits
    want = entropy(real, torch.full_like(real, 0.9)) + entropy(fake, torch.zeros_like(fake))
    torch.testing.assert_close(found["loss"](real, fake), want)
    assert isinstance(recipe.critic, minibatch.Critic)


def test_blocks_of_r3gan_start_as_the_identity():
    x = torch.randn(2, 8, 4, 4)
    block = r3gan.Block(8, 2)
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block.body[-1].weight)
    assert not torch.equal(block(x), x)
