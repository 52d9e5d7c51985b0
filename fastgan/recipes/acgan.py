"""AC-GAN: the critic names the class besides judging; both players gain when a sample is recognised as its class.

The critic is not told the class; it has a second output for it, which ``score_fn`` keeps from R1 and from the judging.

Odena, Olah, Shlens, "Conditional image synthesis with auxiliary classifier GANs", 2017.
"""

from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgan import losses
from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    width: int = 16
    lr: float = 1e-3
    r1: float = 1.0
    classifier: float = 0.3  # weight of the classes' cross entropy


class Critic(networks.ConvCritic):
    """Images to (score (B, 1), class scores (B, classes))."""

    def __init__(self, shape: networks.Shape, width: int, classes: int):
        super().__init__(shape, width)
        self.classifier = nn.Linear(self.feature_count, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.score(h), self.classifier(h)


class Recipe(GAN):
    Options = Options
    steps = 700
    goals: ClassVar = {"classes": 10, "fid": 3, "recall": 0.3, "accuracy": 0.8}
    conditional = True

    def build(self):
        o, shape = self.options, self.source.shape
        if o.loss.startswith("relativistic"):
            raise ValueError(f"acgan: loss={o.loss} compares samples of different classes; take another, or cgan")
        return {
            "generator": networks.ConvGenerator(o.z_dim, shape, o.width, self.classes),
            "critic": Critic(shape, o.width, self.classes),
        }

    def critic_loss(self, batch):
        o, real, fake, label = self.options, batch["image"], self.fake(batch), batch["label"]
        _, classes = self.critic(torch.cat([real, fake]))
        return {
            "critic": self.critic_step(self.critic, real, fake, o.loss, score_fn=itemgetter(0), **self.penalties()),
            "classifier": o.classifier * 2 * losses.auxiliary(classes, label.repeat(2)),
        }

    def generator_loss(self, batch):
        o, label = self.options, batch["label"]
        score, classes = self.critic(self.generator(self.latent(len(label)), label))
        return {"generator": losses.generator(o.loss)(score), "classes": o.classifier * losses.auxiliary(classes, label)}
