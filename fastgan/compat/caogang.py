"""caogang/wgan-gp, whose function most PyTorch WGAN-GP code descends from."""

from fastgan.compat._common import at, mix, per_sample_alpha
from fastgan.critic.reduction import Form


def calc_gradient_penalty(netD, real_data, fake_data, *, LAMBDA=10.0):
    """LAMBDA * mean (||grad|| - 1)^2 at alpha * real + (1 - alpha) * fake, alpha (B, 1) drawn on the CPU. Returns a scalar.

    The original has LAMBDA and the batch size as globals. Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
    """
    inputs = mix(real_data, fake_data, per_sample_alpha(real_data, 1))
    return at(netD, inputs, Form("gradient_penalty", LAMBDA))
