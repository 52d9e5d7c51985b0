"""StyleGAN2: a mapped latent scales the channels of every convolution, and noise adds the detail that no latent decides.

Demodulated weights, skip connections to the image, style mixing, lazy R1 and path length penalty
(:func:`fastgan.path_length_penalty`), minibatch standard deviation (:class:`fastgan.nn.MinibatchStdDev`; samples then
interact, so that R1 takes double backward), truncated samples, equalised learning rates. ``--set style=adain`` normalises
feature maps instead of weights, as the first StyleGAN.

Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020; "A style-based generator architecture", 2019.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import fastgan
from fastgan.training import networks
from fastgan.training.recipe import GAN, GANOptions, Player


@dataclass
class Options(GANOptions):
    width: int = 8
    lr: float = 2e-3
    beta1: float = 0.0
    beta2: float = 0.99
    r1: float = 10.0  # of 1 two seeds in three lost classes
    penalty_every: int = 8
    style: Literal["demodulated", "adain"] = "demodulated"
    mapping_layers: int = 4
    mixing: float = 0.9  # share of training samples of two latents, one for the coarse layers and one for the fine
    path_length: float = 1.0  # weight
    path_every: int = 4
    truncation: float = 0.9  # samples' styles are this share of the way from the mean style; 1: not truncated


class Scaled(nn.Module):
    """Parametrization: the weight is a multiple of the parameter."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def equalised(layer: nn.Module, rate: float = 1.0, bias: float = 0.0) -> nn.Module:
    """Parameters of N(0, 1) that are scaled when used, so that Adam moves all layers alike, this one at ``rate``."""
    fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=1 / rate)
    nn.init.constant_(layer.bias, bias)
    parametrize.register_parametrization(layer, "weight", Scaled(rate / fan_in**0.5))
    return layer


def activation(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, 0.2) * 2**0.5  # keeps the variance


