"""LAPGAN: images grow from coarse to fine; at each level of a Laplacian pyramid a GAN of its own adds detail, given the coarse.

The coarsest image (side ``base``) comes from a latent. Each further level doubles the image and adds what its generator
makes of it and of a plane of noise; its critic judges (detail, coarse image). Levels are trained independently, on real
coarse images.

Denton et al., "Deep generative image models using a Laplacian pyramid of adversarial networks", 2015.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from fastgan import losses
from fastgan.training import networks
from fastgan.training.options import Options as BaseOptions
from fastgan.training.recipe import Player
from fastgan.training.recipe import Recipe as Base
from fastgan.training.translation import PatchCritic, needs_images


@dataclass
class Options(BaseOptions):
    width: int = 16
    lr: float = 5e-4
    base: int = 8  # side of the coarsest image
    loss: Literal[losses.names()] = "non_saturating"


def coarser(images):
    return functional.avg_pool2d(images, 2)


def finer(images):
    return functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


class Detail(nn.Module):
    """(coarse image at its double size (B, C, H, W), noise (B, 1, H, W)) to what it lacks."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels + 1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 5, padding=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, channels, 5, padding=2),
        )

    def forward(self, coarse, noise):
        return self.body(torch.cat([coarse, noise], 1))


class Recipe(Base):
    Options = Options
    steps = 600
    goals: ClassVar = {"fid": 5.0, "classes": 10}

    def __init__(self, options, source):
        _, side, _ = needs_images(source)
        self.sides = [side]
        while self.sides[0] > options.base:
            self.sides.insert(0, self.sides[0] // 2)
        if self.sides[0] != options.base or side != options.base << len(self.sides) - 1:
            raise ValueError(f"base={options.base} does not double to the size {side}")
        super().__init__(options, source)

    @property
    def averaged(self):
        return tuple(f"generator{side}" for side in self.sides)

    def build(self):
        o, channels = self.options, self.source.shape[0]
        shape = (channels, o.base, o.base)
        built = {
            f"generator{o.base}": networks.ConvGenerator(o.z_dim, shape, 4 * o.width),
            f"critic{o.base}": networks.ConvCritic(shape, 4 * o.width),
        }
        for side in self.sides[1:]:
            built[f"generator{side}"] = Detail(channels, 2 * o.width)
            built[f"critic{side}"] = PatchCritic(2 * channels, 2 * o.width, norm=None)
        return built

    def players(self):
        critics = [Player(f"critic{s}", (f"critic{s}",), partial(self.critic_loss, s), is_critic=True) for s in self.sides]
        return critics + [Player(f"generator{s}", (f"generator{s}",), partial(self.loss, s)) for s in self.sides]

    def level(self, side, batch):
        """(real image or detail of this level, arguments of its critic: the coarse image, but at the first level)."""
        image = batch["image"]
        while image.shape[-1] > side:
            image = coarser(image)
        if side == self.sides[0]:
            return image, ()
        coarse = finer(coarser(image))
        return image - coarse, (coarse,)

    def draw(self, side, n, args):
        generator = self.networks[f"generator{side}"]
        if not args:
            return generator(self.latent(n))
        return generator(*args, torch.randn(n, 1, side, side, device=self.device))

    def critic_loss(self, side, batch):
        real, args = self.level(side, batch)
        with torch.no_grad():
            fake = self.draw(side, len(real), args)
        critic = self.networks[f"critic{side}"]
        return {f"critic{side}": self.critic_step(critic, real, fake, self.options.loss, real_args=args, fake_args=args)}

    def loss(self, side, batch):
        real, args = self.level(side, batch)
        critic = self.networks[f"critic{side}"]
        with torch.no_grad():
            real_scores = critic(real, *args)
        fake_scores = critic(self.draw(side, len(real), args), *args)
        return {f"generator{side}": losses.generator(self.options.loss)(fake_scores, real_scores)}

    def grow(self, n):
        """``n`` samples at each side, coarse to fine."""
        images = [self.draw(self.sides[0], n, ())]
        for side in self.sides[1:]:
            coarse = finer(images[-1])
            images.append((coarse + self.draw(side, n, (coarse,))).clamp(-1, 1))
        return images

    def sample(self, n):
        return self.grow(n)[-1]

    def show(self, batch, n):
        """Columns of one sample from coarse to fine."""
        side = self.sides[-1]
        return torch.stack([functional.interpolate(images, (side, side)) for images in self.grow(n // 4)], 1)
