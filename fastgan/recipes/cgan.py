"""Conditional GAN: both networks are told the class; the critic by projection (Miyato, Koyama, 2018).

Mirza, Osindero, "Conditional generative adversarial nets", 2014.
"""

from dataclasses import dataclass

from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    width: int = 16
    lr: float = 5e-4


class Recipe(GAN):
    Options = Options
    steps = 900
    conditional = True
