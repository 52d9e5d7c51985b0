"""The GAN of the demo: handwritten digits, a small convolutional pair, and the ways to run it that are compared."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgan
from fastgan.training.networks import GroupedBlock

LATENT, FEATURES = 64, 128
KERNELS, KERNEL_DIMS = 64, 16
INIT_STD = 0.5  # keeps distances between samples of the order of 1, where exp(-distance) has a gradient
ROLES = ("discriminator", "generator")


class BroadcastMinibatchDiscrimination(nn.Module):
    """The layer as most repositories write it: all differences at once, O(B^2 K D) memory."""

    def __init__(self, in_features: int, out_features: int, kernel_dims: int):
        super().__init__()
        self.T = nn.Parameter(torch.randn(in_features, out_features, kernel_dims) * INIT_STD)

    def project(self, x: Tensor) -> Tensor:
        return (x @ self.T.flatten(1)).unflatten(1, self.T.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        m = self.project(x)
        return torch.cat([x, torch.exp(-(m[:, None] - m[None]).abs().sum(-1)).sum(1)], 1)


class CdistMinibatchDiscrimination(BroadcastMinibatchDiscrimination):
    """The best plain form for a first-order GAN, O(B^2 K) memory; torch.cdist has no second derivative for penalties."""

    def forward(self, x: Tensor) -> Tensor:
        m = self.project(x).transpose(0, 1)
        return torch.cat([x, torch.exp(-torch.cdist(m, m, p=1.0)).sum(-1).T], 1)


def fastgan_layer(in_features: int, out_features: int, kernel_dims: int) -> nn.Module:
    return fastgan.nn.MinibatchDiscrimination(in_features, out_features, kernel_dims, self_term=True, init_std=INIT_STD)


@dataclass(frozen=True)
class Run:
    """One training compared: the same GAN with a part in plain PyTorch and from fastgan, with one state_dict.

    ``plain`` maps a form's name to that part: a factory of the discriminator's layer, or the critic's loss. Each step is
    checked against ``best_plain``, the fastest of them that has all the derivatives this training takes.
    """

    name: str
    gan: "type[Gan]"
    plain: dict[str, Callable]
    best_plain: str
    fastgan: Callable
    operators: tuple[str, ...] = ()  # of fastgan.ops: tells which backend serves
    steps: int | None = None  # at most

    @property
    def forms(self) -> dict[str, Callable]:
        return {**self.plain, "fastgan": self.fastgan}

    @property
    def has_layer(self) -> bool:
        """Is it one layer that is compared, whose share of the step and growth with the batch can be shown?"""
        return self.gan is Gan


class Batch(NamedTuple):
    """One step's inputs: real images and a latent sample for each of the two updates."""

    real: Tensor
    discriminator_noise: Tensor
    generator_noise: Tensor

    def to(self, dtype: torch.dtype) -> "Batch":
        return Batch(*(tensor.to(dtype) for tensor in self))


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images (1797, 1, 8, 8) scaled to [-1, 1], labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(data.target)


