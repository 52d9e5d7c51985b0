"""Networks from images to images, and what recipes that translate have in common."""

import torch
from torch import Tensor, nn

from .data import Source
from .recipe import Batch, Recipe

WRONG = 0.05  # difference of a pixel, in [-1, 1], from which on it is to be repaired
SHOWN = 12  # images in a picture: their inputs above, what they ought to be below


class Translation(Recipe):
    """A recipe whose samples are translations of images: ``translate``, of what ``pair`` makes of a batch."""

    size = 32
    data = "photos"
    batch_size = 16
    held_out = 0.1

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(inputs, what they ought to become), of one size where they are to be compared."""
        raise NotImplementedError

    def translate(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of the input's domain, of any size that the generator takes."""
        return self.generator(images).clamp(-1, 1)

    def sample(self, n: int) -> Tensor:
        """Translations of ``n`` random ones of the images that were not trained on."""
        return self.translate(self.pair(self.unseen(n, random=True))[0])

    def show(self, batch: Batch, n: int) -> Tensor:
        inputs, target = self.pair(self.unseen(SHOWN))
        output = self.translate(inputs)
        return torch.stack([nn.functional.interpolate(inputs, output.shape[2:]), output, target], 1)

    def evaluate(self, n: int = 500) -> dict[str, float]:
        """Of translations of at most ``n`` unseen images what :func:`metrics.paired` gives, and how much more that is than the
        baseline's; and "detail", their roughness where the baseline is wrong over that of what they ought to be: 1 at best,
        blur is below."""
        from . import metrics

        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            inputs, target = self.pair(self.unseen(n))
            outputs = torch.cat([self.translate(part) for part in inputs.split(64)])
            base = self.baseline(inputs)
            found, before = (metrics.paired(images, target, self.perceptual) for images in (outputs, base))
            wrong = (base - target).abs().amax(1, keepdim=True) > WRONG
            more = self.judge(inputs, target, outputs)
        gains = {f"{name}_gain": value - before[name] for name, value in found.items()}
        return found | gains | {"detail": float(roughness(outputs, wrong) / roughness(target, wrong))} | more

    def judge(self, inputs: Tensor, target: Tensor, outputs: Tensor) -> dict[str, float]:
        """Further metrics of a recipe's own."""
        return {}

    def baseline(self, inputs: Tensor) -> Tensor:
        """What a translation has to be better than."""
        return inputs


def roughness(images: Tensor, where: Tensor) -> Tensor:
    """Mean over ``where`` (B, 1, H, W) of the absolute second differences of images (B, C, H, W) along both sides."""
    across, down = (images[:, :, 1:-1].diff(n=2, dim=3).abs(), images[:, :, :, 1:-1].diff(n=2, dim=2).abs())
    return ((across + down) * where[:, :, 1:-1, 1:-1]).sum() / where[:, :, 1:-1, 1:-1].sum().clamp_min(1) / images.shape[1]


def needs_images(source: Source) -> tuple[int, int, int]:
    """The shape (C, H, W) of ``source``; ValueError where it holds no images."""
    if len(source.shape) != 3:
        raise ValueError(f"this recipe translates images, and --data {source.name} has samples of shape {source.shape}")
    return source.shape


class UNet(nn.Module):
    """Image to image in [-1, 1], at sides that halve ``levels`` times: down by strided convolutions, up by transposed ones,
    each level of the way down joined to that of the way up (Ronneberger et al., 2015; Isola et al., 2017)."""

    def __init__(self, inputs: int, outputs: int, width: int, levels: int = 3):
        super().__init__()
        sizes = [width * min(2**i, 8) for i in range(levels + 1)]
        self.first = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.LeakyReLU(0.2))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(levels):
            convolution = nn.Conv2d(sizes[i], sizes[i + 1], 4, 2, 1, bias=False)
            self.down.append(nn.Sequential(convolution, nn.BatchNorm2d(sizes[i + 1]), nn.LeakyReLU(0.2)))
            joined = sizes[i + 1] * (1 if i == levels - 1 else 2)
            convolution = nn.ConvTranspose2d(joined, sizes[i], 4, 2, 1, bias=False)
            self.up.append(nn.Sequential(convolution, nn.BatchNorm2d(sizes[i]), nn.ReLU()))
        self.last = nn.Sequential(nn.Conv2d(2 * width, outputs, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        path = [self.first(x)]
        for down in self.down:
            path.append(down(path[-1]))
        h = path.pop()
        for up in reversed(self.up):
            h = torch.cat([up(h), path.pop()], 1)
        return self.last(h)


class PatchCritic(nn.Module):
    """Images, and images that they are judged with, to a score of each patch (B, 1, h, w): ``halvings`` strided convolutions
    and one more (Isola et al., 2017). Further images are appended as channels; ``channels`` counts all of them."""

    def __init__(self, channels: int, width: int, halvings: int = 2, norm=nn.InstanceNorm2d):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(halvings - 1):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), *([norm(2 * width)] if norm else []), nn.LeakyReLU(0.2)]
            width *= 2
        self.body = nn.Sequential(*layers)
        self.score = nn.Conv2d(width, 1, 3, padding=1)

    def features(self, *images: Tensor) -> Tensor:
        return self.body(torch.cat(images, 1))

    def forward(self, *images: Tensor) -> Tensor:
        return self.score(self.features(*images))


class Residual(nn.Module):
    """x + two 3x3 convolutions of it; ``norm``: a factory of a layer over c channels, or None."""

    def __init__(self, channels: int, norm=None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=not norm),
            *([norm(channels)] if norm else []),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=not norm),
            *([norm(channels)] if norm else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)
