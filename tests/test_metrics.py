"""Metrics of samples, each against a plain computation or a value that is known; and what bad generators get."""

import importlib
import importlib.util
import math

import pytest
import torch

from fastgan.training import data, features, metrics
from fastgan.training.data import Source


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", 8)


def drawn_from(images):
    return lambda n: images[torch.randint(len(images), (n,))]


# --- distances of features ------------------------------------------------------------------------------------------


def gaussian(n, mean, spread, seed):
    """(n, D) float64 whose mean and variances are exactly these, and whose covariances are 0."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(n - 1)
    return x * torch.tensor(spread) + torch.tensor(mean)


def test_fid_of_gaussians():
    """|difference of means|^2 + sum (difference of standard deviations)^2 where covariances are diagonal."""
    a = gaussian(300, (0.0, 1.0, 2.0), (1.0, 2.0, 0.5), 0)
    b = gaussian(200, (1.0, 1.0, -1.0), (1.5, 2.0, 0.1), 1)
    assert metrics.fid(a, b) == pytest.approx((1 + 9) + (0.25 + 0.16), rel=1e-6)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    assert metrics.fid(a @ rotation, b @ rotation) == pytest.approx(10.41, rel=1e-6)
    assert metrics.fid(a, a) == pytest.approx(0, abs=1e-6)


def test_kid_of_few():
    """The whole sets in each draw, so that it is the unbiased MMD itself."""
    x, y = torch.randn(40, 6), torch.randn(40, 6) * 2 + 0.5

    def kernel(a, b):
        return ((a.double() @ b.double().T) / 6 + 1) ** 3

    def others(k):
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    expected = others(kernel(x, x)) + others(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert metrics.kid(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_inception_score():
    assert metrics.inception_score(torch.randn(1, 7).expand(200, 7)) == pytest.approx(1, abs=1e-6)
    sure = torch.nn.functional.one_hot(torch.arange(8000) % 4, 5) * 2000.0  # and a class that none has
    assert 3.98 < metrics.inception_score(sure) <= 4
    unsure = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]]).repeat(2000, 1)  # 1/4 and 3/4
    assert metrics.inception_score(unsure) == pytest.approx(math.exp(0.25 * math.log(0.5) + 0.75 * math.log(1.5)), rel=1e-2)


def test_neighbourhoods_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(70, 3, generator=generator), torch.randn(50, 3, generator=generator) * 0.8 + 1

    def distance(a, b):
        return math.dist(a.tolist(), b.tolist())

    def radii(points, k):
        return [sorted(distance(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]

    def inside(x, centres, balls):
        return sum(distance(x, c) <= r for c, r in zip(centres, balls, strict=True))

    narrow, wide, of_fakes = radii(real, 3), radii(real, 5), radii(fake, 3)
    expected = {
        "precision": sum(inside(x, real, narrow) > 0 for x in fake) / 50,
        "recall": sum(inside(x, fake, of_fakes) > 0 for x in real) / 70,
        "density": sum(inside(x, real, wide) for x in fake) / (5 * 50),
        "coverage": sum(any(distance(x, c) <= r for x in fake) for c, r in zip(real, wide, strict=True)) / 70,
    }
    assert all(0 < value < 1 for value in expected.values()) and len(set(expected.values())) == 4
    assert metrics.neighbourhoods(real, fake) == pytest.approx(expected)


def test_neighbourhoods_of_a_copy_and_of_what_is_far():
    real = torch.randn(200, 4)
    same = metrics.neighbourhoods(real, real.clone())
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] == pytest.approx(6 / 5)  # itself and 5 others, on average
    assert set(metrics.neighbourhoods(real, real + 100).values()) == {0.0}


def test_pairs_of_images():
    a, b = torch.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), -0.1)  # 0.75 and 0.45 in [0, 1]
    found = metrics.paired(a, b)
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.3**2), rel=1e-4)
    assert found["ssim"] == pytest.approx((2 * 0.75 * 0.45 + 1e-4) / (0.75**2 + 0.45**2 + 1e-4), rel=1e-3)  # luminance alone
    assert metrics.paired(a, a)["ssim"] == pytest.approx(1)


def test_lpips_of_weights_on_disk(tmp_path, monkeypatch):
    """Weights by chance in place of those that torchvision would fetch."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    a, b = torch.rand(6, 1, 16, 16) * 2 - 1, torch.rand(6, 1, 16, 16) * 2 - 1
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(
        ValueError, match=rf"lpips needs torchvision's weights of squeeze in {tmp_path}/hub/checkpoints.*no net"
    ):
        metrics.paired(a, b, "squeeze")
    weights = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "hub" / "checkpoints" / weights)
    found, half = metrics.paired(a, b, "squeeze"), metrics.paired(a, a + 0.2 * (b - a), "squeeze")
    assert set(found) == {"psnr", "ssim", "lpips"} and found["lpips"] > half["lpips"] > 0
    assert metrics.paired(a, a.clone(), "squeeze")["lpips"] == 0
    assert metrics.better("lpips", 0.1, 0.2)


