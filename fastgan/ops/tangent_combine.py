r"""The step of the critic's shared pass between two products with parameters: the specification.

Behind a (leaky) ReLU with activation ``a`` (B, ...), in one pass, from the tangent ``t`` of what went into it::

    passed    m t                 m = 1 where a > 0, else slope: the activation's tangent, which the next product carries on
    combined  factors_i a + m t   what the next product's weight gradient is taken of

``factors`` (B,), or () if all samples share one, is dLoss/dscore; slope = 1 leaves the tangent as it is. Arithmetic on 16 bits
is float32, but rounding ``combined`` to them may lose the smaller of its terms: the critic step adds two gradients instead.
The results are tangents of a gradient that is delivered as a finished number: they have no derivatives.
"""

import torch
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops._declare import declare


def forward_reference(t: Tensor, a: Tensor, factors: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    work = accumulate_dtype(t.dtype)
    wide, activation = t.to(work), a.to(work)
    passed = torch.where(activation > 0, wide, wide * slope)
    scaled = activation * (factors.view([-1] + [1] * (a.dim() - 1)) if factors.dim() else factors)
    return torch.empty_like(t).copy_(passed), torch.empty_like(t).copy_(scaled + passed)


forward = declare(
    "tangent_combine(Tensor t, Tensor a, Tensor factors, float slope) -> (Tensor, Tensor)",
    reference=forward_reference,
    fake=lambda t, a, factors, slope: (torch.empty_like(t), torch.empty_like(t)),
)
