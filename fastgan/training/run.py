"""A run and its folder: config.json says what it is, so that it can be resumed, sampled from and evaluated."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import fastgan
from fastgan import recipes

from . import checkpoint, data, options, parallel
from .recipe import Recipe
from .trainer import Diverged, Trainer

#: what must be the same for a run to go on
SAME = ("recipe", "data", "size", "batch_size", "seed", "options", "amp", "processes")


def device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


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
    processes = parallel.start(where)
    out = arguments.out or Path("out") / arguments.recipe
    config = {
        "fastgan": fastgan.__version__,
        "torch": torch.__version__,
        "recipe": arguments.recipe,
        "data": arguments.data or recipe.data,
        "size": arguments.size or recipe.size,
        "steps": arguments.steps or recipe.steps,
        "batch_size": arguments.batch_size or recipe.batch_size,
        "seed": arguments.seed,
        "amp": arguments.amp,
        "processes": processes.world,
        "options": dataclasses.asdict(chosen),
    }
    _prepare(out, config, arguments.resume, processes)
    source = data.load(config["data"], config["size"], arguments.strict)
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
    resumed = arguments.resume and trainer.resume()
    console = Console(quiet=processes.rank > 0)
    console.print(f"[bold]{arguments.recipe}[/] on {source.name}: {len(source)} samples of {source.shape}, on {where}")
    if resumed:
        console.print(f"going on from step {trainer.done}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=processes.rank > 0) as progress:
        task = progress.add_task("", total=config["steps"], completed=trainer.done, note="")

        def after_step(trainer: Trainer) -> None:
            note = None
            if trainer.done % 10 == 0:
                note = "  ".join(f"{name} {float(value):.3f}" for name, value in trainer.losses.items())
            progress.update(task, completed=trainer.done, **({"note": note} if note else {}))

        try:
            trainer.run(sample_every=arguments.sample_every, save_every=arguments.save_every, after_step=after_step)
        except Diverged as error:
            console.print(f"[red]{error}[/]. A smaller lr, or --set clip_gradient=1, may help; checkpoints stay in {out}.")
            return 1
    console.print(f"checkpoints, samples and log.jsonl in {out}; fastgan sample {out} -n 64 draws from it")
    return 0


def _prepare(out: Path, config: dict, resume: bool, processes: parallel.Processes) -> None:
    """Check the folder against ``config`` and write it there. ValueError where another run would be overwritten."""
    path = out / "config.json"
    if path.exists():
        if not resume:
            raise ValueError(f"{out} holds a run already: --resume goes on with it, --out names another folder")
        old = json.loads(path.read_text())
        for key in SAME:
            if old[key] != config[key]:
                raise ValueError(f"--resume: {out} was begun with {key} {old[key]}, not {config[key]}")
    if not processes.rank:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, config)
    processes.wait()


def load(folder: Path, where: torch.device | str = "cpu") -> tuple[Recipe, dict]:
    """(recipe with its averaged networks in evaluation mode, config) of a trained run. FileNotFoundError without one."""
    if not (folder / "config.json").exists() or not checkpoint.found(folder / "checkpoints"):
        raise FileNotFoundError(f"{folder} holds no trained run: fastgan train RECIPE --out {folder} makes one")
    config = json.loads((folder / "config.json").read_text())
    kind = recipes.get(config["recipe"])
    recipe = kind(kind.Options(**config["options"]), data.load(config["data"], config["size"]))
    tensors, _ = checkpoint.load(checkpoint.found(folder / "checkpoints")[-1])
    for name, module in recipe.networks.items():
        stem = "average" if any(key.startswith(f"{name}.") for key in tensors.get("average", {})) else "model"
        checkpoint.unpack_modules({name: module}, tensors[stem])
        module.to(where).eval()
    return recipe, config
