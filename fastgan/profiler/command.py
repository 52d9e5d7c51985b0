"""``fastgan profile TRAINER.py [arguments]``: run a training script unchanged, and say where time and memory go.

The script runs as ``__main__`` with its own arguments until enough iterations have been looked at. Options of this command come
before the script. With --sweep-batch the batch is doubled until memory ends: of a script (or an importable module) that defines
``make_step(batch_size)``, which returns a function that makes one training step, or with --batch-arg of any script that takes
its batch size as an argument.
"""

import argparse
import contextlib
import json
import os
import runpy
import sys
from pathlib import Path

from fastgan.profiler.session import Finished, Profile


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastgan profile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--critic", metavar="NAME", help="variable, attribute or class of the critic (told from who feeds whom)")
    add("--generator", metavar="NAME", help="the same for the generator")
    add("--warmup", type=int, default=2, metavar="N", help="iterations that are let pass (2)")
    add("--timed", type=int, default=3, metavar="N", help="iterations that are timed as they are (3)")
    add("--steps", type=int, default=5, metavar="N", help="iterations that are traced (5)")
    add("--finish", action="store_true", help="let the script run to its own end")
    add("--no-gains", action="store_true", help="don't measure what fastgan would gain")
    add("--seconds", type=float, default=2.0, help="how long each comparison goes on (2)")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the traced iterations")
    add("--json", action="store_true", help="print the results as JSON; the script's own output goes to stderr")
    add("--html", type=Path, metavar="FILE", help="write a report with charts")
    add("--sweep-batch", metavar="FROM:TO", help="double the batch size from FROM to TO, or until memory ends")
    add("--batch-arg", metavar="OPTION", help="the script's option for its batch size, e.g. --batch-arg=--batch-size")
    add("--memory", type=float, metavar="GIB", help="most memory a batch size may take (half of what is available)")
    add("--patience", type=float, default=10.0, metavar="S", help="seconds that one step of the sweep may take (10)")
    add("script", help="a Python file, or a module's dotted name")
    add("arguments", nargs=argparse.REMAINDER, help="the script's own")
    return parser


def run_script(script: str, arguments: list[str], name: str = "__main__") -> dict:
    """Run a file or a module as Python does, with its arguments; returns its globals."""
    before = sys.argv, sys.path[:], os.getcwd()
    sys.argv = [script, *arguments]
    try:
        if Path(script).is_file():
            sys.path.insert(0, str(Path(script).resolve().parent))
            return runpy.run_path(script, run_name=name)
        sys.path.insert(0, os.getcwd())
        return runpy.run_module(script, run_name=name, alter_sys=name == "__main__")
    finally:
        sys.argv, sys.path[:] = before[:2]
        os.chdir(before[2])


def profile_script(script: str, arguments: list[str], **options) -> Profile:
    with Profile(**options) as profile:
        try:
            run_script(script, arguments)
        except SystemExit as end:
            if end.code:
                print(f"fastgan profile: the script ended itself: {end.code}", file=sys.stderr)
    return profile


def main(argv: list[str] | None = None) -> int:
    """0: results shown; 1: the script failed; 2: nothing could be measured."""
    options = _parser().parse_args(argv)
    for path in filter(None, (options.html, options.trace)):  # known before minutes have gone by
        if not path.parent.is_dir():
            print(f"fastgan profile: no folder {path.parent} to write {path.name} to", file=sys.stderr)
            return 2
    output = sys.stderr if options.json else sys.stdout
    try:
        with contextlib.redirect_stdout(output):
            found = _sweep(options) if options.sweep_batch else _profile(options)
    except (RuntimeError, ValueError, FileNotFoundError, ImportError) as error:
        if not _ours(error):
            raise
        print(f"fastgan profile: {error}", file=sys.stderr)
        return 2
    if _other_rank():
        return 0
    if options.html:
        found.save_html(options.html)
    if options.trace and not options.sweep_batch:
        found.save_trace(options.trace)
    if options.json:
        json.dump(found.to_dict(), sys.stdout, indent=1)
        print()
    else:
        print(found)
        for path in filter(None, (options.html, options.trace)):
            print(f"written: {path}")
    return 0


def _other_rank() -> bool:
    """Of processes that train together, as torchrun starts them, the first shows what it found."""
    return os.environ.get("RANK", "0") != "0"


def _ours(error: BaseException) -> bool:
    """Raised by this package, not by the script that it runs."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "fastgan/profiler/" in trace.tb_frame.f_code.co_filename or trace.tb_frame.f_code.co_filename.startswith(
        "<frozen runpy"
    )


def _profile(options) -> Profile:
    found = profile_script(
        options.script,
        options.arguments,
        critic=options.critic,
        generator=options.generator,
        warmup=options.warmup,
        timed=options.timed,
        steps=options.steps,
        stop=not options.finish,
    )
    if not options.no_gains and not _other_rank():
        print("fastgan profile: measuring what fastgan would gain", file=sys.stderr)
        found.measure_gains(options.seconds)
    return found


def _sweep(options):
    from fastgan.profiler import batches

    return batches.sweep(
        batches.Script(options.script, tuple(options.arguments), options.batch_arg),
        options.sweep_batch,
        memory=None if options.memory is None else int(options.memory * 2**30),
        patience=options.patience,
        progress=True,
    )


__all__ = ["Finished", "main", "profile_script", "run_script"]
