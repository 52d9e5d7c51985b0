"""PyTorch-StudioGAN, whose discriminators take (images, labels, eval) and return a dict with "adv_output"."""

import torch

from fastgan.compat._common import at, mix, per_sample_alpha
from fastgan.critic.reduction import Form
from fastgan.penalties import penalty_from_output


def _adv_output(output):
    return output["adv_output"]


def _at(discriminator, inputs, labels, form):
    return at(discriminator, inputs, form, args=(labels, False), score_fn=_adv_output)


def _mixed(real_images, fake_images, device):
    alpha = per_sample_alpha(real_images, 1, to=device)
    return mix(real_images.to(device), fake_images, alpha)


def cal_deriv(inputs, outputs, device):
    """d sum(outputs) / d inputs, with its graph."""
    ones = torch.ones(outputs.size()).to(device)
    return torch.autograd.grad(outputs, inputs, ones, create_graph=True, retain_graph=True)[0]


def cal_grad_penalty(real_images, real_labels, fake_images, discriminator, device):
    """mean (||grad|| - 1)^2 at alpha * real + (1 - alpha) * fake, alpha (B, 1) drawn on the CPU. Returns a scalar.

    Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
    """
    return _at(discriminator, _mixed(real_images, fake_images, device), real_labels, Form("gradient_penalty", 1.0))


def cal_dra_penalty(real_images, real_labels, discriminator, device):
    """mean (||grad|| - 1)^2 at real + alpha * std(real) / 2 * U; alpha (B, 1, 1, 1), then U, drawn on the CPU.

    Returns a scalar. Kodali et al., "On convergence and stability of GANs", 2017.
    """
    alpha = per_sample_alpha(real_images, *(1,) * (real_images.dim() - 1), to=device)
    real_images = real_images.detach().to(device)
    differences = 0.5 * real_images.std() * torch.rand(real_images.size()).to(device)
    return _at(discriminator, real_images + alpha * differences, real_labels, Form("gradient_penalty", 1.0))


def cal_maxgrad_penalty(real_images, real_labels, fake_images, discriminator, device):
    """max ||grad||^2 at alpha * real + (1 - alpha) * fake, alpha (B, 1) drawn on the CPU. Returns a scalar.

    Zhou et al., "Lipschitz generative adversarial nets", 2019.
    """
    return _at(discriminator, _mixed(real_images, fake_images, device), real_labels, Form("max", 1.0))


def cal_r1_reg(adv_output, images, device):
    """mean ||grad||^2 / 2 of ``adv_output`` connected to ``images``. Returns a differentiable scalar.

    Mescheder et al., "Which training methods for GANs do actually converge?", 2018.
    """
    return penalty_from_output(adv_output, images, kind="r1", weight=1.0)


def stylegan_cal_r1_reg(adv_output, images):
    """:func:`cal_r1_reg` without a device."""
    return penalty_from_output(adv_output, images, kind="r1", weight=1.0)
