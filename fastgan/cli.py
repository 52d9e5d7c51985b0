"""The ``fastgan`` command; ``python -m fastgan`` is the same."""

import argparse
import importlib
import sys

#: subcommand -> (module whose main(argv) runs it, help). Imported only when called: --help needs no extras.
COMMANDS = {
    "bench": ("fastgan.bench", "operators and the critic step against the best alternatives, on this machine"),
    "profile": ("fastgan.profiler.command", "where a training script spends time and memory, and what fastgan would gain"),
    "doctor": ("fastgan.doctor", "which kernels serve on this machine, and why"),
    "demo": ("fastgan.demo", "train a small GAN with plain PyTorch and with fastgan, and compare"),
    "train": ("fastgan.training.command", "train one of the GANs of fastgan.recipes; train --list shows them"),
    "sample": ("fastgan.training.sample", "draw from a trained run"),
    "eval": ("fastgan.training.evaluate", "how good a trained run's samples are: modes, FID, precision, recall, ..."),
    "tune": ("fastgan.training.tune", "search for the options that train a recipe best"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="fastgan",
        description="Fused kernels for GAN training in PyTorch.",
        epilog="commands:\n" + "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="see below; each has its own --help")
    command = parser.parse_args(argv[:1]).command
    return importlib.import_module(COMMANDS[command][0]).main(argv[1:])
