"""Conditional GAN: both networks are told the class; the critic by projection (Miyato, Koyama, 2018).

Mirza, Osindero, "Conditional generative adversarial nets", 2014.
"""

from fastgan.training.recipe import GAN


class Recipe(GAN):
    conditional = True
