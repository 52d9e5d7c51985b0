"""Sample critics: those of the benchmarks, and one per kind of layer."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from benchmarks.critics import CTGAN as CTGAN
from benchmarks.critics import DCGAN as DCGAN
from benchmarks.critics import R3GAN as R3GAN
from benchmarks.critics import SNGAN as SNGAN
from benchmarks.critics import HiFi as HiFi
from benchmarks.critics import Pack as Pack
from benchmarks.critics import ResBlock as ResBlock


class EqualLinear(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.zeros(o))
        self.scale = i**-0.5

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias * 0.5)


class EqualConv(nn.Module):
    def __init__(self, i, o, k, **options):
        super().__init__()
        self.weight, self.options = nn.Parameter(torch.randn(o, i, k, k)), options
        self.scale = (i * k * k) ** -0.5

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, **self.options)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, *args):
        return self.function(x, *args)


class WithParameter(nn.Module):
    """function(x, parameter, *args)."""

    def __init__(self, parameter, function):
        super().__init__()
        self.p, self.function = nn.Parameter(parameter), function

    def forward(self, x, *args):
        return self.function(x, self.p, *args)


class Projection(nn.Module):
    """Label projection: D(x, y) = w . h(x) + <embed(y), h(x)>."""

    def __init__(self, ch=8, classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, ch, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(ch, ch, 4, 2, 1), nn.ReLU())
        self.out, self.embed = nn.Linear(ch, 1), nn.Embedding(classes, ch)

    def forward(self, x, y):
        h = self.body(x).sum((2, 3))
        return self.out(h).view(-1) + (self.embed(y) * h).sum(1)


class TwoHeads(nn.Module):
    def __init__(self, ch=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, ch, 3, 2, 1), nn.LeakyReLU(0.2))
        self.one, self.two = nn.Linear(ch * 16, 1), nn.Conv2d(ch, 1, 3)

    def forward(self, x):
        h = self.body(x)
        return [self.one(h.flatten(1)).view(-1), self.two(h)]


class SharedConv(nn.Module):
    def __init__(self, ch=6):
        super().__init__()
        self.stem, self.twice, self.out = nn.Conv2d(3, ch, 1), nn.Conv2d(ch, ch, 3, 1, 1), nn.Linear(ch, 1)

    def forward(self, x):
        h = F.leaky_relu(self.stem(x), 0.2)
        for _ in range(2):
            h = F.leaky_relu(self.twice(h), 0.2)
        return self.out(h.mean((2, 3)))


def head(ch, size=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(ch * size * size, 1))


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=options.pop("padding", k // 2), **options)


def images(b=4, size=8, dtype=torch.float64):
    return torch.randn(b, 3, size, size, dtype=dtype)


def with_layer(layer, ch=6):
    """A convolution, the layer in question on (B, ch, 8, 8), and a score."""
    return nn.Sequential(conv(3, ch), nn.LeakyReLU(0.2), layer, LazyHead())


class LazyHead(nn.Module):
    """A linear score of whatever arrives, with a fixed pseudo-random weight made at the first call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.UninitializedParameter()

    def forward(self, x):
        x = x.flatten(1)
        if isinstance(self.weight, nn.UninitializedParameter):
            self.weight.materialize((x.shape[1],), dtype=x.dtype)
            with torch.no_grad():
                self.weight.copy_(torch.linspace(-1, 1, x.shape[1]).sin().to(x.dtype))
        return (x * self.weight).sum(1)