def refused(*arguments, **options):
    raise OSError("no net")


def test_lpips_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchvision"):
        metrics.lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), "alex")


def test_a_torchvision_that_does_not_fit(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match=r"nms does not exist.*a torchvision for another torch\?"):
        metrics.paired(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_which_way_is_better():
    assert metrics.better("fid", 1, 2) and not metrics.better("fid", 3, 2) and metrics.better("fid", 2, 2)
    assert metrics.better("modes", 3, 2) and not metrics.better("modes", 1, 2)


# --- points ---------------------------------------------------------------------------------------------------------


def test_planted_modes():
    """25 modes, 2500 samples: 20 near a mode make it count, 19 don't."""
    ring = data.load("ring", 0)
    labels = ring.tensors["label"]
    means = torch.stack([ring.tensors["image"][labels == i].mean(0) for i in range(25)])
    points = means[torch.full((2500,), 3)].clone()
    points[:20], points[20:39] = means[0], means[1]
    parts = iter(points.split(500))
    found = metrics.evaluate(lambda n: next(parts), ring, 2500)
    assert found["modes"] == 2 and found["high_quality"] == 1
    outward = means[3] / means[3].norm()
    for standard_deviations, near in ((2.8, 1), (3.2, 0)):
        moved = (means[3] + standard_deviations * 0.05 * outward).expand(500, 2)
        found = metrics.evaluate(lambda n, moved=moved: moved, ring, 500)
        assert (found["modes"], found["high_quality"]) == (near, near)


def test_energy_distance_of_points():
    ring = data.load("ring", 0)
    x = torch.randn(300, 2)
    real = metrics._real(ring)[0]
    expected = 2 * torch.cdist(x, real).mean() - torch.cdist(x, x).mean() - torch.cdist(real, real).mean()
    assert metrics.evaluate(lambda n: x, ring, 300)["energy_distance"] == pytest.approx(expected.item(), rel=1e-3)


def test_points_without_labels():
    x = torch.randn(500, 3)
    found = metrics.evaluate(lambda n: x, Source("x", {"image": x}), 500)
    assert found["precision"] == found["coverage"] == 1 and "modes" not in found


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_real_points_and_collapsed_ones(name):
    source = data.load(name, 0)
    found = metrics.reference(source)
    assert found["modes"] == 25 and found["high_quality"] > 0.95 and found["energy_distance"] < 0.02
    collapsed = metrics.evaluate(lambda n: source.tensors["image"][:1].repeat(n, 1), source)
    assert collapsed["modes"] == 1 and collapsed["energy_distance"] > 0.5


# --- images ---------------------------------------------------------------------------------------------------------


def test_generators_of_digits(digits):
    """Real samples, one digit again and again, half the classes, noise, blends of two."""
    images, labels = digits.tensors["image"], digits.tensors["label"]
    torch.manual_seed(0)
    found = {
        "real": drawn_from(images),
        "collapsed": drawn_from(images[:1]),
        "half": drawn_from(images[labels < 5]),
        "noise": lambda n: (9 * torch.randn(n, 1, 8, 8)).clamp(-1, 1),
        "blends": lambda n: (drawn_from(images)(n) + drawn_from(images)(n)) / 2,
    }
    found = {name: metrics.evaluate(sample, digits, 800) for name, sample in found.items()}
    floor = metrics.reference(digits)
    assert floor["fid"] < 1 and abs(floor["kid"]) < 0.05 and floor["classes"] == 10 and floor["inception_score"] > 7
    real = found.pop("real")
    assert real["fid"] < floor["fid"] and real["precision"] == 1  # they are among those that they are compared with
    assert all(values["fid"] > 10 * floor["fid"] and values["kid"] > 0.5 for values in found.values())
    assert found["collapsed"]["classes"] == 1 and found["collapsed"]["inception_score"] < 1.01
    assert found["collapsed"]["recall"] < 0.01 and found["collapsed"]["coverage"] < 0.02
    assert found["half"]["classes"] == 5 and found["half"]["precision"] == 1 and found["half"]["coverage"] < 0.6
    assert found["noise"]["precision"] < 0.1 and found["noise"]["recall"] < 0.3
    assert found["blends"]["precision"] < 0.8


def test_nothing_is_drawn_from_the_random_state(digits, monkeypatch):
    monkeypatch.setattr(features, "EPOCHS", 1)
    monkeypatch.setattr(features, "_trained", {})
    torch.manual_seed(5)
    before, seeded = torch.get_rng_state(), len(torch.cuda._queued_calls)  # seeds that CUDA is to get when it starts
    sample = lambda n: torch.randn(n, 1, 8, 8).tanh()  # noqa: E731
    first = metrics.evaluate(sample, digits, 60)
    metrics.reference(digits)
    metrics.note(digits)
    assert torch.equal(before, torch.get_rng_state()) and seeded == len(torch.cuda._queued_calls)
    assert metrics.evaluate(sample, digits, 60) == first  # the same state draws the same samples
    features._trained.clear()
    torch.manual_seed(6)  # the classifier does not depend on it
    metrics.reference(digits)
    torch.manual_seed(5)
    assert metrics.evaluate(sample, digits, 60) == first
    torch.manual_seed(7)
    assert metrics.evaluate(sample, digits, 60) != first


def test_a_classifier_is_trained_once_and_tested_on_what_it_has_not_seen(digits, monkeypatch):
    images, labels = digits.tensors["image"], digits.tensors["label"]
    found = features.extractor(None, images, labels)
    assert found is features.extractor("classifier", images.clone(), labels)
    assert found.accuracy > 0.95 and f"{found.accuracy:.3f}" in found.note and "not comparable" in found.note
    assert found.classes == 10
    monkeypatch.setattr(features, "EPOCHS", 150)
    guessed = torch.randint(10, (100,), generator=torch.Generator().manual_seed(0))  # can be learnt by heart only
    assert features.extractor(None, images[:100], guessed).accuracy < 0.5


@pytest.mark.parametrize("name", ["classifier", "random"])
def test_features_have_a_mean_variance_of_one(digits, name):
    images, labels = digits.tensors["image"], digits.tensors["label"]
    found, logits = features.extractor(name, images, labels)(images)
    assert found.var(0).mean().item() == pytest.approx(1, rel=1e-4)
    assert (logits is None) == (name == "random")
    again, _ = features.extractor(name, images, labels)(images[:3])
    assert torch.allclose(again, found[:3], atol=1e-5)


def test_images_without_labels():
    images = torch.rand(60, 3, 12, 12) * 2 - 1
    source = Source("photos", {"image": images})
    found = metrics.evaluate(drawn_from(images), source, 100)
    assert set(found) == {"fid", "kid", "precision", "recall", "density", "coverage"}
    assert metrics.evaluate(lambda n: torch.zeros(n, 3, 12, 12), source, 100)["fid"] > 10 * found["fid"]
    assert "random network" in metrics.note(source)
    with pytest.raises(ValueError, match="'random' needs none"):
        metrics.evaluate(drawn_from(images), source, 100, "classifier")


def test_errors(digits):
    with pytest.raises(ValueError, match="n is 9: expected at least 10"):
        metrics.evaluate(lambda n: torch.zeros(n, 1, 8, 8), digits, 9)
    with pytest.raises(ValueError, match=r"samples have shape \(1, 4, 4\), those of digits \(1, 8, 8\)"):
        metrics.evaluate(lambda n: torch.zeros(n, 1, 4, 4), digits, 20)
    with pytest.raises(metrics.NotFinite, match="20 of 20 samples are not finite"):
        metrics.evaluate(lambda n: torch.full((n, 1, 8, 8), torch.nan), digits, 20)
    with pytest.raises(ValueError, match="expected one of classifier, random, inception"):
        metrics.evaluate(lambda n: torch.zeros(n, 1, 8, 8), digits, 20, "vgg")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_to_install(digits):
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        metrics.evaluate(lambda n: torch.zeros(n, 1, 8, 8), digits, 20, "inception")
