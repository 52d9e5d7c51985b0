"""Data sources of ``fastgan train``: what comes with Python packages, and the user's own."""

import importlib.util
import pickle
import sys

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
    one, other = (photos.Patches("", seen[i::2], 16).tensors["image"] for i in (0, 1))
    assert torch.equal(source.image.tensors["image"], one)
    drawn = source.other.tensors["image"]
    assert len(drawn) == len(other)  # as many as their photographs have
    nearest = torch.cdist(drawn.flatten(1), other.flatten(1)).argmin(1)
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


# --- the user's own ---------------------------------------------------------------------------------------------------


def picture(path, size=(20, 12), mode="RGB", colour=(200, 30, 60), **options):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    if mode != "RGB":
        colour = {"L": 100, "LA": (100, 128), "I;16": 51400, "RGBA": (200, 30, 60, 0), "F": 0.5, "P": 0}[mode]
    Image.new(mode, size, colour).save(path, **options)
    return path


def pixel(source, i=0):
    return (source[i]["image"].amax((1, 2)) * 127.5 + 127.5).round().tolist()


def test_a_folder_of_images(tmp_path):
    """In alphabetical order, whatever they are called and however deep they lie; RGB if one of them is."""
    picture(tmp_path / "b.PNG", mode="L")
    picture(tmp_path / "a" / "x.bmp")
    picture(tmp_path / "a" / "deeper" / "y.webp", lossless=True)
    picture(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    source = data.load(str(tmp_path), 8)
    assert len(source) == 3 and source.shape == (3, 8, 8) and not source.classes and not source.skipped
    assert [pixel(source, i) for i in range(3)] == [[200, 30, 60], [200, 30, 60], [100, 100, 100]]
    batch = source.__getitems__([2, 0])
    assert batch.keys() == {"image"} and batch["image"].shape == (2, 3, 8, 8) and batch["image"].dtype == torch.float32


def test_sub_folders_are_classes_if_all_images_lie_in_them(tmp_path):
    for name in ("cats", "ants", "bees"):
        picture(tmp_path / name / "1.png", mode="L")
    picture(tmp_path / "ants" / "more" / "2.png", mode="L")
    (tmp_path / "empty").mkdir()
    source = data.load(str(tmp_path), 8)
    assert source.class_names == ("ants", "bees", "cats") and source.shape == (1, 8, 8)
    assert source.__getitems__([0, 1, 2, 3])["label"].tolist() == [0, 0, 1, 2]
    picture(tmp_path / "outside.png", mode="L")
    assert not data.load(str(tmp_path), 8).classes
    assert not data.load(str(tmp_path / "ants"), 8).classes  # one sub-folder alone tells nothing apart


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", [100]), ("I;16", [200]), ("LA", [177]), ("RGBA", [255, 255, 255]), ("RGB", [200, 30, 60])]
)
def test_modes_of_images(tmp_path, mode, channels):
    """16 bits are scaled, transparency lies over white."""
    picture(tmp_path / "1.png", mode=mode)
    source = data.load(str(tmp_path), 8)
    assert source.shape[0] == len(channels) and pixel(source) == pytest.approx(channels, abs=1)


def test_images_are_turned_cropped_in_the_middle_and_resized(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (60, 20))
    image.paste((255, 255, 255), (20, 0, 40, 20))  # the square in the middle
    image.paste((255, 0, 0), (20, 0, 40, 10))  # its upper half
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", exif=exif, quality=95, subsampling=0)
    source = data.load(str(tmp_path), 4)
    for image in source.__getitems__([0, 1])["image"]:
        red, green = image[0], image[1]
        assert red.min() > 0.7 and (green[0] < -0.7).all() and (green[3] > 0.7).all()


