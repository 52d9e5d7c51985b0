"""A run and its folder: config.json says what it is, so that it can be resumed, sampled from and evaluated."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import fastgan
from fastgan import recipes

from . import checkpoint, data, options, parallel
from .recipe import Recipe
from .trainer import Diverged, Trainer

SHOWN_SKIPPED = 20
SAME_SIGNAL = 2.0  # seconds in which several processes take further signals for the first one again

#: what must be the same for a run to go on, and the argument that says so
SAME = {
    "recipe": "RECIPE",
    "data": "--data",
    "size": "--size",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "amp": "--amp",
    "processes": "torchrun --nproc-per-node",
    "parallel": "--parallel",
}


def device(name: str) -> torch.device:
    """ValueError where there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(name)
        torch.zeros(1, device=where).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return where


def describe(recipe: str) -> int:
    """Print the docstring and the options of a recipe."""
    found = recipes.get(recipe)
    print(sys.modules[found.__module__].__doc__)
    print(f"data {found.data}, size {found.size}, {found.steps} steps, batch size {found.batch_size}\n")
    for name, default in options.describe(found.Options()):
        print(f"  {name}={default}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """What ``fastgan train`` does with its arguments; the exit status."""
    recipe = recipes.get(arguments.recipe)
    chosen = options.parse(recipe.Options, [setting for group in arguments.set for setting in group])
    where = device(arguments.device)
    if arguments.compile and arguments.parallel == "fsdp":
        raise ValueError("--compile does not go with --parallel fsdp: leave one of them out")
    processes = parallel.start(where, arguments.parallel)
    try:
        return _train(arguments, recipe, chosen, where, processes)
    finally:
        parallel.stop()


def _train(arguments, recipe: type[Recipe], chosen: options.Options, where: torch.device, processes: parallel.Processes) -> int:
    out = arguments.out or Path("out") / arguments.recipe
    config = {
        "fastgan": fastgan.__version__,
        "torch": torch.__version__,
        "recipe": arguments.recipe,
        "data": data.absolute(arguments.data or recipe.data),
        "size": arguments.size or recipe.size,
        "steps": arguments.steps or recipe.steps,
        "batch_size": arguments.batch_size or recipe.batch_size,
        "seed": arguments.seed,
        "amp": arguments.amp,
        "processes": processes.world,
        "parallel": processes.mode,
        "options": dataclasses.asdict(chosen),
    }
    processes.first(_check, out, config, arguments.resume)
    source = data.load(config["data"], config["size"], arguments.strict)
    # for fastgan sample, where the data may be gone, and for --resume, where it may have changed
    config |= {"shape": list(source.shape), "class_names": list(source.class_names), "samples": len(source)}
    trainer = Trainer(
        recipe,
        chosen,
        source,
        batch_size=config["batch_size"],
        steps=config["steps"],
        seed=arguments.seed,
        out=out,
        device=where,
        amp=arguments.amp,
        compile=arguments.compile,
        processes=processes,
        workers=arguments.workers,
    )
    processes.first(_begin, out, config)
    resumed = arguments.resume and trainer.resume()
    console = Console(quiet=processes.rank > 0)
    console.print(f"[bold]{arguments.recipe}[/] on {source.name}: {len(source)} samples of {source.shape}, on {where}")
    if source.skipped:
        shown = "\n  ".join(source.skipped[:SHOWN_SKIPPED]) + ("\n  ..." if len(source.skipped) > SHOWN_SKIPPED else "")
        console.print(f"{len(source.skipped)} files can't be read and are left out:\n  {shown}", soft_wrap=True, markup=False)
    if resumed:
        console.print(f"going on from step {trainer.done}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=processes.rank > 0, refresh_per_second=4) as progress:
        task = progress.add_task("", total=config["steps"], completed=trainer.done, note="")

        def after_step(trainer: Trainer) -> None:
            if trainer.done % 10 == 0:  # when the losses have been looked at anyway
                note = "  ".join(f"{name} {value:.3f}" for name, value in trainer.values.items())
                progress.update(task, completed=trainer.done, note=note)

        try:
            with _interruptible(trainer, console):
                trainer.run(sample_every=arguments.sample_every, save_every=arguments.save_every, after_step=after_step)
            progress.update(task, completed=trainer.done)
        except Diverged as error:
            console.print(f"[red]{error}[/]. A smaller lr, or --set clip_gradient=1, may help; checkpoints stay in {out}.")
            return 1
    if trainer.done < trainer.steps:
        console.print(f"stopped after step {trainer.done}; the same command with --resume goes on")
        return 130
    console.print(f"checkpoints, samples and log.jsonl in {out}; fastgan sample {out} -n 64 draws from it")
    return 0


@contextlib.contextmanager
def _interruptible(trainer: Trainer, console: Console):
    """Ctrl-C, or SIGTERM, ends training after the step in progress, with a checkpoint; a second one ends it at once.

    Of several processes one that is told is enough: they agree before each step. All of them get Ctrl-C from the terminal, and
    then again from torchrun.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        signals = ()  # Python lets no other thread handle them
    before, first = {number: signal.getsignal(number) for number in signals}, None

    def put_back():
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, frame):
        nonlocal first
        if first is None:
            first, trainer.stopping = time.monotonic(), True
            console.print("finishing this step and saving; once more to stop at once")
        elif trainer.processes.world == 1 or time.monotonic() - first > SAME_SIGNAL:
            put_back()
            os.kill(os.getpid(), number)

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        put_back()


