"""VAE/GAN: a variational autoencoder whose reconstruction error is measured in features of the critic, and who is judged by it.

The encoder minimises KL + feature error, the generator (the decoder) weight x feature error + its side of the game, for
both reconstructions and samples from the prior.

Larsen et al., "Autoencoding beyond pixels using a learned similarity metric", 2016.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import fastgan
from fastgan import losses
from fastgan.training import metrics, networks
from fastgan.training.recipe import GAN, GANOptions, Player


@dataclass
class Options(GANOptions):
    width: int = 16
    z_dim: int = 16
    kl: float = 0.001  # weight of KL in the encoder's loss, where the feature error, a mean, has weight 1
    similarity: float = 10.0  # weight of the feature error in the generator's loss


class Recipe(GAN):
    Options = Options
    steps = 800
    averaged = ("generator", "encoder")
    held_out = 0.1
    goals: ClassVar = {"fid": 3.0, "psnr": 15.0}

    def build(self):
        o, shape = self.options, self.source.shape
        return {
            "encoder": networks.ConvCritic(shape, o.width, norm=torch.nn.BatchNorm2d, outputs=2 * o.z_dim),
            "generator": networks.ConvGenerator(o.z_dim, shape, o.width),
            "critic": networks.ConvCritic(shape, o.width),
        }

    def players(self):
        critic, generator = super().players()
        return [critic, Player("encoder", ("encoder",), self.encoder_loss), generator]

    def encode(self, images):
        """Mean and log variance of the code's distribution, (B, z_dim) each."""
        return self.encoder(images).chunk(2, 1)

    def both(self, real):
        """(reconstructions of ``real``, what the critic is shown: half of them and as many samples, KL of the codes)."""
        mean, log_variance = self.encode(real)
        code, half = mean + (log_variance / 2).exp() * torch.randn_like(mean), len(real) // 2
        returned = self.generator(code)
        fake = torch.cat([returned[:half], self.generator(self.latent(len(real) - half))])
        return returned, fake, losses.kl(mean, log_variance)

    def error(self, real, returned):
        """Mean squared difference of the critic's features."""
        return fastgan.feature_matching(self.critic.features(real).detach(), self.critic.features(returned), p=2, paired=True)

    def critic_loss(self, batch):
        real = batch["image"]
        with torch.no_grad():
            _, fake, _ = self.both(real)
        return {"critic": self.critic_step(self.critic, real, fake, self.options.loss, **self.penalties())}

    def encoder_loss(self, batch):
        returned, _, kl = self.both(batch["image"])
        return {"kl": self.options.kl * kl, "similarity": self.error(batch["image"], returned)}

    def generator_loss(self, batch):
        o, real = self.options, batch["image"]
        returned, fake, _ = self.both(real)
        return {"generator": self.deceive(fake, batch), "similarity": o.similarity * self.error(real, returned)}

    def reconstruct(self, images):
        return self.generator(self.encode(images)[0])

    def evaluate(self, n=2000):
        """And "psnr", "ssim" of reconstructions of images that were not trained on."""
        found = super().evaluate(n)
        with torch.no_grad():
            image = self.unseen(n)["image"]
            return found | metrics.paired(self.reconstruct(image), image, self.perceptual)

    def show(self, batch, n):
        """Samples; below them images and their reconstructions."""
        images = self.unseen(n // 5)["image"]
        samples = self.sample(4 * len(images)).unflatten(0, (-1, 4))
        return torch.cat([samples, torch.stack([images, self.reconstruct(images)], 1)], 1)
