"""StackGAN: text to image in two stages: the first draws a coarse image, the second corrects and refines it, given the text.

Texts are like "three" or "a small seven" (:mod:`fastgan.training.captions`); "small" ones are shrunk, and a text without
size may be either. Tokens are embedded and added up. Conditioning augmentation draws the condition from a Gaussian around
the text's embedding, which KL keeps near N(0, I). A real image with another one's text counts as a fake, so that critics
read. ``fastgan sample DIR --text "a small seven"`` draws what the text says.

Zhang et al., "StackGAN: Text to photo-realistic image synthesis with stacked generative adversarial networks", 2017.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from fastgan import losses
from fastgan.training import captions, metrics, networks
from fastgan.training.data import Source
from fastgan.training.features import extractor
from fastgan.training.options import Options as BaseOptions
from fastgan.training.recipe import Player
from fastgan.training.recipe import Recipe as Base
from fastgan.training.translation import Residual, needs_images


@dataclass
class Options(BaseOptions):
    width: int = 16
    lr: float = 5e-4
    condition: int = 32  # coordinates of the condition
    kl: float = 0.1  # weight of the conditions' KL
    loss: Literal[losses.names()] = "non_saturating"
    wrong_text: float = 0.5  # share of the critics' fakes that are real images with another's text


class Augmented(nn.Module):
    """Tokens (B, T) to a condition (B, size) from N(mean, variance) of the text; and these Gaussians' KL."""

    def __init__(self, words: int, size: int):
        super().__init__()
        self.words = nn.EmbeddingBag(words, 2 * size, mode="sum", padding_idx=0)
        self.gaussian = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(2 * size, 2 * size))

    def forward(self, tokens):
        mean, log_variance = self.gaussian(self.words(tokens)).chunk(2, 1)
        return mean + (log_variance / 2).exp() * torch.randn_like(mean), losses.kl(mean, log_variance)


class Coarse(nn.Module):
    """Stage I: (latent, tokens) to (images of half the side, KL)."""

    def __init__(self, z_dim, shape, width, words, size):
        super().__init__()
        self.text = Augmented(words, size)
        self.image = networks.ConvGenerator(z_dim + size, shape, 2 * width)

    def forward(self, z, tokens):
        condition, kl = self.text(tokens)
        return self.image(torch.cat([z, condition], 1)), kl


class Fine(nn.Module):
    """Stage II: (images of half the side, tokens) to (images, KL)."""

    def __init__(self, channels, width, words, size):
        super().__init__()
        self.text, norm = Augmented(words, size), nn.BatchNorm2d
        self.read = nn.Sequential(nn.Conv2d(channels, 2 * width, 3, padding=1), nn.ReLU())
        self.join = nn.Sequential(nn.Conv2d(2 * width + size, 2 * width, 3, padding=1, bias=False), norm(2 * width), nn.ReLU())
        self.draw = nn.Sequential(
            *(Residual(2 * width, norm) for _ in range(2)),
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()),
        )

    def forward(self, coarse, tokens):
        condition, kl = self.text(tokens)
        planes = condition[:, :, None, None].expand(-1, -1, *coarse.shape[2:])
        return self.draw(self.join(torch.cat([self.read(coarse), planes], 1))), kl


class Critic(nn.Module):
    """(images, tokens) to a score."""

    def __init__(self, shape, width, words, size):
        super().__init__()
        self.words = nn.EmbeddingBag(words, size, mode="sum", padding_idx=0)
        self.joint = networks.JointCritic(shape, width, size)

    def forward(self, images, tokens):
        return self.joint(images, self.words(tokens))


