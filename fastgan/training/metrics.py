"""How good samples are: ``evaluate(recipe.sample, recipe.source, 2000)``, metrics by name.

* points: ``energy_distance`` from the source; with labels ``modes`` that are covered and ``high_quality``, the share of samples
  near a mode;
* images: ``fid`` (Heusel et al., 2017) and ``kid`` (Bińkowski et al., 2018) in the features of
  :mod:`~fastgan.training.features`; with labels ``classes`` that are covered and ``inception_score`` (Salimans et al., 2016) by
  the same classifier;
* images, and points without labels: ``precision``, ``recall`` (Kynkäänniemi et al., 2019), ``density``, ``coverage`` (Naeem et
  al., 2020);
* images whose class was asked for: ``accuracy``, the share that the classifier takes for that class;
* pairs of images: ``psnr``, ``ssim`` (Wang et al., 2004), and on demand ``lpips`` (Zhang et al., 2018), by :func:`paired`.

A mode or a class is covered if it gets at least a fifth of an even share of the samples; a sample is near a mode within three
standard deviations. Of 25 modes and 2500 samples that is 20 samples.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastgan

from .data import Source
from .features import PART, Extractor, extractor

#: metrics of which less is better; of all others more is
LESS_IS_BETTER = frozenset({"energy_distance", "error", "fid", "kid", "l1", "l2", "lpips", "reconstruction_error"})
REAL = 5000  # samples of the source that others are compared with, at most
NEAREST, NEAREST_DENSITY = 3, 5  # neighbours that make the balls of precision and recall, of density and coverage
LEAST = 10  # samples


class NotFinite(ValueError):
    """Samples hold NaN or infinity."""


def evaluate(
    sample: Callable[[int], Tensor], source: Source, n: int = 2000, features: str | None = None,
    labels: Callable[[int], Tensor | None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics of ``n`` samples against those of ``source``.

    Args:
        sample: called with how many, returns images (N, C, H, W) in [-1, 1] or points (N, D), of the shape of the source's.
        n: samples in all, at least 10.
        features: of images: "classifier", "random" or "inception"; None: the classifier where there are labels, else random.
        labels: called with how many, the classes that such samples were asked to be of (N,), or None.

    The random state that samples are drawn from is put back afterwards, so that a run that is evaluated goes on unchanged.
    ValueError: n too small, samples of another shape; :class:`NotFinite`; ModuleNotFoundError says what "inception" needs.
    """
    if n < LEAST:
        raise ValueError(f"n is {n}: expected at least {LEAST}")
    with _random_state_kept(), torch.no_grad():
        parts = [min(PART, n - i) for i in range(0, n, PART)]
        drawn = torch.cat([sample(part).detach() for part in parts])
        asked = [labels(part) for part in parts] if labels else [None]
        if drawn.shape[1:] != source.shape:
            raise ValueError(f"samples have shape {tuple(drawn.shape[1:])}, those of {source.name} {source.shape}")
        if bad := int((~drawn.flatten(1).isfinite().all(1)).sum()):
            raise NotFinite(f"{bad} of {n} samples are not finite")
        real, known = _real(source)
        if drawn.dim() == 2:
            return _points(drawn, real, known)
        return _images(drawn, real, extractor(features, real, known), None if asked[0] is None else torch.cat(asked))


def reference(source: Source, features: str | None = None) -> dict[str, float]:
    """What :func:`evaluate` gives for perfect samples: one half of the source's (at most 5000) against the other."""
    with _random_state_kept(), torch.no_grad():
        real, labels = _real(source)
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        one, other = order[::2], order[1::2]
        if real.dim() == 2:
            return _points(real[one], real[other], None if labels is None else labels[other])
        return _images(real[one], real[other], extractor(features, real, labels))


def note(source: Source, features: str | None = None) -> str:
    """What the metrics of images are measured with, and whether they can stand beside published ones; "" for points."""
    if len(source.shape) == 1:
        return ""
    with _random_state_kept():
        return extractor(features, *_real(source)).note


def better(name: str, value: float, than: float) -> bool:
    """Whether the metric ``name`` at ``value`` is at least as good as at ``than``."""
    return value <= than if name in LESS_IS_BETTER else value >= than


def paired(output: Tensor, target: Tensor, perceptual: str | None = None) -> dict[str, float]:
    """``psnr`` in dB and ``ssim`` of images (N, C, H, W) in [-1, 1] and what they should be; ``perceptual``: ``lpips`` too, by
    this one of ``PERCEPTUAL``. ModuleNotFoundError or ValueError say what that needs."""
    functional = _torchmetrics("torchmetrics.functional.image")
    output, target = (x.detach().float().clamp(-1, 1) for x in (output, target))
    unit = (output + 1) / 2, (target + 1) / 2
    found = {
        "psnr": float(functional.peak_signal_noise_ratio(*unit, data_range=1.0)),
        "ssim": float(functional.structural_similarity_index_measure(*unit, data_range=1.0)),
    }
    return found | ({"lpips": lpips(output, target, perceptual)} if perceptual else {})


PERCEPTUAL = ("alex", "vgg", "squeeze")  # networks that LPIPS compares features of


