"""Losses on a batch of features: feature matching and the pulling-away term."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._checks import check_tensor
from fastgan._dtypes import FLOATS, accumulate_dtype

__all__ = ["feature_matching", "pulling_away"]


def _layers(name: str, features) -> list[Tensor]:
    layers = [features] if isinstance(features, Tensor) else features
    layers = list(layers.values()) if isinstance(layers, dict) else layers
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(f, Tensor) for f in layers):
        raise TypeError(
            f"feature_matching: {name} is a {type(features).__name__}, expected a tensor (B, ...), or a non-empty list or dict "
            "of them"
        )
    for k, f in enumerate(layers):
        if f.dtype not in FLOATS:
            raise TypeError(f"feature_matching: {name}[{k}] has dtype {f.dtype}, expected a floating dtype")
        if f.dim() < 1 or f.shape[0] == 0:
            raise ValueError(f"feature_matching: {name}[{k}] has shape {tuple(f.shape)}, expected (B, ...) with B of 1 or more")
    return layers


def feature_matching(
    real: Tensor | Sequence[Tensor] | dict,
    fake: Tensor | Sequence[Tensor] | dict,
    *,
    p: int = 1,
    weights: Sequence[float] | None = None,
    paired: bool = False,
) -> Tensor:
    r"""How far mean features are apart, :math:`\sum_l w_l\, \mathrm{mean}_f |\bar r_{lf} - \bar s_{lf}|^p` for reals r.

    Args:
        real, fake: features (B, ...) of a layer, or a list or dict of those of several layers; float16, bfloat16, float32 or
            float64. Means run over the batch, in float32 for half precision; B may differ between the two.
        p: 1, mean absolute difference, or 2, mean squared difference, over a layer's features.
        weights: one number a layer; None: 1 each.
        paired: compare sample i with sample i instead of the means over the batch: pix2pixHD's loss for translated images, and
            vocoders' over a critic's layers.

    Returns:
        Scalar, float32 or, for float64, float64. Differentiable to any order in ``real`` and ``fake``; detach ``real`` where
        its features are a target, as they are for a generator.

    Raises:
        TypeError: not floating tensors.
        ValueError: numbers or shapes of layers, p or weights other than said.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 3.1 (p = 2); Wang et al. 2018,
    "High-Resolution Image Synthesis and Semantic Manipulation with Conditional GANs", section 3.3 (paired, p = 1).
    """
    if p not in (1, 2):
        raise ValueError(f"feature_matching: p is {p!r}, expected 1 or 2")
    if isinstance(real, dict) and isinstance(fake, dict):
        if real.keys() != fake.keys():
            raise ValueError(f"feature_matching: real has layers {list(real)}, fake {list(fake)}, expected the same")
        fake = {name: fake[name] for name in real}  # by name, not by order
    reals, fakes = _layers("real", real), _layers("fake", fake)
    if len(reals) != len(fakes):
        raise ValueError(f"feature_matching: real has {len(reals)} layers, fake {len(fakes)}, expected equally many")
    weights = [1.0] * len(reals) if weights is None else list(weights)
    if len(weights) != len(reals):
        raise ValueError(f"feature_matching: {len(weights)} weights for {len(reals)} layers, expected one for each")
    total = None
    for k, (r, f, weight) in enumerate(zip(reals, fakes, weights, strict=True)):
        if r.shape[1:] != f.shape[1:] or (paired and r.shape != f.shape):
            raise ValueError(
                f"feature_matching: layer {k} has shapes {tuple(r.shape)} and {tuple(f.shape)}, expected the same"
                + ("" if paired else " but for the batch")
            )
        dtype = accumulate_dtype(r.dtype)
        difference = (f.to(dtype) - r) if paired else f.mean(0, dtype=dtype) - r.mean(0, dtype=dtype)
        term = (difference.abs() if p == 1 else difference.square()).mean()
        term = term if weight == 1 else term * weight
        total = term if total is None else total + term
    return total


def pulling_away(features: Tensor) -> Tensor:
    r"""Mean squared cosine between different samples, :math:`\frac{1}{B (B - 1)} \sum_{i \ne j} \cos^2(f_i, f_j)`.

    An energy-based GAN's generator adds it, on the features of its critic's encoder, so that the samples of a batch point in
    different directions.

    Args:
        features: (B, D); float16, bfloat16, float32 or float64. Half precision is computed in float32.

    Returns:
        Scalar between 0 and 1, float32 or, for float64, float64. B of 0 or 1 has no pairs: 0. A row of zeros has cosine 0 with
        every other. Differentiable to any order. Memory O(B D + min(B, D)^2).

    Raises:
        TypeError: ``features`` is not a floating tensor.
        ValueError: it is not 2-dimensional.

    Source: Zhao, Mathieu, LeCun 2017, "Energy-based Generative Adversarial Networks", section 2.4. Copies of it that keep i = j
    are larger by about 1 / B; some normalise over the batch, which means something else.
    """
    check_tensor("pulling_away", "features", features, "(B, D)")
    x = features.to(accumulate_dtype(features.dtype))
    b, d = x.shape
    if b < 2:
        return x.sum() * 0
    x = torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
    products = x @ x.T if b <= d else x.T @ x  # both have the same sum of squares
    own = x.square().sum(1).square().sum()
    return (products.square().sum() - own).clamp_min(0) / (b * (b - 1))
