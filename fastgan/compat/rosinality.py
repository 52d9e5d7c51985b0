"""rosinality/stylegan2-pytorch."""

from fastgan.penalties import penalty_from_output


def d_r1_loss(real_pred, real_img):
    """mean ||grad||^2 of ``real_pred`` connected to ``real_img``, without the factor 1/2. Returns a differentiable scalar.

    Mescheder et al., "Which training methods for GANs do actually converge?", 2018.
    """
    return penalty_from_output(real_pred, real_img, kind="r1", weight=2.0)
