"""lucidrains/gigagan-pytorch: outputs of several scales."""

from fastgan.penalties import penalty_from_output


def gradient_penalty(images, outputs, grad_output_weights=None, weight=10, center=0.0, scaler=None, eps=1e-4):
    """weight * mean (||d sum_k w_k outputs_k / d images|| - center)^2. Returns a differentiable scalar.

    ``outputs``: one tensor or a list, connected to ``images``, which must require gradients. ``scaler``: a GradScaler; outputs
    are scaled and gradients unscaled by it. ``eps``: the lower limit of the scale, of no effect above it.
    """
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    weights = [1.0] * len(outputs) if grad_output_weights is None else [float(w) for w in grad_output_weights]
    outputs, weights = zip(*[(o, w) for o, w in zip(outputs, weights, strict=True) if w != 0], strict=True)
    return penalty_from_output(
        list(outputs), images, kind="wgan_gp", weight=weight, target=center, output_weights=weights, grad_scaler=scaler
    )
