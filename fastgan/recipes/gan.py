"""The first GAN: two perceptrons play against each other, binary cross entropy on the critic's scores.

``--set loss=minimax`` is the game as it is first written, where the generator's gradient vanishes once the critic wins;
the default is the paper's own remedy. Nothing keeps the generator from serving some modes only, or from smearing over all:
of the grid's 25 it finds about half, hence the goals; :mod:`fastgan.recipes.mrgan` and ``r3gan`` find more with the same
networks.

Goodfellow et al., "Generative adversarial nets", 2014.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    z_dim: int = 2  # as many as the plane has: of 64 it finds no mode; for images 64
    lr: float = 1e-3
    lr_decay: float = 0.5


class Recipe(GAN):
    Options = Options
    data = "grid"
    batch_size = 256
    steps = 2000
    goals: ClassVar = {"modes": 6, "high_quality": 0.15}

    def build(self):
        o, shape = self.options, self.source.shape
        if len(shape) == 1:
            return super().build()
        generator = nn.Sequential(networks.Perceptron(o.z_dim, shape, 4 * o.width), nn.Tanh())
        return {"generator": generator, "critic": networks.Perceptron(shape, 1, 4 * o.width, dropout=0.3)}