# Critics that are piecewise linear and treat samples alone: the shared pass must serve them.
SHARED = {
    "dcgan": lambda: DCGAN(4, 16),
    "sngan": lambda: SNGAN(4),
    "sngan spectral norm": lambda: SNGAN(4, parametrizations.spectral_norm),
    "sngan old spectral norm": lambda: SNGAN(4, spectral_norm),
    "shared conv": SharedConv,
    "relu in place": lambda: nn.Sequential(conv(3, 4), nn.ReLU(True), conv(4, 4), nn.LeakyReLU(0.1, True), head(4)),
    "prelu": lambda: with_layer(nn.PReLU(6)),
    "relu6": lambda: with_layer(nn.ReLU6()),
    "hardtanh": lambda: with_layer(nn.Hardtanh()),
    "abs": lambda: with_layer(Lambda(torch.abs)),
    "clamp": lambda: with_layer(Lambda(lambda x: x.clamp(-0.3, 0.5))),
    "rrelu": lambda: with_layer(nn.RReLU()),
    "hardshrink": lambda: with_layer(nn.Hardshrink(0.1)),
    "max pool": lambda: with_layer(nn.MaxPool2d(2)),
    "overlapping max pool": lambda: with_layer(nn.MaxPool2d(3, 2, 1)),
    "avg pool": lambda: with_layer(nn.AvgPool2d(2)),
    "adaptive pools": lambda: with_layer(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.AdaptiveMaxPool2d(2))),
    "bilinear": lambda: with_layer(Lambda(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))),
    "nearest": lambda: with_layer(nn.Upsample(scale_factor=2)),
    "pixel shuffle": lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.PixelShuffle(2), conv(1, 2), LazyHead()),
    "pixel unshuffle": lambda: with_layer(nn.PixelUnshuffle(2)),
    "reflection pad": lambda: with_layer(nn.ReflectionPad2d(1)),
    "zero pad": lambda: with_layer(nn.ZeroPad2d(1)),
    "grouped": lambda: with_layer(conv(6, 6, groups=3)),
    "depthwise": lambda: with_layer(conv(6, 6, groups=6)),
    "dilated": lambda: with_layer(conv(6, 4, dilation=2)),
    "strided": lambda: with_layer(conv(6, 4, stride=2)),
    "transposed": lambda: with_layer(nn.ConvTranspose2d(6, 4, 4, 2, 1)),
    "transposed grouped": lambda: with_layer(nn.ConvTranspose2d(6, 4, 4, 2, 1, groups=2)),
    "3-D": lambda: with_layer(nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv3d(2, 3, 3, 1, 1), nn.ReLU())),
    "1-D": lambda: with_layer(nn.Sequential(nn.Flatten(2), nn.Conv1d(6, 4, 5, 2, 2), nn.ReLU())),
    "weight norm": lambda: with_layer(weight_norm(conv(6, 4))),
    "weight norm parametrized": lambda: with_layer(parametrizations.weight_norm(conv(6, 4))),
    "equalised": lambda: nn.Sequential(EqualConv(3, 5, 3), nn.LeakyReLU(0.2), nn.Flatten(), EqualLinear(180, 1)),
    "dropout": lambda: with_layer(nn.Dropout(0.3)),
    "dropout2d": lambda: with_layer(nn.Dropout2d(0.3)),
    "alpha dropout": lambda: with_layer(nn.AlphaDropout(0.3)),
    "cat": lambda: with_layer(Lambda(lambda x: torch.cat([x, -x.relu(), x.flip(3)], 1))),
    "cat parameter": lambda: with_layer(
        WithParameter(torch.randn(1, 2, 8, 8), lambda x, p: torch.cat([x, p.expand(len(x), 2, 8, 8)], 1))
    ),
    "gain": lambda: with_layer(WithParameter(torch.randn(6, 1, 1), lambda x, p: x * p)),
    "division": lambda: with_layer(WithParameter(torch.rand(6, 1, 1) + 1, lambda x, p: x / p)),
    "matmul left": lambda: with_layer(WithParameter(torch.randn(8, 8), lambda x, p: p @ x)),
    "matmul right": lambda: with_layer(WithParameter(torch.randn(8, 5), lambda x, p: x @ p)),
    "einsum": lambda: with_layer(WithParameter(torch.randn(6, 4), lambda x, p: torch.einsum("bchw,cd->bdhw", x, p))),
    "subtracted from": lambda: with_layer(WithParameter(torch.randn(6, 1, 1), lambda x, p: p - x)),
    "where": lambda: with_layer(WithParameter(torch.randn(6, 1, 1), lambda x, p: torch.where(x > 0, x, p))),
    "maxout": lambda: with_layer(Lambda(lambda x: x.unflatten(1, (3, 2)).amax(2))),
    "maximum": lambda: with_layer(Lambda(lambda x: torch.maximum(x[:, ::2], x[:, 1::2]))),
    "split": lambda: with_layer(Lambda(lambda x: x.split(3, 1)[0] - 0.5 * x.split(3, 1)[1])),
    "channel roll": lambda: with_layer(Lambda(lambda x: x.roll(1, 1))),
    "sort": lambda: with_layer(Lambda(lambda x: x.sort(1).values)),
    "topk": lambda: with_layer(Lambda(lambda x: x.topk(3, 1).values)),
    "fft": lambda: with_layer(Lambda(lambda x: torch.fft.irfft2(torch.fft.rfft2(x)[..., :3], s=(8, 8)))),
    "unfold": lambda: with_layer(nn.Unfold(3, padding=1)),
    "merged batch": lambda: with_layer(
        nn.Sequential(Lambda(lambda x: x.reshape(-1, 1, 8, 8)), conv(1, 2), Lambda(lambda x: x.reshape(-1, 12, 8, 8)))
    ),
    "batch norm eval": lambda: with_layer(nn.BatchNorm2d(6)).eval(),
    "no grad branch": lambda: with_layer(Lambda(lambda x: x * (x.detach().mean((1, 2, 3), keepdim=True) > 0))),
    "linear 3-D": lambda: with_layer(nn.Linear(8, 5)),
    "baddbmm": lambda: with_layer(
        WithParameter(torch.randn(1, 8, 4), lambda x, p: torch.baddbmm(p, x[:, 0], p.expand(len(x), 8, 4)))
    ),
    "scaled addmm": lambda: nn.Sequential(
        nn.Flatten(),
        WithParameter(torch.randn(192, 5), lambda x, p: torch.addmm(p[0], x, p, alpha=0.5, beta=2.0)),
        nn.ReLU(),
        LazyHead(),
    ),
    "mv": lambda: nn.Sequential(nn.Flatten(), WithParameter(torch.randn(192), lambda x, p: x.relu() @ p)),
}


