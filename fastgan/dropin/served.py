"""A layer with one method of fastgan's: it keeps its class's name, attributes, parameters and everything else that it does.

It becomes an instance of a subclass, made here, of its own class. ``METHODS``: kind -> (name of the method, function of the
layer, the method's arguments and the options that were found for the layer).
"""

import functools
from collections.abc import Callable

from torch import nn

from fastgan.dropin.swap import Swap

METHODS: dict[str, tuple[str, Callable]] = {}


@functools.cache
def served(base: type, kind: str, options: tuple) -> type:
    """The subclass of a layer's class."""
    name, function = METHODS[kind]

    def method(self, *args):
        return function(self, *args, **dict(options))

    members = {
        name: method,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fastgan_base": base,
    }
    if base.__reduce_ex__ is object.__reduce_ex__ and base.__reduce__ is object.__reduce__:  # else it knows a way of its own
        members["__reduce_ex__"] = lambda self, protocol: (_new, (base, kind, options), nn.Module.__getstate__(self))
        if not hasattr(nn.Module, "__getstate__"):  # before Python 3.11
            members["__reduce_ex__"] = lambda self, protocol: (_new, (base, kind, options), self.__dict__)
    return type(base.__name__, (base,), members)


def _new(base, kind, options):
    """For copies and pickles."""
    cls = served(base, kind, options)
    return cls.__new__(cls)


def is_served(module: nn.Module) -> bool:
    return "_fastgan_base" in type(module).__dict__


def undo(module: nn.Module) -> None:
    module.__class__ = type(module)._fastgan_base


def obstacle(module: nn.Module, method: str) -> str:
    """Why ``method`` of a layer can't be served, whatever it computes; "" where nothing stands in the way."""
    if method in vars(module):
        return f"its {method} has been replaced on the instance, by which its class's is passed over"
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return "its parameters have no values yet (meta device)"
    return ""


def swap(name: str, module: nn.Module, kind: str, by: str, options: dict) -> Swap:
    """``name``, ``by``: for the report."""
    base = type(module)

    def apply():
        module.__class__ = served(base, kind, tuple(sorted(options.items())))

    return Swap(name, base.__name__, by, apply, lambda: undo(module))
