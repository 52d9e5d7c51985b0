"""lucidrains/stylegan2-pytorch."""

from fastgan.penalties import penalty_from_output


def gradient_penalty(images, output, weight=10, center=0.0):
    """weight * mean (||grad|| - center)^2 of an output connected to ``images``. Returns a differentiable scalar."""
    return penalty_from_output(output, images, kind="wgan_gp", weight=weight, target=center)
