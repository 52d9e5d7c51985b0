"""pytorch_GAN_zoo: penalties that run backward themselves and return Python floats, and its minibatch standard deviation."""

from fastgan.compat._common import at, mix, per_sample_alpha
from fastgan.critic.reduction import Form
from fastgan.functional import minibatch_stddev


def _first_column(scores):
    return scores[:, 0]


def _finished(penalty, backward):
    if backward:
        penalty.backward()
    return penalty.item()


def WGANGPGradientPenalty(input, fake, discriminator, weight, backward=True):
    """weight * sum over samples of (||grad|| - 1)^2 of ``discriminator(x, False)[:, 0]``; alpha (B, 1) drawn on the CPU.

    A sum, where the paper has a mean. ``backward``: add its gradients to the parameters. Returns a float.
    Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
    """
    inputs = mix(input, fake, per_sample_alpha(input, 1))
    form = Form("gradient_penalty", float(weight) * input.shape[0])
    return _finished(at(discriminator, inputs, form, args=(False,), score_fn=_first_column), backward)


def logisticGradientPenalty(input, discrimator, weight, backward=True):
    """weight * mean ||grad||^2 of ``discrimator(x)[:, 0]`` at ``input``. Returns a float.

    ``backward``: add its gradients to the parameters. Mescheder et al., 2018.
    """
    form = Form("zero_centered", 2.0 * float(weight))
    return _finished(at(discrimator, input, form, score_fn=_first_column), backward)


def miniBatchStdDev(x, subGroupSize=4):
    """x (B, C, H, W) with one channel more: the unbiased standard deviation over runs of ``subGroupSize`` samples.

    Of the whole batch where they don't divide it; zeros for a single sample. Karras et al. 2017, section 3.
    """
    return minibatch_stddev(x, group_size=subGroupSize, layout="contiguous", unbiased=True, remainder="whole")
