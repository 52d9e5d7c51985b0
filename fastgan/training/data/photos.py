"""Photographs that come with Python packages, cut into patches; and photographs next to drawings of other ones.

scikit-learn ships two photographs in colour and scikit-image, where it is installed, five more. Nothing is downloaded.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .source import Domains, Part, Source

WINDOWS = (64, 96, 144, 216)  # sides in pixels of what becomes one patch, or as many times the size where that is larger
IN_SCIKIT_IMAGE = ("motorcycle_left.png", "chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg")
DULL = 0.04  # patches with a smaller standard deviation, in [0, 1], are left out: blank sky, mostly


def load(name: str, size: int) -> Source:
    """ "photos": "image" (3, size, size). "drawings" and "flat": two domains, "image" and "other", without pairs."""
    photos = read()
    if name == "photos":
        return Patches(name, photos, size)
    return Domains(name, Patches(name, photos[::2], size), Patches(name, photos[1::2], size, STYLES[name]))


def read() -> list[Tensor]:
    """The photographs, (3, H, W) in [0, 1]; shorter sides from 300 to 512 pixels. Two where scikit-image is missing."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(image) for image in load_sample_images().images]
    if found := importlib.util.find_spec("skimage"):
        folder = Path(found.origin).parent / "data"
        for path in (folder / name for name in IN_SCIKIT_IMAGE):
            if path.exists():
                with Image.open(path) as image:
                    # a copy: numpy's view of the file's bytes is not ours to keep
                    photos.append(torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8))
                    photos[-1] = photos[-1].view(image.height, image.width, 3)
    return [photo.movedim(-1, 0) / 255 for photo in photos]


class Patches(Source):
    """Images (3, size, size): each photograph at several scales, on a grid whose patches overlap by half.

    ``style`` is applied to a photograph at its scale, before it is cut, so that lines are equally wide in all patches.
    ``places`` (N, 5): of each patch the photograph, and where it begins and ends from top to bottom and from left to right, in
    sides of the photograph.
    """

    def __init__(self, name: str, photos: list[Tensor], size: int, style: Callable[[Tensor], Tensor] | None = None):
        cut, places = [], []
        for i, photo in enumerate(photos):
            for window in (w * max(1.0, size / WINDOWS[0]) for w in WINDOWS):
                height, width = (int(side * size / window) for side in photo.shape[1:])
                if min(height, width) < size:
                    break
                scaled = F.interpolate(photo[None], (height, width), mode="bicubic", antialias=True).clamp_(0, 1)
                plain = _cut(scaled, size)
                lively = plain.flatten(2).std(2).amax(1) > DULL  # in some channel
                cut.append((plain if style is None else _cut(style(scaled), size))[lively])
                places.append(_places(i, height, width, size)[lively])
        if not cut:
            raise ValueError(f"--size {size}: the photographs' shorter sides have 300 to 512 pixels; expected a smaller size")
        super().__init__(name, {"image": torch.cat(cut) * 2 - 1})
        self.places = torch.cat(places)

    def split(self, share: float) -> tuple[Source, Source]:
        """Of every photograph the patches in one corner are held out, and those that reach into it are in neither part."""
        photo, top, bottom, left, right = self.places.T
        lower, later = photo % 4 >= 2, photo % 2 == 1  # each photograph's corner is another's than the one before
        near = torch.maximum(torch.where(lower, 1 - bottom, top), torch.where(later, 1 - right, left))
        far = torch.maximum(torch.where(lower, 1 - top, bottom), torch.where(later, 1 - left, right))
        held, trained = torch.zeros(2, len(self), dtype=torch.bool)
        for i in photo.unique():
            here = photo == i
            corner = far[here].sort().values[: max(1, round(share * int(here.sum())))].max()
            held |= here & (far <= corner)
            trained |= here & (near >= corner)
        return tuple(Part(self, rows.nonzero().flatten().tolist()) for rows in (trained, held))


def _cut(photo: Tensor, size: int) -> Tensor:
    """(1, 3, H, W) to (N, 3, size, size)."""
    stride = max(1, size // 2)
    return photo[0].unfold(1, size, stride).unfold(2, size, stride).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _places(i: int, height: int, width: int, size: int) -> Tensor:
    """(N, 5), of what ``_cut`` cuts."""
    top, left = (torch.arange(0, side - size + 1, max(1, size // 2), dtype=torch.float64) for side in (height, width))
    top, left = (grid.flatten() for grid in torch.meshgrid(top, left, indexing="ij"))
    place = (top / height, (top + size) / height, left / width, (left + size) / width)
    return torch.stack([torch.full_like(top, i), *place], 1)


# --- what makes a drawing of a photograph (1, 3, H, W) in [0, 1] ------------------------------------------------------


def _blur(x: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.mT, groups=x.shape[1])


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def pencil(x: Tensor) -> Tensor:
    """Dark strokes on white: what is darker than its surroundings, by a blur divided out ("colour dodge")."""
    grey = _grey(x)
    return (grey / _blur(grey, 2.0).clamp(min=0.02)).clamp(0, 1).pow(3).expand(-1, 3, -1, -1)


def flatten(x: Tensor) -> Tensor:
    """Patches of few, saturated colours with dark outlines, as in animated films.

    Smoothed by the mean of the quietest of four quadrants around each pixel (Kuwahara et al., 1976), three times.
    """
    for _ in range(3):
        padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
        mean = F.avg_pool2d(padded, 3, 1)  # of the quadrant whose upper left corner is there
        spread = (F.avg_pool2d(padded.square(), 3, 1) - mean.square()).sum(1, keepdim=True)
        height, width = x.shape[2:]
        corners = [(slice(a, a + height), slice(b, b + width)) for a in (0, 2) for b in (0, 2)]
        quietest = torch.stack([spread[:, :, a, b] for a, b in corners]).argmin(0, keepdim=True)
        x = torch.stack([mean[:, :, a, b] for a, b in corners]).gather(0, quietest.expand(-1, -1, 3, -1, -1))[0]
    grey = _grey(x)
    lines = ((_blur(grey, 1.2) - _blur(grey, 0.6)) * 12).clamp(0, 1)  # where it is darker than around
    return ((grey * 5).round() / 5 + 1.4 * (x - grey)).clamp(0, 1) * (1 - lines)


STYLES = {"drawings": pencil, "flat": flatten}
