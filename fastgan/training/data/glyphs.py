"""Letters and digits, rendered with the fonts that matplotlib ships: 62 classes, offline."""

import math
import string
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .source import Source

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmss10", "cmtt10", "cmb10"),
]  # fmt: skip
VARIANTS = 4  # of each character in each font
CANVAS = 64  # pixels of a rendering


def load(name: str, size: int) -> Source:
    """4464 images (1, size, size), white on black, and labels: every character in 18 fonts, 4 times, a little turned,
    shifted and scaled; the same at each call."""
    sheet = _render()
    count = len(sheet)
    random = torch.Generator().manual_seed(0)

    def uniform(reach: float) -> Tensor:
        return (torch.rand(VARIANTS * count, generator=random) * 2 - 1) * reach

    angle, scale = uniform(math.radians(8)), 1 / (1 + uniform(0.1))
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([cosine, -sine, uniform(0.08), sine, cosine, uniform(0.08)], 1).view(-1, 2, 3)
    # shrunk variant by variant: all renderings together would take much more memory than the images
    images = [
        F.interpolate(
            F.grid_sample(sheet, F.affine_grid(part, list(sheet.shape), align_corners=False), align_corners=False),
            (size, size), mode="bilinear", antialias=True,
        )
        for part in maps.split(count)
    ]  # fmt: skip
    labels = torch.arange(len(CHARACTERS)).repeat(VARIANTS * len(FONTS))
    return Source(name, {"image": torch.cat(images).clamp_(0, 1) * 2 - 1, "label": labels}, tuple(CHARACTERS))


def _render() -> Tensor:
    """(fonts x characters, 1, CANVAS, CANVAS) in [0, 1], characters fastest, on one baseline."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder, sheet = Path(matplotlib.get_data_path()) / "fonts" / "ttf", []
    for name in FONTS:
        font = ImageFont.truetype(folder / f"{name}.ttf", round(0.72 * CANVAS))
        for character in CHARACTERS:
            image = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(image).text((CANVAS / 2, 0.76 * CANVAS), character, 255, font, anchor="ms")
            sheet.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, CANVAS, CANVAS))
    return torch.stack(sheet) / 255
