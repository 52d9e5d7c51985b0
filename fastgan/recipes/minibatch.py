"""Improved GAN: the critic sees how close the samples of a batch are to each other, so that a collapsed generator is found out.

:class:`fastgan.nn.MinibatchDiscrimination` before the score. Reals are labelled ``smooth`` instead of 1. The paper's other
remedy, ``--set feature_matching=1``, has the mean features of fakes meet those of reals (:func:`fastgan.feature_matching`),
besides the adversarial loss. What it gains shows where the generator collapses; on the grid it does not, and a critic without
these features found as many modes. A gradient penalty would be exact here too, but not shared: the samples of a batch interact.

Salimans et al., "Improved techniques for training GANs", 2016.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

import fastgan
from fastgan import losses
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    z_dim: int = 2  # as many as the plane has; for images 64
    lr: float = 1e-3
    lr_decay: float = 0.5
    kernels: int = 16  # of minibatch discrimination
    kernel_dims: int = 4
    smooth: float = 0.9  # the label of reals in cross entropies; 1: labels are not smoothed
    feature_matching: float = 0.0  # weight


class Critic(nn.Module):
    """``features``: a network to (B, hidden). Scores (B, 1) that depend on the rest of the batch."""

    def __init__(self, features: nn.Module, hidden: int, kernels: int, kernel_dims: int):
        super().__init__()
        self.features = features
        self.minibatch = fastgan.nn.MinibatchDiscrimination(hidden, kernels, kernel_dims, init_std=0.1)
        self.score = nn.Linear(hidden + kernels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.minibatch(self.features(x)))


class Recipe(GAN):
    Options = Options
    data = "grid"
    batch_size = 256
    steps = 2000
    goals: ClassVar = {"modes": 8, "high_quality": 0.4}

    def build(self):
        o, hidden = self.options, 4 * self.options.width
        features = nn.Sequential(self.network(self.source.shape, hidden), nn.LeakyReLU(0.2))
        critic = Critic(features, hidden, o.kernels, o.kernel_dims)
        return super().build() | {"critic": critic}

    def critic_loss(self, batch):
        o = self.options

        def smoothed(real: Tensor, fake: Tensor) -> Tensor:
            loss = losses.get(o.loss)(real, fake)
            # s softplus(-D) + (1 - s) softplus(D) on reals: softplus(D) - softplus(-D) = D
            return loss + (1 - o.smooth) * real.mean() if o.loss in ("minimax", "non_saturating") else loss

        step = self.critic_step(self.critic, batch["image"], self.fake(batch), smoothed, **self.penalties())
        return {"critic": step}

    def generator_loss(self, batch):
        weight, fake = self.options.feature_matching, self.generator(self.latent(len(batch["image"])))
        terms = {"generator": self.deceive(fake, batch)}
        if weight:
            real = self.critic.features(batch["image"]).detach()
            terms["features"] = weight * fastgan.feature_matching(real, self.critic.features(fake), p=2)
        return terms
