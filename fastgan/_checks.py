"""Checks that several functions share: errors name the argument, what came, what is expected and the way out."""

import difflib
from collections.abc import Iterable

from torch import Tensor

from fastgan._dtypes import FLOATS


def near_or_known(name: str, names: Iterable[str]) -> str:
    """What may have been meant by ``name``, or where nothing is near it all ``names``: the end of a message."""
    near = difflib.get_close_matches(name, names, 3)
    return f"near: {', '.join(near)}" if near else f"known: {', '.join(names)}"


def check_tensor(function: str, name: str, value, shape: str) -> None:
    """Type, rank and floating dtype of one argument; ``shape`` is written like "(B, K, D)", or "(B, C, ...)" for 2 or more."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} is a {type(value).__name__}, expected a torch.Tensor of shape {shape}")
    rank, more = shape.count(",") + 1, shape.endswith("...)")
    if value.dim() < rank - 1 if more else value.dim() != rank:
        way_out = ""
        if shape == "(B, K, D)" and value.dim() == 2:
            way_out = ". A (B, K*D) projection becomes it with .view(B, K, D)"
        elif rank == 2:
            way_out = f", one point a row; images become it with {name}.flatten(1)"
        raise ValueError(
            f"{function}: {name} has {value.dim()} dimensions {tuple(value.shape)}, expected "
            f"{f'{rank - 1} or more' if more else rank}: {shape}{way_out}"
        )
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {name} has dtype {value.dtype}, expected a floating dtype; convert it with {name}.float()"
        )


def check_points(function: str, x, y) -> None:
    """Two samples of points, x (N, D) and y (M, D), of one dtype and device."""
    check_tensor(function, "x", x, "(N, D)")
    check_tensor(function, "y", y, "(M, D)")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{function}: x {tuple(x.shape)} and y {tuple(y.shape)} have points of different dimensions D")
    if x.dtype != y.dtype or x.device != y.device:
        raise TypeError(
            f"{function}: x is {x.dtype} on {x.device}, y {y.dtype} on {y.device}, expected the same of both; "
            f"convert one with y.to(x)"
        )