def batches(images: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless, reproducible batches on the device of ``images``, no image twice in one.

    Twins would meet the kink of the distance at 0, where rounding alone decides the gradient's sign.
    """
    if batch_size > len(images):
        raise ValueError(f"batch size {batch_size} is more than the {len(images)} images there are")
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(len(images), generator=generator)[:batch_size]
        noise = torch.randn(2, batch_size, LATENT, generator=generator).to(images.device)
        yield Batch(images[rows.to(images.device)], *noise)


def make_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(LATENT, 96 * 4 * 4),
        nn.Unflatten(1, (96, 4, 4)),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.ConvTranspose2d(96, 48, 4, stride=2, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 1, 3, padding=1),
        nn.Tanh(),
    )


class Discriminator(nn.Module):
    """Convolutional features, the minibatch layer on top of them, one score per sample."""

    def __init__(self, layer: Callable[..., nn.Module]):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 96, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(96 * 2 * 2, FEATURES),
            nn.LeakyReLU(0.2),
        )
        self.minibatch = layer(FEATURES, KERNELS, KERNEL_DIMS)
        self.score = nn.Linear(FEATURES + KERNELS, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.minibatch(self.features(images)))


class Stopwatch:
    """Seconds per named part of a step; the time of a part inside another counts for the inner one only."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._open, self._since = device, [], 0.0

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def start(self, part: str) -> None:
        self._settle()
        self._open.append(part)

    def stop(self) -> None:
        self._settle()
        self._open.pop()

    @contextmanager
    def __call__(self, part: str):
        self.start(part)
        yield
        self.stop()

    @contextmanager
    def inside(self, module: nn.Module, name: str):
        """Count ``module``'s forward and backward as parts of their own."""
        hooks = [
            module.register_forward_pre_hook(lambda *_: self.start(f"{name} forward")),
            module.register_forward_hook(lambda *_: self.stop()),
            module.register_full_backward_pre_hook(lambda *_: self.start(f"{name} backward")),
            module.register_full_backward_hook(lambda *_: self.stop()),
        ]
        yield
        for hook in hooks:
            hook.remove()


class Gan:
    """Both networks with their optimizers; non-saturating losses (Goodfellow et al. 2014). ``form``: the minibatch layer."""

    def __init__(self, form: Callable, device: torch.device, dtype: torch.dtype = torch.float32):
        self.device, self.dtype, self.form = device, dtype, form
        self.generator = make_generator().to(device, dtype)
        self.discriminator = self.make_discriminator().to(device, dtype)
        self.optimizers = {
            role: torch.optim.Adam(getattr(self, role).parameters(), lr=rate, betas=(0.5, 0.99))
            for role, rate in zip(ROLES, (1e-3, 2e-3), strict=True)
        }

    def make_discriminator(self) -> nn.Module:
        return Discriminator(self.form)

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(fake)).mean()

    def copy_from(self, other: "Gan") -> "Gan":
        """Take over parameters, buffers and optimizer state."""
        for role in ROLES:
            getattr(self, role).load_state_dict(getattr(other, role).state_dict())
            self.optimizers[role].load_state_dict(other.optimizers[role].state_dict())
        return self

    def parameters(self) -> Tensor:
        """All parameters of both networks in one vector."""
        return torch.cat([p.detach().flatten() for role in ROLES for p in getattr(self, role).parameters()])

    def gradient(self, role: str) -> Tensor:
        """What the last update of ``role`` differentiated, in one vector."""
        return torch.cat([p.grad.flatten() for p in getattr(self, role).parameters()])

    def update(self, role: str, batch: Batch, watch: Stopwatch | None = None) -> Tensor:
        """One optimizer step of "discriminator" or "generator"; returns its loss."""
        watch = watch or Stopwatch(self.device)
        if batch.real.dtype != self.dtype:
            batch = batch.to(self.dtype)
        trains_discriminator = role == "discriminator"
        self.discriminator.requires_grad_(trains_discriminator)
        with watch("generator forward"), torch.set_grad_enabled(not trains_discriminator):
            fake = self.generator(batch.discriminator_noise if trains_discriminator else batch.generator_noise)
        with watch("rest of discriminator forward"):
            loss = (self.discriminator_loss if trains_discriminator else self.generator_loss)(batch.real, fake)
        with watch("rest of backward"):
            self.optimizers[role].zero_grad()
            loss.backward()
        with watch("optimizers"):
            self.optimizers[role].step()
        return loss.detach()

    def step(self, batch: Batch, watch: Stopwatch | None = None) -> None:
        """One update of each network."""
        for role in ROLES:
            self.update(role, batch, watch)


class Critic(nn.Sequential):
    """Residual blocks at 8x8 and 4x4 with bilinear downsampling between, as in R3GAN (Huang et al. 2024)."""

    def __init__(self, channels: int = 32, groups: int = 4):
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1),
            GroupedBlock(channels, groups),
            nn.Upsample(scale_factor=0.5, mode="bilinear"),
            nn.Conv2d(channels, 2 * channels, 1),
            GroupedBlock(2 * channels, groups),
            nn.Conv2d(2 * channels, 2 * channels, 4, groups=2 * channels, bias=False),
            nn.Flatten(),
            nn.Linear(2 * channels, 1, bias=False),
        )


PENALTY = 0.5  # weight of R1 and of R2


def textbook_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The pairing relativistic loss + R1 + R2, with gradients by double backward."""
    scores, penalty = [], 0.0
    for images in (real, fake):
        images = images.detach().requires_grad_(True)
        scores.append(critic(images))
        (gradient,) = torch.autograd.grad(scores[-1].sum(), images, create_graph=True)
        penalty = penalty + PENALTY / 2 * gradient.square().sum((1, 2, 3)).mean()
    return F.softplus(scores[1] - scores[0]).mean() + penalty


def fastgan_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return fastgan.critic_step(critic, real, fake, loss="relativistic", r1=PENALTY, r2=PENALTY).loss


class PenalisedGan(Gan):
    """R3GAN in small: relativistic losses with R1 and R2 (Huang et al. 2024). ``form``: the critic's loss."""

    def make_discriminator(self) -> nn.Module:
        return Critic()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.form(self.discriminator, real, fake)

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        with torch.no_grad():
            scores = self.discriminator(real)
        return F.softplus(scores - self.discriminator(fake)).mean()


RUNS = [
    Run(
        name="minibatch-discrimination",
        gan=Gan,
        plain={"plain broadcast": BroadcastMinibatchDiscrimination, "plain cdist": CdistMinibatchDiscrimination},
        best_plain="plain cdist",
        fastgan=fastgan_layer,
        operators=("minibatch_discrimination", "minibatch_discrimination_backward"),
    ),
    Run(
        name="r3gan",
        gan=PenalisedGan,
        plain={"plain double backward": textbook_loss},
        best_plain="plain double backward",
        fastgan=fastgan_loss,
        steps=30,
    ),
]
