"""Training data by name or path: ``load("digits", 16)``. All of it is offline; one file per kind of source."""

import difflib
import importlib
from pathlib import Path

from .source import Absent as Absent
from .source import Batches as Batches
from .source import Domains as Domains
from .source import Part as Part
from .source import Source as Source

#: name -> (module whose load(name, size) makes the source, what it is)
NAMES = {
    "digits": ("digits", "1797 handwritten digits, from scikit-learn; 10 classes"),
    "ring": ("points", "25 Gaussians on a circle, in the plane"),
    "grid": ("points", "25 Gaussians on a 5 by 5 grid, in the plane"),
    "glyphs": ("glyphs", "4464 letters and digits in 18 fonts, from matplotlib; 62 classes"),
    "photos": ("photos", "patches of photographs, in colour, from scikit-learn and scikit-image"),
    "drawings": ("photos", "two domains: patches of photographs, and pencil drawings of other photographs"),
    "flat": ("photos", "two domains: patches of photographs, and others in few colours with outlines, as in animated films"),
}


PATHS = "a folder of images (sub-folders are classes), two with a comma between, an .npz file or torchvision:NAME:FOLDER"


def load(spec: str, size: int, strict: bool = False) -> Source:
    """The source of a name of ``NAMES``, of a path, or of "torchvision:NAME:FOLDER"; two with a comma between are two domains.

    ``size``: side of images, which are cropped and resized to it. ``strict``: a file that can't be read is an error; otherwise
    such files are named, counted and skipped. ValueError says what is expected where ``spec`` is nothing of that.
    """
    if spec in NAMES:
        return _module(NAMES[spec][0]).load(spec, size)
    if spec.startswith("torchvision:"):
        return _module("vision").load(spec, size, strict)
    path = Path(spec)
    if path.is_dir():
        return _module("huggingface" if _module("huggingface").is_one(path) else "folder").load(spec, size, strict)
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(f"--data {spec}: expected {PATHS}, got a file that ends in {path.suffix!r}")
        return _module("npz").load(spec, size, strict)
    if spec.count(",") == 1:
        return Domains(spec, *(load(part, size, strict) for part in spec.split(",")))
    near = difflib.get_close_matches(spec, NAMES, 1)
    hint = f"perhaps {near[0]}? " if near else ""
    raise ValueError(f"--data {spec}: {hint}expected a name ({', '.join(NAMES)}) or {PATHS}; {path.absolute()} does not exist")


def absolute(spec: str) -> str:
    """``spec`` such that it means the same in any working directory."""
    if spec in NAMES or spec.startswith("torchvision:"):
        return spec
    if not Path(spec).exists() and spec.count(",") == 1:
        return ",".join(map(absolute, spec.split(",")))
    return str(Path(spec).absolute())


def _module(name: str):
    return importlib.import_module(f"{__name__}.{name}")
