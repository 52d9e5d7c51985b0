"""The first GAN: two perceptrons play against each other, binary cross entropy on the critic's scores.

``--set loss=minimax`` is the game as it is first written, where the generator's gradient vanishes once the critic wins;
the default is the paper's own remedy. Nothing keeps the generator from serving some modes only: of the ring's modes, which are
close, it finds all, drawing the circle through them, hence the goal for ``high_quality``; of ``--data grid`` it found 4 of 25.

Goodfellow et al., "Generative adversarial nets", 2014.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    lr: float = 1e-3
    lr_decay: float = 0.5


class Recipe(GAN):
    Options = Options
    data = "ring"
    batch_size = 256
    steps = 2000
    goals: ClassVar = {"modes": 22, "high_quality": 0.5}

    def build(self):
        o, shape = self.options, self.source.shape
        if len(shape) == 1:
            return super().build()
        generator = nn.Sequential(networks.Perceptron(o.z_dim, shape, 4 * o.width), nn.Tanh())
        return {"generator": generator, "critic": networks.Perceptron(shape, 1, 4 * o.width, dropout=0.3)}
