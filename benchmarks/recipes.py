"""``python -m benchmarks.recipes [NAME...]``: train recipes with their defaults, evaluate them, and record what came of it.

Each is trained by ``fastgan train`` in a process of its own. docs/recipes/results.json gets an entry (metrics, goals, seconds,
steps, machine), the others stay as they are; NAME.png is the picture of samples. A recipe's ``further`` runs, on other data,
are recorded by RECIPE-DATA. ``--pages`` writes a page per recipe and the gallery from docstrings, options and what is
recorded. ``--merge FILE`` takes over the newer entries of another results.json.
"""

import argparse
import datetime
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastgan import measure, recipes
from fastgan._checks import near_or_known

OUT = Path("docs/recipes")
MODES = """How many are found, and the share of samples within three standard deviations of one: samples spread evenly over the
square of a grid would get 0.07, along the circle of a ring 0.6."""


class Run(NamedTuple):
    recipe: str
    arguments: list[str]  # of fastgan train
    goals: dict[str, float]


def runs() -> dict[str, Run]:
    """What is recorded, by name: each recipe with its defaults, and its ``further`` {data: (arguments, goals)}."""
    found = {}
    for name in recipes.names():
        kind = recipes.get(name)
        found[name] = Run(name, [], kind.goals)
        for data, (arguments, goals) in getattr(kind, "further", {}).items():
            found[f"{name}-{data}"] = Run(name, ["--data", data, *shlex.split(arguments)], goals)
    return found


# --- recording ------------------------------------------------------------------------------------------------------


def record(name: str, out: Path, more: Sequence[str] = ()) -> dict:
    """Train and evaluate the run ``name``, with ``more`` arguments; its entry. CalledProcessError where it diverges."""
    from fastgan.training import evaluate

    recipe, arguments, goals = runs()[name]
    train = ["train", recipe, *arguments, *more]
    with tempfile.TemporaryDirectory() as folder:
        run, found = Path(folder) / name, Path(folder) / "eval.json"
        fastgan = [sys.executable, "-m", "fastgan"]
        started = time.perf_counter(), _cpu_time()
        subprocess.run([*fastgan, *train, "--out", str(run)], check=True)
        seconds, cpu_seconds = time.perf_counter() - started[0], _cpu_time() - started[1]
        evaluated = subprocess.run([*fastgan, "eval", str(run), "--json", str(found)]).returncode
        if evaluated not in (0, 1):  # 1: a goal is missed, which is recorded
            raise subprocess.CalledProcessError(evaluated, "fastgan eval")
        config, values = json.loads((run / "config.json").read_text()), json.loads(found.read_text())
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(max((run / "samples").glob("step-*.png")), out / f"{name}.png")
        return {
            "command": shlex.join(["fastgan", *train]),
            "recorded": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            **{key: config[key] for key in ("fastgan", "steps", "batch_size", "size")},
            "machine": measure.machine(),
            **values,
            **evaluate.judged(values["metrics"], goals),
        }


def _cpu_time() -> float:
    """Seconds that processes which have ended computed: on a busy machine fewer than went by."""
    times = os.times()
    return times.children_user + times.children_system


def merge(path: Path, entries: dict[str, dict]) -> dict[str, dict]:
    """``entries`` into those of ``path``, in alphabetical order; of two of one name the newer stays. Returns all."""
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, entry in entries.items():
        if name not in results or entry["recorded"] >= results[name]["recorded"]:
            results[name] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    os.replace(part, path)
    return results


# --- pages ----------------------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """A docstring's markup."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")


def table(headings: tuple[str, ...], rows) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cost(entry: dict) -> str:
    return f"{entry['seconds']:.0f} s ({entry['cpu_seconds']:.0f} s of computing), threads: {entry['machine']['threads']}"


def _recorded(name: str, entry: dict, picture: bool) -> list[str]:
    """A run on its recipe's page."""
    from fastgan.training import evaluate

    machine = entry["machine"]
    return [
        *([f"![samples]({name}.png)"] if picture else []),
        table(("metric", f"of {entry['samples']} samples", "goal", "real samples"), evaluate.cells(entry)),
        f"`{entry['command']}`: {entry['steps']} steps of {entry['batch_size']} of `{entry['data']}`, {_cost(entry)}. "
        f"{machine['processor'].strip()}, GPU: {machine['gpu']}, torch {machine['torch']}, {entry['recorded'][:10]}."
        + (f" Features: {entry['features']}." if entry["features"] else ""),
    ]


