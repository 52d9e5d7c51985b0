"""scikit-learn's handwritten digits (Alpaydin, Kaynak, 1998): real, small, offline."""

import torch
from torch.nn import functional as F

from .source import Source


def load(name: str, size: int) -> Source:
    """1797 images (1, size, size), resized from 8x8, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None]
    if size != 8:
        images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False).clamp_(-1, 1)
    return Source(name, {"image": images, "label": torch.tensor(data.target)}, tuple("0123456789"))
