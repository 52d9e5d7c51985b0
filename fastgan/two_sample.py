"""Distances between two samples that sum a kernel over their pairs: MMD and energy distance, and the sums themselves."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._checks import check_points
from fastgan._dtypes import accumulate_dtype
from fastgan.ops import pairwise_kernel_sum as _pairwise_kernel_sum
from fastgan.ops.gradient_penalty import norms_of

_KERNELS = _pairwise_kernel_sum.KERNELS
#: Points of each sample that the median heuristic looks at.
_MEDIAN_OF = 512


def _constants(function: str, name: str, given, x: Tensor) -> Tensor:
    """(n,) on x's device, in the dtype that sums are in."""
    like = {"dtype": accumulate_dtype(x.dtype), "device": x.device}
    if isinstance(given, Tensor):
        if given.dim() > 1 or given.numel() == 0:
            raise ValueError(f"{function}: {name} has shape {tuple(given.shape)}, expected () or (n,) with n of 1 or more")
        if given.requires_grad:
            raise ValueError(f"{function}: {name} requires grad, but is a constant of the kernel; pass {name}.detach()")
        return given.to(**like).reshape(-1)
    values = list(given) if isinstance(given, Sequence) else [given]
    if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError(f"{function}: {name} is {given!r}, expected a finite number, a sequence of them, or a tensor (n,)")
    if name == "bandwidths" and min(values) <= 0:
        raise ValueError(f"{function}: bandwidths is {given!r}, expected numbers above 0")
    return torch.tensor(values, **like)


def _kernel(function: str, x: Tensor, kernel, bandwidths, weights, alpha, degree, offset) -> tuple:
    """What the operator takes after x and y, but for the last."""
    if kernel not in _KERNELS:
        raise ValueError(f"{function}: kernel is {kernel!r}, expected one of {', '.join(map(repr, _KERNELS))}")
    if not isinstance(degree, int) or degree < 1:
        raise ValueError(f"{function}: degree is {degree!r}, expected a positive integer")
    if not alpha > 0:
        raise ValueError(f"{function}: alpha is {alpha!r}, expected a number above 0")
    if bandwidths is None:
        bandwidths = max(1, x.shape[1]) if kernel == "polynomial" else 1.0
    bandwidths = _constants(function, "bandwidths", bandwidths, x)
    weights = torch.ones_like(bandwidths) if weights is None else _constants(function, "weights", weights, x)
    if weights.shape != bandwidths.shape:
        raise ValueError(
            f"{function}: there are {weights.numel()} weights for {bandwidths.numel()} bandwidths, expected one weight for each"
        )
    return bandwidths, weights, kernel, float(degree if kernel == "polynomial" else alpha), float(offset)


