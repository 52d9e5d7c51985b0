"""Inputs for every operator, shared by the test battery and the benchmarks.

``OPERATORS[name]`` holds for each operator of ``fastgan.ops`` how to make its inputs for a shape, and which shapes to try.
Adding an operator: add an entry, and the battery (test_ops.py) covers it on every backend.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Operator:
    make: Callable[..., tuple]  # (*shape, dtype, generator) -> inputs
    shapes: tuple[tuple[int, ...], ...]  # for values: odd, empty, one, past every tile
    interpreted: tuple[tuple[int, ...], ...]  # the same for Triton's interpreter, which takes seconds for the larger ones
    small: tuple[tuple[int, ...], ...]  # for numeric derivatives
    large: tuple[int, ...]  # for thread and memory questions
    differentiable: bool = True  # in reverse mode
    forward_mode: bool = True
    constants: tuple[int, ...] = ()  # positions of inputs that the derivatives take as constant
    bad: tuple[int, tuple[int, ...]] = (-1, (4, 1, 2))  # the input that gets a non-finite element, and where in it
    bad_shape: tuple[int, ...] = (9, 2, 3)


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
    "minibatch_discrimination": Operator(lambda *a: (_m(*a), False), bad=(0, (4, 1, 2)), **_mbd),
    "minibatch_discrimination_backward": Operator(lambda *a: (_g(*a), _m(*a)), **_mbd),
    "minibatch_discrimination_jvp": Operator(lambda *a: (_v(*a), _m(*a)), forward_mode=False, **_mbd),
    "minibatch_discrimination_double_backward": Operator(
        lambda *a: (_v(*a), _g(*a), _m(*a)), differentiable=False, forward_mode=False, **_mbd
    ),
}


# Spectral norm: shapes are those of the weight, then dim, the number of power iterations, and 1 for v first.
def _sn(*shape, target=1.5, at_most=False):
    *shape, dim, iterations, v_first, dtype, generator = shape
    work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    weight = normal(*shape, dtype=dtype, generator=generator, scale=0.3)
    rows = shape[dim]
    columns = math.prod(shape[:dim] + shape[dim + 1 :])
    u, v = (normal(n, dtype=work, generator=generator) for n in (rows, columns))
    return weight, u / u.norm(), v / v.norm(), dim, iterations, 1e-12, bool(v_first), target, at_most


def _sn_backward(*shape):
    weight, u, v, dim, *_, target, at_most = _sn(*shape)
    sigma = u.new_tensor(1.7)
    return normal(*weight.shape, dtype=weight.dtype, generator=shape[-1]), weight, u, v, sigma, dim, target, at_most


def _sn_multi(*shape):
    *shape, dim, iterations, v_first, dtype, generator = shape
    transposed = tuple(reversed(shape))
    several = [(shape, dim), (transposed, len(shape) - 1), (shape, 0)]
    made = [_sn(*one, d, iterations, v_first, dtype, generator, at_most=True, target=0.9) for one, d in several]
    weights, u, v, dims, *_ = (list(column) for column in zip(*made, strict=True))
    return weights, u, v, dims, *made[0][4:]


def _sn_multi_backward(*shape):
    weights, u, v, dims, *_, target, at_most = _sn_multi(*shape)
    grads = [normal(*w.shape, dtype=w.dtype, generator=shape[-1]) for w in weights]
    return grads, weights, u, v, u[0].new_tensor([1.7, 0.8, 2.5]), dims, target, at_most


_SN = (
    (1, 1, 0, 1, 0),
    (3, 5, 0, 1, 1),
    (1, 300, 0, 2, 0),
    (19, 7, 3, 3, 0, 1, 0),
    (19, 7, 3, 3, 1, 1, 1),
    (24, 17, 4, 4, 1, 3, 0),
    (70, 33, 0, 0, 0),
    (64, 576, 0, 1, 0),
    (65, 577, 0, 1, 1),
    (257, 1, 0, 1, 1),
    (130, 65, 1, 2, 1),
    (130, 65, 1, 1, 0),
    (0, 3, 0, 1, 0),
    (3, 0, 0, 1, 1),
)
_SN_INTERPRETED = ((1, 1, 0, 1, 0), (3, 5, 0, 1, 1), (19, 7, 3, 3, 0, 1, 0), (65, 33, 0, 2, 1), (0, 3, 0, 1, 0))
_SN_SMALL = ((1, 1, 0, 0, 0), (4, 3, 0, 0, 0), (3, 4, 2, 1, 0, 1))
_sn_common = {
    "shapes": _SN,
    "interpreted": _SN_INTERPRETED,
    "small": _SN_SMALL,
    "large": (301, 67, 3, 3, 0, 2, 0),
    "bad_shape": (9, 6, 0, 1, 0),
}

OPERATORS |= {
    "spectral_norm": Operator(_sn, constants=(1, 2), bad=(0, (4, 2)), **_sn_common),
    "spectral_norm_sigma": Operator(lambda *a: _sn(*a)[:-2], constants=(1, 2), bad=(0, (4, 2)), **_sn_common),
    "spectral_norm_backward": Operator(_sn_backward, constants=(2, 3), bad=(1, (4, 2)), **_sn_common),
    "spectral_norm_multi": Operator(_sn_multi, constants=(1, 2), bad=(0, (4, 2)), **_sn_common),
    "spectral_norm_multi_backward": Operator(
        _sn_multi_backward, forward_mode=False, constants=(2, 3), bad=(0, (4, 2)), **_sn_common
    ),
}


# Penalties: shapes are those of the gradients, then the kind.
_FORMS = (
    ("gradient_penalty", 10.0, 1.0, False, 2.0),
    ("gradient_penalty", 3.0, 1.5, True, 2.0),
    ("zero_centered", 1.5, 1.0, False, 2.0),
    ("power", 2.0, 1.0, False, 6.0),
    ("max", 0.7, 1.0, False, 2.0),
)


def _gp(*shape):
    *shape, kind, dtype, generator = shape
    length = max(1, math.prod(shape[1:]))
    grads = normal(*shape, dtype=dtype, generator=generator, scale=2 / math.sqrt(length))  # norms about 2
    return grads, *_FORMS[kind]


def _gp_backward(*shape):
    (grads, *_), dtype = _gp(*shape), shape[-2]
    work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return grads, normal(shape[0], dtype=work, generator=shape[-1])


_gp_common = {
    "shapes": (
        *((9, 5, 3, 7, kind) for kind in range(5)),
        (1, 1, 0),
        (6, 0),
        (3, 17000, 2),
        (2, 3, 65, 129, 1),
        (301, 33, 1),
        (1, 40001, 4),
        (0, 3, 4),
        (5, 0, 2),
    ),
    "interpreted": ((1, 1, 0), (7, 33, 1), (5, 3, 4, 7, 3), (6, 2), (3, 1500, 4), (0, 3, 0), (5, 0, 2)),
    "small": ((3, 2, 0), (4, 2, 2, 3), (3, 2, 1), (3, 3, 2), (3, 2, 4)),
    "large": (33, 3, 64, 65, 0),
    "bad": (0, (4, 2)),
    "bad_shape": (9, 6, 0),
}

OPERATORS |= {
    "gradient_penalty": Operator(_gp, **_gp_common),
    "gradient_penalty_backward": Operator(_gp_backward, **_gp_common),
}


# Tangents: the last of the shape says whether every sample has a factor of its own.
def _tangents(*shape):
    *shape, own, dtype, generator = shape
    work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    t, a = (normal(*shape, dtype=dtype, generator=generator) for _ in range(2))
    return t, a, normal(*shape[:own], dtype=work, generator=generator), 0.2


OPERATORS |= {
    "tangent_combine": Operator(
        _tangents,
        shapes=((1, 1, 0), (7, 1), (9, 5, 3, 7, 1), (9, 5, 3, 7, 0), (3, 17001, 1), (301, 33, 0), (0, 3, 1), (5, 0, 0)),
        interpreted=((1, 1, 0), (7, 33, 1), (5, 3, 4, 7, 1), (6, 0), (3, 1500, 1), (0, 3, 0), (5, 0, 1)),
        small=((3, 2, 1), (3, 2, 0)),
        large=(33, 3, 64, 65, 1),
        differentiable=False,
        forward_mode=False,
        bad=(0, (4, 2)),
        bad_shape=(9, 6, 1),
    ),
}


# Minibatch standard deviation: shapes are those of x, then the number of groups, that of channels, and 1 for GAN_zoo's form.
def _stddev_form(shape):
    *shape, groups, channels, zoo, dtype, generator = shape
    # eps not small: where by chance a group's samples nearly agree, second derivatives are a few huge numbers and their errors
    return shape, (groups, not zoo, channels, bool(zoo), 0.1), {"dtype": dtype, "generator": generator}


def _stddev(extra):
    """Inputs: ``extra`` of "t" (like x) and "g" (like the output), then x."""

    def make(*shape):
        (b, c, *rest), form, how = _stddev_form(shape)
        extras = (normal(b, c + (form[2] if kind == "g" else 0), *rest, **how) for kind in extra)
        return *extras, normal(b, c, *rest, **how), *form

    return make


_stddev_common = {
    "shapes": (
        (1, 1, 1, 1, 0),
        (4, 3, 1, 1, 0),
        (8, 6, 5, 3, 2, 2, 0),
        (7, 4, 9, 2, 1, 1),
        (9, 4, 3, 5, 2, 4, 1),
        (6, 5, 2, 3, 2, 1, 1, 0),
        (37, 6, 1, 3, 1),
        (4, 64, 17, 9, 1, 2, 0),
        (70, 2, 33, 1, 1, 0),
        (0, 4, 3, 1, 1, 0),
        (3, 4, 0, 1, 2, 0),
    ),
    "interpreted": (
        (1, 1, 1, 1, 0),
        (7, 4, 9, 2, 1, 1),
        (8, 6, 5, 3, 2, 2, 0),
        (3, 300, 1, 1, 0),
        (0, 4, 3, 1, 1, 0),
        (3, 4, 0, 1, 2, 0),
    ),
    "small": ((4, 2, 1, 1, 0), (5, 4, 2, 2, 2, 0), (4, 2, 2, 1, 1, 1)),
    "large": (10, 6, 65, 33, 3, 2, 0),
    "bad_shape": (9, 6, 2, 2, 3, 0),
}

OPERATORS |= {
    "minibatch_stddev": Operator(_stddev(""), bad=(0, (4, 1, 1)), **_stddev_common),
    "minibatch_stddev_backward": Operator(_stddev("g"), bad=(1, (4, 1, 1)), **_stddev_common),
    "minibatch_stddev_jvp": Operator(_stddev("t"), forward_mode=False, bad=(1, (4, 1, 1)), **_stddev_common),
    "minibatch_stddev_double_backward": Operator(
        _stddev("tg"), differentiable=False, forward_mode=False, bad=(2, (4, 1, 1)), **_stddev_common
    ),
}


# Kernel sums: shapes are N, M, D, then which of the forms, then 1 to leave the diagonal out.
_KERNEL_SUMS = (
    ("laplacian", (0.7, 2.0), 2.0, 0.0),
    ("gaussian", (0.7, 2.0, 5.0), 2.0, 0.0),
    ("rational_quadratic", (0.8, 1.5), 0.7, 0.0),
    ("rational_quadratic", (1.2,), 1.0, 0.0),
    ("energy", (1.0,), 1.0, 0.0),
    ("polynomial", (1.5,), 3.0, 1.0),
    ("polynomial", (1.5, 2.0), 2.0, 0.5),
)


def _kernel_sum(n, m, d, form, excluded, dtype, generator):
    kernel, bandwidths, exponent, offset = _KERNEL_SUMS[form]
    work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    scale = _spread(d) if kernel == "laplacian" else math.sqrt(_spread(d))  # distances of about 1
    x, y = (normal(size, d, dtype=dtype, generator=generator, scale=scale) for size in (n, m))
    mixture = torch.tensor([bandwidths, (0.6, 0.3, 0.8)[: len(bandwidths)]], dtype=work)
    return x, y, *mixture.unbind(), kernel, exponent, offset, bool(excluded)


def _kernel_sum_backward(n, m, d, form, excluded, dtype, generator):
    row, column = (normal(size, dtype=dtype, generator=generator) for size in (n, m))
    return row, column, *_kernel_sum(n, m, d, form, excluded, dtype, generator)


_KERNEL_SUM_FORMS = range(len(_KERNEL_SUMS))
_kernel_sum_common = {
    "shapes": (
        *((37, 141, 19, form, 0) for form in _KERNEL_SUM_FORMS),
        *((150, 150, 5, form, 1) for form in _KERNEL_SUM_FORMS),
        (1, 1, 1, 0, 0),
        (1, 1, 1, 1, 1),
        (5, 300, 2, 1, 0),
        (301, 3, 64, 0, 0),
        (66, 65, 130, 0, 0),
        (66, 65, 130, 1, 0),
        (9, 8, 600, 5, 0),
        *((0, 4, 3, form, 0) for form in (0, 1, 5)),
        *((4, 0, 3, form, 0) for form in (0, 1, 5)),
        *((4, 5, 0, form, 0) for form in (0, 1, 4, 5)),
    ),
    "interpreted": (
        (1, 1, 1, 0, 0),
        (35, 35, 18, 4, 1),
        (9, 10, 19, 0, 0),
        *((33, 38, 5, form, 0) for form in _KERNEL_SUM_FORMS),
        (35, 35, 18, 0, 1),
        (5, 70, 40, 0, 0),
        (0, 4, 3, 0, 0),
        (4, 0, 3, 1, 0),
        (4, 5, 0, 5, 0),
    ),
    "small": (*((5, 5, 2, form, form % 2) for form in _KERNEL_SUM_FORMS), (3, 4, 3, 4, 0), (1, 2, 1, 0, 0)),
    "large": (257, 321, 33, 0, 0),
    "forward_mode": False,
    "bad_shape": (9, 7, 3, 0, 0),
}

OPERATORS |= {
    "pairwise_kernel_sum": Operator(_kernel_sum, constants=(2, 3), bad=(0, (4, 1)), **_kernel_sum_common),
    "pairwise_kernel_sum_with_gradient": Operator(_kernel_sum, constants=(2, 3), bad=(0, (4, 1)), **_kernel_sum_common),
    "pairwise_kernel_sum_backward": Operator(_kernel_sum_backward, differentiable=False, bad=(2, (4, 1)), **_kernel_sum_common),
    "pairwise_kernel_sum_backward_both": Operator(
        lambda *a: (_kernel_sum_backward(*a)[0], *_kernel_sum(*a)), differentiable=False, bad=(2, (4, 1)), **_kernel_sum_common
    ),
}


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    return OPERATORS[name].make(*shape, dtype, torch.Generator().manual_seed(seed))


def map_tensors(function: Callable[[Tensor], Tensor], values: tuple) -> tuple:
    """``function`` of every tensor, those in lists included."""
    return tree_map_only(Tensor, function, values)


def tensors_of(values) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def permuted(x: Tensor) -> Tensor:
    """Same values, dimensions stored in reverse order."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def strided(x: Tensor) -> Tensor:
    """Same values, every second element of each row of a larger storage, at an offset."""
    if x.dim() == 0:
        return x
    room = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    view = room[..., 1::2]
    view.copy_(x)
    return view


def expanded(x: Tensor) -> Tensor:
    """All samples the first one, with stride 0."""
    return x[:1].expand_as(x) if x.dim() else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "permuted": permuted,
    "strided": strided,
    "expanded": expanded,
}


def instruction_sets():
    """Those of the C++ kernels that this processor runs."""
    import fastgan._C as C

    before, found = C.isa(), []
    for level in ("baseline", "avx2", "avx512"):
        try:
            C.set_isa(level)
        except ValueError:
            continue
        found.append(level)
    C.set_isa(before)
    return found
