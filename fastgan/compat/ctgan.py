"""CTGAN: the penalty of a packed critic."""

import torch

from fastgan.compat._common import at, mix
from fastgan.critic.reduction import Form


def calc_gradient_penalty(discriminator, real_data, fake_data, device="cpu", pac=10, lambda_=10):
    """lambda_ * mean over packs of ``pac`` rows of (||grad|| - 1)^2; alpha (B / pac, 1, 1) drawn on ``device``, one per pack.

    In CTGAN a method: ``Discriminator.calc_gradient_penalty = fastgan.compat.ctgan.calc_gradient_penalty`` makes it one.
    Returns a scalar. Xu et al., "Modeling tabular data using conditional GAN", 2019; Lin et al., "PacGAN", 2018.
    """
    alpha = torch.rand(real_data.size(0) // pac, 1, 1, device=device)
    alpha = alpha.repeat(1, pac, 1).view(-1, 1)
    return at(discriminator, mix(real_data, fake_data, alpha), Form("gradient_penalty", float(lambda_), pac=pac))