def pairwise_kernel_sum(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidths: float | Sequence[float] | Tensor | None = None,
    weights: float | Sequence[float] | Tensor | None = None,
    alpha: float = 1.0,
    degree: int = 3,
    offset: float = 1.0,
    exclude_diagonal: bool = False,
) -> Tensor:
    r"""Sum of a kernel over all points y, for every point x: :math:`f_i = \sum_j \sum_b w_b\, k_b(x_i, y_j)`.

    The pairs are streamed: nothing of size N x M is kept, memory is O((N + M) D).

    Args:
        x: (N, D) points; float16, bfloat16, float32 or float64, any strides. Half precision is computed in float32.
        y: (M, D), dtype and device of ``x``; may be ``x`` itself.
        kernel: with s a bandwidth,

            - ``"laplacian"``: :math:`\exp(-\lVert x - y \rVert_1 / s)`
            - ``"gaussian"``: :math:`\exp(-\lVert x - y \rVert_2^2 / (2 s^2))`
            - ``"rational_quadratic"``: :math:`(1 + \lVert x - y \rVert_2^2 / (2 \alpha s^2))^{-\alpha}`; alpha = 1/2 is the
              inverse multiquadric :math:`(1 + \lVert x - y \rVert^2 / s^2)^{-1/2}`, and alpha = 1 with
              :math:`s = \sqrt{C / 2}` Wasserstein autoencoders' :math:`C / (C + \lVert x - y \rVert^2)`
            - ``"energy"``: :math:`-\lVert x - y \rVert_2 / s`, whose derivative at coincident points is 0
            - ``"polynomial"``: :math:`(x^T y / s + \mathrm{offset})^{\mathrm{degree}}`; the defaults are the kernel inception
              distance's :math:`(x^T y / D + 1)^3`
        bandwidths: s, above 0, in the units of x: a number, several, or a tensor (n,), which may lie on a GPU without anybody
            waiting for it and whose values aren't checked. The sum over several is one pass. None: D for the
            polynomial, 1 for the others.
        weights: w, one for each bandwidth; None: 1 each.
        alpha, degree, offset: of the kernels that have them; degree is an integer.
        exclude_diagonal: leave out j = i, exactly; N = M then. What an unbiased estimate over one sample wants.

    Returns:
        (N,), dtype and device of ``x``. M = 0 gives zeros. Differentiable once with respect to x and y, in reverse mode, under
        ``torch.func`` and ``torch.compile(fullgraph=True)``. Bandwidths and weights are constants.

    Raises:
        TypeError: x or y is not a floating tensor, or they differ in dtype or device.
        ValueError: shapes or options other than said.
        RuntimeError: where a second derivative or forward mode is asked for: compose the kernel of plain torch operators then,
            such as ``torch.exp(-(x[:, None] - y).square().sum(-1) / 2).sum(1)``.

    A NaN in a point makes the sums it takes part in NaN.
    """
    check_points("pairwise_kernel_sum", x, y)
    options = _kernel("pairwise_kernel_sum", x, kernel, bandwidths, weights, alpha, degree, offset)
    if exclude_diagonal and x.shape[0] != y.shape[0]:
        raise ValueError(
            f"pairwise_kernel_sum: exclude_diagonal with x {tuple(x.shape)} and y {tuple(y.shape)}: expected as many points in "
            f"both, of which the i-th are the same"
        )
    return _sum(x, y, options, bool(exclude_diagonal))


