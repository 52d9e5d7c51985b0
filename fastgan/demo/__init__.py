"""``fastgan demo``: train a GAN on handwritten digits with plain PyTorch and with fastgan, and compare them step by step."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import fastgan
from fastgan import measure

NEEDED = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn", "psutil": "psutil"}


def missing_extras() -> list[str]:
    """Distributions of the extra ``train`` that are not installed."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def _parser() -> argparse.ArgumentParser:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="fastgan demo", description=__doc__, formatter_class=style)
    parser.add_argument(
        "--steps",
        type=_at_least_two,
        default=argparse.SUPPRESS,
        help="training steps, each compared (default: 160, or 40 where no native kernels serve)",
    )
    parser.add_argument("--batch-size", type=_at_least_two, default=128, help="samples per step")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for plots and results.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument(
        "--allocator", choices=("current", "default", "tuned"), default="current", help="C allocator settings to run under"
    )
    parser.add_argument(
        "--memory-budget", type=float, default=6.0, metavar="GIB", help="most that the sweep takes (and half of what is free)"
    )
    parser.add_argument("--times-only", action="store_true", help=argparse.SUPPRESS)  # for the child process: JSON to stdout
    return parser


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is too few, expected at least 2")
    return value


def _child(argv: list[str], allocator: str, **options) -> subprocess.CompletedProcess:
    """This demo in a new Python under another allocator setting, which only takes effect at its start."""
    environment = measure.allocator_environment(allocator)
    root = str(Path(fastgan.__file__).parents[1])  # the same fastgan, wherever it was imported from
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, "-m", "fastgan", "demo", *argv], env=environment, **options)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when plain PyTorch and fastgan agree, 1 when they don't, 2 when it can't run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.quick:
        options.steps, options.batch_size = min(vars(options).get("steps", 6), 6), min(options.batch_size, 32)
    if missing := missing_extras():
        print(f"fastgan demo: {', '.join(missing)} missing; pip install 'fastgan[train]'", file=sys.stderr)
        return 2
    if options.allocator not in ("current", measure.allocator()):
        return _child(argv, options.allocator).returncode
    from fastgan.demo import run

    if options.times_only:
        print(json.dumps([run.measure_times(each, options) for each in run.RUNS]))
        return 0
    return run.demo(options, _other_allocator)


def _other_allocator(options: argparse.Namespace) -> list[dict] | None:
    """Step times of each run under the allocator setting that is not in force; None if the child fails."""
    other = "default" if measure.allocator() == "tuned" else "tuned"
    argv = ["--times-only", "--batch-size", str(options.batch_size), "--seed", str(options.seed), "--device", options.device]
    child = _child([*argv, *(["--quick"] if options.quick else [])], other, capture_output=True, text=True)
    return json.loads(child.stdout) if child.returncode == 0 else None
