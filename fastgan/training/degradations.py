"""Ways to spoil images (B, C, H, W) in [-1, 1], by torch's random state: what restoration learns to undo."""

import torch
from torch import Tensor
from torch.nn import functional


def inpaint(images: Tensor) -> Tensor:
    """A square hole of a third of the side somewhere in each, mid-grey."""
    height, width = images.shape[2:]
    side = max(1, min(height, width) // 3)
    return torch.where(_squares(images, side), torch.zeros_like(images), images)


def denoise(images: Tensor, deviation: float = 0.4) -> Tensor:
    """Gaussian noise of this standard deviation added; not cut off at -1 and 1."""
    return images + deviation * torch.randn_like(images)


def watermark(images: Tensor, opacity: float = 0.6) -> Tensor:
    """Diagonal bright stripes of a random period, phase and direction laid over each: what stock photographs bear."""
    count, _, height, width = images.shape
    row = torch.arange(height, device=images.device)[:, None]
    column = torch.arange(width, device=images.device)
    random = torch.rand(3, count, 1, 1, 1, device=images.device)
    period, phase, direction = height / 4 * (1 + random[0]), random[1], (random[2] > 0.5) * 2.0 - 1
    stripes = ((row + direction * column) / period + phase) % 1 < 0.25
    return torch.where(stripes, (1 - opacity) * images + opacity, images)


def edges(images: Tensor) -> Tensor:
    """A sketch: how much brightness changes (Sobel's operator, any direction) as dark lines on white; all channels alike."""
    grey = functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=images.device, dtype=images.dtype) / 4
    change = functional.conv2d(grey, torch.stack([kernel, kernel.T])[:, None]).square().sum(1, keepdim=True)
    return (1 - 2 * (change + 1e-12).sqrt()).clamp(-1, 1).expand_as(images).contiguous()


def scratch(images: Tensor) -> Tensor:
    """A defect for anomaly detection: a square of a quarter of the side in each, inverted."""
    side = max(1, min(images.shape[2:]) // 4)
    return torch.where(_squares(images, side), -images, images)


def _squares(images: Tensor, side: int) -> Tensor:
    """(B, 1, H, W): True in a square of this side at a random place of each image."""
    count, _, height, width = images.shape
    corner = torch.rand(2, count, 1, 1, 1, device=images.device)
    row = torch.arange(height, device=images.device)[:, None] - (corner[0] * (height - side + 1)).floor()
    column = torch.arange(width, device=images.device) - (corner[1] * (width - side + 1)).floor()
    return (row >= 0) & (row < side) & (column >= 0) & (column < side)
