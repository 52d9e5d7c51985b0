"""Networks that recipes share: perceptrons for points, convolutions for square images. A recipe writes only what is special."""

import math

import torch
from torch import Tensor, nn

import fastgan

Shape = tuple[int, ...]


def doublings(shape: Shape, smallest: int = 4) -> int:
    """How often ``smallest`` doubles to the side of images (C, H, W). ValueError if it never does."""
    side = shape[-1]
    steps = round(math.log2(side / smallest)) if side >= smallest else -1
    if len(shape) != 3 or shape[-2] != side or smallest * 2**steps != side:
        raise ValueError(f"images of shape {shape}: expected square ones with a side of {smallest} times a power of 2 (--size)")
    return steps


class Perceptron(nn.Module):
    """Three hidden layers from ``inputs`` to ``outputs``, numbers or shapes. A label of ``classes`` is embedded."""

    def __init__(self, inputs: int | Shape, outputs: int | Shape, hidden: int, classes: int = 0):
        super().__init__()
        self.outputs = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        features = inputs if isinstance(inputs, int) else math.prod(inputs)
        self.label = nn.Embedding(classes, hidden // 4) if classes else None
        features += hidden // 4 if classes else 0
        layers = []
        for _ in range(3):
            layers += [nn.Linear(features, hidden), nn.LeakyReLU(0.2)]
            features = hidden
        self.body = nn.Sequential(*layers, nn.Linear(hidden, math.prod(self.outputs)))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        if self.label is not None:
            x = torch.cat([x, self.label(label)], 1)
        return self.body(x).unflatten(1, self.outputs)


class ConvGenerator(nn.Module):
    """Latent (B, z_dim) to images in [-1, 1]: 4x4, then doubled by transposed convolutions with batch norm and ReLU, as in
    DCGAN (Radford et al., 2016). A label of ``classes`` is embedded and appended to the latent."""

    def __init__(self, z_dim: int, shape: Shape, width: int, classes: int = 0):
        super().__init__()
        n = doublings(shape)
        self.label = nn.Embedding(classes, z_dim) if classes else None
        channels = width * 2**n
        layers = [
            nn.Linear(z_dim * (2 if classes else 1), channels * 16, bias=False),
            nn.Unflatten(1, (channels, 4, 4)),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
        for _ in range(n):
            layers += [
                nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(channels // 2),
                nn.ReLU(),
            ]
            channels //= 2
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, shape[0], 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.body(z if self.label is None else torch.cat([z, self.label(label)], 1))


class ConvCritic(nn.Module):
    """Images to one score (B, 1): convolutions halve down to 4x4. A label enters by projection (Miyato, Koyama, 2018).

    ``norm``: a factory of a layer over c channels, after every convolution but the first. ``spectral``: all weights are
    spectrally normalised. ``features`` gives what the score is linear in.
    """

    def __init__(self, shape: Shape, width: int, classes: int = 0, norm=None, spectral: bool = False):
        super().__init__()
        normalised = fastgan.spectral_norm if spectral else lambda layer: layer
        channels = width
        layers = [normalised(nn.Conv2d(shape[0], width, 3, padding=1)), nn.LeakyReLU(0.2)]
        for _ in range(doublings(shape)):
            layers.append(normalised(nn.Conv2d(channels, channels * 2, 4, 2, 1)))
            channels *= 2
            layers += [*([norm(channels)] if norm else []), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.feature_count = channels * 16
        self.score = normalised(nn.Linear(self.feature_count, 1))
        self.label = normalised(nn.Embedding(classes, self.feature_count)) if classes else None

    def features(self, x: Tensor) -> Tensor:
        """(B, feature_count)."""
        return self.body(x)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.features(x)
        score = self.score(h)
        if self.label is not None:
            score = score + (self.label(label) * h).sum(1, keepdim=True) / math.sqrt(self.feature_count)
        return score


INITIALISERS = {
    "normal": lambda weight: nn.init.normal_(weight, 0.0, 0.02),
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def initialise(module: nn.Module, how: str) -> None:
    """Draw the weights of all linear, convolution and embedding layers anew; biases become 0. "default" leaves torch's."""
    if how == "default":
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            weight = getattr(layer, "parametrizations", {"weight": None})["weight"]
            with torch.no_grad():
                INITIALISERS[how](layer.weight if weight is None else weight.original)
                if getattr(layer, "bias", None) is not None:
                    layer.bias.zero_()
