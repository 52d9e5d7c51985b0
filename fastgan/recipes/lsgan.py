"""LSGAN: squared distances of the scores to 1 for reals and 0 for fakes, so that fakes far on the right side still learn.

DCGAN's networks.

Mao et al., "Least squares generative adversarial networks", 2017.
"""

from dataclasses import dataclass

from . import dcgan


@dataclass
class Options(dcgan.Options):
    loss: str = "least_squares"


class Recipe(dcgan.Recipe):
    Options = Options
