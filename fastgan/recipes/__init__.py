"""Every GAN that ``fastgan train`` knows: one short file each, with a class ``Recipe``. The docstring says what is special."""

import importlib
import pkgutil

from fastgan._checks import near_or_known


def names() -> list[str]:
    """All recipes, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str):
    """The class ``Recipe`` of a name; ValueError with the nearest ones where there is none."""
    if name not in names():
        raise ValueError(f"no recipe {name!r}; {near_or_known(name, names())}")
    return importlib.import_module(f"{__name__}.{name}").Recipe


def summary(name: str) -> str:
    """The first sentence of a recipe's docstring."""
    return importlib.import_module(f"{__name__}.{name}").__doc__.split("\n")[0]
