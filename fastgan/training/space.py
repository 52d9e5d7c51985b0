"""What ``fastgan tune`` searches, and how: ranges of options, grids of them, Optuna's samplers and pruners."""

import itertools
import math
import warnings
from dataclasses import dataclass

from . import options

SAMPLERS = ("bayes", "random", "grid", "evolution")
PRUNERS = ("median", "hyperband", "none")
REPORTS = 5  # measurements of a trial, evenly over its steps


@dataclass(frozen=True)
class Range:
    """One option: numbers from ``low`` to ``high``, or one of ``choices`` as text."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()

    def suggest(self, trial) -> str:
        """The trial's value, as ``--set`` takes it."""
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        if self.whole:
            return str(trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.4g}"

    def points(self, count: int) -> list:
        """At most ``count`` values that lie evenly in it, ends included; all of the choices."""
        if self.choices:
            return list(self.choices)
        at = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
        if self.log:
            values = [self.low * (self.high / self.low) ** x for x in at]
        else:
            values = [self.low + (self.high - self.low) * x for x in at]
        # powers may step over an end by a rounding
        values = [min(max(value, self.low), self.high) for value in values]
        return sorted({round(value) for value in values}) if self.whole else values


def parse_range(kind: type, text: str) -> Range:
    """``name=low:high[:log]`` or ``name=a,b,c`` for an option of ``kind``. ValueError says what is wrong with it."""
    name, equals, values = text.partition("=")
    expected = f"--space {text}: expected name=low:high, name=low:high:log or name=a,b,c"
    if not equals or not values:
        raise ValueError(expected)
    numbers = values.split(":")
    ends = numbers[:2] if len(numbers) > 1 else [value.strip() for value in values.split(",")]
    try:
        parsed = [getattr(options.parse(kind, [f"{name}={end}"]), name) for end in ends]
    except ValueError as error:
        raise ValueError(str(error).replace("--set", "--space")) from None
    if len(numbers) == 1:
        return Range(name, choices=tuple(ends))
    if len(numbers) > 3 or numbers[2:] not in ([], ["log"]) or any(type(x) not in (int, float) for x in parsed):
        raise ValueError(expected)
    low, high = parsed
    log = numbers[2:] == ["log"]
    if not low < high or not math.isfinite(high) or (log and low <= 0):
        raise ValueError(f"--space {text}: expected low < high{', both above 0' if log else ''}")
    return Range(name, low, high, log, type(low) is int)


def default_space(chosen) -> list[Range]:
    """Learning rates, beta1 where the optimizer is Adam, and those weights of penalties that are not 0."""

    def around(name: str, value: float, factor: float) -> Range:
        return Range(name, value / factor, value * factor, log=True)

    space = [around("lr", chosen.lr, 5), around("lr_critic", chosen.lr_critic or chosen.lr, 5)]
    if chosen.optimizer == "adam":
        space.append(Range("beta1", choices=("0.0", "0.5", "0.9")))
    for name, meaning in options.meanings(type(chosen)).items():
        value = getattr(chosen, name)
        if type(value) is float and value > 0 and ("weight of" in meaning or "penalty" in name or name in ("r1", "r2")):
            space.append(around(name, value, 10))
    return space


def grid(space: list[Range], trials: int) -> list[dict]:
    """All combinations of as many values of each range as let them fit into ``trials``, at least 2; the choices all count."""
    free = sum(not axis.choices for axis in space)
    fixed = math.prod(len(axis.choices) for axis in space if axis.choices)
    count = max(2, int((trials / fixed) ** (1 / free) + 1e-9)) if free else 0
    names = [axis.name for axis in space]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.points(count) for axis in space))]


def sampler(name: str, trials: int, seed: int):
    """Optuna's sampler; of a grid it has nothing to choose."""
    import optuna

    if name == "bayes":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, min(10, trials // 3)))
    if name == "evolution":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            blend = optuna.samplers.nsgaii.BLXAlphaCrossover()  # of numbers; choices come from either parent
        size = max(4, math.isqrt(trials))
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=size, mutation_prob=0.1, crossover=blend)
    return optuna.samplers.RandomSampler(seed=seed)


def pruner(name: str):
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=REPORTS)
    return optuna.pruners.NopPruner()
