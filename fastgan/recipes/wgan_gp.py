"""WGAN-GP: the critic estimates a distance between distributions, kept smooth by a penalty on its gradient's norm.

The penalty is :func:`fastgan.critic_step`'s. No batch norm in the critic, whose samples must not depend on each other.

Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
"""

from dataclasses import dataclass

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
