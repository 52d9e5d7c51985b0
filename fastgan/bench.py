"""``fastgan bench``: fastgan's operators and the critic step against the best alternatives, on this machine.

Candidates run interleaved, round by round, and only after each has agreed with float64. A rate is compared with a limit that is
measured on the spot: copying as many bytes, in the same rounds, and the fastest multiply-adds. --compare names what has become
slower against the same baseline by more than the spread, and exits with 1.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fastgan
from fastgan import html, measure
from fastgan.tables import duration, render, size

DTYPES = ("float64", "float32", "bfloat16", "float16")
KINDS = ("fwd", "bwd", "double", "step")
_SLOWER = 0.03  # a loss smaller than this is not called a regression


def _benchmarks():
    """The package of cases: installed as fastgan.benchmarks, in a checkout also beside the package."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module("fastgan.benchmarks")
    root = str(Path(fastgan.__file__).parents[1])
    if not Path(root, "benchmarks", "case.py").exists():
        raise FileNotFoundError(f"no benchmarks in this installation ({root}); install fastgan again")
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module("benchmarks")


class _On(TorchFunctionMode):
    """Tensors made inside are on ``device``; random ones are drawn on the CPU, where the cases' generators are."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func in _device_constructors() and kwargs.get("device") is None and isinstance(made, torch.Tensor):
            return made.detach().to(self.device).requires_grad_(made.requires_grad)
        return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgan bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--op", action="append", metavar="OP", help="only this operator (may be repeated, as the next four)")
    add("--mode", action="append", choices=KINDS, help="forward, with backward, a penalty's derivative, a training step")
    add(
        "--size",
        action="append",
        help="only cases whose size is or begins with this; with --op any other is made, e.g. 512x128x16",
    )
    add("--dtype", action="append", choices=DTYPES, help="only this dtype; with --op cases that lack are made")
    add("--baseline", action="append", metavar="NAME", help="only against these, e.g. eager, torch, cdist, compile")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--allocator", choices=("current", "default", "tuned"), default="current", help="C allocator settings to run under")
    add("--seconds", type=float, default=4.0, help="how long the rounds of one case go on (4)")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--html", type=Path, metavar="FILE", help="write a report with charts")
    add("--list", action="store_true", help="name the cases and end")
    add("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="what has become slower from A to B?")
    return parser


def _begins(shape: str, asked: str | None) -> bool:
    """A whole number, not 64 of 640."""
    return asked is None or shape == asked or (shape.startswith(asked) and shape[len(asked)] in "x- ")


def select(cases, options, make=None) -> list:
    """The cases that were asked for. ``make(op, size, dtype)`` makes those of a named operator that are not among ``cases``.

    Raises:
        ValueError: there is none; says what there is, or what form a size has.
    """

    def having(wanted, pick):
        return not wanted or pick in wanted

    some = [case for case in cases if having(options.op, case.op) and having(options.mode, case.kind)]
    found = []
    for op, extent, dtype in itertools.product(*(asked or [None] for asked in (options.op, options.size, options.dtype))):
        there = [case for case in some if op in (None, case.op) and _begins(case.shape, extent) and dtype in (None, case.dtype)]
        if not there and make and op in {case.op for case in cases} and (extent or dtype):
            there = [case for case in _made(cases, op, extent, dtype, make) if having(options.mode, case.kind)]
        found += [case for case in there if case not in found]
    if not found:
        for option, pick in (("op", "op"), ("mode", "kind"), ("size", "shape"), ("dtype", "dtype")):
            asked, there = getattr(options, option), sorted({getattr(case, pick) for case in cases})
            if asked and not any(t.startswith(a) for a in asked for t in there):
                way = "; name an operator with --op and they are made" if option in ("size", "dtype") and not options.op else ""
                raise ValueError(f"--{option} {' '.join(asked)}: there are {', '.join(there)}{way}")
        raise ValueError("no case has all of these together; fastgan bench --list names them")
    return found


def _made(cases, op: str, size: str | None, dtype: str | None, make) -> list:
    """Of one operator: of this size, or of the sizes that its cases have."""
    wanted = getattr(torch, dtype or "float32")
    if size is not None:
        return make(op, size, wanted)
    found, problem = [], None
    for shape in dict.fromkeys(case.shape for case in cases if case.op == op and case.dtype == "float32"):
        try:
            found += make(op, shape, wanted)
        except ValueError as error:  # a whole network's name
            problem = error
    if not found and problem:
        raise problem
    return found


def measure_cases(cases, options, run) -> dict:
    """Results as plain data: {"machine", "limits", "cases", "failed"}."""

    def making():
        return _On(options.device) if options.device != "cpu" else contextlib.nullcontext()

    kinds = sorted({case.dtype for case in cases})
    with making():
        peaks = {kind: measure.multiply_add_peak(getattr(torch, kind)) for kind in kinds}
        stream = 256 << 20
        copied = measure.interleaved({"copy": measure.copier(stream)}, seconds=0.5)["copy"]
    limits = {"flops_per_second": peaks, "bytes_per_second": stream / measure.Spread.of(copied).median}
    rows, failed = [], []
    for case in _progress(cases):
        try:
            rows.append(run(case, options.seconds, options.baseline or (), making))
        except Exception as error:  # the others are still worth measuring
            failed.append({"id": case.id, "why": f"{type(error).__name__}: {error}".splitlines()[0]})
    return {"machine": measure.machine() | {"device": options.device}, "limits": limits, "cases": rows, "failed": failed}


def _progress(cases):
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield from cases
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.id)
            yield case
            progress.advance(task)


def share(row: dict, limits: dict) -> tuple[float, str] | None:
    """Of the limit that binds ours: its rate, over copying as many bytes or over the multiply-add peak, the larger."""
    shares = []
    if rates := row.get("bytes_per_second"):
        shares.append((rates[row["ours"]] / rates["stream"], f"{rates[row['ours']] / 1e9:.3g} GB/s"))
    if (rates := row.get("flops_per_second")) and row["ours"] in rates:
        peak = limits["flops_per_second"][row["dtype"]]
        shares.append((rates[row["ours"]] / peak, f"{rates[row['ours']] / 1e9:.3g} GFLOP/s"))
    return max(shares) if shares else None


def _table(result: dict) -> tuple[list[str], list[list[str]]]:
    headings = ["case", "fastgan", "best other", "speed-up", "quartiles", "rate", "of the limit", "peak", "other's"]
    rows = []
    for row in result["cases"]:
        ours, best = row["ours"], row["best"]
        gain, part = row["speedup"][best], share(row, result["limits"])
        rows.append(
            [
                f"{row['op']} {row['shape']} {row['mode']}",
                duration(row["seconds"][ours]["median"]),
                f"{best} {duration(row['seconds'][best]['median'])}",
                f"{gain['median']:.2f}x",
                f"{gain['low']:.2f}-{gain['high']:.2f}",
                part[1] if part else "",
                f"{part[0]:.0%}" if part else "",
                size(row["peak_bytes"][ours]),
                size(row["peak_bytes"][best]),
            ]
        )
    return headings, rows


def _head(result: dict) -> list[str]:
    machine, limits = result["machine"], result["limits"]
    peaks = ", ".join(f"{rate / 1e9:.3g} GFLOP/s in {kind}" for kind, rate in limits["flops_per_second"].items())
    return [
        f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads, GPU {machine['gpu']}, torch "
        f"{machine['torch']}, allocator {machine['allocator']}, device {machine['device']}.",
        f"Limits measured here: a copy of 256 MiB {limits['bytes_per_second'] / 1e9:.3g} GB/s (a case: of its own bytes), "
        f"multiply-adds {peaks}.",
        *(f"not measured: {entry['id']}: {entry['why']}" for entry in result["failed"]),
    ]


def page(results: dict) -> str:
    body = []
    for which, result in results.items():
        body += [html.heading(f"Allocator {which}"), *map(html.text, _head(result))]
        names = {f"{row['op']} {row['shape']} {row['mode']}": row for row in result["cases"]}
        gains = {name: row["speedup"][row["best"]]["median"] for name, row in names.items()}
        parts = {name: found[0] for name, row in names.items() if (found := share(row, result["limits"]))}
        shown = [html.bars("Times faster than the best alternative", gains, lambda v: f"{v:.2f}x", mark=1.0)]
        if parts:
            shown.append(html.bars("Share of the limit measured here", parts, lambda v: f"{v:.0%}", mark=1.0))
        body += [html.charts(*shown), html.table(*_table(result))]
    return html.page("fastgan's benchmarks", *body)


def compare(before: dict, after: dict) -> tuple[list[list[str]], list[str]]:
    """Rows for a table, and what has become slower: speed-ups over the same baseline that fell by more than the spread.

    Absolute times are shown, not judged: they also tell how busy the machine was, which a ratio of interleaved runs does not.
    """
    rows, regressions = [], []
    for which, result in after.items():
        old = {(r["op"], r["shape"], r["mode"]): r for r in before.get(which, {}).get("cases", [])}
        for row in result["cases"]:
            was = old.pop((row["op"], row["shape"], row["mode"]), None)
            name = f"{row['op']} {row['shape']} {row['mode']} ({which})"
            for baseline, now in row["speedup"].items():
                if was is None or baseline not in was["speedup"]:
                    continue
                then = was["speedup"][baseline]
                change = now["median"] / then["median"] - 1
                worse = now["high"] < then["low"] and change < -_SLOWER
                times = [duration(r["seconds"][r["ours"]]["median"]) for r in (was, row)]
                verdict = "slower" if worse else "faster" if now["low"] > then["high"] and change > _SLOWER else ""
                rows.append(
                    [name, baseline, f"{then['median']:.2f}x", f"{now['median']:.2f}x", f"{change:+.0%}", *times, verdict]
                )
                if worse:
                    regressions.append(f"{name}: {then['median']:.2f}x becomes {now['median']:.2f}x over {baseline}")
        for entry in result.get("failed", []):
            regressions.append(f"{entry['id']} ({which}): no longer measured: {entry['why']}")
    return rows, regressions


def _results(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        right = all("cases" in result and "machine" in result for result in found.values())
    except (ValueError, AttributeError, TypeError):
        right = False
    if not right:
        raise ValueError(f"{path} holds no results; fastgan bench --json writes them")
    return found


def _compare(paths) -> int:
    before, after = map(_results, paths)
    rows, regressions = compare(before, after)
    if not rows and not regressions:
        print(f"fastgan bench: {paths[0]} and {paths[1]} have no case and allocator in common", file=sys.stderr)
        return 2
    machines = [
        [{k: r["machine"].get(k) for k in ("processor", "gpu", "threads")} for r in f.values()] for f in (before, after)
    ]
    if any(one != other for one in machines[0] for other in machines[1]):
        print(f"measured on different machines or by different numbers of threads: {machines[0][0]} and {machines[1][0]}")
    headings = ["case", "over", "before", "after", "change", "time before", "after", ""]
    print(render("Speed-ups before and after", headings, rows))
    for line in regressions:
        print(f"slower: {line}")
    if not regressions:
        print("nothing has become slower beyond the spread")
    return 1 if regressions else 0


def main(argv: list[str] | None = None) -> int:
    """0: all measured; 1: a case failed, or has become slower; 2: nothing to do that could be done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    try:
        if options.compare:
            return _compare(options.compare)
        package = _benchmarks()
        cases = select(package.every_case(), options, package.make_cases)
    except (ValueError, OSError) as error:
        print(f"fastgan bench: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{case.op} {case.shape} {case.dtype} {case.kind}: {case.mode}" for case in cases))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("fastgan bench: --device cuda, but this torch sees no GPU", file=sys.stderr)
        return 2
    if options.allocator not in ("current", measure.allocator()):
        environment = measure.allocator_environment(options.allocator)
        root = str(Path(fastgan.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        return subprocess.run([sys.executable, "-m", "fastgan", "bench", *argv], env=environment).returncode
    run = importlib.import_module(f"{package.__name__}.case").run
    results = {measure.allocator(): measure_cases(cases, options, run)}
    for which, result in results.items():
        print("\n".join(_head(result)))
        print(render(f"Allocator {which}", *_table(result)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.html:
        options.html.write_text(page(results), encoding="utf-8")
    return 1 if any(result["failed"] for result in results.values()) else 0
