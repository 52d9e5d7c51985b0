"""CycleGAN: translation between two domains without pairs; what goes to the other domain and comes back is to be what it was.

Two generators, two critics of patches with least squares, cycle and identity losses, and a pool of earlier results that the
critics are shown. ``fastgan train cyclegan`` is style transfer from photographs to pencil drawings, ``--data flat`` to the
flat colours and outlines of animated films, ``--data FOLDER,FOLDER`` between two of your own; ``fastgan sample DIR --input
PICTURES`` then translates others. A source of one domain is made into two by ``--set domain=``: its images, and other
images of it inverted, rotated by a quarter or as outlines.

Zhu et al., "Unpaired image-to-image translation using cycle-consistent adversarial networks", 2017.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from fastgan import losses
from fastgan.training import degradations, metrics
from fastgan.training.data import Domains
from fastgan.training.data.photos import STYLES
from fastgan.training.options import Options as BaseOptions
from fastgan.training.recipe import Player
from fastgan.training.translation import SHOWN, PatchCritic, Residual, Translation, needs_images


@dataclass
class Options(BaseOptions):
    width: int = 16
    lr: float = 5e-4
    lr_decay: float = 0.5
    loss: Literal[losses.names()] = "least_squares"
    cycle: float = 10.0  # weight of |there and back - original|
    identity: float = 5.0  # weight of |result - original| for what is in the target domain already
    blocks: int = 3
    pool: int = 50  # earlier results that critics are shown; 0: none
    domain: Literal["invert", "rotate", "edges"] = "edges"  # the other domain of a source that has one


DOMAINS = {
    "invert": lambda images: -images,
    "rotate": lambda images: images.rot90(1, (2, 3)),
    "edges": degradations.edges,
}


class Generator(nn.Module):
    """Image to image in [-1, 1]: halved once, residual blocks, doubled again; instance norm."""

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()
        norm = nn.InstanceNorm2d
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 5, padding=2), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1), norm(2 * width), nn.ReLU()),
            *(Residual(2 * width, norm) for _ in range(blocks)),
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, channels, 5, padding=2), nn.Tanh()),
        )

    def forward(self, x):
        return self.body(x)


class Pool(nn.Module):
    """The last results that a critic was shown, ``size`` of them; a network without parameters, so that checkpoints hold it.
    Several processes all have the first one's."""

    def __init__(self, size: int, shape):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.compiler.disable
    def forward(self, images):
        """``images`` as they are until the pool is full; then each with probability 1/2 exchanged for one of the pool."""
        size, count, shown = len(self.images), int(self.count), images.clone()
        for i, image in enumerate(images):
            if count < size:
                self.images[count] = image
                count += 1
            elif size and torch.rand(()) < 0.5:
                k = int(torch.randint(size, ()))
                shown[i], self.images[k] = self.images[k].clone(), image
        self.count.fill_(count)
        return shown


class Recipe(Translation):
    """ "generator" leads from "image" to "other", "inverse" back."""

    Options = Options
    data = "drawings"
    averaged = ("generator", "inverse")
    steps = 500
    goals: ClassVar = {"cycle_psnr": 14.0, "ssim": 0.3}
    further: ClassVar = {"flat": ("--data flat", {"cycle_psnr": 14.0, "ssim": 0.3})}
    batch_size = 4

    def build(self):
        shape, o = needs_images(self.source), self.options
        networks = {name: Generator(shape[0], o.width, o.blocks) for name in ("generator", "inverse")}
        networks |= {name: PatchCritic(shape[0], o.width) for name in ("critic", "inverse_critic")}
        return networks | {name: Pool(o.pool, shape) for name in ("pool", "inverse_pool")}

    def players(self):
        return [
            Player("critics", ("critic", "inverse_critic"), self.critic_loss, is_critic=True),
            Player("generators", ("generator", "inverse"), self.loss),
        ]

    def domains(self, batch):
        """(images of one domain, images of the other), not pairs."""
        if "other" in batch:
            return batch["image"], batch["other"]
        image = batch["image"]
        return image, DOMAINS[self.options.domain](image.roll(1, 0))

    def critic_loss(self, batch):
        image, other = self.domains(batch)
        with torch.no_grad():
            fake_other, fake_image = self.pool(self.generator(image)), self.inverse_pool(self.inverse(other))
        return {
            "critic": self.critic_step(self.critic, other, fake_other, self.options.loss),
            "inverse_critic": self.critic_step(self.inverse_critic, image, fake_image, self.options.loss),
        }

    def loss(self, batch):
        o, (image, other) = self.options, self.domains(batch)
        fake_other, fake_image = self.generator(image), self.inverse(other)
        with torch.no_grad():
            scores, inverse_scores = self.critic(other), self.inverse_critic(image)
        side = losses.generator(o.loss)
        terms = {
            "generator": side(self.critic(fake_other), scores),
            "inverse": side(self.inverse_critic(fake_image), inverse_scores),
            "cycle": o.cycle
            * (losses.cycle(self.inverse(fake_other), image) + losses.cycle(self.generator(fake_image), other)),
        }
        if o.identity:
            same = losses.identity(self.generator(other), other) + losses.identity(self.inverse(image), image)
            terms["identity"] = o.identity * same
        return terms

    def stylise(self, images):
        """What ``images`` are in the other domain, which training never sees; None where nobody knows."""
        if self.source.name in STYLES:
            return STYLES[self.source.name]((images + 1) / 2) * 2 - 1
        return None if isinstance(self.source, Domains) else DOMAINS[self.options.domain](images)

    def pair(self, batch):
        """Images, and what they ought to become or, where nobody knows, the images."""
        image = batch["image"]
        truth = self.stylise(image)
        return image, image if truth is None else truth

    def show(self, batch, n):
        """Images, their translations, these translated back, and what they ought to be, where that is known."""
        image = self.unseen(SHOWN)["image"]
        fake, truth = self.generator(image), self.stylise(image)
        return torch.stack([image, fake, self.inverse(fake), *([] if truth is None else [truth])], 1)

    def evaluate(self, n=500):
        """Of at most ``n`` unseen images: "cycle_psnr", of what came back; where the true style is known "psnr" and "ssim" of
        their translations against it, and "psnr_gain", over what images have that are left as they are."""
        with torch.no_grad():
            image = self.unseen(n)["image"]
            fake = torch.cat([self.generator(part) for part in image.split(64)])
            back, truth = torch.cat([self.inverse(part) for part in fake.split(64)]), self.stylise(image)
        found = {"cycle_psnr": metrics.paired(back, image)["psnr"]}
        if truth is not None:
            found |= metrics.paired(fake, truth, self.perceptual)
            found["psnr_gain"] = found["psnr"] - metrics.paired(image, truth)["psnr"]
        return found
