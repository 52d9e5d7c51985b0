"""WGAN-GP: the critic estimates a distance between distributions, kept smooth by a penalty on its gradient's norm.

The penalty is :func:`fastgan.critic_step`'s. No batch norm in the critic, whose samples must not depend on each other.

Points take a lighter penalty, which lets the critic be as steep as it has to be between two modes: ``--data grid --batch-size
256 --steps 1000 --set width=32 z_dim=2 gradient_penalty=0.1 lr_decay=0.3`` finds about half of 25 modes.

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
    further: ClassVar = {
        "grid": (
            "--data grid --batch-size 256 --steps 1000 --set width=32 z_dim=2 gradient_penalty=0.1 lr_decay=0.3",
            {"modes": 8, "high_quality": 0.15},
        )
    }
