"""Networks that recipes share: perceptrons for points, convolutions for square images. A recipe writes only what is special."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    """Three hidden layers from ``inputs`` to ``outputs``, numbers or shapes. A label of ``classes`` is embedded.
    ``dropout``: probability of a hidden unit to be left out. ReLU and not a leaky one, with which critics of points take twice
    the steps to become steep between modes."""

    def __init__(self, inputs: int | Shape, outputs: int | Shape, hidden: int, classes: int = 0, dropout: float = 0.0):
        super().__init__()
        self.outputs = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        features = inputs if isinstance(inputs, int) else math.prod(inputs)
        self.label = nn.Embedding(classes, hidden // 4) if classes else None
        features += hidden // 4 if classes else 0
        layers = []
        for _ in range(3):
            layers += [nn.Linear(features, hidden), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
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
        if classes:
            nn.init.normal_(self.label.weight, std=0.2)  # less than the latent: at 1, samples of a class come out alike
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
    """Images to a score (B, 1): convolutions halve down to 4x4. A label enters by projection (Miyato, Koyama, 2018).

    ``norm``: a factory of a layer over c channels, after every convolution but the first. ``features`` gives what the score is
    linear in. ``outputs``: more numbers than one, for an encoder.
    """

    def __init__(self, shape: Shape, width: int, classes: int = 0, norm=None, outputs: int = 1):
        super().__init__()
        channels = width
        layers = [nn.Conv2d(shape[0], width, 3, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(doublings(shape)):
            layers.append(nn.Conv2d(channels, channels * 2, 4, 2, 1))
            channels *= 2
            layers += [*([norm(channels)] if norm else []), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.feature_count = channels * 16
        self.score = nn.Linear(self.feature_count, outputs)
        self.label = nn.Embedding(classes, self.feature_count) if classes else None
        if classes:
            nn.init.normal_(self.label.weight, std=0.02)

    def features(self, x: Tensor) -> Tensor:
        """(B, feature_count)."""
        return self.body(x)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.features(x)
        score = self.score(h)
        if self.label is not None:
            score = score + (self.label(label) * h).sum(1, keepdim=True) / math.sqrt(self.feature_count)
        return score


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and shift depend on the class (de Vries et al., 2017); the ordinary one without ``classes``."""

    def __init__(self, channels: int, classes: int = 0):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not classes)
        self.label = nn.Embedding(classes, 2 * channels) if classes else None
        if classes:
            nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.label is None:
            return x
        gain, shift = self.label(label)[:, :, None, None].chunk(2, 1)
        return x * (1 + gain) + shift


