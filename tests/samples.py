"""Inputs for every operator, shared by the test battery and the benchmarks.

``OPERATORS[name]`` holds for each operator of ``fastgan.ops`` how to make its inputs for a shape, and which shapes to try.
Adding an operator: add an entry, and the battery (test_ops.py) covers it on every backend.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    make: Callable[..., tuple]  # (*shape, dtype, generator) -> inputs
    shapes: tuple[tuple[int, ...], ...]  # for values: odd, empty, one, past every tile
    interpreted: tuple[tuple[int, ...], ...]  # the same for Triton's interpreter, which takes seconds for the larger ones
    small: tuple[tuple[int, ...], ...]  # for numeric derivatives
    large: tuple[int, ...]  # for thread and memory questions
    differentiable: bool = True  # in reverse mode
    forward_mode: bool = True


def normal(*shape: int, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(dtype)


def _spread(dims: int) -> float:
    """Scale at which L1 distances over ``dims`` coordinates are about 1, so that no exponential underflows."""
    return 1.0 / max(1, dims)


def _m(b, k, d, dtype, generator):
    return normal(b, k, d, dtype=dtype, generator=generator, scale=_spread(d))


def _g(b, k, d, dtype, generator):
    return normal(b, k, dtype=dtype, generator=generator)


def _v(b, k, d, dtype, generator):
    return normal(b, k, d, dtype=dtype, generator=generator)


_BKD = (
    (1, 1, 1),
    (2, 3, 4),
    (7, 5, 3),
    (33, 2, 5),
    (64, 50, 5),
    (65, 3, 16),
    (31, 1, 17),
    (130, 2, 8),
    (19, 3, 50),
    (300, 1, 1),
)
_INTERPRETED = ((1, 1, 1), (7, 5, 3), (33, 2, 5), (5, 1, 35), (66, 1, 2))
_EMPTY = ((0, 3, 4), (5, 0, 4), (5, 3, 0))
_SMALL = ((2, 2, 2), (5, 2, 3), (6, 1, 1))
_mbd = {"shapes": _BKD + _EMPTY, "interpreted": _INTERPRETED + _EMPTY, "small": _SMALL, "large": (257, 9, 16)}

OPERATORS: dict[str, Operator] = {
    "minibatch_discrimination": Operator(lambda *a: (_m(*a), False), **_mbd),
    "minibatch_discrimination_backward": Operator(lambda *a: (_g(*a), _m(*a)), **_mbd),
    "minibatch_discrimination_jvp": Operator(lambda *a: (_v(*a), _m(*a)), forward_mode=False, **_mbd),
    "minibatch_discrimination_double_backward": Operator(
        lambda *a: (_v(*a), _g(*a), _m(*a)), differentiable=False, forward_mode=False, **_mbd
    ),
}


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    return OPERATORS[name].make(*shape, dtype, torch.Generator().manual_seed(seed))


def map_tensors(function: Callable[[Tensor], Tensor], values: tuple) -> tuple:
    return tuple(function(value) if isinstance(value, Tensor) else value for value in values)


def permuted(x: Tensor) -> Tensor:
    """Same values, dimensions stored in reverse order."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def strided(x: Tensor) -> Tensor:
    """Same values, every second element of each row of a larger storage, at an offset."""
    room = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    view = room[..., 1::2]
    view.copy_(x)
    return view


def expanded(x: Tensor) -> Tensor:
    """All samples the first one, with stride 0."""
    return x[:1].expand_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "permuted": permuted,
    "strided": strided,
    "expanded": expanded,
}
