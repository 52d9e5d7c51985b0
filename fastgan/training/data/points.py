"""Mixtures of 25 Gaussians in the plane, whose modes can be counted (as in Srivastava et al., "VEEGAN", 2017)."""

import math

import torch

from .source import Source

SPREAD = 0.05  # standard deviation of each mode; the means are within [-2, 2]
COUNT = 25 * 4000


def means(name: str) -> torch.Tensor:
    """(25, 2): where the modes of "ring" or "grid" are."""
    if name == "ring":
        angle = torch.arange(25) * (2 * math.pi / 25)
        return 2 * torch.stack([angle.cos(), angle.sin()], 1)
    line = torch.linspace(-2, 2, 5)
    return torch.cartesian_prod(line, line)


def load(name: str, size: int) -> Source:
    """100,000 points (2,), 4,000 of each mode, the same at each call; ``size`` does not matter."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.arange(25).repeat(COUNT // 25)
    points = means(name)[modes] + SPREAD * torch.randn(COUNT, 2, generator=generator)
    return Source(name, {"image": points, "label": modes}, tuple(map(str, range(25))))
