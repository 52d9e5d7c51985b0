"""WGAN: the critic estimates how far the distributions are apart; clipped weights keep it Lipschitz. RMSprop, 5 critic updates.

Arjovsky, Chintala, Bottou, "Wasserstein GAN", 2017.
"""

from dataclasses import dataclass

from torch import nn

from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    loss: str = "wasserstein"
    optimizer: str = "rmsprop"
    clip_weight: float = 0.01
    critic_updates: int = 5


class Recipe(GAN):
    Options = Options
    steps = 600

    def build(self):
        o = self.options
        critic = networks.ConvCritic(self.source.shape, o.width, norm=nn.BatchNorm2d)
        return {"generator": networks.ConvGenerator(o.z_dim, self.source.shape, o.width), "critic": critic}