class Mapping(nn.Module):
    """Latent (B, z_dim) to style (B, z_dim); remembers the mean style."""

    def __init__(self, z_dim: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(equalised(nn.Linear(z_dim, z_dim), rate=0.1) for _ in range(layers))
        self.register_buffer("mean", torch.zeros(z_dim))

    def forward(self, z: Tensor) -> Tensor:
        style = functional.normalize(z) * z.shape[1] ** 0.5
        for layer in self.layers:
            style = activation(layer(style))
        if self.training:
            self.mean.lerp_(style.detach().mean(0).to(self.mean.dtype), 0.01)
        return style


class StyledConv(nn.Module):
    """3x3 convolution with a weight of its own for each sample: the style scales its input channels, and output channels
    are brought back to unit variance, which is done to the feature maps around one convolution for all."""

    def __init__(self, inputs: int, outputs: int, z_dim: int, adain: bool, up: bool = False):
        super().__init__()
        self.adain, self.up = adain, up
        self.conv = equalised(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.style = equalised(nn.Linear(z_dim, 2 * outputs if adain else inputs), bias=0.0 if adain else 1.0)
        self.noise = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        style = self.style(style)[:, :, None, None]
        if self.up:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear")
        weight, bias = self.conv.weight, self.conv.bias[:, None, None]
        if not self.adain:
            x = functional.conv2d(x * style, weight, padding=1)
            x = x * (style.flatten(1).square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()[:, :, None, None]
        else:
            x = functional.conv2d(x, weight, padding=1)
        x = activation(x + self.noise * torch.randn_like(x[:, :1]) + bias)
        if self.adain:
            gain, shift = style.chunk(2, 1)
            x = functional.instance_norm(x) * (1 + gain) + shift
        return x


class Synthesis(nn.Module):
    """Styles (B, layers, z_dim) to images (B, C, H, W), not bounded: each resolution adds to the image."""

    def __init__(self, z_dim: int, shape: networks.Shape, width: int, adain: bool):
        super().__init__()
        n = networks.doublings(shape)
        channels = [width * 2 ** (n - i) for i in range(n + 1)]
        self.start = nn.Parameter(torch.randn(channels[0], 4, 4))
        convs = [StyledConv(channels[0], channels[0], z_dim, adain)]
        for before, after in pairwise(channels):
            convs += [StyledConv(before, after, z_dim, adain, up=True), StyledConv(after, after, z_dim, adain)]
        self.convs = nn.ModuleList(convs)
        self.images = nn.ModuleList(equalised(nn.Conv2d(c, shape[0], 1)) for c in channels)
        self.register_buffer("path_length", torch.zeros(()))  # running mean

    @property
    def layers(self) -> int:
        return len(self.convs)

    def forward(self, styles: Tensor) -> Tensor:
        x = self.convs[0](self.start.expand(len(styles), -1, -1, -1), styles[:, 0])
        image = self.images[0](x)
        for i, to_image in enumerate(self.images[1:]):
            for k in (2 * i + 1, 2 * i + 2):
                x = self.convs[k](x, styles[:, k])
            image = functional.interpolate(image, scale_factor=2, mode="bilinear") + to_image(x)
        return image


class CriticBlock(nn.Module):
    """Two convolutions and a shortcut to half the side."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = equalised(nn.Conv2d(inputs, inputs, 3, padding=1))
        self.second = equalised(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.shortcut = equalised(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = activation(self.second(functional.avg_pool2d(activation(self.first(x)), 2)))
        return (h + self.shortcut(functional.avg_pool2d(x, 2))) * 0.5**0.5


class Critic(nn.Module):
    """Images to scores (B, 1)."""

    def __init__(self, shape: networks.Shape, width: int):
        super().__init__()
        channels = width
        self.first, blocks = equalised(nn.Conv2d(shape[0], width, 1)), []
        for _ in range(networks.doublings(shape)):
            blocks.append(CriticBlock(channels, 2 * channels))
            channels *= 2
        self.blocks, self.deviation = nn.Sequential(*blocks), fastgan.nn.MinibatchStdDev(4)
        self.last = equalised(nn.Conv2d(channels + 1, channels, 3, padding=1))
        self.hidden, self.score = equalised(nn.Linear(16 * channels, channels)), equalised(nn.Linear(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(activation(self.first(x)))
        x = activation(self.last(self.deviation(x))).flatten(1)
        return self.score(activation(self.hidden(x)))


class Recipe(GAN):
    Options = Options
    steps = 900
    goals: ClassVar = {"classes": 9, "fid": 11, "recall": 0.15}
    averaged = ("mapping", "synthesis")

    def build(self):
        o, shape = self.options, self.source.shape
        return {
            "mapping": Mapping(o.z_dim, o.mapping_layers),
            "synthesis": Synthesis(o.z_dim, shape, o.width, o.style == "adain"),
            "critic": Critic(shape, o.width),
        }

    def players(self):
        critic, _ = super().players()
        return [critic, Player("generator", ("mapping", "synthesis"), self.generator_loss)]

    def styles(self, n: int) -> Tensor:
        """(n, layers, z_dim), mixed: from a random layer on some samples have the style of another latent."""
        o, layers = self.options, len(self.networks["synthesis"].convs)
        style, other = self.mapping(self.latent(2 * n))[:, None].chunk(2)
        swapped = torch.arange(layers, device=self.device) >= torch.randint(1, layers, (n, 1), device=self.device)
        swapped &= torch.rand(n, 1, device=self.device) < o.mixing
        return torch.where(swapped[:, :, None], other, style)

    @torch.no_grad()
    def fake(self, batch):
        return self.synthesis(self.styles(len(batch["image"])))

    def generator_loss(self, batch):
        o, n = self.options, len(batch["image"])
        terms = {"generator": self.deceive(self.synthesis(self.styles(n)), batch)}
        if o.path_length and self.step % o.path_every == 0:
            weight, mean = o.path_length * o.path_every, self.synthesis.path_length
            styles = self.styles(max(1, n // 2))
            terms["path_length"] = fastgan.path_length_penalty(self.synthesis, styles, weight=weight, mean=mean)
        return terms

    def decode(self, z, label=None):
        mean = self.mapping.mean
        style = mean + self.options.truncation * (self.mapping(z) - mean)
        images = self.synthesis(style[:, None].expand(-1, len(self.synthesis.convs), -1))
        return images.clamp(-1, 1)
