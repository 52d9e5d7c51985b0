"""The functions of fastgan in one place; minibatch features are defined here, over the operators of ``fastgan.ops``."""

import math

import torch
from torch import Tensor

from fastgan._checks import check_tensor
from fastgan._dtypes import FLOATS, accumulate_dtype
from fastgan.critic import critic_step as critic_step
from fastgan.critic import explain as explain
from fastgan.distributed import gather_batch, rows_of_this_rank
from fastgan.features import feature_matching as feature_matching
from fastgan.features import pulling_away as pulling_away
from fastgan.neighbours import nearest_distances as nearest_distances
from fastgan.ops import minibatch_discrimination as _minibatch_discrimination
from fastgan.ops import minibatch_stddev as _minibatch_stddev
from fastgan.ops import spectral_norm as _spectral_norm
from fastgan.penalties import dragan_penalty as dragan_penalty
from fastgan.penalties import gradient_penalty as gradient_penalty
from fastgan.penalties import max_gradient_penalty as max_gradient_penalty
from fastgan.penalties import path_length_penalty as path_length_penalty
from fastgan.penalties import penalty_from_output as penalty_from_output
from fastgan.penalties import r1_penalty as r1_penalty
from fastgan.penalties import r2_penalty as r2_penalty
from fastgan.penalties import wgan_div_penalty as wgan_div_penalty
from fastgan.penalties import zero_centered_penalty as zero_centered_penalty
from fastgan.two_sample import energy_distance as energy_distance
from fastgan.two_sample import median_bandwidth as median_bandwidth
from fastgan.two_sample import mmd as mmd
from fastgan.two_sample import pairwise_kernel_sum as pairwise_kernel_sum


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
    check_tensor("minibatch_discrimination", "m", m, "(B, K, D)")
    if group is None:
        return _minibatch_discrimination.forward(m, self_term)
    everyone, counts = gather_batch(m, group, "minibatch_discrimination: m")
    return rows_of_this_rank(_minibatch_discrimination.forward(everyone, self_term), counts, group)


