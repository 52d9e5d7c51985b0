"""What both forms of spectral normalisation, the parametrization and the hook, have in common."""

import torch
from torch import Tensor, nn

from fastgan._dtypes import FLOATS
from fastgan.ops import spectral_norm as _ops


def matrix_dim(module: nn.Module, dim: int | None) -> int:
    """torch's rule: rows are output channels, which transposed convolutions keep in dimension 1."""
    if dim is not None:
        return dim
    return int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))


def check_options(n_power_iterations, eps, target=1.0) -> None:
    if isinstance(n_power_iterations, bool) or not isinstance(n_power_iterations, int) or n_power_iterations < 0:
        raise ValueError(
            f"spectral_norm: n_power_iterations is {n_power_iterations!r}, expected a whole number, 1 or more; "
            f"0 keeps u and v as they are"
        )
    if not eps >= 0:
        raise ValueError(f"spectral_norm: eps is {eps!r}, expected a small number, not negative, such as 1e-12")
    if not 0 < target < float("inf"):
        raise ValueError(f"spectral_norm: target is {target!r}, expected a positive number: the norm to normalise to")


def check_num_svs(num_svs, rows: int, columns: int) -> None:
    most = max(1, min(rows, columns))
    if isinstance(num_svs, bool) or not isinstance(num_svs, int) or not 1 <= num_svs <= most:
        raise ValueError(
            f"spectral_norm: num_svs is {num_svs!r}, expected a whole number from 1 to {most} for a matrix of "
            f"{rows} x {columns}"
        )


def check_weight(module: nn.Module, name: str, weight) -> None:
    """That there is a weight that can be normalised."""
    if weight is None:
        raise ValueError(
            f"spectral_norm: the parameter {name!r} of {type(module).__name__} is None; "
            f"leave this module out, or give another name"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"spectral_norm: the parameter {name!r} of {type(module).__name__} is uninitialized; "
            f"run one forward pass to give it a shape, then apply spectral_norm"
        )
    if weight.dtype not in FLOATS:
        raise TypeError(
            f"spectral_norm: the parameter {name!r} of {type(module).__name__} has dtype {weight.dtype}, "
            f"expected one of {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}"
        )


class Groupable:
    """A form of normalisation that a :class:`fastgan.SpectralNormGroup` may have done the work for."""

    _group = None
    target, at_most = 1.0, False

    def take(self) -> Tensor | None:
        """What the group has for one read of the weight; None where there is nothing."""
        return None if self._group is None else self._group.take(self)

    def iterations(self, training: bool) -> int:
        return self.n_power_iterations if training and not (self._group is not None and self._group.frozen) else 0


def normalise(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dim: int,
    n_power_iterations: int,
    eps: float,
    v_first: bool,
    target=1.0,
    at_most=False,
) -> Tensor:
    """The normalised weight; u and v, which are buffers in the weight's dtype, are advanced in place."""
    rows = u.numel()
    if rows != weight.shape[dim] or rows * v.numel() != weight.numel():
        raise RuntimeError(
            f"spectral_norm: u {tuple(u.shape)} and v {tuple(v.shape)} don't fit a weight {tuple(weight.shape)}, dim {dim}: "
            f"the weight was replaced by one of another shape: remove spectral_norm before that and apply it again after"
        )
    given = u, v
    if weight.dtype in (torch.float16, torch.bfloat16):
        u, v = u.float(), v.float()
    normalised, *new, _ = _ops.normalise_one(weight, u, v, dim, n_power_iterations, eps, v_first, target, at_most)
    if n_power_iterations:
        torch._foreach_copy_(given, new)
    return normalised
