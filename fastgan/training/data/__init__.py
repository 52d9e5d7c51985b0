"""Training data by name or path: ``load("digits", 16)``. All of it is offline; one file per kind of source."""

import importlib
from pathlib import Path

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


def load(spec: str, size: int, strict: bool = False) -> Source:
    """The source of a name of ``NAMES``, or of a path.

    ``size``: side of images, which are resized to it. ``strict``: a file that can't be read is an error; otherwise such
    files are named, counted and skipped. ValueError says what is expected where ``spec`` is neither name nor path.
    """
    if spec in NAMES:
        return importlib.import_module(f"{__name__}.{NAMES[spec][0]}").load(spec, size)
    raise ValueError(f"--data {spec}: neither a name ({', '.join(NAMES)}) nor an existing path {Path(spec).absolute()}")
