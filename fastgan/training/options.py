"""Options of a recipe: dataclass fields, changed by ``name=value``."""

import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fastgan._checks import near_or_known

POSITIVE = ("width", "z_dim")  # numbers of something that has to be there
SHARES = ("beta1", "beta2", "ema")  # of what was, in a running mean


@dataclass
class Options:
    """What every recipe has. A recipe's own ``Options`` adds fields and changes defaults."""

    z_dim: int = 64  # coordinates of the latent sample
    z: Literal["normal", "uniform"] = "normal"  # its distribution: N(0, 1), or uniform in [-1, 1]
    width: int = 32  # channels of the widest feature maps' finest level; hidden units are a multiple of it
    lr: float = 2e-4
    lr_critic: float = 0.0  # 0: the same as lr
    beta1: float = 0.5
    beta2: float = 0.999
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    lr_decay: float = 0.0  # over this last share of the steps the learning rate falls linearly to 0
    init: Literal["default", "normal", "xavier", "orthogonal"] = "default"  # of weights; normal: DCGAN's N(0, 0.02)
    clip_gradient: float = 0.0  # largest norm of all gradients of a player together; 0: not clipped
    clip_weight: float = 0.0  # critics' parameters are kept in [-c, c]; 0: not clipped
    ema: float = 0.99  # decay a step of the averaged generator, which samples are drawn from; 0: none
    flip: bool = False  # mirror images at random
    fast: bool = True  # False: plain PyTorch, without accelerate and with double backward

    def __post_init__(self):
        for name, kind in _types(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
                raise ValueError(f"option {name}={value!r} is none of {', '.join(map(str, typing.get_args(kind)))}")
            if kind in (int, float):
                least, below = name in POSITIVE, 1 if name in SHARES else math.inf
                if not least <= value < below:
                    raise ValueError(f"option {name}={value!r}: expected at least {int(least)} and below {below}")


def _types(kind: type) -> dict[str, type]:
    """Types by option. Where a recipe declares one anew, for another default, the first declaration holds."""
    known = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            known = typing.get_type_hints(base) | known
    return known


def parse(kind: type[Options], settings: Iterable[str]) -> Options:
    """``kind`` with the ``name=value`` of ``settings``. ValueError names an unknown option or a value that doesn't fit."""
    hints, values = _types(kind), {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected name=value")
        if name not in hints:
            raise ValueError(f"--set {name}: no such option; {near_or_known(name, hints)}")
        values[name] = _convert(name, text, hints[name])
    return kind(**values)


def _convert(name: str, text: str, kind):
    if typing.get_origin(kind) is Literal:
        kind = type(typing.get_args(kind)[0])
    if kind is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise ValueError(f"--set {name}={text}: expected true or false")
        return text.lower() in ("true", "yes", "1")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--set {name}={text}: expected {'a whole number' if kind is int else 'a number'}") from None


def meanings(kind: type[Options]) -> dict[str, str]:
    """The comment behind each option's declaration, "" where there is none; declared anew without one it keeps the first's."""
    found = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            for name, comment in re.findall(r"^    (\w+): [^\n#]*?(?:#[ ]*([^\n]*))?$", inspect.getsource(base), re.MULTILINE):
                found[name] = comment or found.get(name, "")
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def describe(options: Options) -> list[tuple[str, str]]:
    """(name, default) of each option, the recipe's own first."""
    common = {field.name for field in dataclasses.fields(Options)}
    fields = sorted(dataclasses.fields(options), key=lambda field: field.name in common)
    return [(field.name, str(getattr(options, field.name))) for field in fields]
