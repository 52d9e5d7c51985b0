"""pytorch-CycleGAN-and-pix2pix."""

import torch

from fastgan.compat._common import gradient, mix, of_gradient
from fastgan.critic.reduction import Form


def cal_gradient_penalty(netD, real_data, fake_data, device, type="mixed", constant=1.0, lambda_gp=10.0):
    """(lambda_gp * mean (||grad + 1e-16|| - constant)^2, gradients (B, prod)), or (0.0, None) where lambda_gp <= 0.

    ``type``: at "real", "fake" or "mixed" samples, these with alpha (B, 1) drawn on ``device``. ``gradients`` have their graph.
    Raises NotImplementedError for another type. Unlike the original, real and fake are not marked as requiring gradients.
    Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
    """
    if lambda_gp <= 0.0:
        return 0.0, None
    if type == "real":
        inputs = real_data
    elif type == "fake":
        inputs = fake_data
    elif type == "mixed":
        alpha = torch.rand(real_data.shape[0], 1, device=device)
        inputs = mix(real_data, fake_data, alpha.view(-1, *(1,) * (real_data.dim() - 1)))
    else:
        raise NotImplementedError(f'cal_gradient_penalty: type is {type!r}, expected "real", "fake" or "mixed"')
    gradients = gradient(netD, inputs).reshape(real_data.shape[0], -1)
    return of_gradient(gradients + 1e-16, Form("gradient_penalty", lambda_gp, constant)), gradients
