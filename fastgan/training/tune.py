"""``fastgan tune RECIPE``: search for the options that train a recipe best, by Optuna.

Every trial trains from the same seed and is measured five times on its way; it is given up where it is worse than the median of
earlier trials at the same step, or where losses or samples are no longer finite. All trials lie in --out: --resume goes on with
them, after a kill too.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import random
import sys
import time
from pathlib import Path

from fastgan import recipes
from fastgan.training import missing_extras
from fastgan.training.command import _positive
from fastgan.training.space import PRUNERS, REPORTS, SAMPLERS, default_space, grid, parse_range, pruner, sampler

SHOWN = 10  # rows of the table
#: what must be the same for a search to go on
SAME = ("recipe", "data", "size", "steps", "batch_size", "seed", "metric", "samples", "set", "space")


def main(argv: list[str] | None = None) -> int:
    """0 when some trial was trained to its end, 1 when none was, 2 when it can't run."""
    parser = argparse.ArgumentParser(
        prog="fastgan tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="see fastgan train --list")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, default="bayes", help="bayes: tree of Parzen estimators; evolution: NSGA-II"
    )
    parser.add_argument("--pruner", choices=PRUNERS, default="median")
    parser.add_argument("--trials", type=_positive, default=20, help="in all, those of earlier calls included")
    parser.add_argument("--steps", type=_positive, help="of each trial; default: the recipe's")
    parser.add_argument("--metric", help="default: the recipe's fid or energy_distance, else its first goal")
    parser.add_argument("-n", type=_positive, default=1000, help="samples that it is measured on")
    parser.add_argument(
        "--space", nargs="+", action="append", default=[], metavar="NAME=RANGE",
        help="options to search: name=low:high, name=low:high:log, name=a,b,c; default: rates, beta1, weights of penalties",
    )  # fmt: skip
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar="NAME=VALUE", help="options of all trials")
    parser.add_argument("--data", help="as for fastgan train")
    parser.add_argument("--size", type=_positive)
    parser.add_argument("--batch-size", type=_positive)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the search; default: out/tune-RECIPE")
    parser.add_argument("--resume", action="store_true", help="go on with the search in --out, if there is one")
    arguments = parser.parse_args(argv)
    missing = missing_extras() + ([] if importlib.util.find_spec("optuna") else ["optuna"])
    if missing:
        print(f"fastgan tune: {', '.join(missing)} missing; pip install 'fastgan[tune]'", file=sys.stderr)
        return 2
    try:
        return tune(arguments)
    except (ValueError, OSError, ImportError) as error:  # their messages say what is expected
        print(f"fastgan tune: {error}", file=sys.stderr)
        return 2


# --- the search -------------------------------------------------------------------------------------------------------


def tune(arguments: argparse.Namespace) -> int:
    """What ``fastgan tune`` does with its arguments; the exit status."""
    import optuna

    from fastgan.training import checkpoint, data, options, run

    recipe = recipes.get(arguments.recipe)
    fixed = [setting for group in arguments.set for setting in group]
    chosen = options.parse(recipe.Options, fixed)
    space = [parse_range(recipe.Options, text) for group in arguments.space for text in group] or default_space(chosen)
    if len({axis.name for axis in space}) < len(space):
        raise ValueError(f"--space names an option twice: {', '.join(axis.name for axis in space)}")
    config = {
        "recipe": arguments.recipe,
        "data": arguments.data or recipe.data,
        "size": arguments.size or recipe.size,
        "steps": arguments.steps or recipe.steps,
        "batch_size": arguments.batch_size or recipe.batch_size,
        "seed": arguments.seed,
        "samples": arguments.n,
        "set": fixed,
        "space": [dataclasses.asdict(axis) | {"choices": list(axis.choices)} for axis in space],
    }
    source = data.load(config["data"], config["size"])
    where = run.device(arguments.device)
    config["metric"] = metric = arguments.metric or default_metric(recipe, source)
    out = arguments.out or Path("out") / f"tune-{arguments.recipe}"
    _prepare(out, config, arguments.resume)
    from fastgan.training.metrics import LESS_IS_BETTER

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / "journal.log"))),
        study_name=arguments.recipe,
        load_if_exists=True,
        direction="minimize" if metric in LESS_IS_BETTER else "maximize",
        pruner=pruner(arguments.pruner),
    )
    remaining = arguments.trials - len(_done(study))
    # a sampler that starts anew from the same seed would propose the same again
    study.sampler = sampler(arguments.sampler, arguments.trials, arguments.seed + len(study.trials))
    points = _fail_what_was_killed(study)
    waiting = [trial.system_attrs["fixed_params"] for trial in study.trials if trial.state.name == "WAITING"]
    if arguments.sampler == "grid":
        known = [*waiting, *(trial.params for trial in _done(study))]
        points = [point for point in grid(space, arguments.trials) if point not in known]
        random.Random(arguments.seed).shuffle(points)  # a part of a grid is to be from all over it
        remaining = min(remaining, len(waiting) + len(points))
    for point in points[: max(0, remaining - len(waiting))]:
        study.enqueue_trial(point)

    def objective(trial) -> float:
        settings = [*fixed, *(f"{axis.name}={axis.suggest(trial)}" for axis in space)]
        trial.set_user_attr("settings", settings)
        return trained(recipe, options.parse(recipe.Options, settings), source, config, where, metric, trial)

    def tell(study, trial) -> None:
        why = trial.user_attrs.get("why", "")
        value = "" if trial.value is None else f"{metric} {trial.value:.4g}"
        print(f"trial {trial.number}: {trial.state.name.lower()} {value}{why}  {_words(trial, len(fixed))}", flush=True)
        checkpoint.write_json(out / "trials.json", [_row(trial) for trial in study.trials])

    if remaining > 0:
        study.optimize(objective, n_trials=remaining, callbacks=[tell])
    return report(study, config)


