"""A folder of image files, whose sub-folders are classes."""

import os
from pathlib import Path

from .images import GREY, Images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def load(name: str, size: int, strict: bool) -> "Folder":
    """Every image file in the folder ``name`` and below, in alphabetical order; they are read when they are needed.

    Classes are the folders in it, if there are at least two with images and no image lies outside them. Images are grey, with
    one channel, if all files are, and RGB otherwise. Files that can't be read are left out and named in ``skipped``.
    """
    from PIL import Image

    root, files, channels, skipped = Path(name), [], 1, []
    for path in _walk(root):
        if problem := _problem(path):
            if strict:
                raise ValueError(f"{path} can't be read ({problem}), and --strict is given: delete it, or leave out --strict")
            skipped.append(f"{path} ({problem})")
            continue
        with Image.open(path) as image:
            channels = channels if image.mode in GREY else 3
        files.append(path)
    if not files:
        which = f"none of its {len(skipped)} images can be read: {skipped[0]}, ..." if skipped else "no images in this folder"
        raise ValueError(f"--data {name}: {which}; expected files that end in {', '.join(SUFFIXES)}, also in sub-folders")
    tops = [path.relative_to(root).parts[0] if path.parent != root else None for path in files]
    classes = sorted(set(tops)) if None not in tops and len(set(tops)) > 1 else ()
    source = Folder(name, size, channels, [classes.index(top) for top in tops] if classes else None, classes, strict)
    source.files, source.skipped = files, tuple(skipped)
    return source


class Folder(Images):
    files: list[Path]

    def __len__(self) -> int:
        return len(self.files)

    def open(self, i: int):
        from PIL import Image

        return Image.open(self.files[i])

    def describe(self, i: int) -> str:
        return str(self.files[i])


def _walk(root: Path) -> list[Path]:
    return sorted(
        Path(folder) / file
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if file.lower().endswith(SUFFIXES) and not file.startswith(".")
    )


def _problem(path: Path) -> str:
    """Why an image can't be read, or "". Its pixels are decoded only if its end does not say that it is complete."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if not _ends(path, image.format):
                image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "no image, or damaged" if "cannot identify" in str(error) else str(error)
    return ""


def _ends(path: Path, kind: str) -> bool:
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 12))
        tail = file.read()
        if kind == "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= length
    return (kind == "JPEG" and tail.endswith(b"\xff\xd9")) or (kind == "PNG" and tail[4:8] == b"IEND")
