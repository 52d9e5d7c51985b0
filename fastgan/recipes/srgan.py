"""SRGAN: images 2 or 4 times as large, by residual blocks and pixel shuffle; a critic asks for detail, which L1 averages away.

The generator adds to the bicubic image. ``--set content=features`` compares features of the critic in place of pixels (the
paper's are those of a network that was trained on ImageNet), ``loss=relativistic_average`` is ESRGAN's. The pair is an
image of the source and its average over squares of ``scale`` pixels. ``fastgan sample DIR --input PICTURES`` enlarges
others. What the critic is there for is ``detail``: of the recorded run's held-out images bicubic ones have 0.37 of it.

Ledig et al., "Photo-realistic single image super-resolution using a generative adversarial network", 2017; Wang et al.,
"ESRGAN", 2018.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

import fastgan
from fastgan import losses
from fastgan.training.options import Options as BaseOptions
from fastgan.training.recipe import Player
from fastgan.training.translation import PatchCritic, Residual, Translation, needs_images


@dataclass
class Options(BaseOptions):
    width: int = 16
    lr: float = 1e-3
    lr_decay: float = 0.5
    scale: Literal[2, 4] = 2
    blocks: int = 4
    content: Literal["pixels", "features"] = "pixels"
    content_weight: float = 1.0
    adversarial: float = 0.003  # weight of the critic's opinion
    loss: Literal[losses.names()] = "relativistic_average"


def bicubic(images, scale):
    """(B, C, H, W) to (B, C, scale H, scale W)."""
    return functional.interpolate(images, scale_factor=scale, mode="bicubic", align_corners=False)


class Generator(nn.Module):
    """(B, C, h, w) to (B, C, scale h, scale w): residual blocks, then a pixel shuffle for each doubling."""

    def __init__(self, channels: int, width: int, blocks: int, scale: int):
        super().__init__()
        self.scale = scale
        doublings = [(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()) for _ in range(scale // 2)]
        self.first = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.PReLU())
        self.middle = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.last = nn.Sequential(
            *(layer for layers in doublings for layer in layers), nn.Conv2d(width, channels, 3, padding=1)
        )
        for parameter in self.last[-1].parameters():  # at first the bicubic image
            nn.init.zeros_(parameter)

    def forward(self, x):
        h = self.first(x)
        return bicubic(x, self.scale) + self.last(h + self.middle(h))


class Recipe(Translation):
    Options = Options
    steps = 700
    goals: ClassVar = {"psnr_gain": -0.2, "detail": 0.4}
    further: ClassVar = {"x4": ("--set scale=4", {"psnr_gain": -0.2, "detail": 0.3})}

    def build(self):
        (channels, side, _), o = needs_images(self.source), self.options
        if side % o.scale or side < 8:
            raise ValueError(f"srgan: a size of at least 8 that scale={o.scale} divides, not {side}")
        return {"generator": Generator(channels, o.width, o.blocks, o.scale), "critic": PatchCritic(channels, o.width)}

    def pair(self, batch):
        return functional.avg_pool2d(batch["image"], self.options.scale), batch["image"]

    def baseline(self, inputs):
        return bicubic(inputs, self.options.scale)

    def players(self):
        return [Player("critic", ("critic",), self.critic_loss, is_critic=True), Player("generator", ("generator",), self.loss)]

    def critic_loss(self, batch):
        inputs, target = self.pair(batch)
        with torch.no_grad():
            fake = self.generator(inputs)
        return {"critic": self.critic_step(self.critic, target, fake, self.options.loss)}

    def loss(self, batch):
        o, (inputs, target) = self.options, self.pair(batch)
        fake = self.generator(inputs)
        with torch.no_grad():
            real_scores = self.critic(target)
        if o.content == "features":
            content = fastgan.feature_matching(self.critic.features(target).detach(), self.critic.features(fake), paired=True)
        else:
            content = losses.reconstruction(fake, target)
        adversarial = losses.generator(o.loss)(self.critic(fake), real_scores)
        return {"generator": o.adversarial * adversarial, "content": o.content_weight * content}
