"""A recipe that has one of everything, and trains in milliseconds: what the trainer's tests train.

Three players; a generator with batch norm; a critic that the critic's step learns to run as one batch (a perceptron) and one
with spectral norm; a lazy penalty; an encoder that is trained every fourth step and whose second half takes no part.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fastgan
from fastgan.training.recipe import GAN, GANOptions, Player
from fastgan.training.trainer import Trainer


@dataclass
class Options(GANOptions):
    z_dim: int = 4
    loss: str = "wasserstein"
    r1: float = 0.5
    r2: float = 0.5
    penalty_every: int = 3
    critic_updates: int = 2
    noise: bool = True  # False: the latent is a function of the batch, so that samples are the same in any process


class Recipe(GAN):
    Options = Options
    averaged = ("generator", "encoder")

    def build(self):
        norm = [nn.BatchNorm1d(16)] if self.options.noise else []
        normed = nn.Sequential(fastgan.spectral_norm(nn.Linear(2, 16)), nn.ReLU(), fastgan.spectral_norm(nn.Linear(16, 1)))
        return {
            "generator": nn.Sequential(nn.Linear(4, 16), *norm, nn.ReLU(), nn.Linear(16, 2)),
            "critic": nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)),
            "normed": normed,
            "encoder": nn.ModuleDict({"used": nn.Linear(2, 4), "unused": nn.Linear(2, 4)}),
        }

    def players(self):
        return [
            Player("critics", ("critic", "normed"), self.critic_loss, updates=2, is_critic=True),
            Player("generator", ("generator",), self.generator_loss),
            Player("encoder", ("encoder",), self.encoder_loss, every=4),
        ]

    def z(self, real):
        return self.latent(len(real)) if self.options.noise else torch.cat([real, real.flip(1)], 1)

    def critic_loss(self, batch):
        o, real = self.options, batch["image"]
        with torch.no_grad():
            fake = self.generator(self.z(real))
        due = o.penalty_every if self.step % o.penalty_every == 0 else 0
        return {
            "critic": self.critic_step(self.critic, real, fake, o.loss, r1=due * o.r1, r2=due * o.r2),
            "normed": self.critic_step(self.normed, real, fake, "hinge", r1=due * o.r1),
        }

    def generator_loss(self, batch):
        fake = self.generator(self.z(batch["image"]))
        return {"generator": -self.critic(fake).mean() - self.normed(fake).mean()}

    def encoder_loss(self, batch):
        z = self.z(batch["image"])
        with torch.no_grad():
            fake = self.generator(z)
        return {"encoder": (self.encoder["used"](fake) - z).square().mean()}


def trainer(
    out: Path | None, steps: int = 40, processes=None, batch_size: int = 8, amp=False, compile=False, **options
) -> Trainer:
    from fastgan.training import data, parallel

    source = data.load("ring", 16)
    return Trainer(
        Recipe, Options(**options), source, batch_size=batch_size, steps=steps, out=out, amp=amp, compile=compile,
        processes=processes or parallel.ALONE,
    )  # fmt: skip


def train(out: Path, steps: int = 40, after_step=None) -> Trainer:
    """From the newest checkpoint in ``out``, if there is one."""
    made = trainer(out, steps)
    made.resume()
    made.run(save_every=7, sample_every=0, log_every=5, after_step=after_step)
    return made


if __name__ == "__main__":  # python small_recipe.py OUT: slowly, in a process that is to be killed
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), 10**6, lambda made: time.sleep(0.02))
