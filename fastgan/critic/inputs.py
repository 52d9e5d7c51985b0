"""Checking and preparing what the public functions are given."""

import math

import torch


def check_batch(name, batch):
    """Raise TypeError or ValueError unless this is a non-empty floating-point batch."""
    if not isinstance(batch, torch.Tensor) or not batch.is_floating_point():
        found = batch.dtype if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {found}")
    if batch.dim() < 1 or batch.numel() == 0:
        raise ValueError(f"{name} must be a non-empty batch, got shape {tuple(batch.shape)}")


def check_pair(real, fake):
    check_batch("real", real)
    check_batch("fake", fake)
    if real.shape != fake.shape:
        raise ValueError(f"real and fake need one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")


def scale_of(grad_scaler):
    """The current scale of a GradScaler, 1 without one or where it is disabled."""
    if grad_scaler is None or not grad_scaler.is_enabled():
        return 1.0
    return float(grad_scaler.get_scale())


def weights_for(scores, output_weights):
    """One float per score tensor. Raises ValueError for a wrong number of weights or a weight of 0."""
    if output_weights is None:
        return [1.0] * len(scores)
    weights = [float(w) for w in output_weights]
    if len(weights) != len(scores):
        raise ValueError(f"{len(weights)} output weights for {len(scores)} score tensors")
    if not all(w != 0 and math.isfinite(w) for w in weights):
        raise ValueError("output weights must be finite and not 0; leave the output out with score_fn instead")
    return weights


def interpolate(real, fake, *, alpha=None, generator=None, pac=1):
    """alpha * real + (1 - alpha) * fake, detached, with alpha uniform in [0, 1) per sample unless given.

    ``alpha``: a float or a tensor that broadcasts against ``real`` (B, ...); a tensor (B,) counts as per sample.
    ``pac``: rows which share one alpha. Raises ValueError for other shapes.
    """
    check_pair(real, fake)
    if real.dtype != fake.dtype:  # under autocast generators return 16 bits
        dtype = torch.promote_types(real.dtype, fake.dtype)
        real, fake = real.to(dtype), fake.to(dtype)
    b = real.shape[0]
    ones = (1,) * (real.dim() - 1)
    if alpha is None:
        if b % pac:
            raise ValueError(f"batch of {b} rows does not divide into packs of {pac}")
        alpha = torch.rand((b // pac, *ones), device=real.device, dtype=real.dtype, generator=generator)
        if pac > 1:
            alpha = alpha.repeat_interleave(pac, 0)
    elif isinstance(alpha, torch.Tensor):
        alpha = alpha.to(device=real.device, dtype=real.dtype)
        if alpha.dim() == 1 and alpha.shape[0] == b:
            alpha = alpha.view(b, *ones)
        if alpha.dim() > real.dim() or any(a not in (1, r) for a, r in zip(alpha.shape[::-1], real.shape[::-1], strict=False)):
            raise ValueError(f"alpha of shape {tuple(alpha.shape)} does not broadcast over {tuple(real.shape)}")
    return torch.lerp(fake.detach(), real.detach(), alpha)