def default_metric(recipe, source) -> str:
    """A distance where the recipe's metrics have one: what counts modes or classes is soon at its best. Else its first goal."""
    from fastgan.training.recipe import Recipe

    distance = "fid" if len(source.shape) == 3 else "energy_distance"
    if recipe.evaluate is Recipe.evaluate or distance in recipe.goals:
        return distance
    if not recipe.goals:
        raise ValueError("--metric: expected, for this recipe has measures of its own; fastgan eval shows their names")
    return next(iter(recipe.goals))


def trained(recipe, chosen, source, config: dict, where, metric: str, trial) -> float:
    """Train with the options ``chosen``; the metric at the end. TrialPruned where the trial is not worth going on with."""
    import optuna
    import torch

    from fastgan.training.metrics import NotFinite
    from fastgan.training.trainer import Diverged, Trainer

    trainer = Trainer(
        recipe, chosen, source, batch_size=config["batch_size"], steps=config["steps"], seed=config["seed"], device=where
    )
    value, every = math.nan, max(1, config["steps"] // REPORTS)

    def after_step(trainer: Trainer) -> None:
        nonlocal value
        if trainer.done % every and trainer.done < trainer.steps:
            return
        value = measured(trainer, config["samples"], metric)
        trial.report(value, trainer.done)
        if trainer.done < trainer.steps and trial.should_prune():
            raise optuna.TrialPruned

    started = time.perf_counter()
    try:
        trainer.run(after_step=after_step)
    except (Diverged, NotFinite) as error:
        trial.set_user_attr("why", str(error))
        raise optuna.TrialPruned from None
    finally:
        trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))
        del trainer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return value


def measured(trainer, n: int, metric: str) -> float:
    """The metric of the averaged networks; the training goes on as if nothing had been measured."""
    import torch

    try:
        with torch.no_grad():
            values = trainer.for_sampling().evaluate(n)
    finally:
        trainer.back_to_training()
    if metric not in values:
        raise ValueError(f"--metric {metric}: expected one of {', '.join(values)}")
    return values[metric]


def _prepare(out: Path, config: dict, resume: bool) -> None:
    """Write ``config`` into the folder. ValueError where another search lies there."""
    from fastgan.training import checkpoint

    path = out / "config.json"
    if path.exists():
        if not resume:
            raise ValueError(f"{out} holds a search already: --resume goes on with it, --out names another folder")
        old = json.loads(path.read_text())
        for key in SAME:
            if old[key] != config[key]:
                raise ValueError(f"--resume: {out} was begun with {key} {old[key]}, not {config[key]}")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, config)


def _done(study) -> list:
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


def _fail_what_was_killed(study) -> list[dict]:
    """A trial that still counts as running belongs to a process that is gone. Their settings."""
    import optuna

    states = optuna.trial.TrialState
    killed = study.get_trials(states=[states.RUNNING])
    for trial in killed:
        study.tell(trial.number, state=states.FAIL)
    return [trial.params for trial in killed if trial.params]


# --- what came of it --------------------------------------------------------------------------------------------------


def _words(trial, skip: int = 0) -> str:
    return " ".join(trial.user_attrs.get("settings", [])[skip:])


def _row(trial) -> dict:
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "steps": {str(step): value for step, value in trial.intermediate_values.items()},
        **trial.user_attrs,
    }


def report(study, config: dict) -> int:
    """Print the best trials and the command that trains with the best settings."""
    from fastgan.tables import render

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
    if not complete:
        print(f"none of {pruned} trials was trained to its end", file=sys.stderr)
        return 1
    best = sorted(complete, key=lambda trial: trial.value, reverse=study.direction.name == "MAXIMIZE")
    skip = len(config["set"])
    rows = [
        (str(trial.number), f"{trial.value:.4g}", f"{trial.user_attrs['seconds']:.0f}", _words(trial, skip))
        for trial in best[:SHOWN]
    ]
    title = f"{config['recipe']} on {config['data']}: {len(complete)} trials trained, {pruned} given up"
    print(render(title, ("trial", config["metric"], "seconds", "options"), rows))
    print("\nbest:\n" + command(config, best[0].user_attrs["settings"]))
    return 0


def command(config: dict, settings: list[str]) -> str:
    """``fastgan train`` with these settings, and with what is not the recipe's default."""
    recipe = recipes.get(config["recipe"])
    words = ["fastgan train", config["recipe"]]
    for flag in ("data", "size", "steps", "batch_size"):
        if config[flag] != getattr(recipe, flag):
            words.append(f"--{flag.replace('_', '-')} {config[flag]}")
    if config["seed"]:
        words.append(f"--seed {config['seed']}")
    return " ".join([*words, "--set", *settings])
