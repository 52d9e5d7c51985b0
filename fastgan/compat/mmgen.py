"""mmgeneration and mmagic: ``norm_mode`` says whose norm."""

from torch import rand

from fastgan.compat._common import at, is_strict, mix
from fastgan.critic.reduction import Form

_PER = {"pixel": "pixel", "HWC": "sample"}


def _chosen(norm_mode, strict_peer, function) -> str:
    if norm_mode is None:
        norm_mode = "pixel" if is_strict(strict_peer, function, 'norm_mode="pixel" unless told, a norm per pixel') else "HWC"
    if norm_mode not in _PER:
        raise NotImplementedError(f'{function}: norm_mode is {norm_mode!r}, expected "pixel" or "HWC"')
    return _PER[norm_mode]


def _masked(penalty, mask, weight):
    return (penalty if mask is None else penalty / mask.mean()) * weight


def gradient_penalty_loss(discriminator, real_data, fake_data, mask=None, norm_mode=None, *, weight=1.0, strict_peer=None):
    """mean (||grad|| - 1)^2 at alpha * real + (1 - alpha) * fake, alpha (B, 1, 1, 1) drawn on the CPU. Returns a scalar.

    ``norm_mode``: "HWC" for a norm per sample, the paper's, "pixel" for one per pixel. The original's default is "pixel",
    here only with ``strict_peer=True``. ``mask``: multiplies the gradient; the result is divided by its mean. ``weight``:
    multiplies the result.
    Raises NotImplementedError for another mode. Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
    """
    per = _chosen(norm_mode, strict_peer, "gradient_penalty_loss")
    alpha = rand(real_data.shape[0], *(1,) * (real_data.dim() - 1)).to(real_data)
    form = Form("gradient_penalty", 1.0, mask=mask)
    return _masked(at(discriminator, mix(real_data, fake_data, alpha), form, per=per), mask, weight)


def r1_gradient_penalty_loss(discriminator, real_data, mask=None, norm_mode=None, *, weight=1.0, strict_peer=None):
    """mean ||grad||^2 at the data, without the factor 1/2. Returns a scalar. Arguments as :func:`gradient_penalty_loss`.

    Mescheder et al., "Which training methods for GANs do actually converge?", 2018.
    """
    per = _chosen(norm_mode, strict_peer, "r1_gradient_penalty_loss")
    return _masked(at(discriminator, real_data, Form("zero_centered", 2.0, mask=mask), per=per), mask, weight)