def test_files_that_can_not_be_read_are_named_and_left_out(tmp_path, capsys):
    from fastgan.training import command

    for i in range(4):
        picture(tmp_path / "in" / f"{i}.png", size=(64, 64))
    whole = picture(tmp_path / "in" / "cut.png", size=(64, 64)).read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(whole[: len(whole) // 2])
    for suffix in ("jpg", "webp", "gif"):
        path = picture(tmp_path / "in" / f"cut.{suffix}", size=(64, 64))
        path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "in" / "text.jpg").write_text("no image at all")
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    source = data.load(str(tmp_path / "in"), 8)
    assert len(source) == 4 and len(source.skipped) == 6
    assert all(any(name in text for text in source.skipped) for name in ("cut.png", "cut.jpg", "cut.webp", "text.jpg"))
    arguments = ["gan", "--data", str(tmp_path / "in"), "--size", "8", "--steps", "1", "--batch-size", "4", "--set", "width=2"]
    arguments += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert command.main([*arguments, "--strict"]) == 2
    said = capsys.readouterr().err
    assert "cut.gif can't be read" in said and "--strict" in said and not (tmp_path / "out").exists()
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "6 files can't be read and are left out" in said and "text.jpg" in said
    for path in (tmp_path / "in").glob("[0-9].png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"--data .*none of its 6 images can be read"):
        data.load(str(tmp_path / "in"), 8)


def test_an_image_whose_damage_shows_only_when_it_is_decoded(tmp_path):
    """The next one takes its place, with a warning, once; under strict it is an error."""
    for i in range(3):
        picture(tmp_path / f"{i}.png", size=(64, 64), mode="L")
    broken = bytearray((tmp_path / "1.png").read_bytes())
    middle = broken.index(b"IDAT") + 6
    broken[middle : middle + 8] = b"\xff" * 8
    (tmp_path / "1.png").write_bytes(broken)
    picture(tmp_path / "2.png", size=(64, 64), mode="I;16")
    source = data.load(str(tmp_path), 8)
    with pytest.warns(UserWarning, match=r"1\.png can't be read .*: the next image takes its place") as warned:
        assert [pixel(source, i) for i in (0, 1, 1)] == [[100], [200], [200]]
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"1\.png can't be read .*--strict"):
        data.load(str(tmp_path), 8, strict=True).__getitems__([0, 1])


def test_images_are_read_once_if_they_are_few(tmp_path, monkeypatch):
    from fastgan.training.data import folder, images

    picture(tmp_path / "1.png")
    opened, real = [], folder.Folder.open
    monkeypatch.setattr(folder.Folder, "open", lambda self, i: opened.append(i) or real(self, i))
    source = data.load(str(tmp_path), 8)
    assert not opened
    first = source.__getitems__([0, 0])["image"]
    assert opened == [0] and torch.equal(first, source.__getitems__([0, 0])["image"])
    monkeypatch.setattr(images, "KEPT", 0)
    source = data.load(str(tmp_path), 8)
    assert torch.equal(first, source.__getitems__([0, 0])["image"]) and opened == [0, 0, 0]


def test_two_folders_are_two_domains(tmp_path):
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.png")
    picture(tmp_path / "b" / "0.png", colour=(1, 2, 3))
    source = data.load(f"{tmp_path / 'a'},{tmp_path / 'b'}", 8)
    batch = source.__getitems__([0, 2])
    assert len(source) == 3 and batch["image"].shape == batch["other"].shape == (2, 3, 8, 8)
    assert pixel(source) == [200, 30, 60] and (batch["other"][:, 2] * 127.5 + 127.5).round().unique().tolist() == [3]
    picture(tmp_path / "grey" / "0.png", mode="L")
    with pytest.raises(ValueError, match=r"two domains have samples of \(3, 8, 8\) and \(1, 8, 8\)"):
        data.load(f"{tmp_path / 'a'},{tmp_path / 'grey'}", 8)


def saved(tmp_path, **arrays):
    import numpy

    numpy.savez(tmp_path / "a.npz", **arrays)
    return str(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "bool", "int64"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_of_images(tmp_path, dtype, layout):
    import numpy

    images = numpy.random.default_rng(0).integers(0, 256, (5, 8, 8) if layout == "NHW" else (5, 8, 8, 3))
    if dtype == "bool":
        images = images > 127
    expected = torch.tensor(images).float() / (0.5 if dtype == "bool" else 127.5) - 1
    expected = expected[:, None] if layout == "NHW" else expected.movedim(-1, 1)
    if layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
    for scaled in (images, images / 255, images / 127.5 - 1) if "float" in dtype else (images,):
        source = data.load(saved(tmp_path, images=scaled.astype(dtype), labels=numpy.array([[7], [9], [7], [3], [9]])), 8)
        assert source.class_names == ("3", "7", "9")
        batch = source.__getitems__([4, 0])
        torch.testing.assert_close(batch["image"], expected[[4, 0]], atol=1e-5, rtol=0)
        assert batch["label"].tolist() == [2, 1]


def test_arrays_are_cropped_and_resized(tmp_path):
    import numpy

    images = numpy.zeros((2, 12, 20, 1), "uint8")
    images[:, :, 4:16] = 200
    for dtype in ("uint8", "float32"):
        source = data.load(saved(tmp_path, x=images.astype(dtype)), 6)
        assert source.shape == (1, 6, 6)
        torch.testing.assert_close(source[1]["image"], torch.full((1, 6, 6), 200 / 127.5 - 1), atol=1e-6, rtol=0)


def test_arrays_of_points(tmp_path):
    import numpy

    points = numpy.random.default_rng(0).normal(size=(5, 3)) * 1000
    source = data.load(saved(tmp_path, x=points, y=numpy.array(list("abcab"))), 8)
    assert source.shape == (3,) and source.class_names == ("a", "b", "c")
    torch.testing.assert_close(source[2]["image"], torch.tensor(points[2], dtype=torch.float32))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "holds nothing: expected an array images or"),
        ({"weights": (3, 4)}, "holds weights: expected an array"),
        ({"x": (3, 8, 8, 4)}, r"images of shape \(3, 8, 8, 4\), with neither 1 nor 3 channels; expected \(N, H, W\)"),
        ({"x": (3, 3, 8, 3)}, r"images of shape \(3, 3, 8, 3\), which could be either"),
        ({"x": (3, 8, 8), "y": (2,)}, r"labels of shape \(2,\) for 3 samples; expected \(3,\)"),
        ({"x": (0, 8, 8)}, r"got an array of float64 and shape \(0, 8, 8\)"),
    ],
)
def test_arrays_that_are_not_understood(tmp_path, arrays, says):
    import numpy

    with pytest.raises(ValueError, match=says):
        data.load(saved(tmp_path, **{key: numpy.zeros(shape) for key, shape in arrays.items()}), 8)