def check_stddev_options(function: str, group_size, num_channels, layout, remainder, eps) -> None:
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"{function}: group_size is {group_size!r}, expected a positive integer, or None for the whole batch")
    if not isinstance(num_channels, int) or num_channels < 1:
        raise ValueError(f"{function}: num_channels is {num_channels!r}, expected a positive integer")
    for name, value, choices in (("layout", layout, ("strided", "contiguous")), ("remainder", remainder, ("even", "whole"))):
        if value not in choices:
            raise ValueError(f"{function}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    if not eps >= 0:
        raise ValueError(f"{function}: eps is {eps!r}, expected 0 or more")


def minibatch_stddev(
    x: Tensor,
    *,
    group_size: int | None = 4,
    num_channels: int = 1,
    layout: str = "strided",
    unbiased: bool = False,
    remainder: str = "even",
    eps: float = 1e-8,
    group=None,
) -> Tensor:
    r"""Append to every sample how much its group of samples varies, averaged over channels and places: StyleGAN's layer.

    Per channel and place, :math:`\sqrt{\mathrm{var} + \varepsilon}` over the G samples of a group; the mean of that over each
    of ``num_channels`` equal slices of the channels is one number, which fills one channel appended to the group's samples.

    Args:
        x: (B, C, ...) with any number of places, from (B, C) to (B, C, D, H, W); float16, bfloat16, float32 or float64, any
            strides. Half precision is computed in float32.
        group_size: G, at most B; None for the whole batch (progressive GANs, tfgan).
        num_channels: F, has to divide C.
        layout: "strided" (StyleGAN): sample n is in group n mod (B / G). "contiguous" (pytorch_GAN_zoo): groups are runs of
            samples.
        unbiased: divide squares by G - 1 (pytorch_GAN_zoo) instead of G. A group of one sample then has the statistic 0.
        remainder: where G does not divide B, which StyleGAN refuses: "even" makes B // G groups, as equal as can be and none
            smaller than G (10 samples and G = 4: 5 and 5; 11: 6 and 5); "whole" makes one of all samples (pytorch_GAN_zoo).
        eps: added to the variance. With 0, identical samples have the derivative 0 where the formula's is NaN (tfgan).
        group: a ``torch.distributed`` process group, or ``"world"``. The batch is then that of all its ranks in rank order: x
            is gathered (with gradients) and each rank gets its own samples. Ranks may hold different B.

    Returns:
        (B, C + F, ...), x first, dtype and device of ``x``; channels_last if x is, else contiguous. B may be 0.
        Differentiable twice, in forward mode, under ``torch.func`` and ``torch.compile(fullgraph=True)``; identical samples
        have finite derivatives of both orders.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: ``x`` has fewer than 2 dimensions; ``num_channels`` does not divide C; an option other than said.
        RuntimeError: with ``group``: ``torch.distributed`` is not initialised, or ranks disagree on the shape of a sample.

    A NaN or Inf makes the statistic of its group and slice NaN.

    Source: Karras et al. 2017, "Progressive Growing of GANs", section 3; groups and slices as in the code of Karras et al.
    2020, "Analyzing and Improving the Image Quality of StyleGAN".
    """
    check_tensor("minibatch_stddev", "x", x, "(B, C, ...)")
    check_stddev_options("minibatch_stddev", group_size, num_channels, layout, remainder, eps)
    if x.shape[1] == 0 or x.shape[1] % num_channels:
        raise ValueError(
            f"minibatch_stddev: x has {x.shape[1]} channels {tuple(x.shape)}, expected a positive multiple of "
            f"num_channels={num_channels}; choose a num_channels that divides {x.shape[1]}"
        )
    if group is not None:
        x, counts = gather_batch(x, group, "minibatch_stddev: x")
    batch = x.shape[0]
    size = max(1, batch if group_size is None else min(group_size, batch))
    groups = 1 if remainder == "whole" and batch % size else max(1, batch // size)
    if unbiased and batch == groups:
        out = torch.cat([x, x.new_zeros(batch, num_channels, *x.shape[2:])], 1)
    else:
        out = _minibatch_stddev.forward(x, groups, layout == "strided", num_channels, unbiased, eps)
    return out if group is None else rows_of_this_rank(out, counts, group)


def spectral_normalize(
    weight: Tensor | list[Tensor],
    u: Tensor | list[Tensor],
    v: Tensor | list[Tensor],
    *,
    dim: int | list[int] = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    v_first: bool = False,
    target: float = 1.0,
    at_most: bool = False,
):
    r"""Power iteration, largest singular value and normalised weight, for one weight or for a list of them in one call.

    A weight is the matrix W (h, w) with its dimension ``dim`` as rows. Nothing is changed in place.

    Args:
        weight: of any rank; float16, bfloat16, float32 or float64, any strides, which the result keeps. Or a list.
        u, v: (h,) and (w,), of length 1; float64 for a float64 weight, else float32. Lists for a list.
        dim: which dimension of the weight is rows; for a list, one for each or one for all.
        n_power_iterations: 0 or more.
        eps: lower limit of the norms that u and v are divided by.
        v_first: update v, then u (``torch.nn.utils.spectral_norm``), instead of u, then v (torch's parametrization).
        target: the largest singular value to normalise to.
        at_most: leave weights alone whose largest singular value is at most ``target``.

    Returns:
        (normalised, u, v, sigma), sigma of shape () or, for a list of L weights, three lists and (L,). ``normalised`` and
        ``sigma`` are differentiable with respect to ``weight``, any number of times, with u and v constant; in forward mode
        and under ``torch.func`` too.

    Raises:
        TypeError: a weight that is no floating tensor; u or v of another dtype than said.
        ValueError: u or v of another shape than (h,) or (w,); lists of different lengths; an empty list.

    A weight of zeros stays zero, and an iteration that yields zero or non-finite vectors is not taken.

    On CPU large results lie in memory that fastgan uses again once nothing refers to it. As with a tensor made from a NumPy
    array, torch can't enlarge that: ``result.resize_()`` to more elements, and ``out=result`` for a larger result, raise a
    RuntimeError; ``result.clone()`` is without that limit. In-place arithmetic, ``set_`` and ``share_memory_`` are as usual.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks".
    """
    several = isinstance(weight, (list, tuple))
    weights, us, vs = ([*x] if several else [x] for x in (weight, u, v))
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim] * len(weights)
    if not weights or not len(weights) == len(us) == len(vs) == len(dims):
        raise ValueError(
            f"spectral_normalize: weight, u, v and dim have {len(weights)}, {len(us)}, {len(vs)} and {len(dims)} elements, "
            f"expected as many of each, and at least one"
        )
    for each in zip(weights, us, vs, dims, strict=True):
        _check_power_iteration("spectral_normalize", *each)
    options = n_power_iterations, eps, v_first, target, at_most
    if several:
        return _spectral_norm.multi(weights, us, vs, dims, *options)
    return _spectral_norm.forward(weight, u, v, dim, *options)


def largest_singular_value(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Power iteration and the largest singular value alone: :func:`spectral_normalize` without the normalised weight.

    For logging, and for penalties on the spectral norm. On CPU one read of the weight per iteration is all that it takes.

    Args:
        weight, u, v, dim, n_power_iterations, eps, v_first: as for :func:`spectral_normalize`; one weight, no list.

    Returns:
        (u, v, sigma): (h,), (w,) and (). sigma is differentiable with respect to ``weight``, its gradient being
        :math:`u v^T`, with u and v constant; in forward mode and under ``torch.func`` too. Nothing is changed in place.

    Raises:
        TypeError, ValueError: as :func:`spectral_normalize`.

    Source: Yoshida and Miyato 2017, "Spectral Norm Regularization for Improving the Generalizability of Deep Learning".
    """
    _check_power_iteration("largest_singular_value", weight, u, v, dim)
    return _spectral_norm.sigma_alone(weight, u, v, dim, n_power_iterations, eps, v_first)


def _check_power_iteration(function: str, weight, u: Tensor, v: Tensor, dim: int) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        raise TypeError(f"{function}: weight is {getattr(weight, 'dtype', type(weight).__name__)}, expected a floating tensor")
    shape = tuple(weight.shape)
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"{function}: dim is {dim}, out of range for a weight of shape {shape}")
    columns = math.prod(size for i, size in enumerate(shape) if i != dim % weight.dim())
    expected = accumulate_dtype(weight.dtype)
    for name, vector, length in (("u", u, shape[dim]), ("v", v, columns)):
        if tuple(vector.shape) != (length,):
            raise ValueError(
                f"{function}: {name} has shape {tuple(vector.shape)}, expected ({length},) for a weight of shape {shape} with "
                f"dim={dim}"
            )
        if vector.dtype != expected:
            raise TypeError(
                f"{function}: {name} has dtype {vector.dtype}, expected {expected} for a weight of {weight.dtype}; "
                f"convert it with {name}.to({expected})"
            )


def top_singular_values(
    weight: Tensor, u: Tensor, *, dim: int = 0, n_power_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Estimates of the k largest singular values by power iteration with deflation: BigGAN's ``num_svs``.

    Each iteration updates all v, then all u, and takes from each vector its projection on those before it (Gram-Schmidt).
    The first is what :func:`spectral_normalize` with ``v_first=True`` finds: BigGAN normalises by it,
    ``weight / sigma[0]``, and logs the others. The k products share reads of the weight: two per iteration, one for sigma.

    Args:
        weight: of rank 2 or more, the matrix W (h, w) with its dimension ``dim`` as rows; any floating dtype.
        u: (k, h), k at most min(h, w): the estimates to start from, in any basis, such as standard normal draws; float64 for a
            float64 weight, else float32. BigGAN's buffers are ``torch.cat([u0, u1, ...])``.
        dim: which dimension of the weight is rows.
        n_power_iterations: 1 or more.
        eps: lower limit of the norms that u and v are divided by.

    Returns:
        (u, v, sigma): (k, h) and (k, w) with orthonormal rows, and (k,), where :math:`\sigma_i = u_i^T W v_i` is
        differentiable with respect to ``weight`` with u and v constant. Nothing is changed in place.

    Raises:
        TypeError: ``weight`` is not a floating tensor; u of another dtype than said.
        ValueError: shapes, ``dim`` or ``n_power_iterations`` other than said.

    Source: Brock et al. 2018, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", appendix on spectra.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        raise TypeError(
            f"top_singular_values: weight is {getattr(weight, 'dtype', type(weight).__name__)}, expected a floating tensor"
        )
    if weight.dim() < 2 or not -weight.dim() <= dim < weight.dim():
        raise ValueError(
            f"top_singular_values: dim is {dim} for a weight of shape {tuple(weight.shape)}, expected one of its dimensions, "
            f"of which there have to be two or more"
        )
    if n_power_iterations < 1:
        raise ValueError(f"top_singular_values: n_power_iterations is {n_power_iterations}, expected 1 or more")
    matrix = _spectral_norm._matrix(weight, dim)
    h, w = matrix.shape
    if u.dim() != 2 or u.shape[1] != h or not 1 <= u.shape[0] <= min(h, w):
        raise ValueError(
            f"top_singular_values: u has shape {tuple(u.shape)}, expected (k, {h}) with k from 1 to {min(h, w)} for a weight "
            f"of shape {tuple(weight.shape)} with dim={dim}"
        )
    if u.dtype != matrix.dtype:
        raise TypeError(
            f"top_singular_values: u has dtype {u.dtype}, expected {matrix.dtype} for a weight of {weight.dtype}; "
            f"convert it with u.to({matrix.dtype})"
        )
    with torch.no_grad():
        for _ in range(n_power_iterations):
            v = _orthonormal(u @ matrix, eps)
            u = _orthonormal(v @ matrix.T, eps)
    return u, v, ((u @ matrix) * v).sum(1)


def _orthonormal(rows: Tensor, eps: float) -> Tensor:
    """Gram-Schmidt, twice over each row: once leaves rounding of what is taken away, large where that was nearly all."""
    done: list[Tensor] = []
    for row in rows:
        if done:
            basis = torch.stack(done)
            for _ in range(2):
                row = row - (basis @ row) @ basis
        done.append(row / torch.linalg.vector_norm(row).clamp_min(eps))
    return torch.stack(done)
