"""``torchvision:NAME[:ROOT]``: a data set of torchvision that is on disk already."""

import inspect

from .images import GREY, Images

LOOKED_AT = 64  # images that say whether all are grey


def load(name: str, size: int, strict: bool) -> "Vision":
    """The training part of ``torchvision.datasets.NAME`` in the folder ROOT (default: "data"). Nothing is downloaded.

    Grey, with one channel, if the first 64 images are. Labels where targets are whole numbers.
    """
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        raise ValueError(f"--data {name}: {error}; pip install torchvision, of the version that goes with this torch") from None
    _, kind, root = (*name.split(":", 2), "data")[:3]
    made = getattr(datasets, kind, None)
    if kind not in datasets.__all__:
        raise ValueError(f"--data {name}: torchvision.datasets has no {kind}; it has {', '.join(sorted(datasets.__all__))}")
    takes, arguments = inspect.signature(made).parameters, {}
    for key, value in {"root": root, "train": True, "split": "train", "download": False}.items():
        if key in takes:
            arguments[key] = value
    try:
        rows = made(**arguments)
    except Exception as error:  # each data set has errors of its own
        raise ValueError(
            f"--data {name}: {error}. Nothing is downloaded here: "
            f'python -c "from torchvision import datasets; datasets.{kind}({root!r}, download=True)" does'
        ) from error
    head = [rows[i] for i in range(min(LOOKED_AT, len(rows)))]
    labels = getattr(rows, "targets", None)
    labels = [int(label) for label in labels] if labels is not None and isinstance(head[0][1], int) else None
    names = getattr(rows, "classes", None) or (range(max(labels) + 1) if labels else ())
    channels = 1 if all(image.mode in GREY for image, *_ in head) else 3
    source = Vision(name, size, channels, labels, map(str, names) if labels else (), strict)
    source.rows = rows
    return source


class Vision(Images):
    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int):
        return self.rows[i][0]
