"""Conditional GAN: both networks are told the class; the critic by projection (Miyato, Koyama, 2018).

R1 keeps samples of a class apart (Mescheder et al., 2018): without it they become alike.

Mirza, Osindero, "Conditional generative adversarial nets", 2014.
"""

from dataclasses import dataclass
from typing import ClassVar

from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    width: int = 16
    lr: float = 1e-3
    r1: float = 1.0


class Recipe(GAN):
    Options = Options
    conditional = True
    steps = 800
    goals: ClassVar = {"classes": 10, "fid": 3, "recall": 0.3, "accuracy": 0.8}
    further: ClassVar = {"glyphs": ("--data glyphs --steps 1500", {"classes": 60, "fid": 2, "accuracy": 0.5})}
