"""GAN_stability."""

from fastgan.compat._common import squared_norms


def compute_grad2(d_out, x_in):
    """||grad_i||^2 of each sample, (B,), of an output ``d_out`` connected to ``x_in``; differentiable.

    Mescheder, Geiger, Nowozin, "Which training methods for GANs do actually converge?", 2018.
    """
    return squared_norms(d_out, x_in)
