"""R3GAN: each fake is compared with a real one, R1 and R2 hold the critic on both sides; no normalisation, no tricks.

Residual blocks of 1x1, grouped 3x3 and 1x1 convolutions, bilinear resampling, scaled so that each block starts as the
identity. Piecewise linear throughout, so that :func:`fastgan.critic_step` takes one shared pass for loss and both penalties.

Points, whose modes lie close to each other, need lighter penalties: those that images take forbid the critic to be as steep as
it has to be between two modes. ``--data grid --batch-size 256 --steps 2000 --set width=32 z_dim=2 r1=0.003 r2=0.003`` finds
nearly all of 25.

Huang et al., "The GAN is dead; long live the GAN! A modern GAN baseline", 2024.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    loss: str = "relativistic"
    width: int = 8
    lr: float = 2e-3
    lr_decay: float = 0.3
    r1: float = 1.0
    r2: float = 1.0
    beta1: float = 0.0
    beta2: float = 0.99
    blocks: int = 1  # at each resolution
    groups: int = 2  # of the 3x3 convolutions


class Block(networks.GroupedBlock):
    """Its last convolution starts at 0: the block as the identity."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, groups)
        nn.init.zeros_(self.body[-1].weight)


def resampled(inputs: int, outputs: int, factor: float) -> list[nn.Module]:
    """The 1x1 convolution is on the smaller side, where it is cheaper; it commutes with resampling."""
    resample, convolve = nn.Upsample(scale_factor=factor, mode="bilinear"), nn.Conv2d(inputs, outputs, 1, bias=False)
    return [convolve, resample] if factor > 1 else [resample, convolve]


class Generator(nn.Module):
    """A learnt 4x4 basis weighted by the latent, then blocks; images (B, C, H, W), not bounded."""

    def __init__(self, z_dim: int, shape: networks.Shape, width: int, blocks: int, groups: int):
        super().__init__()
        n = networks.doublings(shape)
        channels = width * 2**n
        self.weights = nn.Linear(z_dim, channels, bias=False)
        self.basis = nn.Parameter(torch.randn(channels, 4, 4))
        layers = [Block(channels, groups) for _ in range(blocks)]
        for _ in range(n):
            layers += resampled(channels, channels // 2, 2)
            channels //= 2
            layers += [Block(channels, groups) for _ in range(blocks)]
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, shape[0], 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.weights(z)[:, :, None, None] * self.basis)


class Critic(nn.Sequential):
    """The generator's mirror image: at the end a 4x4 convolution of each channel, and a score (B, 1) linear in them."""

    def __init__(self, shape: networks.Shape, width: int, blocks: int, groups: int):
        channels = width
        layers = [nn.Conv2d(shape[0], channels, 1), *(Block(channels, groups) for _ in range(blocks))]
        for _ in range(networks.doublings(shape)):
            layers += resampled(channels, 2 * channels, 0.5)
            channels *= 2
            layers += [Block(channels, groups) for _ in range(blocks)]
        last = nn.Conv2d(channels, channels, 4, groups=channels, bias=False)
        super().__init__(*layers, last, nn.Flatten(), nn.Linear(channels, 1, bias=False))


class Recipe(GAN):
    Options = Options
    steps = 800
    goals: ClassVar = {"classes": 10, "fid": 6, "recall": 0.4}
    further: ClassVar = {
        "grid": (
            "--data grid --batch-size 256 --steps 2000 --set width=32 z_dim=2 r1=0.003 r2=0.003",
            {"modes": 20, "high_quality": 0.65},
        )
    }

    def build(self):
        o, shape = self.options, self.source.shape
        if len(shape) == 1:
            return super().build()
        return {
            "generator": Generator(o.z_dim, shape, o.width, o.blocks, o.groups),
            "critic": Critic(shape, o.width, o.blocks, o.groups),
        }

    def decode(self, z, label=None):
        samples = super().decode(z, label)
        return samples if len(self.source.shape) == 1 else samples.clamp(-1, 1)
