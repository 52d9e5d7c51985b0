"""Critics as papers have them, for the benchmarks and the tests."""

import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import weight_norm


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
