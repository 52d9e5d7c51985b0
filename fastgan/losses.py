"""Adversarial losses: the critic's side ``name(real_scores, fake_scores)`` and the generator's side
``name_generator(fake_scores, real_scores=None)``.

Every function takes scores of any shape and averages over all their elements; a list or tuple of score tensors (a
multi-scale critic) gives the sum over the tensors. float16 and bfloat16 scores are reduced in float32. The result is a
scalar, differentiable to any order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F

from fastgan._dtypes import accumulate_dtype

__all__ = [
    "CriticLoss",
    "generator",
    "get",
    "hinge",
    "hinge_generator",
    "least_squares",
    "least_squares_generator",
    "minimax",
    "minimax_generator",
    "names",
    "non_saturating",
    "non_saturating_generator",
    "relativistic",
    "relativistic_average",
    "relativistic_average_generator",
    "relativistic_generator",
    "wasserstein",
    "wasserstein_generator",
]  # fmt: skip


def _tensors(scores):
    if isinstance(scores, torch.Tensor):
        scores = (scores,)
    if not isinstance(scores, (list, tuple)) or not scores or not all(isinstance(s, torch.Tensor) for s in scores):
        raise TypeError(
            "scores must be a tensor or a non-empty list of tensors; "
            f"pick them out of the critic's output first (got {type(scores).__name__})"
        )
    return [s.to(accumulate_dtype(s.dtype)) for s in scores]


def _paired(real_scores, fake_scores):
    real, fake = _tensors(real_scores), _tensors(fake_scores)
    if len(real) != len(fake):
        raise ValueError(f"{len(real)} real score tensors but {len(fake)} fake ones")
    return list(zip(real, fake, strict=False))


def _same_shape(name, pairs):
    for r, f in pairs:
        if r.shape != f.shape:
            raise ValueError(
                f"{name} compares real sample i with fake sample i: scores need one shape, got "
                f"{tuple(r.shape)} and {tuple(f.shape)} (relativistic_average takes different batch sizes)"
            )
    return pairs


def _total(terms):
    return reduce(add, terms)  # sum() would begin with 0 + term, one more node in the graph


def _need_real(name, real_scores):
    if real_scores is None:
        raise ValueError(f"{name} compares fakes with reals: pass real_scores as well")
    return real_scores


# --- one term per batch ----------------------------------------------------------------------------------------------
# Each term is a mean over one batch's scores. A loss that is the sum of two such terms is separable: the real batch can
# be finished, and its memory given back, before the fake batch is looked at.


def _negative_mean(scores):
    return -_total(s.mean() for s in _tensors(scores))


def _mean(scores):
    return _total(s.mean() for s in _tensors(scores))


def _softplus_of_negative(scores):
    return _total(F.softplus(-s).mean() for s in _tensors(scores))


def _softplus(scores):
    return _total(F.softplus(s).mean() for s in _tensors(scores))


def _half_square_to_one(scores):
    return 0.5 * _total((s - 1).square().mean() for s in _tensors(scores))


def _half_square(scores):
    return 0.5 * _total(s.square().mean() for s in _tensors(scores))


def _hinge_real(scores):
    return _total(F.relu(1 - s).mean() for s in _tensors(scores))


def _hinge_fake(scores):
    return _total(F.relu(1 + s).mean() for s in _tensors(scores))


# --- the critic's side -----------------------------------------------------------------------------------------------


def wasserstein(real_scores, fake_scores):
    """mean D(fake) - mean D(real). Arjovsky, Chintala, Bottou, "Wasserstein GAN", 2017."""
    return _mean(fake_scores) + _negative_mean(real_scores)


def wasserstein_generator(fake_scores, real_scores=None):
    """-mean D(fake)."""
    return _negative_mean(fake_scores)


def minimax(real_scores, fake_scores):
    """Binary cross entropy on logits, mean softplus(-D(real)) + mean softplus(D(fake)). Goodfellow et al., 2014."""
    return _softplus_of_negative(real_scores) + _softplus(fake_scores)


def minimax_generator(fake_scores, real_scores=None):
    """mean log(1 - sigmoid D(fake)) = -mean softplus(D(fake)): the saturating game of Goodfellow et al., 2014."""
    return -_softplus(fake_scores)


def non_saturating(real_scores, fake_scores):
    """The critic's side is that of :func:`minimax`; only the generator's side differs. Goodfellow et al., 2014."""
    return minimax(real_scores, fake_scores)


def non_saturating_generator(fake_scores, real_scores=None):
    """mean softplus(-D(fake))."""
    return _softplus_of_negative(fake_scores)


def least_squares(real_scores, fake_scores):
    """1/2 mean (D(real) - 1)^2 + 1/2 mean D(fake)^2. Mao et al., "Least Squares GANs", 2017, equation 9."""
    return _half_square_to_one(real_scores) + _half_square(fake_scores)


def least_squares_generator(fake_scores, real_scores=None):
    """1/2 mean (D(fake) - 1)^2."""
    return _half_square_to_one(fake_scores)


def hinge(real_scores, fake_scores):
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)). Lim, Ye, "Geometric GAN", 2017; Miyato et al., 2018."""
    return _hinge_real(real_scores) + _hinge_fake(fake_scores)


