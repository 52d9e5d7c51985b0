"""What a data source is, and the batches drawn from it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Source(Dataset):
    """Samples by index, as dictionaries: "image" (C, H, W) in [-1, 1] or points (D,), "label" (scalar) where there are classes.

    Here they lie in memory, as ``tensors`` of one length, images as uint8 from 0 to 255 or ready; other sources override
    ``__len__`` and ``__getitems__``. ``shape``: of one sample. ``class_names``: what labels mean. ``skipped``: files left out.
    """

    skipped: tuple[str, ...] = ()

    def __init__(self, name: str, tensors: dict[str, Tensor], class_names: tuple[str, ...] = ()):
        self.name, self.class_names = name, class_names
        # in float32 whatever the default dtype was when they were made
        self.tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        self.shape = tuple(tensors["image"].shape[1:])

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.tensors["image"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: tensor[0] for key, tensor in self.__getitems__([i]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A whole batch; DataLoader asks for it where it is there."""
        index = torch.as_tensor(rows)
        batch = {key: tensor[index] for key, tensor in self.tensors.items()}
        if batch["image"].dtype == torch.uint8:
            batch["image"] = batch["image"].float().div_(127.5).sub_(1)
        return batch

    def spread(self, n: int) -> dict[str, Tensor]:
        """At most ``n`` samples from all over, in their order, the same at each call."""
        return self.__getitems__(_drawn(len(self), n))

    def split(self, share: float) -> tuple["Source", "Source"]:
        """(what is trained on, the ``share`` that is held out), the same at each call, classes and files mixed in both."""
        held = _drawn(len(self), int(len(self) * share))
        return Part(self, sorted(set(range(len(self))) - set(held))), Part(self, held)


def _drawn(length: int, n: int) -> list[int]:
    """At most ``n`` rows of ``length``, in order. By chance: every k-th row meets the same classes where labels repeat."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[:n].sort().values.tolist()


class Domains(Source):
    """Two sources side by side, without pairs: "image" of one and "other" of the other. The shorter one is repeated."""

    def __init__(self, name: str, image: Source, other: Source):
        if image.shape != other.shape:
            raise ValueError(
                f"--data {name}: the two domains have samples of {image.shape} and {other.shape}; expected one shape"
            )
        self.name, self.image, self.other, self.class_names, self.shape = name, image, other, (), image.shape
        self.skipped = image.skipped + other.skipped

    def __len__(self) -> int:
        return max(len(self.image), len(self.other))

    def split(self, share: float) -> tuple["Domains", "Domains"]:
        """Of each side; rows that belong together stay together where both have equally many."""
        pairs = zip(self.image.split(share), self.other.split(share), strict=True)
        return tuple(Domains(self.name, image, other) for image, other in pairs)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        image, other = (side.__getitems__([row % len(side) for row in rows])["image"] for side in (self.image, self.other))
        return {"image": image, "other": other}


class Part(Source):
    """Some rows of ``source``."""

    def __init__(self, source: Source, rows: Sequence[int]):
        self.source, self.rows = source, rows
        self.name, self.shape, self.class_names = source.name, source.shape, source.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return self.source.__getitems__([self.rows[row] for row in rows])


class Absent(Source):
    """Stands for the data of a trained run where it is gone: its shape and classes are known, samples are not."""

    def __init__(self, name: str, shape: tuple[int, ...], class_names: tuple[str, ...], why: str):
        self.name, self.shape, self.class_names, self.why = name, tuple(shape), tuple(class_names), why

    def __len__(self) -> int:
        raise ValueError(self.why)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        raise ValueError(self.why)


class _Rows:
    """Row numbers of one rank's part of each batch, from batch ``start`` on: each epoch is a permutation of its own seed."""

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world: int, start: int):
        self.length, self.batch_size, self.seed, self.rank, self.world, self.start = (
            length,
            batch_size,
            seed,
            rank,
            world,
            start,
        )

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // self.batch_size
        epoch, first = divmod(self.start, per_epoch)
        while True:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + 7919 * epoch))
            for i in range(first, per_epoch):
                batch = order[i * self.batch_size : (i + 1) * self.batch_size]
                yield batch[self.rank :: self.world].tolist()
            epoch, first = epoch + 1, 0


def _whole(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The source made a batch of it already."""
    return batch


class Batches:
    """Endless batches whose n-th is always the same, so that a run that goes on sees what it would have seen.

    ``batch_size``: of all ranks together. ``start``: batches drawn before. ``workers``: processes that load ahead.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, rank=0, world=1, start=0, workers=0):
        if batch_size > len(source):
            raise ValueError(f"--batch-size {batch_size} is more than the {len(source)} samples of {source.name}")
        if batch_size % world:
            raise ValueError(f"--batch-size {batch_size} is of all {world} processes together: expected a multiple of {world}")
        self.drawn = start
        rows = _Rows(len(source), batch_size, seed, rank, world, start)
        if workers:
            self._batches = iter(DataLoader(source, batch_sampler=rows, num_workers=workers, collate_fn=_whole))
        else:  # without the loader's overhead, a third of a millisecond a batch
            self._batches = map(source.__getitems__, rows)

    def __next__(self) -> dict[str, Tensor]:
        self.drawn += 1
        return next(self._batches)
