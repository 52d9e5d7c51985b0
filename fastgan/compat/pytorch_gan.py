"""eriklindernoren/PyTorch-GAN: wgan_gp.py and dragan.py, which have one name for two functions."""

import torch

from fastgan.compat._common import at, is_strict, mix
from fastgan.critic.reduction import Form


def _numpys_uniform(shape, like):
    try:
        import numpy
    except ImportError as missing:
        raise ImportError(
            "compute_gradient_penalty draws alpha from NumPy's generator, as the original does: pip install numpy, or use "
            "fastgan.gradient_penalty, which draws from PyTorch's"
        ) from missing
    return torch.from_numpy(numpy.random.random(shape)).float().to(like.device)


def compute_gradient_penalty(D, real_samples, fake_samples=None, *, lambda_gp=10.0, strict_peer=None):
    """With fakes that of wgan_gp.py: mean (||grad|| - 1)^2, alpha (B, 1, 1, 1) drawn by NumPy, no weight.

    Without, that of dragan.py, ``compute_gradient_penalty(D, X)``: ``lambda_gp`` times it, between X and X + std(X) / 2 * U,
    alpha per element drawn by NumPy, then U by PyTorch on the CPU. The original takes the norm of each pixel there, which
    ``strict_peer=True`` reproduces; the default warns once and takes that of each sample.
    Returns a scalar. Gulrajani et al., 2017; Kodali et al., "On convergence and stability of GANs", 2017.
    """
    if fake_samples is not None:
        alpha = _numpys_uniform((real_samples.shape[0], *(1,) * (real_samples.dim() - 1)), real_samples)
        return at(D, mix(real_samples, fake_samples, alpha), Form("gradient_penalty", 1.0))
    strict = is_strict(strict_peer, "compute_gradient_penalty(D, X)", "the norm over channels at each pixel")
    X = real_samples.detach()
    alpha = _numpys_uniform(tuple(X.shape), X)
    inputs = mix(X, X + 0.5 * X.std() * torch.rand(X.shape).to(X.device), alpha)
    return at(D, inputs, Form("gradient_penalty", lambda_gp), per="pixel" if strict else "sample")
