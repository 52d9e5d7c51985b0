"""A change to a model that can be made and taken back."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass
class Swap:
    """``name``, ``kind``, ``by``: as in the report. ``apply``, ``undo``: make the change, take it back."""

    name: str
    kind: str
    by: str
    apply: Callable[[], None]
    undo: Callable[[], None]


def with_class(thing, cls, **attributes):
    """(apply, undo): another class for an object, which stays the same object, and attributes that its methods need."""
    before = type(thing)

    def apply():
        thing.__class__ = cls
        thing.__dict__.update(attributes, _fastgan_was=before)

    def undo():
        undo_class(thing, attributes)

    return apply, undo


def undo_class(thing, attributes=()):
    thing.__class__ = thing.__dict__.pop("_fastgan_was")
    for key in attributes:
        thing.__dict__.pop(key, None)


def belongs_to_parametrizations(model: nn.Module) -> set[nn.Module]:
    """Modules that compute weights, not activations."""
    found = set()
    for module in model.modules():
        if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict):
            found.update(module.parametrizations.modules())
    return found
