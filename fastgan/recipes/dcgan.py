"""DCGAN: convolutions all through, batch norm in both networks, weights from N(0, 0.02), Adam with beta1 = 0.5.

Radford, Metz, Chintala, "Unsupervised representation learning with deep convolutional generative adversarial networks", 2016.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    width: int = 16
    lr: float = 5e-4
    init: str = "normal"


class Recipe(GAN):
    Options = Options
    steps = 900
    goals: ClassVar = {"classes": 10, "fid": 4, "recall": 0.6}

    def build(self):
        o, shape = self.options, self.source.shape
        critic = networks.ConvCritic(shape, o.width, self.classes, norm=nn.BatchNorm2d)
        return {"generator": networks.ConvGenerator(o.z_dim, shape, o.width, self.classes), "critic": critic}
