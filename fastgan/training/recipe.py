"""What a recipe is: networks, the players that train them, and how samples are drawn.

A recipe is one file of :mod:`fastgan.recipes` with a class ``Recipe``. Most are a :class:`GAN` with other networks or
defaults; what has more than one generator and one critic derives from :class:`Recipe` and names its own players.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

import fastgan
from fastgan import losses

from . import networks
from .data import Source
from .options import Options

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Player:
    """Who is trained by what: ``networks`` (their names) step down the sum of the terms that ``loss(batch)`` returns.

    While it is its turn every other network is frozen. ``updates`` of its own batch each a step, at every ``every``-th step.
    """

    name: str
    networks: tuple[str, ...]
    loss: Callable[[Batch], dict[str, Tensor]]
    updates: int = 1
    every: int = 1
    is_critic: bool = False  # takes the critics' learning rate and weight clipping


class Recipe:
    """The base of all. ``self.name`` is the network of that name, as :meth:`build` returned it or as the trainer wrapped it."""

    Options = Options
    data = "digits"  # what it is trained on unless --data says otherwise
    size = 16  # side of the images
    steps = 1500
    batch_size = 64
    averaged: tuple[str, ...] = ("generator",)  # networks with an exponential moving average
    held_out = 0.0  # this share of the source is not trained on
    step = 0  # the trainer counts
    compile = False  # set by the trainer, as is the scaler
    scaler: torch.amp.GradScaler | None = None

    def __init__(self, options: Options, source: Source):
        self.options, self.source = options, source
        self.networks: dict[str, nn.Module] = self.build()

    def __getattr__(self, name: str):
        found = self.__dict__.get("networks", {})
        if name not in found:
            raise AttributeError(f"{type(self).__name__} has no attribute or network {name!r}")
        return found[name]

    def build(self) -> dict[str, nn.Module]:
        """Fresh networks by name."""
        raise NotImplementedError

    def players(self) -> list[Player]:
        """In the order of their turns."""
        raise NotImplementedError

    def sample(self, n: int) -> Tensor:
        """``n`` new samples from the global random state."""
        raise NotImplementedError

    #: metric -> what the recorded run reaches and a broken implementation does not; the least, or the most where less is better
    goals: ClassVar[dict[str, float]] = {}
    features: str | None = None  # what images are compared by, of fastgan.training.features.CHOICES; None: by the data

    perceptual: str | None = None  # of fastgan.training.metrics.PERCEPTUAL, where pairs of images are to be compared by it, too

    def evaluate(self, n: int = 2000) -> dict[str, float]:
        """Metrics by name, of ``n`` samples, by :func:`fastgan.training.metrics.evaluate`."""
        from . import metrics

        return metrics.evaluate(self.sample, self.source, n, self.features, self.labels)

    def labels(self, n: int) -> Tensor | None:
        """(n,): the classes that ``sample(n)`` is asked for; None: it isn't."""
        return None

    def reference(self) -> dict[str, float]:
        """What perfect samples would get, of those metrics for which that is known."""
        from . import metrics

        return metrics.reference(self.source, self.features)

    def show(self, batch: Batch, n: int) -> Tensor:
        """What the picture of samples holds: here samples; a translation shows its inputs too, (n, rows, C, H, W)."""
        return self.sample(n)

    @cached_property
    def _split(self) -> tuple[Source, Source]:
        return self.source.split(self.held_out) if self.held_out else (self.source, self.source)

    @property
    def training_source(self) -> Source:
        """What the trainer draws batches from."""
        return self._split[0]

    def unseen(self, n: int, random: bool = False) -> Batch:
        """At most ``n`` of the samples that are held out (of all, if none is), the same at each call, on the device.
        ``random``: ``n`` of them as they are drawn, some perhaps twice."""
        held = self._split[1]
        batch = held.__getitems__(torch.randint(len(held), (n,)).tolist()) if random else held.spread(n)
        return {key: value.to(self.device) for key, value in batch.items()}

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.networks.values())).parameters()).device

    def latent(self, n: int) -> Tensor:
        """(n, z_dim) from the distribution that ``z`` names."""
        shape = (n, self.options.z_dim)
        if self.options.z == "uniform":
            return torch.rand(shape, device=self.device) * 2 - 1
        return torch.randn(shape, device=self.device)

    def critic_step(self, critic: nn.Module, real: Tensor, fake: Tensor, loss: str, **penalties) -> Tensor:
        """The loss of one critic's update: :func:`fastgan.critic_step`, in plain PyTorch where ``fast`` is off."""
        method = "auto" if self.options.fast else "double_backward"
        step = fastgan.critic_step(
            critic, real, fake, loss=loss, method=method, compile=self.compile, grad_scaler=self.scaler, **penalties
        )
        return step.loss


@dataclass
class GANOptions(Options):
    loss: Literal[losses.names()] = "non_saturating"
    gradient_penalty: float = 0.0  # weight of (|gradient| - 1)^2 at interpolates
    r1: float = 0.0  # weight of |gradient|^2 / 2 at the reals
    r2: float = 0.0  # and at the fakes
    penalty_every: int = 1  # lazily: at every k-th step, k times as much
    critic_updates: int = 1  # for one of the generator


