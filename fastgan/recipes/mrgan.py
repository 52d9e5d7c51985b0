"""Mode-regularised GAN: an encoder leads each real sample through the generator, which so has to know every mode.

What comes back shall be near the real sample (geometric regulariser, weight ``geometric``) and pass for real (mode
regulariser, weight ``mode``). ``reconstruction_error`` is the mean squared difference of real samples from what comes back.

Networks and steps are those of :mod:`fastgan.recipes.gan`, which finds as many of the grid's modes: with latents of two
coordinates it does not lose many. A code may lie where no latent is drawn, so that what comes back well needs not be sampled.

Che et al., "Mode regularized generative adversarial networks", 2017.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import mse_loss

from fastgan.training.recipe import GAN, GANOptions, Player


@dataclass
class Options(GANOptions):
    z_dim: int = 2  # as many as the plane has; for images 64
    lr: float = 1e-3
    lr_decay: float = 0.5
    geometric: float = 0.2
    mode: float = 0.2


class Recipe(GAN):
    Options = Options
    averaged = ("generator", "encoder")
    data = "grid"
    batch_size = 256
    steps = 2000
    goals: ClassVar = {"modes": 12, "high_quality": 0.5, "reconstruction_error": 0.3}

    def build(self):
        return super().build() | {"encoder": self.network(self.source.shape, self.options.z_dim)}

    def players(self):
        critic, _ = super().players()
        return [critic, Player("generator", ("generator", "encoder"), self.generator_loss)]

    def generator_loss(self, batch):
        o, real = self.options, batch["image"]
        back = self.generator(self.encoder(real))
        return super().generator_loss(batch) | {
            "geometric": o.geometric * mse_loss(back, real),
            "mode": o.mode * self.deceive(back, batch),
        }

    def evaluate(self, n=2000):
        real = self.source.spread(min(n, len(self.source)))["image"].to(self.device)
        error = mse_loss(self.generator(self.encoder(real)), real).item()
        return super().evaluate(n) | {"reconstruction_error": error}