def test_values_that_are_not_understood(tmp_path):
    import numpy

    for value in (-3.0, 300.0, float("nan")):
        with pytest.raises(ValueError, match=r"values from \S+ to \S+; expected within \[0, 1\]"):
            data.load(saved(tmp_path, x=numpy.full((2, 8, 8), value)), 8)
    with pytest.raises(ValueError, match="whole numbers from 300 to 300; expected 0 to 255"):
        data.load(saved(tmp_path, x=numpy.full((2, 8, 8), 300)), 8)
    with pytest.raises(ValueError, match="points hold values that are not finite"):
        data.load(saved(tmp_path, x=numpy.full((2, 2), float("nan"))), 8)
    with pytest.raises(ValueError, match="expected numbers, got an array of <U1"):
        data.load(saved(tmp_path, x=numpy.array(["a"])), 8)
    with pytest.raises(ValueError, match=r"not an \.npz file with arrays of numbers"):
        data.load(saved(tmp_path, x=numpy.array([None])), 8)
    (tmp_path / "a.npz").write_text("")
    with pytest.raises(ValueError, match=r"not an \.npz file with arrays of numbers"):
        data.load(str(tmp_path / "a.npz"), 8)


def test_what_is_neither_a_name_nor_there(tmp_path):
    with pytest.raises(ValueError, match=r"--data digitz: perhaps digits\? expected a name .*digitz does not exist"):
        data.load("digitz", 8)
    with pytest.raises(ValueError, match=r"--data .*: no images in this folder; expected files that end in .png"):
        data.load(str(tmp_path), 8)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"expected a folder .*got a file that ends in '\.csv'"):
        data.load(str(tmp_path / "a.csv"), 8)
    with pytest.raises(ValueError, match="b does not exist"):
        data.load(f"digits,{tmp_path}/b", 8)


