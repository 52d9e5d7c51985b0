"""Images of any size, number of channels and type to the square ones of one kind that networks are trained on."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from .source import Source

GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of one channel
KEPT = 1 << 28  # bytes: a source whose images take no more keeps them once they have been read


def fit(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) to (N, C, size, size), of the same dtype: the largest square in the middle, resized without aliasing."""
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images.contiguous()
    resized = []
    for part in images.split(1024):  # in float only some at a time
        part = F.interpolate(part.float(), (size, size), mode="bicubic", antialias=True)
        resized.append(part.clamp_(0, 255).round_().to(torch.uint8) if images.dtype == torch.uint8 else part.clamp_(-1, 1))
    return torch.cat(resized)


def tensor(image, size: int, channels: int) -> Tensor:
    """A Pillow image to (channels, size, size) uint8: turned as its EXIF data says, cropped to the square in the middle,
    resized; transparency over white. ValueError for floating point pixels, whose range nobody knows."""
    import numpy
    from PIL import Image, ImageOps

    image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded no larger than need be
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("pixels are floating point numbers: expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray((numpy.asarray(image).clip(0, 65535) / 257).round().astype("uint8"))
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return torch.tensor(numpy.asarray(image)).view(size, size, channels).movedim(-1, 0)


class Images(Source):
    """Images that are read when a batch needs them, and kept where all of them together are small.

    A subclass has ``names`` of the images and ``open(i)``, which gives a Pillow image or raises OSError or ValueError: such an
    image is named in a warning and the next one takes its place, or, under ``strict``, ValueError names it.
    """

    def __init__(self, name, size, channels, labels: list[int] | None, class_names=(), strict=False):
        self.name, self.shape, self.class_names, self.strict = name, (channels, size, size), tuple(class_names), strict
        self.labels = None if labels is None else torch.tensor(labels)
        self.kept, self.have = None, None
        self.failed: set[int] = set()

    def open(self, i: int):
        raise NotImplementedError

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        rows, pixels = list(rows), []
        for at, i in enumerate(rows):
            while (image := self._read(i)) is None:
                i = (i + 1) % len(self)
            rows[at] = i
            pixels.append(image)
        batch = {"image": torch.stack(pixels).float().div_(127.5).sub_(1)}
        return batch if self.labels is None else batch | {"label": self.labels[rows]}

    def _read(self, i: int) -> Tensor | None:
        if i in self.failed:
            return None
        channels, size, _ = self.shape
        if self.kept is None and len(self) * channels * size * size <= KEPT:
            self.kept = torch.empty(len(self), *self.shape, dtype=torch.uint8)
            self.have = torch.zeros(len(self), dtype=torch.bool)
        if self.kept is not None and self.have[i]:
            return self.kept[i]
        try:
            image = tensor(self.open(i), size, channels)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises the last for a broken PNG
            if self.strict:
                raise ValueError(f"{self.describe(i)} can't be read ({error}), and --strict is given") from None
            warnings.warn(f"{self.describe(i)} can't be read ({error}): the next image takes its place", stacklevel=2)
            self.failed.add(i)
            if len(self.failed) == len(self):
                raise ValueError(f"--data {self.name}: none of its {len(self)} images can be read") from None
            return None
        if self.kept is not None:
            self.kept[i], self.have[i] = image, True
        return image

    def describe(self, i: int) -> str:
        return f"image {i} of {self.name}"
