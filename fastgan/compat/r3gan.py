"""R3GAN."""

from fastgan.compat._common import squared_norms


def ZeroCenteredGradientPenalty(Samples, Critics):
    """||grad_i||^2 of each sample, (B,), of ``Critics`` connected to ``Samples``; differentiable.

    The trainer adds Gamma / 2 of it, at reals and at fakes. Huang et al., "The GAN is dead; long live the GAN!", 2024.
    """
    return squared_norms(Critics, Samples)
