"""``fastgan eval DIR``: how good a trained run's samples are, beside what its recipe is to reach and what real samples get."""

import argparse
import sys
from pathlib import Path

from fastgan.training import missing_extras
from fastgan.training.features import CHOICES
from fastgan.training.metrics import PERCEPTUAL


def main(argv: list[str] | None = None) -> int:
    """0 when all goals are met, or the run has none; 1 when one is missed; 2 when it can't be measured."""
    parser = argparse.ArgumentParser(prog="fastgan eval", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a run, as fastgan train made it")
    parser.add_argument("-n", type=int, default=2000, help="how many samples")
    parser.add_argument("--features", choices=CHOICES, help="what images are compared by; default: classifier if labelled")
    parser.add_argument(
        "--lpips", choices=PERCEPTUAL, nargs="?", const="alex",
        help="of recipes that compare pairs of images: LPIPS too, by this network (default: alex) of torchvision",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args(argv)
    if missing := missing_extras():
        print(f"fastgan eval: {', '.join(missing)} missing; pip install 'fastgan[train]'", file=sys.stderr)
        return 2
    from fastgan.training import checkpoint

    try:
        found = measured(arguments.folder, arguments.n, arguments.features, arguments.seed, arguments.device, arguments.lpips)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(arguments.json, found)
    except (ValueError, OSError, ImportError) as error:  # their messages say what is expected
        print(f"fastgan eval: {error}", file=sys.stderr)
        return 2
    print(table(found))
    return 0 if all(found["met"].values()) else 1


def measured(
    folder: Path, n: int, features: str | None = None, seed: int = 0, device: str = "auto", lpips: str | None = None
) -> dict:  # fmt: skip
    """Metrics of the newest checkpoint in ``folder``, what they are measured with, goals and the like.

    ``reference``: the same metrics of real samples against others. ``goals``: those of the recipe; none on other data than its
    own, or in other features.
    """
    import torch

    from fastgan.training import checkpoint, metrics, run

    recipe, config = run.load(folder, run.device(device))
    own = config["data"] == recipe.data and config["size"] == recipe.size and features in (None, recipe.features)
    recipe.features, recipe.perceptual = features or recipe.features, lpips
    torch.manual_seed(seed)
    with torch.no_grad():
        values = recipe.evaluate(n)
        if lpips and "lpips" not in values:
            raise ValueError(f"--lpips: {config['recipe']} compares no pairs of images")
        distributions = not values.keys().isdisjoint(("fid", "energy_distance"))  # or only pairs are compared
        reference = recipe.reference() if distributions else {}
    goals = recipe.goals if own else {}
    return {
        "recipe": config["recipe"],
        "data": config["data"],
        "step": checkpoint.load(checkpoint.found(folder / "checkpoints")[-1])[1]["step"],
        "samples": n,
        "seed": seed,
        "features": metrics.note(recipe.source, recipe.features) if distributions else "",
        "metrics": values,
        "reference": {name: value for name, value in reference.items() if name in values},
        **judged(values, goals),
    }


def judged(values: dict[str, float], goals: dict[str, float]) -> dict[str, dict]:
    """``goals``, and which of them are ``met``; one without a value is not."""
    from fastgan.training.metrics import better

    return {
        "goals": dict(goals),
        "met": {name: name in values and better(name, values[name], goal) for name, goal in goals.items()},
    }


def cells(found: dict) -> list[tuple[str, str, str, str]]:
    """(metric, value, goal, value of real samples) by row; a goal says whether it is met."""
    from fastgan.training.metrics import LESS_IS_BETTER

    def form(values: dict, name: str) -> str:
        return f"{values[name]:.4g}" if name in values else ""

    rows = []
    for name in found["metrics"] | found["goals"]:
        goal = ""
        if name in found["goals"]:
            sign = "≤" if name in LESS_IS_BETTER else "≥"
            goal = f"{sign} {found['goals'][name]:g} {'met' if found['met'][name] else 'missed'}"
        rows.append((name, form(found["metrics"], name), goal, form(found["reference"], name)))
    return rows


def table(found: dict) -> str:
    from fastgan.tables import render

    title = f"{found['recipe']} on {found['data']}, step {found['step']}: {found['samples']} samples"
    text = render(title, ("metric", "value", "goal", "real samples"), cells(found))
    return f"{text}\nfeatures: {found['features']}" if found["features"] else text