def lpips(output: Tensor, target: Tensor, network: str) -> float:
    """Mean distance of images (N, C, H, W) in [-1, 1] in features of a ``network`` that torchvision has trained on ImageNet.
    Sides below 32 are doubled until they are not, which such networks can't do without."""
    if importlib.util.find_spec("torchvision") is None:
        raise ModuleNotFoundError("lpips compares features of torchvision's networks: pip install torchvision")
    kind = _torchmetrics("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
    output, target = (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (output, target))
    while min(output.shape[2:]) < 32:
        output, target = (nn.functional.interpolate(x, scale_factor=2.0) for x in (output, target))
    try:
        parts = list(zip(output.split(PART), target.split(PART), strict=True))
        return float(_value(kind, parts, net_type=network))
    except OSError as error:  # urllib's, where the weights are not on disk and can't be fetched
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(
            f"lpips needs torchvision's weights of {network} in {folder}, from where there is a net: {error}"
        ) from error


def _torchmetrics(name: str):
    """The module. ImportError where a torchvision that was built for another torch, which it imports, is in its way."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        raise ImportError(
            f"torchmetrics can't be imported ({error}): a torchvision for another torch? pip uninstall it"
        ) from error


def _random_state_kept():
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


def _real(source: Source) -> tuple[Tensor, Tensor | None]:
    """Samples of the source, always the same ones, and their labels."""
    batch = source.spread(REAL)
    return batch["image"], batch["label"] if source.classes else None


# --- points -----------------------------------------------------------------------------------------------------------


def _points(drawn: Tensor, real: Tensor, labels: Tensor | None) -> dict[str, float]:
    real = real.to(drawn.device, drawn.dtype)
    found = {"energy_distance": fastgan.energy_distance(drawn, real).item()}
    if labels is None:
        return found | neighbourhoods(real, drawn)
    groups = [real[labels.to(real.device) == label] for label in labels.unique()]
    means = torch.stack([group.mean(0) for group in groups])
    spread = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)]).square().mean().sqrt()
    distance, mode = torch.cdist(drawn, means).min(1)
    near = distance <= 3 * spread
    found["modes"] = float(_covered(mode[near], len(means), len(drawn)))
    found["high_quality"] = near.float().mean().item()
    return found


def _covered(labels: Tensor, classes: int, n: int) -> int:
    """How many of ``classes`` have at least a fifth of an even share of ``n`` samples."""
    return int((torch.bincount(labels, minlength=classes) >= n / classes / 5).sum())


# --- images -----------------------------------------------------------------------------------------------------------


def _images(drawn: Tensor, real: Tensor, extract: Extractor, asked: Tensor | None = None) -> dict[str, float]:
    fake, logits = extract(drawn)
    true, _ = extract(real.to(drawn.device))
    found = {"fid": fid(true, fake), "kid": kid(true, fake)}
    if extract.classes:
        found["classes"] = float(_covered(logits.argmax(1), extract.classes, len(logits)))
    if extract.classes and asked is not None:
        found["accuracy"] = (logits.argmax(1) == asked).float().mean().item()
    if logits is not None:
        found["inception_score"] = inception_score(logits)
    return found | neighbourhoods(true, fake)


def _given(features: Tensor) -> nn.Module:
    """torchmetrics' extractor where features are found already."""
    module = nn.Identity()
    module.num_features = features.shape[1]
    return module


def _value(kind, pairs: list[tuple], **arguments) -> Tensor:
    """A torchmetrics metric of what its ``update`` is called with. It warns that it keeps features; they are few."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        metric = kind(**arguments)
    metric.to(pairs[0][0].device)
    for values in pairs:
        metric.update(*values)
    return metric.compute()


def fid(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of features (N, D) and (M, D)."""
    pairs = [(real.double(), True), (fake.double(), False)]
    return float(_value(_torchmetrics("torchmetrics.image.fid").FrechetInceptionDistance, pairs, feature=_given(real)))


def kid(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)^3, the mean over 20 draws of at most 500 of each. Can be < 0."""
    kind = _torchmetrics("torchmetrics.image.kid").KernelInceptionDistance
    size = min(500, len(real), len(fake))
    pairs = [(real.double(), True), (fake.double(), False)]
    with torch.random.fork_rng(()):  # it draws on the CPU
        torch.default_generator.manual_seed(0)
        return float(_value(kind, pairs, feature=_given(real), subsets=20, subset_size=size)[0])


def inception_score(logits: Tensor) -> float:
    """exp(mean KL(p(y | x), p(y))) of logits (N, classes), the mean of ten parts: 1 at worst, the number of classes at best."""
    kind = _torchmetrics("torchmetrics.image.inception").InceptionScore
    logits = logits.double()
    logits = (logits - logits.amax(1, keepdim=True)).clamp_min(-700)  # else a class that no sample has is 0 * log 0
    with torch.random.fork_rng(()):
        torch.default_generator.manual_seed(0)
        return float(_value(kind, [(logits,)], feature=_given(logits))[0])


def neighbourhoods(real: Tensor, fake: Tensor) -> dict[str, float]:
    """``precision``, ``recall``, ``density`` and ``coverage`` of features (N, D) and (M, D): shares of samples that lie in the
    balls around others that reach to their 3rd or 5th nearest neighbour of the same kind."""
    real, fake = real.double(), fake.double()

    def radius(x: Tensor, k: int) -> Tensor:
        # the neighbour itself is inside, however its distance is rounded
        return fastgan.nearest_distances(x, k=min(k, len(x) - 1))[:, -1] * (1 + 1e-9)

    def inside(x: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
        """(N,): in how many balls each x lies."""
        return torch.cat([(torch.cdist(part, centres) <= radii).sum(1) for part in x.split(PART)])

    wide = radius(real, NEAREST_DENSITY)
    return {
        "precision": (inside(fake, real, radius(real, NEAREST)) > 0).double().mean().item(),
        "recall": (inside(real, fake, radius(fake, NEAREST)) > 0).double().mean().item(),
        "density": inside(fake, real, wide).double().mean().item() / NEAREST_DENSITY,
        "coverage": (fastgan.nearest_distances(real, fake)[:, 0] <= wide).double().mean().item(),
    }