def _check(out: Path, config: dict, resume: bool) -> None:
    """ValueError where ``out`` holds another run than ``config`` says, or one that was not to go on."""
    if (out / "config.json").exists():
        if not resume:
            raise ValueError(f"{out} holds a run already: --resume goes on with it, --out names another folder")
        _compare(out, _read(out / "config.json"), config)


def _begin(out: Path, config: dict) -> None:
    """Make the folder, once all else that can be wrong with the arguments has been found right. ValueError where a run in it
    was begun with other samples."""
    path = out / "config.json"
    if path.exists():
        old = _read(path)
        for key in ("shape", "class_names", "samples"):
            if key in old and old[key] != config[key]:
                raise ValueError(
                    f"--resume: the data {config['data']} has changed since {out} was begun: {key} was {old[key]} and is "
                    f"{config[key]}. Put it back, or give another --out"
                )
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, config)
    except OSError as error:
        raise OSError(f"--out {out} can't be written to: {error}") from error


def _read(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
        if missing := {"recipe", "data", "size", "options"} - set(config):
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from None
    return config


def _compare(out: Path, old: dict, new: dict) -> None:
    """ValueError names the arguments that differ from those the run was begun with."""
    changed = [(flag, old.get(key), new[key]) for key, flag in SAME.items() if old.get(key) != new[key]]
    before, now = old.get("options", {}), new["options"]
    changed += [(f"--set {key}", before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)]
    if changed:
        text = "; ".join(f"{flag} was {was} and is {now}" for flag, was, now in changed)
        raise ValueError(f"--resume: {out} was begun with other arguments: {text}. Give the old ones, or another --out")


def load(folder: Path, where: torch.device | str = "cpu") -> tuple[Recipe, dict]:
    """(recipe with its averaged networks in evaluation mode, config) of a trained run. FileNotFoundError without one."""
    if not (folder / "config.json").exists() or not checkpoint.found(folder / "checkpoints"):
        raise FileNotFoundError(f"{folder} holds no trained run: fastgan train RECIPE --out {folder} makes one")
    config = _read(folder / "config.json")
    kind = recipes.get(config["recipe"])
    if gone := config["options"].keys() - {field.name for field in dataclasses.fields(kind.Options)}:
        raise ValueError(
            f"{folder} was trained with options that {config['recipe']} no longer has: {', '.join(sorted(gone))}. "
            f"fastgan {config.get('fastgan')}, which wrote it, reads it"
        )
    try:
        source = data.load(config["data"], config["size"])
        form = [list(source.shape), list(source.class_names)]
        if (before := [config.get("shape", form[0]), config.get("class_names", form[1])]) != form:
            raise ValueError(f"--data {config['data']} has changed since {folder} was trained: it was {before} and is {form}")
    except ValueError as error:
        if not {"shape", "class_names"} <= config.keys():
            raise
        source = data.Absent(config["data"], config["shape"], config["class_names"], str(error))
    recipe = kind(kind.Options(**config["options"]), source)
    tensors, _ = checkpoint.load(checkpoint.found(folder / "checkpoints")[-1])
    for name, module in recipe.networks.items():
        stem = "average" if any(key.startswith(f"{name}.") for key in tensors.get("average", {})) else "model"
        checkpoint.unpack_modules({name: module}, tensors[stem])
        module.to(where).eval()
    return recipe, config