class Attention(nn.Module):
    def forward(self, x):
        q = x.flatten(2).mT
        return F.scaled_dot_product_attention(q, q, q)


def minibatch_stddev(x):
    std = (x.reshape(2, -1, *x.shape[1:]).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat([x, std.repeat(2)[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)


def minibatch_discrimination(x, p):
    m = (x.flatten(1) @ p).view(len(x), 4, 3)
    o = torch.exp(-(m[None] - m[:, None]).abs().sum(3)).sum(0)
    return torch.cat([x.flatten(1), o], 1)


# Critics whose loss gradient cannot share the penalty's: exact all the same, by falling back.
CURVED = {
    "silu": lambda: with_layer(nn.SiLU()),
    "gelu": lambda: with_layer(nn.GELU()),
    "softplus": lambda: with_layer(nn.Softplus()),
    "tanh": lambda: with_layer(nn.Tanh()),
    "layer norm": lambda: with_layer(nn.LayerNorm([6, 8, 8])),
    "instance norm": lambda: with_layer(nn.InstanceNorm2d(6, affine=True)),
    "group norm": lambda: with_layer(nn.GroupNorm(2, 6)),
    "batch norm train": lambda: with_layer(nn.BatchNorm2d(6)),
    "attention": lambda: with_layer(Attention()),
    "square": lambda: with_layer(Lambda(lambda x: x * x)),
    "minibatch stddev": lambda: with_layer(Lambda(minibatch_stddev)),
    "minibatch discrimination": lambda: with_layer(WithParameter(torch.randn(384, 12) * 0.1, minibatch_discrimination)),
    "normalize": lambda: with_layer(Lambda(lambda x: F.normalize(x.flatten(1)))),
    "self gating": lambda: with_layer(Lambda(lambda x: x * x.mean((2, 3), keepdim=True))),
}
COUPLED = {
    "batch mean": lambda: with_layer(Lambda(lambda x: x - x.mean(0, keepdim=True))),
    "batch roll": lambda: with_layer(Lambda(lambda x: x + 0.5 * x.roll(1, 0))),
    "batch flip": lambda: with_layer(Lambda(lambda x: x + x.flip(0).abs())),
    "batch matrix": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), Lambda(lambda x: torch.ones(len(x), len(x), dtype=x.dtype) @ x),
        LazyHead(),
    ),
}  # fmt: skip
