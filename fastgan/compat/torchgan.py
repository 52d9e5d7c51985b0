"""torchgan, which takes one norm of the whole batch's gradient."""

from fastgan.compat._common import is_strict
from fastgan.penalties import penalty_from_output


def _penalty(interpolate, d_interpolate, k, strict_peer, function):
    strict = is_strict(strict_peer, function, "one norm of the whole batch's gradient")
    pac = interpolate.shape[0] if strict else 1
    return penalty_from_output(d_interpolate, interpolate, kind="wgan_gp", weight=1.0, target=k, pac=pac)


def wasserstein_gradient_penalty(interpolate, d_interpolate, reduction="mean", *, strict_peer=None):
    """mean (||grad|| - 1)^2 of ``d_interpolate`` connected to ``interpolate``. Returns a differentiable scalar.

    The original's norm is that of all samples together, which ``strict_peer=True`` reproduces; it is one number, which no
    ``reduction`` changes. The default warns once and takes one per sample.
    Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
    """
    return _penalty(interpolate, d_interpolate, 1.0, strict_peer, "wasserstein_gradient_penalty")


def dragan_gradient_penalty(interpolate, d_interpolate, k=1.0, reduction="mean", *, strict_peer=None):
    """mean (||grad|| - k)^2; as :func:`wasserstein_gradient_penalty`. Kodali et al., 2017."""
    return _penalty(interpolate, d_interpolate, k, strict_peer, "dragan_gradient_penalty")
