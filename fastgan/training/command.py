"""``fastgan train RECIPE``: train one of the recipes. ``--list`` shows them; ``RECIPE --options`` what ``--set`` can change."""

import argparse
import sys
from pathlib import Path

from fastgan import recipes
from fastgan.training import data, missing_extras


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgan train",
        description=__doc__,
        epilog="Several processes: torchrun --nproc-per-node N -m fastgan train RECIPE ... "
        "Ctrl-C saves a checkpoint and stops; --resume goes on.",
    )
    parser.add_argument("recipe", nargs="?", help="see --list")
    parser.add_argument("--list", action="store_true", help="the recipes and the data, one line each")
    parser.add_argument("--options", action="store_true", help="the recipe's options and their defaults")
    parser.add_argument("--data", help="a name (--list) or a path; default: the recipe's")
    parser.add_argument("--size", type=_positive, help="side of the images; default: the recipe's")
    parser.add_argument("--strict", action="store_true", help="a file that can't be read is an error; otherwise it is skipped")
    parser.add_argument("--steps", type=_positive, help="default: the recipe's")
    parser.add_argument("--batch-size", type=_positive, help="of all processes together; default: the recipe's")
    parser.add_argument("--out", type=Path, help="folder of the run; default: out/RECIPE")
    parser.add_argument("--set", action="append", default=[], nargs="+", metavar="NAME=VALUE", help="change options")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the networks and the critic's step")
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on CUDA, bfloat16 elsewhere")
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="under torchrun: whole networks in each process, or sharded ones; of critics the optimizer's states alone",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--sample-every", type=_positive, default=500, metavar="STEPS")
    parser.add_argument("--save-every", type=_positive, default=500, metavar="STEPS")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """0 when trained, 1 when the losses diverged, 2 when it can't run, 130 when it was stopped."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{name:12} {recipes.summary(name)}" for name in recipes.names()))
        print(f"\n--data takes one of these, {data.PATHS}:\n")
        print("\n".join(f"{name:12} {what}" for name, (_, what) in data.NAMES.items()))
        return 0
    if not arguments.recipe:
        parser.error("which recipe? --list shows them")
    if missing := missing_extras():
        print(f"fastgan train: {', '.join(missing)} missing; pip install 'fastgan[train]'", file=sys.stderr)
        return 2
    from fastgan.training import run

    try:
        return run.describe(arguments.recipe) if arguments.options else run.train(arguments)
    except (ValueError, OSError) as error:  # of arguments, or of --out: their messages say what is expected
        print(f"fastgan train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step, or a second time
        print("fastgan train: stopped at once", file=sys.stderr)
        return 130
