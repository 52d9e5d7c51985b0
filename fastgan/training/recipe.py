"""What a recipe is: networks, the players that train them, and how samples are drawn.

A recipe is one file of :mod:`fastgan.recipes` with a class ``Recipe``. Most are a :class:`GAN` with other networks or
defaults; what has more than one generator and one critic derives from :class:`Recipe` and names its own players.
"""

from collections.abc import Callable
from dataclasses import dataclass
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

    def evaluate(self, n: int = 2000) -> dict[str, float]:
        """Metrics by name, of ``n`` samples: those of :func:`fastgan.training.metrics.evaluate` for what :attr:`source` holds."""
        from . import metrics

        return metrics.evaluate(self.sample, self.source, n)

    def show(self, batch: Batch, n: int) -> Tensor:
        """What the picture of samples holds: here samples; a translation shows its inputs too, (n, rows, C, H, W)."""
        return self.sample(n)

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
        o, shape, classes = self.options, self.source.shape, self.classes
        if len(shape) == 1:
            return {
                "generator": networks.Perceptron(o.z_dim, shape, 4 * o.width, classes),
                "critic": networks.Perceptron(shape, 1, 4 * o.width, classes),
            }
        return {
            "generator": networks.ConvGenerator(o.z_dim, shape, o.width, classes),
            "critic": networks.ConvCritic(shape, o.width, classes),
        }

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

    def critic_loss(self, batch: Batch) -> dict[str, Tensor]:
        o, real, args = self.options, batch["image"], self.condition(batch)
        with torch.no_grad():
            fake = self.generator(self.latent(len(real)), *args)
        due = o.penalty_every if self.step % max(1, o.penalty_every) == 0 else 0
        penalties = {"gradient_penalty": due * o.gradient_penalty, "r1": due * o.r1, "r2": due * o.r2}
        return {"critic": self.critic_step(self.critic, real, fake, o.loss, real_args=args, fake_args=args, **penalties)}

    def generator_loss(self, batch: Batch) -> dict[str, Tensor]:
        real, args = batch["image"], self.condition(batch)
        fake_scores = self.critic(self.generator(self.latent(len(real)), *args), *args)
        real_scores = None
        if self.options.loss.startswith("relativistic"):
            with torch.no_grad():
                real_scores = self.critic(real, *args)
        return {"generator": losses.generator(self.options.loss)(fake_scores, real_scores)}

    def sample(self, n: int) -> Tensor:
        args = (torch.arange(n, device=self.device) % self.classes,) if self.conditional else ()
        return self.generator(self.latent(n), *args)