class Recipe(Base):
    Options = Options
    steps = 800
    goals: ClassVar = {"caption_accuracy": 0.6, "fid": 5.0}
    averaged = ("coarse", "fine")

    def __init__(self, options, source):
        if not source.classes:
            raise ValueError(f"stackgan's texts are the names of classes, and --data {source.name} has none")
        self.captions = captions.Captions(source.class_names)
        super().__init__(options, source)

    def build(self):
        o, shape, words = self.options, needs_images(self.source), len(self.captions.words)
        half = (shape[0], shape[1] // 2, shape[2] // 2)
        return {
            "coarse": Coarse(o.z_dim, half, o.width, words, o.condition),
            "fine": Fine(shape[0], o.width, words, o.condition),
            "coarse_critic": Critic(half, o.width, words, o.condition),
            "fine_critic": Critic(shape, o.width, words, o.condition),
        }

    def players(self):
        return [
            Player("critics", ("coarse_critic", "fine_critic"), self.critic_loss, is_critic=True),
            Player("coarse", ("coarse",), self.coarse_loss),
            Player("fine", ("fine",), self.fine_loss),
        ]

    def captioned(self, batch):
        """(images, tokens): of each a random size, which half of the texts mention."""
        image, label = batch["image"], batch["label"]
        small, said = torch.rand(2, len(image), device=image.device) < 0.5
        size = torch.where(said, torch.where(small, 1, 2), 0)
        return captions.shrunk(image, small), self.captions.of(label, size)

    def stages(self, tokens):
        """((coarse images, KL), (fine ones, KL))."""
        coarse = self.coarse(self.latent(len(tokens)), tokens)
        return coarse, self.fine(coarse[0], tokens)

    def critic_loss(self, batch):
        image, tokens = self.captioned(batch)
        with torch.no_grad():
            (coarse, _), (fine, _) = self.stages(tokens)
        return {
            "coarse_critic": self.judge(self.coarse_critic, functional.avg_pool2d(image, 2), coarse, tokens),
            "fine_critic": self.judge(self.fine_critic, image, fine, tokens),
        }

    def judge(self, critic, real, fake, tokens):
        """A critic's loss: fakes are what was generated and, at the end of the batch, reals with the text of the one before."""
        wrong = int(self.options.wrong_text * len(real))
        kept = len(real) - wrong
        fake = torch.cat([fake[:kept], real[kept:]])
        other = torch.cat([tokens[:kept], tokens.roll(1, 0)[kept:]])
        return self.critic_step(critic, real, fake, self.options.loss, real_args=(tokens,), fake_args=(other,))

    def game(self, critic, real, fake, tokens):
        with torch.no_grad():
            real_scores = critic(real, tokens)
        return losses.generator(self.options.loss)(critic(fake, tokens), real_scores)

    def coarse_loss(self, batch):
        image, tokens = self.captioned(batch)
        fake, kl = self.coarse(self.latent(len(tokens)), tokens)
        game = self.game(self.coarse_critic, functional.avg_pool2d(image, 2), fake, tokens)
        return {"coarse": game, "coarse_kl": self.options.kl * kl}

    def fine_loss(self, batch):
        image, tokens = self.captioned(batch)
        with torch.no_grad():
            coarse, _ = self.coarse(self.latent(len(tokens)), tokens)
        fake, kl = self.fine(coarse, tokens)
        return {"fine": self.game(self.fine_critic, image, fake, tokens), "fine_kl": self.options.kl * kl}

    def draw(self, tokens):
        """Images of texts (B, 2)."""
        return self.stages(tokens.to(self.device))[1][0]

    def write(self, text, n=1):
        """``n`` images of a text."""
        return self.draw(self.captions.tokens(text).expand(n, -1))

    def every_caption(self, n):
        """(n, 2) tokens: classes and sizes in turn, small and large."""
        i = torch.arange(n, device=self.device)
        return self.captions.of(i % self.source.classes, 1 + i // self.source.classes % 2)

    def labels(self, n):
        return torch.arange(n, device=self.device) % self.source.classes

    def sample(self, n):
        return self.draw(self.every_caption(n))

    def show(self, batch, n):
        """A column for each class: small, large, small, large; the coarse image above the fine one."""
        (coarse, _), (fine, _) = self.stages(self.every_caption(min(4, max(1, n // self.source.classes)) * self.source.classes))
        rows = torch.stack([functional.interpolate(coarse, fine.shape[2:]), fine], 1)
        return rows.unflatten(0, (-1, self.source.classes)).transpose(0, 1).flatten(1, 2)

    def real(self, images, label):
        return Source(self.source.name, {"image": images, "label": label}, self.source.class_names)

    def reference(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            batch = self.unseen(2000)
            return metrics.reference(self.real(self.captioned(batch)[0], batch["label"]), self.features)

    def evaluate(self, n=2000):
        """Of samples for all texts with a size; and "caption_accuracy": the share that a classifier trained on captioned images
        takes for the class of their text and whose spread is nearer to that of the size they are to have."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            batch = self.unseen(n)
            images = self.captioned(batch)[0]
            found = metrics.evaluate(self.sample, self.real(images, batch["label"]), n, self.features, self.labels)
            every = self.every_caption(n)
            drawn, (label, size) = self.draw(every), (every[:, 1] - every[:, 1].min(), every[:, 0])
            _, logits = extractor("classifier", images, batch["label"])(drawn)
            small, large = (
                captions.shrunk(batch["image"], torch.full_like(batch["label"], i, dtype=torch.bool)) for i in (1, 0)
            )
            middle = (spread(small).mean() * spread(large).mean()).sqrt()
            right = (logits.argmax(1) == label) & ((spread(drawn) < middle) == (size == 1))
        return found | {"caption_accuracy": right.float().mean().item()}


def spread(images):
    """(B,): root mean squared distance from the middle, in sides, of what is bright."""
    light = (images.mean(1) + 1) / 2
    place = torch.linspace(-0.5, 0.5, images.shape[-1], device=images.device).square()
    return ((light * (place[:, None] + place)).sum((1, 2)) / light.sum((1, 2)).clamp_min(1e-6)).sqrt()
