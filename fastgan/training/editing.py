"""Moving through a trained generator's latents: between samples, and to samples with more or less of an attribute."""

from collections.abc import Callable

import torch
from torch import Tensor

from .recipe import GAN, Recipe

STEPS = 20  # of an edit
REACH = 0.5  # standard deviations of the latents that one step moves at most, per root of their number


def interpolate(recipe: Recipe, n: int, between: int = 8) -> Tensor:
    """(between, n, C, H, W): ``n`` rows, each from one latent to another by way of the arc that keeps a Gaussian's norm (White,
    "Sampling generative networks", 2016); all of one class where there are classes."""
    _check(recipe)
    start, end, labels = recipe.latent(n), recipe.latent(n), recipe.labels(n)
    shares = torch.linspace(0, 1, between, device=start.device)
    with torch.no_grad():
        return torch.stack([recipe.decode(arc(start, end, share), labels) for share in shares])


def arc(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """(B, D): between latents (B, D), ``share`` of the way. The straight line where they point the same way."""
    cosine = torch.cosine_similarity(start, end, 1).clamp(-1, 1)[:, None]
    angle = cosine.acos()
    sine = angle.sin()
    curved = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / sine.clamp_min(1e-6)
    return torch.where(sine > 1e-3, curved, (1 - share) * start + share * end)


def edit(recipe: Recipe, n: int, attribute: str, value: str, rows: int = 3) -> Tensor:
    """(n, rows, C, H, W): samples, and below them what becomes of them on the way to ``attribute=value``.

    "label": the same latents as another class. Otherwise the latent is moved, along the gradient, until the ``attribute`` is
    ``value`` standard deviations (of samples) above what it was. ValueError says what attributes and values there are.
    """
    _check(recipe)
    if len(recipe.source.shape) != 3:
        raise ValueError(f"--edit: images are edited, and samples of {recipe.source.name} have shape {recipe.source.shape}")
    z, labels = recipe.latent(n), recipe.labels(n)
    with torch.no_grad():
        before = recipe.decode(z, labels)
    if attribute == "label":
        names = recipe.source.class_names if labels is not None else ()
        if value not in names:
            raise ValueError(f"--edit label={value}: expected one of {', '.join(names) or 'none: it is not conditional'}")
        with torch.no_grad():
            return torch.stack([before, recipe.decode(z, torch.full_like(labels, names.index(value)))], 1)
    if attribute not in ATTRIBUTES:
        raise ValueError(f"--edit {attribute}: expected one of label, {', '.join(ATTRIBUTES)}")
    try:
        amount = float(value)
    except ValueError:
        raise ValueError(f"--edit {attribute}={value}: expected a number of standard deviations") from None
    measure = ATTRIBUTES[attribute]
    old, images = measure(before), [before]
    deviation = _deviation(recipe, measure)
    for row in range(1, rows):
        z = move(lambda z: measure(recipe.decode(z, labels)), z, old + amount * deviation * row / (rows - 1))
        with torch.no_grad():
            images.append(recipe.decode(z, labels))
    return torch.stack(images, 1)


def move(function: Callable[[Tensor], Tensor], z: Tensor, target: Tensor) -> Tensor:
    """Latents (B, D) near ``z`` for which ``function``, (B, D) to (B,), is ``target``; Gauss and Newton's steps."""
    longest = REACH * z.shape[1] ** 0.5
    for _ in range(STEPS):
        z = z.detach().requires_grad_()
        value = function(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        step = gradient * ((target - value.detach()) / gradient.square().sum(1).clamp_min(1e-12))[:, None]
        z = z + step * (longest / step.norm(dim=1, keepdim=True).clamp_min(longest))
    return z.detach()


def _check(recipe: Recipe) -> None:
    if not isinstance(recipe, GAN):
        raise ValueError("--interpolate and --edit move latents, and this recipe's samples are not made of them alone")


@torch.no_grad()
def _deviation(recipe: Recipe, measure: Callable[[Tensor], Tensor], n: int = 200) -> Tensor:
    return measure(recipe.decode(recipe.latent(n), recipe.labels(n))).std()


# --- attributes of images (B, C, H, W) in [-1, 1], (B,) each; light is what is brighter than black ----------------------


def brightness(images: Tensor) -> Tensor:
    """Mean, in [-1, 1]; of strokes on black also how thick they are."""
    return images.mean((1, 2, 3))


def _moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variance of the light's place along x, along y, and their covariance, in squares of a side."""
    light = (images.mean(1) + 1).clamp_min(0) + 1e-6
    light = light / light.sum((1, 2), keepdim=True)
    y = torch.linspace(-0.5, 0.5, images.shape[2], device=images.device)[:, None]
    x = torch.linspace(-0.5, 0.5, images.shape[3], device=images.device)
    x = x - (light * x).sum((1, 2), keepdim=True)
    y = y - (light * y).sum((1, 2), keepdim=True)
    return (light * x**2).sum((1, 2)), (light * y**2).sum((1, 2)), (light * x * y).sum((1, 2))


def slant(images: Tensor) -> Tensor:
    """How far the light leans to the right a step up."""
    _, height, both = _moments(images)
    return -both / height.clamp_min(1e-6)


def width(images: Tensor) -> Tensor:
    """Standard deviation of the light's place from left to right, in sides."""
    return _moments(images)[0].clamp_min(1e-12).sqrt()


def height(images: Tensor) -> Tensor:
    """And from top to bottom."""
    return _moments(images)[1].clamp_min(1e-12).sqrt()


ATTRIBUTES = {"brightness": brightness, "slant": slant, "width": width, "height": height}
