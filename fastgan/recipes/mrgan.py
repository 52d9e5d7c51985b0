"""Mode-regularised GAN: an encoder leads each real sample through the generator, which so has to know every mode.

What comes back shall be near the real sample (geometric regulariser, weight ``geometric``) and pass for real (mode
regulariser, weight ``mode``).

Che et al., "Mode regularized generative adversarial networks", 2017.
"""

from dataclasses import dataclass

from torch.nn.functional import mse_loss

from fastgan.training.recipe import GAN, GANOptions, Player


@dataclass
class Options(GANOptions):
    z_dim: int = 16
    geometric: float = 1.0
    mode: float = 0.5


class Recipe(GAN):
    Options = Options
    averaged = ("generator", "encoder")
    data = "grid"
    batch_size = 256
    steps = 3000

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
