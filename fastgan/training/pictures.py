"""Samples as PNG files: grids of images, or a scatter of points."""

import os
from pathlib import Path

import torch
from torch import Tensor

MARGIN = 2  # pixels between images


def grid(images: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) in [-1, 1] to one (H', W', 3) in [0, 1], ``columns`` to a row."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    images = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    page = torch.ones(3, rows * (height + MARGIN) + MARGIN, columns * (width + MARGIN) + MARGIN)
    for i, image in enumerate(images):
        top, left = MARGIN + i // columns * (height + MARGIN), MARGIN + i % columns * (width + MARGIN)
        page[:, top : top + height, left : left + width] = image.expand(3, -1, -1) if channels == 1 else image[:3]
    return page.movedim(0, -1)


def save(path: Path, samples: Tensor, real: Tensor | None = None) -> None:
    """Points (N, 2) are drawn over ``real`` ones. Images (N, C, H, W) make a square grid; (N, rows, C, H, W) N columns."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if samples.dim() == 2:
        figure, axes = pyplot.subplots(figsize=(5, 5))
        if real is not None:
            axes.plot(*real.cpu().T[:2], ".", color="#d9dee2", markersize=3)
        axes.plot(*samples.detach().float().cpu().T[:2], ".", color="#0b7a75", markersize=2)
        axes.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
        figure.savefig(part, format="png", dpi=100)
        pyplot.close(figure)
    else:
        if samples.dim() == 5:
            columns, samples = len(samples), samples.transpose(0, 1).flatten(0, 1)
        else:
            columns = max(1, round(len(samples) ** 0.5))
        page = grid(samples, columns)
        scale = max(1, 512 // page.shape[1])
        page = page.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        pyplot.imsave(part, page.numpy(), format="png")
    os.replace(part, path)
