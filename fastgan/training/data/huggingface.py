"""A data set of Hugging Face's ``datasets``, as its ``save_to_disk`` left it in a folder."""

from pathlib import Path

from .images import GREY, Images

LOOKED_AT = 64  # images that say whether all are grey


def is_one(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (
        (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    )


def load(name: str, size: int, strict: bool) -> "Rows":
    """Its column of images and, where there is one, of class labels. Of several splits, "train". Rows are read when needed.

    Grey, with one channel, if the first 64 images are.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--data {name} was written by Hugging Face's datasets: {error}; pip install datasets") from None
    rows = datasets.load_from_disk(name)
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows and len(rows) > 1:
            raise ValueError(f"--data {name} has the splits {', '.join(rows)}: expected train, or the folder of one of them")
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    columns = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not columns or not len(rows):
        kinds = ", ".join(f"{key}: {type(kind).__name__}" for key, kind in rows.features.items())
        raise ValueError(f"--data {name}: {len(rows)} rows of {kinds}; expected at least one, with a column of type Image")
    classes = {key: kind.names for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    label = next(iter(classes), None)
    head = [rows[i][columns[0]] for i in range(min(LOOKED_AT, len(rows)))]
    source = Rows(
        name, size, 1 if all(image.mode in GREY for image in head) else 3,
        list(rows[label]) if label else None, classes.get(label, ()), strict,
    )  # fmt: skip
    source.rows, source.column = rows.select_columns(columns[:1]), columns[0]
    return source


class Rows(Images):
    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int):
        return self.rows[i][self.column]