def test_names_of_data_in_any_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data.absolute("a") == str(tmp_path / "a") and data.absolute("a,ring") == f"{tmp_path}/a,ring"
    assert data.absolute("digits") == "digits" and data.absolute("torchvision:MNIST:x") == "torchvision:MNIST:x"


# --- what is held out -------------------------------------------------------------------------------------------------


def test_samples_from_all_over_are_of_all_classes():
    """Labels repeat with a period in all three: steps of one length would meet the same few again and again."""
    for name, n in (("ring", 4000), ("glyphs", 4464 // 9), ("digits", 179)):
        source = data.load(name, 8)
        for part in (source.spread(n), source.split(n / len(source))[1].spread(10**6)):
            counts = torch.bincount(part["label"], minlength=source.classes)
            assert counts.sum() == n and counts.min() > 0 and counts.max() < 2.5 * n / source.classes
    assert len(source.spread(10**6)["image"]) == len(source)
    assert torch.equal(source.spread(50)["image"], source.spread(50)["image"])


def test_what_is_held_out_of_photographs_shares_no_pixel_with_what_is_trained_on():
    source = data.load("photos", 32)
    trained, held = (source.places[part.rows] for part in source.split(0.1))
    assert 0.1 <= len(held) / len(source) < 0.11 and len(trained) > 0.7 * len(source)
    for i in range(int(source.places[:, 0].max()) + 1):
        ours, others = trained[trained[:, 0] == i], held[held[:, 0] == i]
        assert len(others) >= 0.09 * (source.places[:, 0] == i).sum() and len(ours)
        _, top, bottom, left, right = others[:, None].unbind(2)
        _, above, below, before, behind = ours[None].unbind(2)
        both = (
            torch.minimum(bottom, below) - torch.maximum(top, above),
            torch.minimum(right, behind) - torch.maximum(left, before),
        )
        assert torch.minimum(*both).max() < 1e-9
    upper, first = held[:, 2] <= 0.6, held[:, 4] <= 0.6
    assert {tuple(corner) for corner in torch.stack([upper, first], 1).tolist()} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    # places are where the pixels are: a patch of the finest scale, cut again
    from fastgan.training.data import photos

    i = int((source.places[:, 0] == 3).nonzero()[5])
    photo = photos.read()[3]
    _, top, bottom, left, right = source.places[i].tolist()
    height, width = photo.shape[1:]
    again = photo[:, round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
    again = torch.nn.functional.interpolate(again[None], (32, 32), mode="bicubic", antialias=True)[0] * 2 - 1
    assert (again - source[i]["image"]).abs().mean() < 0.05


def test_two_domains_are_split_side_by_side():
    x = torch.arange(40.0)[:, None]
    same = data.Domains("", data.Source("", {"image": x}), data.Source("", {"image": 100 + x}))
    trained, held = same.split(0.1)
    for part in (trained, held):
        batch = part.spread(40)
        assert torch.equal(batch["other"], batch["image"] + 100)
    assert len(trained) == 36 and len(held) == 4
    trained, held = data.Domains("", same.image, data.Source("", {"image": x[:20]})).split(0.1)
    seen = {float(v) for v in trained.spread(40)["other"]}  # the shorter side is repeated
    assert len(seen) == 18 and not seen & {float(v) for v in held.spread(40)["other"]}


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_go_on_where_they_were_and_are_shared_out_among_processes():
    source = data.load("digits", 8)

    def first(n, **options):
        batches = data.Batches(source, 600, seed=3, **options)
        return [next(batches)["image"] for _ in range(n)]

    whole = first(7)  # 2 an epoch
    assert all(torch.equal(a, b) for a, b in zip(first(3, start=4), whole[4:], strict=True))
    halves = [first(2, rank=rank, world=2) for rank in (0, 1)]
    for k in (0, 1):
        assert torch.equal(torch.stack([halves[0][k], halves[1][k]], 1).flatten(0, 1), whole[k])
    assert not torch.equal(whole[0], whole[2])  # each epoch in an order of its own
    assert all(torch.equal(a, b) for a, b in zip(first(3, workers=1), whole[:3], strict=True))
    with pytest.raises(ValueError, match=r"--batch-size 602 .*3 processes together: expected a multiple of 3"):
        data.Batches(source, 602, 0, world=3)
    with pytest.raises(ValueError, match="--batch-size 1798 is more than the 1797 samples of digits"):
        data.Batches(source, 1798, 0)


# --- what needs further packages --------------------------------------------------------------------------------------


def test_a_hugging_face_folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    from PIL import Image

    features = datasets.Features(
        {"id": datasets.Value("int32"), "picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])}
    )
    rows = {"id": [1, 2, 3], "picture": [Image.new("L", (10, 12), 50 * i) for i in (1, 2, 3)], "kind": [1, 0, 1]}
    try:
        rows = datasets.Dataset.from_dict(rows, features=features)
    except pickle.PicklingError as error:  # datasets 5.2 with pyarrow 22 and 26
        pytest.skip(f"datasets {datasets.__version__} makes no data set here: {error}")
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "three")
    for name in ("one", "two"):
        source = data.load(str(tmp_path / name), 8)
        batch = source.__getitems__([2, 0])
        assert len(source) == 3 and source.class_names == ("x", "y") and batch["label"].tolist() == [1, 1]
        assert pixel(source, 2) == [150] and batch["image"].shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="has the splits a, b: expected train"):
        data.load(str(tmp_path / "three"), 8)
    rows.remove_columns("picture").save_to_disk(tmp_path / "four")
    with pytest.raises(
        ValueError, match="3 rows of id: Value, kind: ClassLabel; expected at least one, with a column of type Image"
    ):
        data.load(str(tmp_path / "four"), 8)


def test_a_torchvision_data_set(tmp_path, capsys):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    source = data.load("torchvision:FakeData", 8)
    assert source.shape == (3, 8, 8) and len(source) == 1000 and source.__getitems__([1, 2])["image"].shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"torchvision:MNIST:.*Nothing is downloaded here: python -c"):
        data.load(f"torchvision:MNIST:{tmp_path}", 8)
    with pytest.raises(ValueError, match=r"torchvision\.datasets has no MNOST; it has .*MNIST"):
        data.load("torchvision:MNOST", 8)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    head = bytes([0, 0, 8])
    for part, count in (("train", 3), ("t10k", 1)):
        sizes = count.to_bytes(4, "big")
        sides = (28).to_bytes(4, "big")
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + b"\x03" + sizes + sides * 2 + bytes([128]) * 784 * count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + b"\x01" + sizes + bytes([7, 0, 2])[:count])
    source = data.load(f"torchvision:MNIST:{tmp_path}", 8)
    assert source.shape == (1, 8, 8) and source.classes == 10 and source.__getitems__([0, 2])["label"].tolist() == [7, 2]
    assert pixel(source) == [128]


@pytest.mark.parametrize(("module", "spec"), [("datasets", "folder"), ("torchvision", "torchvision:MNIST")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, module, spec):
    monkeypatch.setitem(sys.modules, module, None)
    if spec == "folder":
        (tmp_path / "dataset_dict.json").write_text("{}")
        spec = str(tmp_path)
    with pytest.raises(ValueError, match=f"pip install {module}"):
        data.load(spec, 8)


@pytest.mark.parametrize("name", ["digits", "ring", "glyphs", "photos", "drawings"])
def test_samples_are_float32_whatever_the_default(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        batch = data.load(name, 8).__getitems__([0, 1])
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in batch.values() if value.is_floating_point()} == {torch.float32}