class UpBlock(nn.Module):
    """Residual block that doubles the side: batch norm, ReLU, 3x3 convolution, twice (Miyato et al., 2018)."""

    def __init__(self, channels: int, classes: int, normalised):
        super().__init__()
        self.norms = nn.ModuleList(ConditionalBatchNorm(channels, classes) for _ in range(2))
        self.convs = nn.ModuleList(normalised(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2))
        self.shortcut = normalised(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = functional.interpolate(functional.relu(self.norms[0](x, label)), scale_factor=2)
        h = self.convs[1](functional.relu(self.norms[1](self.convs[0](h), label)))
        return h + functional.interpolate(self.shortcut(x), scale_factor=2)  # after the 1x1 convolution: the same, cheaper


class ResGenerator(nn.Module):
    """Latent to images in [-1, 1] by :class:`UpBlock` from 4x4. ``middle``: factory of a layer over c channels at half size."""

    def __init__(self, z_dim: int, shape: Shape, channels: int, classes: int = 0, spectral: bool = False, middle=None):
        super().__init__()
        normalised = fastgan.spectral_norm if spectral else lambda layer: layer
        self.start = nn.Sequential(normalised(nn.Linear(z_dim, channels * 16)), nn.Unflatten(1, (channels, 4, 4)))
        self.blocks = nn.ModuleList(UpBlock(channels, classes, normalised) for _ in range(doublings(shape)))
        self.middle = middle(channels) if middle else None
        self.norm = nn.BatchNorm2d(channels)
        self.image = normalised(nn.Conv2d(channels, shape[0], 3, padding=1))

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.start(z)
        for i, block in enumerate(self.blocks):
            if self.middle is not None and i == len(self.blocks) - 1:
                h = self.middle(h)
            h = block(h, label)
        return self.image(functional.relu(self.norm(h))).tanh()


class GroupedBlock(nn.Module):
    """R3GAN's residual block: 1x1, grouped 3x3 and 1x1 convolutions, twice as wide inside, no normalisation."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(wide, wide, 3, padding=1, groups=groups),
            nn.LeakyReLU(0.2),
            nn.Conv2d(wide, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DownBlock(nn.Module):
    """Residual block of two spectrally normalised convolutions; ``half`` halves the side. ``first``: of an image, no ReLU."""

    def __init__(self, inputs: int, channels: int, half: bool, first: bool = False):
        super().__init__()
        self.first, self.half = first, half
        sizes = (inputs, channels), (channels, channels)
        self.convs = nn.ModuleList(fastgan.spectral_norm(nn.Conv2d(*size, 3, padding=1)) for size in sizes)
        self.shortcut = fastgan.spectral_norm(nn.Conv2d(inputs, channels, 1)) if inputs != channels or half else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.convs[1](functional.relu(self.convs[0](x if self.first else functional.relu(x))))
        if self.half:
            h, x = functional.avg_pool2d(h, 2), functional.avg_pool2d(x, 2)
        return h + self.shortcut(x)


class ResCritic(nn.Module):
    """Images to a score (B, 1) by :class:`DownBlock` to 4x4 and the sum over positions; a label enters by projection.
    ``middle``: factory of a layer over c channels at half size."""

    def __init__(self, shape: Shape, channels: int, classes: int = 0, middle=None):
        super().__init__()
        n = doublings(shape)
        blocks = [DownBlock(shape[0], channels, half=n > 0, first=True)]
        blocks += [middle(channels)] if middle else []
        blocks += [DownBlock(channels, channels, half=i < n) for i in range(1, n + 2)]
        self.body = nn.Sequential(*blocks, nn.ReLU())
        self.score = fastgan.spectral_norm(nn.Linear(channels, 1))
        self.label = fastgan.spectral_norm(nn.Embedding(classes, channels)) if classes else None

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.body(x).sum((2, 3))
        score = self.score(h)
        return score if self.label is None else score + (self.label(label) * h).sum(1, keepdim=True)


@torch.no_grad()
def normalised(module: nn.Module, tolerance: float = 0.1) -> float:
    """The share of weights of linear and convolution layers whose largest singular value is 1 within ``tolerance``: all of
    those that spectral norm has, which follows the training by one iteration a forward."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)]
    norms = torch.stack([torch.linalg.matrix_norm(weight.flatten(1), 2) for weight in weights])
    return ((norms - 1).abs() <= tolerance).float().mean().item()


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


class JointCritic(nn.Module):
    """(images, vectors (B, given)) to a score (B, 1): whether the two belong together is found by a perceptron over both."""

    def __init__(self, shape: Shape, width: int, given: int):
        super().__init__()
        self.image = ConvCritic(shape, width)
        self.image.score = None  # only its features are used
        hidden = 8 * width
        self.given = nn.Sequential(nn.Linear(given, hidden), nn.LeakyReLU(0.2))
        self.both = nn.Sequential(nn.Linear(self.image.feature_count + hidden, hidden), nn.LeakyReLU(0.2))
        self.score = nn.Linear(hidden, 1)

    def features(self, x: Tensor, given: Tensor) -> Tensor:
        """(B, 8 width): what the score is linear in."""
        return self.both(torch.cat([self.image.features(x), self.given(given)], 1))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.score(self.features(x, given))
