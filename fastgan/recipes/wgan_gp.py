"""WGAN-GP: the critic estimates a distance between distributions, kept smooth by a penalty on its gradient's norm.

The penalty is :func:`fastgan.critic_step`'s. No batch norm in the critic, whose samples must not depend on each other.

Points, too: ``--data ring --set width=32 gradient_penalty=1 critic_updates=5``.

Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
"""

from dataclasses import dataclass
from typing import ClassVar

from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    loss: str = "wasserstein"
    gradient_penalty: float = 10.0
    critic_updates: int = 3
    width: int = 16
    lr: float = 1e-3
    beta1: float = 0.0
    beta2: float = 0.9


class Recipe(GAN):
    Options = Options
    steps = 450
    goals: ClassVar = {"classes": 10, "fid": 2.5, "recall": 0.8}
