"""The functions of fastgan: argument checks and documentation over the operators of ``fastgan.ops``."""

import torch
from torch import Tensor

from fastgan.distributed import gather_batch, rows_of_this_rank
from fastgan.ops import minibatch_discrimination as _minibatch_discrimination

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_tensor(function: str, name: str, value, shape: str) -> None:
    """Type, rank (``shape`` is written like "(B, K, D)") and floating dtype of one argument."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} is a {type(value).__name__}, expected a torch.Tensor of shape {shape}")
    rank = shape.count(",") + 1
    if value.dim() != rank:
        raise ValueError(
            f"{function}: {name} has {value.dim()} dimensions {tuple(value.shape)}, expected {rank}: {shape}"
            + (". A (B, K*D) projection becomes it with .view(B, K, D)" if shape == "(B, K, D)" and value.dim() == 2 else "")
        )
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {name} has dtype {value.dtype}, expected a floating dtype; convert it with {name}.float()"
        )


def minibatch_discrimination(m: Tensor, *, self_term: bool = True, group=None) -> Tensor:
    r"""Closeness of every sample to the rest of its minibatch, :math:`\sum_j \exp(-\lVert m_{ik} - m_{jk} \rVert_1)`.

    Args:
        m: (B, K, D) features of B samples for K kernels of dimension D; float16, bfloat16, float32 or float64, any strides.
            Half precision is accumulated in float32.
        self_term: count j = i, which adds 1, as the paper does. Without it the sum runs over the other samples only
            (what torchgan gets by subtracting 1 and improved-gan by masking), exactly, however small it is.
        group: a ``torch.distributed`` process group, or ``"world"``. The minibatch is then that of all its ranks: m is gathered
            (with gradients) and each rank gets the rows of its own samples. Ranks may hold different B.

    Returns:
        (B, K), dtype and device of ``m``. B = 0 gives (0, K). Differentiable twice, in forward mode, under
        ``torch.func`` and ``torch.compile(fullgraph=True)``. Memory is O(B K D), never O(B^2).

    Raises:
        TypeError: ``m`` is not a floating tensor.
        ValueError: ``m`` is not 3-dimensional.
        RuntimeError: with ``group``: ``torch.distributed`` is not initialised, or ranks disagree on K or D.

    Non-finite rows: Inf is infinitely far from finite rows and adds 0 to them; NaN spreads to every sample of its kernel.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 3.2.
    """
    _check_tensor("minibatch_discrimination", "m", m, "(B, K, D)")
    if group is None:
        return _minibatch_discrimination.forward(m, self_term)
    everyone, counts = gather_batch(m, group, "minibatch_discrimination: m")
    return rows_of_this_rank(_minibatch_discrimination.forward(everyone, self_term), counts, group)
