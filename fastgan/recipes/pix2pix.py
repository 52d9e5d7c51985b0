"""pix2pix: images to images from pairs, by a U-Net against a critic of patches of (result, input), and an L1 loss.

``--set task=`` says what the pairs are. ``inpaint``, ``denoise``, ``watermark``: restoration, of any images, which are
spoiled as they are drawn; ``edges``: sketch to photograph; ``pairs``, with two folders of equally many files, ``--data
SKETCHES,PHOTOGRAPHS``: each of the first becomes its counterpart, in alphabetical order. ``fastgan sample DIR --input
PICTURES`` then restores pictures that are spoiled already.

Isola et al., "Image-to-image translation with conditional adversarial networks", 2017.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fastgan import losses
from fastgan.training import degradations
from fastgan.training.data import Domains
from fastgan.training.options import Options as BaseOptions
from fastgan.training.recipe import Player
from fastgan.training.translation import PatchCritic, Translation, UNet, needs_images


@dataclass
class Options(BaseOptions):
    width: int = 16
    lr: float = 1e-3
    task: Literal["inpaint", "denoise", "watermark", "edges", "pairs"] = "inpaint"
    loss: Literal[losses.names()] = "non_saturating"
    l1: float = 100.0  # weight of |result - target|


class Recipe(Translation):
    Options = Options
    steps = 600
    goals: ClassVar = {"psnr_gain": 4.0, "told_apart": 0.8}
    further: ClassVar = {
        "denoise": ("--set task=denoise", {"psnr_gain": 3.0, "told_apart": 0.8}),
        "watermark": ("--set task=watermark", {"psnr_gain": 3.0, "told_apart": 0.8}),
        "edges": ("--set task=edges", {"psnr_gain": 3.0, "told_apart": 0.8}),  # colours are in no sketch
    }

    def build(self):
        channels, side, _ = needs_images(self.source)
        levels = min(4, (side & -side).bit_length() - 2)  # down to 2x2 or as far as it halves
        if levels < 1:
            raise ValueError(f"pix2pix halves images at least once and further to 2 pixels: size {side} does not divide")
        if self.options.task == "pairs" and isinstance(self.source, Domains):
            first, second = len(self.source.image), len(self.source.other)
            if first != second:
                raise ValueError(f"task=pairs: {first} images in one half of --data {self.source.name}, {second} in the other")
        return {
            "generator": UNet(channels, channels, self.options.width, levels),
            "critic": PatchCritic(2 * channels, self.options.width),
        }

    def pair(self, batch):
        if self.options.task != "pairs":
            return getattr(degradations, self.options.task)(batch["image"]), batch["image"]
        if "other" not in batch:
            raise ValueError(
                f'task=pairs needs a source with "image" and "other", and --data {self.source.name} has no "other"'
            )
        return batch["image"], batch["other"]

    def players(self):
        return [Player("critic", ("critic",), self.critic_loss, is_critic=True), Player("generator", ("generator",), self.loss)]

    def critic_loss(self, batch):
        inputs, target = self.pair(batch)
        with torch.no_grad():
            fake = self.generator(inputs)
        loss = self.critic_step(self.critic, target, fake, self.options.loss, real_args=(inputs,), fake_args=(inputs,))
        return {"critic": loss}

    def loss(self, batch):
        inputs, target = self.pair(batch)
        fake = self.generator(inputs)
        with torch.no_grad():
            real_scores = self.critic(target, inputs)
        adversarial = losses.generator(self.options.loss)(self.critic(fake, inputs), real_scores)
        return {"generator": adversarial, "l1": self.options.l1 * losses.reconstruction(fake, target)}

    def judge(self, inputs, target, outputs):
        """ "told_apart": the share of unseen images that the critic scores above the generator's results. Of a critic that has
        learned nothing it is one half or less, whatever the L1 loss alone has made of the generator."""
        parts = zip(inputs.split(64), target.split(64), outputs.split(64), strict=True)
        right = [
            self.critic(real, given).mean((1, 2, 3)) > self.critic(result, given).mean((1, 2, 3))
            for given, real, result in parts
        ]
        return {"told_apart": float(torch.cat(right).float().mean())}
