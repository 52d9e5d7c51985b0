"""BiGAN, or ALI: an encoder learns with the generator; the critic tells pairs (image, code) from pairs (generated, latent).

At the optimum the encoder inverts the generator. What it can't invert is unlike the training data: ``anomaly_score`` finds
defects. ``--set left_out=8`` trains without the class "8" and takes it for the anomaly; otherwise anomalies are samples
with a defect, a square that is inverted. ``reconstruction`` adds ALICE's term, |generator(encoder(x)) - x|.

Donahue, Krähenbühl, Darrell, "Adversarial feature learning", 2017; Dumoulin et al., "Adversarially learned inference",
2017; Li et al., "ALICE", 2017; Zenati et al., "Efficient GAN-based anomaly detection", 2018, for the score.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from fastgan import losses
from fastgan.training import degradations, networks
from fastgan.training.data import Part
from fastgan.training.recipe import GAN, GANOptions, Player


@dataclass
class Options(GANOptions):
    width: int = 16
    z_dim: int = 32
    reconstruction: float = 1.0  # weight of |generator(encoder(x)) - x|; 0: BiGAN as it is in the paper
    left_out: str = ""  # name of a class that is not trained on, and is what anomalies are


class Recipe(GAN):
    Options = Options
    steps = 1000
    averaged = ("generator", "encoder")
    held_out = 0.2
    goals: ClassVar = {"fid": 4.0, "auc": 0.8}
    further: ClassVar = {"left_out": ("--set left_out=8", {"auc": 0.7})}

    def build(self):
        o, shape = self.options, self.source.shape
        if o.left_out and o.left_out not in self.source.class_names:
            known = ", ".join(self.source.class_names) or "none"
            raise ValueError(f"left_out={o.left_out}: no such class; --data {self.source.name} has {known}")
        return {
            "generator": networks.ConvGenerator(o.z_dim, shape, o.width),
            "encoder": networks.ConvCritic(shape, o.width, norm=torch.nn.BatchNorm2d, outputs=o.z_dim),
            "critic": networks.JointCritic(shape, o.width, o.z_dim),
        }

    def players(self):
        critic, _ = super().players()
        return [critic, Player("generator", ("generator", "encoder"), self.generator_loss)]

    def critic_loss(self, batch):
        real, z = batch["image"], self.latent(len(batch["image"]))
        with torch.no_grad():
            fake, code = self.generator(z), self.encoder(real)
        pairs = {"real_args": (code,), "fake_args": (z,)}
        return {"critic": self.critic_step(self.critic, real, fake, self.options.loss, **pairs, **self.penalties())}

    def generator_loss(self, batch):
        o, real = self.options, batch["image"]
        z = self.latent(len(real))
        code = self.encoder(real)
        # the critic's game with the roles exchanged: both kinds of pairs have a gradient here
        terms = {"generator": losses.get(o.loss)(self.critic(self.generator(z), z), self.critic(real, code))}
        if o.reconstruction:
            terms["reconstruction"] = o.reconstruction * losses.reconstruction(self.generator(code), real)
        return terms

    # --- anomalies ---------------------------------------------------------------------------------------------------

    @cached_property
    def training_source(self):
        kept, o = super().training_source, self.options
        if not o.left_out:
            return kept
        label = self.source.class_names.index(o.left_out)
        return Part(kept, [i for i in range(len(kept)) if int(kept[i]["label"]) != label])

    def reconstruct(self, images):
        return self.generator(self.encoder(images))

    def anomaly_score(self, images, features=0.1):
        """(B,): how unlike the training data each image is. Mean |x - G(E(x))| over its pixels, and ``features`` times the same
        over the critic's features of (x, E(x)) and (G(E(x)), E(x))."""
        code = self.encoder(images)
        returned = self.generator(code)
        apart = (self.critic.features(images, code) - self.critic.features(returned, code)).abs().mean(1)
        return (images - returned).abs().flatten(1).mean(1) + features * apart

    def anomalies(self, n):
        """(images, which of them are anomalies), none of them trained on."""
        batch, o = self.unseen(n), self.options
        image = batch["image"]
        if o.left_out:
            return image, batch["label"] == self.source.class_names.index(o.left_out)
        is_defect = torch.arange(2 * len(image), device=image.device) >= len(image)
        return torch.cat([image, degradations.scratch(image)]), is_defect

    def evaluate(self, n=2000):
        """And "auc" of ``anomaly_score``: the probability that an anomaly has a higher one than a sample without defect."""
        found = super().evaluate(n)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            images, is_anomaly = self.anomalies(n)
            scores = torch.cat([self.anomaly_score(part) for part in images.split(256)])
        return found | {"auc": auc(scores[is_anomaly], scores[~is_anomaly])}

    def show(self, batch, n):
        """Samples; and defects below what the encoder and the generator make of them."""
        images = degradations.scratch(self.unseen(n // 5)["image"])
        samples = self.sample(4 * len(images)).unflatten(0, (-1, 4))
        return torch.cat([samples, torch.stack([images, self.reconstruct(images)], 1)], 1)


def auc(high, low):
    """Area under the receiver's curve: P(high > low) + P(high = low) / 2 of scores (N,) and (M,)."""
    return float(((high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()).mean())
