"""WGAN: the critic estimates how far the distributions are apart; clipped weights keep it Lipschitz. RMSprop.

DCGAN's networks.

Arjovsky, Chintala, Bottou, "Wasserstein GAN", 2017.
"""

from dataclasses import dataclass
from typing import ClassVar

from . import dcgan


@dataclass
class Options(dcgan.Options):
    loss: str = "wasserstein"
    optimizer: str = "rmsprop"
    lr: float = 1e-3
    clip_weight: float = 0.01
    critic_updates: int = 3
    init: str = "default"


class Recipe(dcgan.Recipe):
    Options = Options
    steps = 450
    goals: ClassVar = {"classes": 9, "fid": 7, "recall": 0.5}
