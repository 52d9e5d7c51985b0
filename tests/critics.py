"""Sample critics for tests and benchmarks: (a) to (e) of the benchmark, and one critic per kind of layer."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm


class DCGAN(nn.Sequential):
    """(a) DCGAN critic for 64x64 images, without batch norm."""

    def __init__(self, ch=64, size=64):
        layers, c = [], 3
        while size > 4:
            layers += [nn.Conv2d(c, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
            c, ch, size = ch, ch * 2, size // 2
        super().__init__(*layers, nn.Conv2d(c, 1, 4), nn.Flatten(0))


class ResBlock(nn.Module):
    def __init__(self, i, o, down, first=False, norm=lambda m: m):
        super().__init__()
        self.c1, self.c2 = norm(nn.Conv2d(i, o, 3, 1, 1)), norm(nn.Conv2d(o, o, 3, 1, 1))
        self.skip = norm(nn.Conv2d(i, o, 1)) if i != o or down else None
        self.down, self.first = down, first

    def forward(self, x):
        h = x if self.first else F.relu(x)
        h = self.c2(F.relu(self.c1(h)))
        if self.down:
            h = F.avg_pool2d(h, 2)
            x = F.avg_pool2d(x, 2)
        return h + (self.skip(x) if self.skip is not None else x)


class SNGAN(nn.Module):
    """(b) SNGAN-style ResNet critic for 32x32 images; ``norm`` wraps every layer."""

    def __init__(self, ch=64, norm=lambda m: m):
        super().__init__()
        self.blocks = nn.Sequential(
            ResBlock(3, ch, True, True, norm),
            ResBlock(ch, ch, True, norm=norm),
            ResBlock(ch, ch, False, norm=norm),
            ResBlock(ch, ch, False, norm=norm),
        )
        self.out = norm(nn.Linear(ch, 1))

    def forward(self, x):
        return self.out(F.relu(self.blocks(x)).sum((2, 3)))


class R3Block(nn.Module):
    def __init__(self, c, groups=4):
        super().__init__()
        self.a = nn.Conv2d(c, c * 2, 1, bias=True)
        self.b = nn.Conv2d(c * 2, c * 2, 3, 1, 1, groups=groups, bias=True)
        self.c = nn.Conv2d(c * 2, c, 1, bias=False)

    def forward(self, x):
        h = F.leaky_relu(self.a(x), 0.2)
        return x + self.c(F.leaky_relu(self.b(h), 0.2))


class R3GAN(nn.Module):
    """(c) R3GAN-style grouped-convolution residual critic for 32x32 images."""

    def __init__(self, ch=64, groups=4):
        super().__init__()
        self.stem = nn.Conv2d(3, ch, 1)
        self.stages = nn.ModuleList()
        for k in range(3):
            down = nn.Conv2d(ch, ch * 2, 1) if k < 2 else nn.Identity()
            self.stages.append(nn.ModuleList([R3Block(ch, groups), down]))
            ch = ch * 2 if k < 2 else ch
        self.head = nn.Conv2d(ch, ch, 8, groups=ch, bias=False)
        self.out = nn.Linear(ch, 1, bias=False)

    def forward(self, x):
        x = self.stem(x)
        for k, (block, down) in enumerate(self.stages):
            x = down(block(x))
            if k < 2:
                x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return self.out(self.head(x).flatten(1)).view(-1)


class CTGAN(nn.Sequential):
    """(d) CTGAN-style MLP with dropout; ``pac`` rows make one sample."""

    def __init__(self, features=64, hidden=256, dropout=0.5, pac=1):
        self_pac = nn.Flatten() if pac == 1 else Pack(pac)
        super().__init__(
            self_pac,
            nn.Linear(features * pac, hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )


class Pack(nn.Module):
    def __init__(self, pac):
        super().__init__()
        self.pac = pac

    def forward(self, x):
        return x.reshape(x.shape[0] // self.pac, -1)


class HiFi(nn.Module):
    """(e) HiFi-GAN-style 1-D multi-scale critic with weight norm, scored by per-sample means."""

    def __init__(self, ch=16, scales=3, patches=False, norm=weight_norm):
        super().__init__()
        self.patches = patches
        self.scales = nn.ModuleList(
            nn.ModuleList(
                [
                    norm(nn.Conv1d(1, ch, 15, 1, 7)),
                    norm(nn.Conv1d(ch, ch * 2, 41, 2, 20, groups=4)),
                    norm(nn.Conv1d(ch * 2, ch * 4, 41, 2, 20, groups=8)),
                    norm(nn.Conv1d(ch * 4, ch * 4, 5, 1, 2)),
                    norm(nn.Conv1d(ch * 4, 1, 3, 1, 1)),
                ]
            )
            for _ in range(scales)
        )

    def forward(self, x):
        outs = []
        for k, layers in enumerate(self.scales):
            if k:
                x = F.avg_pool1d(x, 4, 2, 2)
            h = x
            for conv in layers[:-1]:
                h = F.leaky_relu(conv(h), 0.1)
            outs.append(layers[-1](h).flatten(1))
        return outs if self.patches else sum(o.mean(1) for o in outs)


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
