"""AC-GAN: the critic names the class besides judging; both players gain when a sample is recognised as its class.

The critic is not told the class. Its score and its class scores come from one forward pass and are one loss for
:func:`fastgan.critic_step`.

Odena, Olah, Shlens, "Conditional image synthesis with auxiliary classifier GANs", 2017.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastgan import losses
from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    width: int = 16
    lr: float = 5e-4
    classifier: float = 1.0  # weight of the classes' cross entropy


class Critic(networks.ConvCritic):
    """Images to [score (B, 1), class scores (B, classes)]."""

    def __init__(self, shape: networks.Shape, width: int, classes: int):
        super().__init__(shape, width, norm=nn.BatchNorm2d)
        self.classifier = nn.Linear(self.feature_count, classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.features(x)
        return [self.score(h), self.classifier(h)]


class Recipe(GAN):
    Options = Options
    steps = 900
    conditional = True

    def build(self):
        o, shape = self.options, self.source.shape
        if o.r1 or o.r2 or o.gradient_penalty:
            raise ValueError("acgan: a penalty would hold the class scores too; leave r1, r2, gradient_penalty 0, or take cgan")
        if o.loss.startswith("relativistic"):
            raise ValueError(f"acgan: loss={o.loss} compares samples of different classes; take another, or cgan")
        return {
            "generator": networks.ConvGenerator(o.z_dim, shape, o.width, self.classes),
            "critic": Critic(shape, o.width, self.classes),
        }

    def critic_loss(self, batch):
        o, label = self.options, batch["label"]

        def loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
            classes = cross_entropy(real[1], label) + cross_entropy(fake[1], label)
            return losses.get(o.loss)(real[0], fake[0]) + o.classifier * classes

        return {"critic": self.critic_step(self.critic, batch["image"], self.fake(batch), loss)}

    def generator_loss(self, batch):
        o, label = self.options, batch["label"]
        score, classes = self.critic(self.generator(self.latent(len(label)), label))
        return {"generator": losses.generator(o.loss)(score), "classes": o.classifier * cross_entropy(classes, label)}
