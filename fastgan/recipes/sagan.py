"""SAGAN: self-attention between distant positions in both networks, both spectrally normalised; two learning rates, hinge.

Where the data has classes, the generator's batch norm is conditional and the critic's score a projection.

Zhang et al., "Self-attention generative adversarial networks", 2019.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fastgan
from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions


@dataclass
class Options(GANOptions):
    loss: str = "hinge"
    width: int = 16
    lr: float = 5e-4
    lr_critic: float = 1e-3
    beta1: float = 0.5  # 0 in the paper; in as few steps as here samples then miss much of what digits look like
    beta2: float = 0.9
    init: str = "xavier"


class SelfAttention(nn.Module):
    """(B, C, H, W) plus ``gain`` times what each position gathers from all; the gain starts at 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.small, self.half = max(1, channels // 8), max(1, channels // 2)
        self.project = fastgan.spectral_norm(nn.Conv2d(channels, 2 * self.small + self.half, 1, bias=False))
        self.out = fastgan.spectral_norm(nn.Conv2d(self.half, channels, 1, bias=False))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.project(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, H W, channels)
        query, key, value = projected.split([self.small, self.small, self.half], -1)
        gathered = scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0]
        return x + self.gain * self.out(gathered.transpose(1, 2).unflatten(2, x.shape[2:]))


class Recipe(GAN):
    Options = Options
    steps = 1000
    goals: ClassVar = {"classes": 10, "fid": 4, "recall": 0.3, "accuracy": 0.7}

    @property
    def conditional(self) -> bool:
        return self.source.classes > 0

    def build(self):
        o, shape = self.options, self.source.shape
        generator = networks.ResGenerator(o.z_dim, shape, o.width, self.classes, spectral=True, middle=SelfAttention)
        return {"generator": generator, "critic": networks.ResCritic(shape, o.width, self.classes, middle=SelfAttention)}
