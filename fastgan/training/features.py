"""What images are compared by: features of a classifier trained on the spot, of a fixed random network, or of InceptionV3.

All work offline but the last, and the first two are scaled to a mean variance of 1 over the source's images. Distances in the
features of different networks have nothing to do with each other, so that only InceptionV3's can stand beside published ones;
``Extractor.note`` goes with every result.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHOICES = ("classifier", "random", "inception")
NOT_COMPARABLE = "not comparable with published figures"
HELD_OUT = 5  # every 5th image tests the classifier
EPOCHS = 8
PART = 500  # images at a time


@dataclass(frozen=True)
class Extractor:
    """``extractor(images (N, C, H, W) in [-1, 1])`` is (features (N, D), logits (N, classes) or None), on the images' device.

    ``classes``: how many classes of the source the logits are about, 0 where they are about others. ``accuracy``: of the
    classifier, on images that it was not trained on.
    """

    name: str
    note: str
    call: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    classes: int = 0
    accuracy: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = zip(*[self.call(part) for part in images.float().split(PART)], strict=True)
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def extractor(name: str | None, images: Tensor, labels: Tensor | None = None) -> Extractor:
    """The extractor of a name of ``CHOICES``; None: "classifier" where there are labels, else "random".

    ``images`` (N, C, H, W), ``labels`` (N,): what the classifier is trained on, once a process. Draws nothing from the global
    random state. ValueError: an unknown name, or no labels for a classifier; ModuleNotFoundError says what Inception needs.
    """
    name = name or ("random" if labels is None else "classifier")
    if name == "classifier":
        if labels is None:
            raise ValueError("features 'classifier' are trained on labels, and the data has none: 'random' needs none")
        return _classifier(images, labels)
    if name == "random":
        return _random(images)
    if name == "inception":
        return _inception()
    raise ValueError(f"features {name!r}: expected one of {', '.join(CHOICES)}")


# --- a classifier trained on the spot -------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Three convolutions, halved twice, to 64 features; their linear map are the logits."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4),
            nn.Conv2d(64, 64, 4), nn.Flatten(), nn.ReLU(),
        )  # fmt: skip
        self.score = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.score(features)


_trained: dict[str, Extractor] = {}


def _classifier(images: Tensor, labels: Tensor) -> Extractor:
    images, labels = images.detach().float().cpu(), labels.cpu()
    key = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    if key not in _trained:
        with torch.random.fork_rng(()), torch.enable_grad():
            torch.default_generator.manual_seed(0)  # the CPU's alone
            _trained[key] = _train(images, labels)
    return _trained[key]


def _train(images: Tensor, labels: Tensor) -> Extractor:
    """Adam, images moved at random by a pixel; a few seconds."""
    classes = int(labels.max()) + 1
    rows = torch.randperm(len(images))
    held_out, rows = rows[::HELD_OUT], rows[torch.arange(len(rows)) % HELD_OUT > 0]
    model = Classifier(images.shape[1], classes)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    batches = max(1, len(rows) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in rows[torch.randperm(len(rows))].chunk(batches)[:batches]:
            moved = images[chosen].roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
            loss = F.cross_entropy(model(moved)[1], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    accuracy = (model(images[held_out])[1].argmax(1) == labels[held_out]).float().mean().item()
    note = f"a classifier trained on the spot, accuracy {accuracy:.3f} on held-out images; {NOT_COMPARABLE}"
    return Extractor("classifier", note, _scaled(model, images), classes, accuracy)


def _scaled(model: nn.Module, images: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """``model`` with its features divided by the root of their mean variance over ``images``."""
    with torch.no_grad():
        features = torch.cat([model(part)[0] for part in images.split(PART)])
    scale = features.var(0).mean().sqrt().clamp_min(1e-12).item()

    def call(x: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = model.to(x.device)(x)
        return features / scale, logits

    return call


# --- a fixed random network -----------------------------------------------------------------------------------------


class _Random(nn.Module):
    """Means over quarters of the image of three levels of random convolutions; 448 features."""

    def __init__(self, channels: int):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in ((channels, 16), (16, 32), (32, 64)))
        for level in self.levels:
            nn.init.orthogonal_(level.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        found = []
        for level in self.levels:
            x = F.relu(level(x))
            found.append(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return torch.cat(found, 1), None


def _random(images: Tensor) -> Extractor:
    images = images.detach().float().cpu()
    with torch.random.fork_rng(()):
        torch.default_generator.manual_seed(0)
        model = _Random(images.shape[1]).requires_grad_(False)
    return Extractor("random", f"a fixed random network; {NOT_COMPARABLE}", _scaled(model, images))


# --- InceptionV3 ----------------------------------------------------------------------------------------------------


def _inception() -> Extractor:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        model = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except (ImportError, OSError) as error:  # the latter: its weights can't be had
        needed = "pip install torch-fidelity torchvision, and a network for its weights at first use"
        raise ModuleNotFoundError(f"features 'inception': {needed} ({str(error).strip().splitlines()[0]})") from error

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return model.to(x.device)._torch_fidelity_forward(pixels.expand(-1, 3, -1, -1) if x.shape[1] == 1 else pixels[:, :3])

    return Extractor("inception", "InceptionV3 of torch-fidelity, by torchmetrics", call)