def hinge_generator(fake_scores, real_scores=None):
    """-mean D(fake)."""
    return _negative_mean(fake_scores)


def relativistic(real_scores, fake_scores):
    """Pairing relativistic loss, mean softplus(D(fake_i) - D(real_i)). Jolicoeur-Martineau, 2018; R3GAN, 2024.

    Raises ValueError unless both have one shape.
    """
    return _total(F.softplus(f - r).mean() for r, f in _same_shape("relativistic", _paired(real_scores, fake_scores)))


def relativistic_generator(fake_scores, real_scores=None):
    """mean softplus(D(real_i) - D(fake_i)). Raises ValueError without ``real_scores``."""
    return relativistic(fake_scores, _need_real("relativistic_generator", real_scores))


def relativistic_average(real_scores, fake_scores):
    """mean softplus(-(D(real) - mean D(fake))) + mean softplus(D(fake) - mean D(real)).

    Jolicoeur-Martineau, "The relativistic discriminator", 2018 (RaGAN).
    """
    return _total(
        F.softplus(f.mean() - r).mean() + F.softplus(f - r.mean()).mean() for r, f in _paired(real_scores, fake_scores)
    )


def relativistic_average_generator(fake_scores, real_scores=None):
    """:func:`relativistic_average` with the roles exchanged. Raises ValueError without ``real_scores``."""
    return relativistic_average(fake_scores, _need_real("relativistic_average_generator", real_scores))


# --- what the critic step needs to know about a loss -----------------------------------------------------------------


@dataclass(frozen=True)
class CriticLoss:
    """A critic loss and the facts about it that decide how a step may be computed.

    ``real_term`` and ``fake_term``: the two halves of a separable loss, else None. ``mean_of_samples``: the loss of a
    batch is the mean of the losses of its equal parts, so that a batch may be split.
    """

    name: str
    function: Callable
    real_term: Callable | None = None
    fake_term: Callable | None = None
    mean_of_samples: bool = False

    @property
    def separable(self):
        return self.real_term is not None

    def __call__(self, real_scores, fake_scores):
        return self.function(real_scores, fake_scores)


_LOSSES = {
    loss.name: loss
    for loss in (
        CriticLoss("wasserstein", wasserstein, _negative_mean, _mean, True),
        CriticLoss("minimax", minimax, _softplus_of_negative, _softplus, True),
        CriticLoss("non_saturating", non_saturating, _softplus_of_negative, _softplus, True),
        CriticLoss("least_squares", least_squares, _half_square_to_one, _half_square, True),
        CriticLoss("hinge", hinge, _hinge_real, _hinge_fake, True),
        CriticLoss("relativistic", relativistic, mean_of_samples=True),
        CriticLoss("relativistic_average", relativistic_average),
    )
}


def names():
    """The names :func:`get` knows."""
    return tuple(_LOSSES)


def generator(name):
    """The generator's side of a named loss: callable(fake_scores, real_scores=None). Raises as :func:`get` does."""
    return globals()[f"{get(name).name}_generator"]


def get(loss):
    """The :class:`CriticLoss` of a name, of one of this module's functions, or of a callable(real, fake) -> scalar.

    Raises ValueError for an unknown name and TypeError for something that cannot be called.
    """
    if isinstance(loss, CriticLoss):
        return loss
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise ValueError(f"unknown loss {loss!r}; known: {', '.join(_LOSSES)}, or a callable(real, fake)")
        return _LOSSES[loss]
    for known in _LOSSES.values():
        if loss is known.function:
            return known
    if not callable(loss):
        raise TypeError(f"loss must be a name or a callable(real_scores, fake_scores), got {type(loss).__name__}")
    return CriticLoss(getattr(loss, "__name__", "custom"), loss)
