"""Conditional GAN: both networks are told the class; the critic by projection (Miyato, Koyama, 2018).

DCGAN's networks: without batch norm in the critic, samples of a class become alike.

Mirza, Osindero, "Conditional generative adversarial nets", 2014.
"""

from dataclasses import dataclass

from . import dcgan


@dataclass
class Options(dcgan.Options):
    init: str = "default"  # so that the embedded class weighs as much as the latent


class Recipe(dcgan.Recipe):
    Options = Options
    conditional = True
