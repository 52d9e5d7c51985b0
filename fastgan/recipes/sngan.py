"""SNGAN: every weight of the critic divided by its largest singular value; hinge loss, residual networks.

The critic's weights are normalised in one call, :class:`fastgan.SpectralNormGroup`, with the numbers of layer by layer.

Miyato et al., "Spectral normalization for generative adversarial networks", 2018.
"""

from dataclasses import dataclass
from typing import ClassVar

import fastgan
from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    loss: str = "hinge"
    width: int = 16
    lr: float = 1e-3
    beta1: float = 0.0
    beta2: float = 0.9
    init: str = "xavier"


class Recipe(GAN):
    Options = Options
    steps = 600
    goals: ClassVar = {"classes": 10, "fid": 3.5, "recall": 0.6, "normalised": 1}

    def build(self):
        o, shape = self.options, self.source.shape
        critic = networks.ResCritic(shape, o.width)
        if o.fast:
            fastgan.SpectralNormGroup(critic)
        return {"generator": networks.ResGenerator(o.z_dim, shape, o.width), "critic": critic}

    def evaluate(self, n=2000):
        """And "normalised", as small digits are learnt without, too: the share of the critic's weights whose norm is 1."""
        return super().evaluate(n) | {"normalised": networks.normalised(self.critic)}
