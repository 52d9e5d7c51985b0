"""An .npz file of NumPy: images or points, and labels."""

import zipfile

import torch
from torch import Tensor

from .images import fit
from .source import Source

IMAGES = ("images", "image", "x", "X", "x_train", "train_images", "data", "arr_0")
LABELS = ("labels", "label", "y", "Y", "y_train", "train_labels", "targets", "arr_1")


def load(name: str, size: int, strict: bool) -> Source:
    """The first of ``IMAGES`` that is there, and of ``LABELS``, which may be missing. ValueError for what can't be understood.

    Images (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels: whole numbers from 0 to 255, or floating point in
    [0, 1], [-1, 1] or [0, 255]. Points (N, D), taken as they are.
    """
    import numpy

    try:
        with numpy.load(name, allow_pickle=False) as file:
            found = {key: next((file[known] for known in keys if known in file), None) for key, keys in _WANTED.items()}
            keys = list(file.keys())
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"--data {name}: not an .npz file with arrays of numbers: {error}") from None
    array, labels = found["image"], found["label"]
    if array is None:
        raise ValueError(f"--data {name} holds {', '.join(keys) or 'nothing'}: expected an array {' or '.join(IMAGES)}")
    if array.dtype.kind not in "buif" or not len(array):
        raise ValueError(f"--data {name}: expected numbers, got an array of {array.dtype} and shape {array.shape}")
    if array.ndim == 2:
        tensors = {"image": torch.tensor(array, dtype=torch.float32)}
        if not tensors["image"].isfinite().all():
            raise ValueError(f"--data {name}: points hold values that are not finite")
    else:
        tensors = {"image": fit(_scaled(_channels_first(array, name), name), size)}
    names = ()
    if labels is not None:
        if labels.shape not in ((len(array),), (len(array), 1)):
            raise ValueError(
                f"--data {name}: labels of shape {labels.shape} for {len(array)} samples; expected ({len(array)},), one each"
            )
        known, index = numpy.unique(labels.reshape(-1), return_inverse=True)
        tensors["label"], names = torch.tensor(index.reshape(-1)), tuple(map(str, known))
    return Source(name, tensors, names)


_WANTED = {"image": IMAGES, "label": LABELS}


def _channels_first(array, name: str):
    """(N, C, H, W)."""
    shape = array.shape
    if array.ndim == 3:
        return array[:, None]
    first, last = (array.ndim == 4 and shape[axis] in (1, 3) for axis in (1, -1))
    if first == last:
        why = "which could be either" if first else "with neither 1 nor 3 channels"
        raise ValueError(
            f"--data {name}: images of shape {shape}, {why}; expected (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        )
    return array if first else array.transpose(0, 3, 1, 2)


def _scaled(array, name: str) -> Tensor:
    """uint8, or float32 in [-1, 1]."""
    least, most = float(array.min()), float(array.max())
    if array.dtype.kind in "bui":
        if least < 0 or most > 255:
            raise ValueError(f"--data {name}: whole numbers from {least:g} to {most:g}; expected 0 to 255")
        return torch.tensor(array.astype("uint8") * (255 if array.dtype.kind == "b" else 1))
    images = torch.tensor(array, dtype=torch.float32)
    if -1 <= least < 0 and most <= 1:
        return images
    if least >= 0 and most <= 255:
        return images * 2 - 1 if most <= 1 else images / 127.5 - 1
    raise ValueError(f"--data {name}: values from {least:g} to {most:g}; expected within [0, 1], [-1, 1] or [0, 255]")