class GAN(Recipe):
    """One generator against one critic: perceptrons for points, convolutions for images."""

    Options = GANOptions
    conditional = False  # networks take (x, label)

    def build(self) -> dict[str, nn.Module]:
        o, shape = self.options, self.source.shape
        if len(shape) == 1:
            generator = networks.Perceptron(o.z_dim, shape, 4 * o.width, self.classes)
        else:
            generator = networks.ConvGenerator(o.z_dim, shape, o.width, self.classes)
        return {"generator": generator, "critic": self.network(shape, 1)}

    def network(self, shape: networks.Shape, outputs: int) -> nn.Module:
        """From samples to ``outputs`` numbers."""
        if len(shape) == 1:
            return networks.Perceptron(shape, outputs, 4 * self.options.width, self.classes)
        return networks.ConvCritic(shape, self.options.width, self.classes, outputs=outputs)

    @property
    def classes(self) -> int:
        """How many classes the networks are told of: 0 where they are not conditional."""
        if not self.conditional:
            return 0
        if not self.source.classes:
            raise ValueError(f"a conditional recipe needs labels, and --data {self.source.name} has none")
        return self.source.classes

    def players(self) -> list[Player]:
        return [
            Player("critic", ("critic",), self.critic_loss, updates=self.options.critic_updates, is_critic=True),
            Player("generator", ("generator",), self.generator_loss),
        ]

    def condition(self, batch: Batch) -> tuple[Tensor, ...]:
        """Further arguments of both networks."""
        return (batch["label"],) if self.conditional else ()

    @torch.no_grad()
    def fake(self, batch: Batch) -> Tensor:
        """As many samples as the batch has, of its classes; constants for the critic's turn."""
        return self.generator(self.latent(len(batch["image"])), *self.condition(batch))

    def penalties(self) -> dict[str, float]:
        """Weights of those that are due at this step."""
        o = self.options
        due = o.penalty_every if self.step % max(1, o.penalty_every) == 0 else 0
        return {"gradient_penalty": due * o.gradient_penalty, "r1": due * o.r1, "r2": due * o.r2}

    def critic_loss(self, batch: Batch) -> dict[str, Tensor]:
        real, args = batch["image"], self.condition(batch)
        step = self.critic_step(
            self.critic, real, self.fake(batch), self.options.loss, real_args=args, fake_args=args, **self.penalties()
        )
        return {"critic": step}

    def generator_loss(self, batch: Batch) -> dict[str, Tensor]:
        args = self.condition(batch)
        fake = self.generator(self.latent(len(batch["image"])), *args)
        return {"generator": self.deceive(fake, batch)}

    def deceive(self, fake: Tensor, batch: Batch) -> Tensor:
        """The loss of samples that are to pass for real; of a relativistic loss, beside those of the batch."""
        args, real_scores = self.condition(batch), None
        if self.options.loss.startswith("relativistic"):
            with torch.no_grad():
                real_scores = self.critic(batch["image"], *args)
        return losses.generator(self.options.loss)(self.critic(fake, *args), real_scores)

    def labels(self, n: int) -> Tensor | None:
        """The classes that ``n`` samples are of: all in turn, where the generator is told of them."""
        return torch.arange(n, device=self.device) % self.classes if self.conditional else None

    def decode(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """The samples of latents (n, z_dim)."""
        return self.generator(z) if label is None else self.generator(z, label)

    def sample(self, n: int) -> Tensor:
        return self.decode(self.latent(n), self.labels(n))

    def write(self, text: str, n: int = 1) -> Tensor:
        """(length, n, C, H, W): ``n`` lines of text, each character a sample of its class, and all of a line of one latent.

        Where classes have longer names, words in place of characters. Spaces are black. Letters that are no class are
        looked for in the other case. ValueError: what isn't known either way, or a recipe that is not conditional.
        """
        names = self.source.class_names if self.conditional else ()
        if not names:
            raise ValueError("only a conditional recipe of data with classes writes text")
        single = all(len(name) == 1 for name in names)
        pieces = [
            next((p for p in (piece, piece.swapcase()) if p in names), piece) for piece in (text if single else text.split())
        ]
        if unknown := [piece for piece in pieces if piece not in names and not piece.isspace()]:
            raise ValueError(f"text {text!r}: no class {unknown[0]!r}; known: {' '.join(names)}")
        z, blank = self.latent(n), torch.full((n, *self.source.shape), -1.0, device=self.device)
        labels = {piece: torch.full((n,), names.index(piece), device=self.device) for piece in pieces if piece in names}
        return torch.stack([self.decode(z, labels[piece]) if piece in labels else blank for piece in pieces])

    def show(self, batch: Batch, n: int) -> Tensor:
        """Images of a conditional recipe: a column for each class."""
        if not self.conditional or len(self.source.shape) == 1:
            return self.sample(n)
        rows = max(1, n // self.classes)
        return self.sample(rows * self.classes).unflatten(0, (rows, self.classes)).transpose(0, 1)
