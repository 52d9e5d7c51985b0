"""Feature matching and the pulling-away term: meaning, gradients, errors."""

import pytest
import torch

import fastgan


def layers(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


# --- feature matching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
def test_feature_matching_compares_means_layer_by_layer(p):
    real, fake = layers(0, (6, 3, 4, 4), (6, 10)), layers(1, (5, 3, 4, 4), (5, 10))
    want = 0
    for r, f, weight in zip(real, fake, (0.5, 2.0), strict=True):
        d = (r.sum(0) / len(r) - f.sum(0) / len(f)).abs()
        want = want + weight * (d**p).sum() / d.numel()
    got = fastgan.feature_matching(real, fake, p=p, weights=(0.5, 2.0))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, fake), torch.autograd.grad(want, fake), strict=True):
        torch.testing.assert_close(a, b)
    one = fastgan.feature_matching(real[1], fake[1], p=p)
    torch.testing.assert_close(one, fastgan.feature_matching(real[1:], fake[1:], p=p))


def test_feature_matching_knows_layers_by_name_and_pairs():
    real, fake = layers(0, (4, 3), (4, 5)), layers(1, (4, 3), (4, 5))
    got = fastgan.feature_matching({"a": real[0], "b": real[1]}, {"b": fake[1], "a": fake[0]})
    torch.testing.assert_close(got, fastgan.feature_matching(real, fake))
    paired = fastgan.feature_matching(real, fake, paired=True)
    torch.testing.assert_close(paired, sum((r - f).abs().mean() for r, f in zip(real, fake, strict=True)))
    # equal means, unequal samples
    assert (
        fastgan.feature_matching(real[0], real[0].flip(0))
        < 1e-12
        < fastgan.feature_matching(real[0], real[0].flip(0), paired=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_feature_matching_means_of_half_precision_are_float32(dtype):
    real = torch.ones(4096, 2, dtype=dtype)
    real[:2048] = 1.5  # a running mean in 16 bits is far off
    loss = fastgan.feature_matching(real, torch.zeros(3, 2, dtype=dtype))
    assert loss.dtype == torch.float32 and loss.item() == 1.25


def test_feature_matching_twice_differentiable_and_compiled():
    real, fake = layers(0, (4, 3)), layers(1, (5, 3))
    assert torch.autograd.gradgradcheck(lambda r, f: fastgan.feature_matching(r, f, p=2), (real[0], fake[0]))
    compiled = torch.compile(fastgan.feature_matching, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(real, fake), fastgan.feature_matching(real, fake))


@pytest.mark.parametrize(
    "real, fake, options, error, text",
    [
        (torch.ones(2, 3), [torch.ones(2, 3)] * 2, {}, ValueError, "1 layers, fake 2"),
        (torch.ones(2, 3), torch.ones(2, 4), {}, ValueError, r"layer 0 has shapes \(2, 3\) and \(2, 4\)"),
        (torch.ones(2, 3), torch.ones(4, 3), {"paired": True}, ValueError, "layer 0 has shapes"),
        (torch.ones(2, 3), torch.ones(0, 3), {}, ValueError, "B of 1 or more"),
        (torch.ones(2, 3), torch.ones(2, 3), {"p": 3}, ValueError, "p is 3"),
        (torch.ones(2, 3), torch.ones(2, 3), {"weights": [1, 2]}, ValueError, "2 weights for 1 layers"),
        (torch.ones(2, 3).int(), torch.ones(2, 3), {}, TypeError, "int32"),
        ("a", torch.ones(2, 3), {}, TypeError, "real is a str"),
        ({"a": torch.ones(1, 1)}, {"b": torch.ones(1, 1)}, {}, ValueError, r"real has layers \['a'\]"),
    ],
)
def test_feature_matching_errors(real, fake, options, error, text):
    with pytest.raises(error, match=text):
        fastgan.feature_matching(real, fake, **options)


# --- pulling away ----------------------------------------------------------------------------------------------------


def cosines(f):
    """The formula of the paper, pair by pair."""
    total, b = 0, len(f)
    for i in range(b):
        for j in range(b):
            if i != j:
                total = total + (f[i] @ f[j] / (f[i].norm() * f[j].norm())) ** 2
    return total / (b * (b - 1))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (2, 1), (5, 5)])
def test_pulling_away_is_the_papers(shape):
    (f,) = layers(0, shape)
    got, want = fastgan.pulling_away(f), cosines(f)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(v, f)[0] for v in (got, want)), rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradgradcheck(fastgan.pulling_away, (f,))


def test_pulling_away_at_its_ends():
    assert fastgan.pulling_away(torch.eye(4)).item() == 0
    assert abs(fastgan.pulling_away(torch.ones(4, 3) * torch.tensor([1e-10, -1.0, 2.0, 1e15])[:, None]).item() - 1) < 1e-6
    assert fastgan.pulling_away(torch.ones(1, 3)).item() == 0 and fastgan.pulling_away(torch.ones(0, 3)).item() == 0
    zero = torch.zeros(3, 4, requires_grad=True)
    fastgan.pulling_away(zero).backward()
    assert torch.equal(zero.grad, torch.zeros(3, 4))
    assert fastgan.pulling_away(torch.ones(3, 4, dtype=torch.float16) * 200).item() == pytest.approx(1, abs=1e-6)


def test_pulling_away_errors():
    with pytest.raises(ValueError, match=r"flatten\(1\)"):
        fastgan.pulling_away(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="int64"):
        fastgan.pulling_away(torch.ones(2, 3, dtype=torch.long))
