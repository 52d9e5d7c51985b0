"""Data sources of ``fastgan train``: what comes with Python packages, and the user's own."""

import importlib.util

import pytest
import torch

from fastgan.training import data, missing_extras

pytestmark = pytest.mark.skipif(bool(missing_extras()), reason=f"the extra train is not installed: {missing_extras()}")


@pytest.mark.parametrize("name", data.NAMES)
def test_every_name_gives_samples_of_its_shape_and_the_same_ones_each_time(name):
    source = data.load(name, 16)
    rows = [0, len(source) - 1, len(source) // 2]
    batch, again = source.__getitems__(rows), data.load(name, 16).__getitems__(rows)
    assert batch["image"].shape == (3, *source.shape) and batch["image"].dtype == torch.float32
    if len(source.shape) == 3:
        assert source.shape[1:] == (16, 16)
        assert -1 <= batch["image"].min() < batch["image"].max() <= 1
    assert ("label" in batch) == bool(source.classes)
    if source.classes:
        assert {int(label) for label in source.tensors["label"]} == set(range(source.classes))
    if "other" in batch:
        assert batch["other"].shape == batch["image"].shape and not torch.equal(batch["other"], batch["image"])
    assert batch.keys() == again.keys() and all(torch.equal(batch[key], again[key]) for key in batch)


def test_glyphs_can_be_told_apart():
    """The nearest neighbour in another font is the same character far more often than by chance (1 of 62)."""
    source = data.load("glyphs", 16)
    images, labels = source.tensors["image"].flatten(1), source.tensors["label"]
    distances = torch.cdist(images[:1116], images[1116:])  # another draw of turns and shifts
    right = (labels[1116:][distances.argmin(1)] == labels[:1116]).float().mean()
    assert right > 0.85 and source.class_names[int(labels[36])] == "k"


def test_the_two_domains_of_drawings_are_of_different_photographs():
    """No patch of one domain is the drawing of a patch of the other: the photographs are split, then cut."""
    from fastgan.training.data import photos

    source, seen = data.load("flat", 16), photos.read()
    assert torch.equal(source.image.tensors["image"], photos.patches(seen[::2], 16))
    drawn = source.other.tensors["image"]
    assert len(drawn) == len(photos.patches(seen[1::2], 16))  # as many as their photographs have
    nearest = torch.cdist(drawn.flatten(1), photos.patches(seen[1::2], 16).flatten(1)).argmin(1)
    assert (nearest == torch.arange(len(drawn))).float().mean() > 0.5  # and in their order


def test_photographs_without_scikit_image(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "skimage" else find(name, *a))
    alone = data.load("photos", 16)
    assert 200 < len(alone) < 1000
    assert len(data.load("drawings", 16)) > 100


def test_photographs_refuse_a_size_they_do_not_have():
    with pytest.raises(ValueError, match=r"--size 1000.*smaller"):
        data.load("photos", 1000)