def median_bandwidth(x: Tensor, y: Tensor, *, p: float = 2) -> Tensor:
    r"""The median heuristic: the median of the distances :math:`\lVert z_i - z_j \rVert_p`, i < j, in the pooled sample.

    Where a sample has more than 512 points, every k-th of them counts, with the k that leaves at most 512: a bounded amount of
    work without random numbers, on samples in no particular order.

    Args:
        x, y: (N, D) and (M, D) as for :func:`pairwise_kernel_sum`; at least two points together.
        p: 2 for the kernels of the Euclidean distance, 1 for the Laplacian kernel.

    Returns:
        A scalar on the device of x, float32 for 16 bits, without gradient; 1 where the median is 0.

    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", section 8.
    """
    check_points("median_bandwidth", x, y)
    if x.shape[0] + y.shape[0] < 2:
        raise ValueError("median_bandwidth: x and y have fewer than 2 points together, between which there is no distance")
    some = [z.detach()[:: max(1, -(-z.shape[0] // _MEDIAN_OF))] for z in (x, y)]
    median = torch.pdist(torch.cat(some).to(accumulate_dtype(x.dtype)), p=p).median()
    return torch.where(median == 0, 1.0, median)


def _sum(x: Tensor, y: Tensor, options: tuple, exclude_diagonal: bool) -> Tensor:
    """Where x alone has a gradient, that is found on the way."""
    if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
        return _pairwise_kernel_sum.with_gradient(x, y, *options, exclude_diagonal)[0]
    return _pairwise_kernel_sum.forward(x, y, *options, exclude_diagonal)


def _mean(x: Tensor, y: Tensor, options: tuple, exclude_diagonal: bool = False) -> Tensor:
    """Of k over all pairs, in float64: means of three sums of nearly the same size are subtracted."""
    if not x.requires_grad:  # the mean is symmetric, and a gradient in the first argument the cheaper one
        x, y = y, x
    total = _sum(x, y, options, exclude_diagonal).sum(dtype=torch.float64)
    return total / (x.shape[0] * (y.shape[0] - exclude_diagonal))


def _mean_within(x: Tensor, options: tuple, exclude_diagonal: bool) -> Tensor:
    """Both arguments have the same gradient: that of one, twice."""
    if not x.requires_grad:
        return _mean(x, x, options, exclude_diagonal)
    half = _mean(x, x.detach(), options, exclude_diagonal)
    return 2 * half - half.detach()


def _discrepancy(function: str, x: Tensor, y: Tensor, options: tuple, unbiased: bool, squared: bool) -> Tensor:
    least = 2 if unbiased else 1
    for name, z in (("x", x), ("y", y)):
        if z.shape[0] < least:
            raise ValueError(
                f"{function}: {name} has {z.shape[0]} points, expected at least {least}" + (" where unbiased=True" * unbiased)
            )
    total = _mean_within(x, options, unbiased) + _mean_within(y, options, unbiased) - 2 * _mean(x, y, options)
    total = total.to(x.dtype)
    return total if squared else norms_of(total.clamp_min(0))


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidths: float | Sequence[float] | Tensor | None = None,
    weights: float | Sequence[float] | Tensor | None = None,
    alpha: float = 1.0,
    degree: int = 3,
    offset: float = 1.0,
    unbiased: bool = False,
    squared: bool = True,
) -> Tensor:
    r"""Maximum mean discrepancy between two samples, :math:`E\,k(x, x') + E\,k(y, y') - 2 E\,k(x, y)`.

    Three sums over pairs, :func:`pairwise_kernel_sum`, none of which is kept as a matrix.

    Args:
        x, y: (N, D) and (M, D), as there.
        kernel, weights, alpha, degree, offset: as there.
        bandwidths: as there, but for None, which is the median heuristic where the kernel is a function of the distance
            ("laplacian", "gaussian", "rational_quadratic"): :func:`median_bandwidth`, a constant. That is for tests of two
            given samples; it moves with them, so that a generator is better trained with several fixed ones.
        unbiased: leave the pairs of a point with itself out of the first two means (the U-statistic); may be negative. By
            default they count (the V-statistic), which is never negative but by rounding.
        squared: return what the formula says; else its root, 0 with gradient 0 where that is not above 0.

    Returns:
        A scalar, float32 for 16 bits, else of x's dtype; differentiable once with respect to x and y.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`pairwise_kernel_sum`; ValueError for a sample without points, or with
            fewer than two where ``unbiased``.

    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", equations 3 and 5; for GANs Li et al. 2015, "Generative Moment
    Matching Networks", and Binkowski et al. 2018, "Demystifying MMD GANs", whose kernel inception distance is
    ``kernel="polynomial", unbiased=True`` on Inception's features.
    """
    check_points("mmd", x, y)
    x, y = _widened(x, y)
    if bandwidths is None and kernel in ("laplacian", "gaussian", "rational_quadratic") and x.shape[0] + y.shape[0] > 1:
        bandwidths = median_bandwidth(x, y, p=_KERNELS[kernel])
    options = _kernel("mmd", x, kernel, bandwidths, weights, alpha, degree, offset)
    return _discrepancy("mmd", x, y, options, unbiased, squared)


def energy_distance(x: Tensor, y: Tensor, *, unbiased: bool = False, squared: bool = True) -> Tensor:
    r"""Energy distance between two samples, :math:`2 E \lVert x - y \rVert - E \lVert x - x' \rVert - E \lVert y - y' \rVert`.

    It is :func:`mmd` with the kernel "energy", which has no bandwidth: scaling both samples scales it.

    Args:
        x, y: (N, D) and (M, D), as for :func:`pairwise_kernel_sum`; Euclidean distances.
        unbiased: leave the pairs of a point with itself out of the last two means; may be negative.
        squared: return what the formula says; else its root, 0 with gradient 0 where that is not above 0.

    Returns:
        A scalar, float32 for 16 bits, else of x's dtype; differentiable once with respect to x and y. Coincident points
        contribute the gradient 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mmd`.

    Source: Szekely and Rizzo 2013, "Energy statistics: A class of statistics based on distances".
    """
    check_points("energy_distance", x, y)
    x, y = _widened(x, y)
    options = _kernel("energy_distance", x, "energy", 1.0, None, 1.0, 1, 0.0)
    return _discrepancy("energy_distance", x, y, options, unbiased, squared)


def _widened(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """16 bits as float32: the difference of means would be lost to the rounding of their sums."""
    dtype = accumulate_dtype(x.dtype)
    return x.to(dtype), y.to(dtype)
