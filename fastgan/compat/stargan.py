"""StarGAN v2."""

from fastgan.penalties import penalty_from_output


def r1_reg(d_out, x_in):
    """mean ||grad||^2 / 2 of ``d_out`` connected to ``x_in``. Returns a differentiable scalar.

    Mescheder et al., "Which training methods for GANs do actually converge?", 2018.
    """
    return penalty_from_output(d_out, x_in, kind="r1", weight=1.0)