def page(name: str, results: dict[str, dict], pictures: set[str]) -> str:
    """What docs/recipes/NAME.md holds."""
    from fastgan.training import options

    recipe = recipes.get(name)
    meanings = options.meanings(recipe.Options)
    parts = [f"# {name}", markdown(inspect.getdoc(sys.modules[recipe.__module__])), f"```\nfastgan train {name}\n```"]
    if name not in results:
        parts.append(f"No run of it has been recorded. `python -m benchmarks.recipes {name}` does.")
    for run in (key for key, found in runs().items() if found.recipe == name and key in results):
        parts += [] if run == name else [f"## On `{results[run]['data']}`"]
        parts += _recorded(run, results[run], run in pictures)
    parts += [
        "## Options",
        f"Data `{recipe.data}`, {recipe.steps} steps, batch size {recipe.batch_size}; `--set name=value` changes:",
        table(("option", "default", ""), [(f"`{k}`", v, meanings[k]) for k, v in options.describe(recipe.Options())]),
        f"[All recipes](README.md). The source: [`fastgan/recipes/{name}.py`](../../fastgan/recipes/{name}.py).",
    ]
    return "\n\n".join(parts) + "\n"


def gallery(results: dict[str, dict], pictures: set[str]) -> str:
    """What docs/recipes/README.md holds."""
    from fastgan.training import evaluate

    rows = []
    for name in recipes.names():
        entry = results.get(name)
        goals = [row for row in evaluate.cells(entry) if row[2]] if entry else []
        rows.append(
            (
                f"[{name}]({name}.md)",
                markdown(recipes.summary(name)),
                f"`{recipes.get(name).data}`",
                "<br>".join(f"{metric} {value}, goal {goal}" for metric, value, goal, _ in goals),
                _cost(entry) if entry else "",
                f'<img src="{name}.png" width="160">' if name in pictures else "",
            )
        )
    coverage = [
        (f"[{run.recipe}]({run.recipe}.md)", f"`{found['data']}`", f"{found['metrics']['modes']:.0f}", f"{share:.2f}")
        for name, run in runs().items()
        if (found := results.get(name)) and (share := found["metrics"].get("high_quality")) is not None
    ]
    text = (
        "# Recipes\n\nThe GANs that `fastgan train` knows, with what their recorded runs reached. `python -m "
        "benchmarks.recipes NAME` records one, `--pages` writes these pages."
    )
    parts = [text, table(("recipe", "", "data", "reached", "trained in", "samples"), rows)]
    if coverage:
        parts += ["## Modes of 25 Gaussians", MODES, table(("recipe", "data", "modes", "high quality"), coverage)]
    return "\n\n".join(parts) + "\n"


def pages(out: Path) -> dict[str, str]:
    """The text of every page by file name. Runs are judged by the goals that recipes have now."""
    from fastgan.training import evaluate

    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, run in runs().items():
        if name in results:
            results[name] |= evaluate.judged(results[name]["metrics"], run.goals)
    pictures = {file.stem for file in out.glob("*.png")}
    texts = {f"{name}.md": page(name, results, pictures) for name in recipes.names()}
    return texts | {"README.md": gallery(results, pictures)}


def main(argv: list[str] | None = None) -> int:
    """0 when all that was asked for is done and every goal met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes, or RECIPE-DATA; default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pages", action="store_true", help="write the pages, train nothing")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="take over entries of this results.json, train nothing")
    parser.add_argument("--steps", help="train so many, to try it out; default: the recipe's")
    arguments = parser.parse_args(argv)
    known = runs()
    for name in arguments.names:
        if name not in known:
            parser.error(f"no run {name!r}; {near_or_known(name, known)}")
    if arguments.merge:
        merge(arguments.out / "results.json", json.loads(arguments.merge.read_text()))
    failed = []
    if not (arguments.pages or arguments.merge):
        for name in arguments.names or known:
            try:
                entry = record(name, arguments.out, ["--steps", arguments.steps] if arguments.steps else ())
            except subprocess.CalledProcessError as error:
                failed.append(f"{name}: {error}")
                continue
            merge(arguments.out / "results.json", {name: entry})
            failed += [f"{name}: {goal} missed" for goal, met in entry["met"].items() if not met]
    if arguments.pages:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for file, text in pages(arguments.out).items():
            (arguments.out / file).write_text(text, encoding="utf-8")
    print("\n".join(failed) if failed else f"written to {arguments.out}", file=sys.stderr if failed else sys.stdout)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
