"""``python -m benchmarks``: test the operators, then measure them with both allocator settings, then report.

Prints a table, writes OUT/results.json, OUT/speedup.png and pytest-benchmark's own files. A speed-up is shown only where the
operator's tests passed first and every candidate agreed with float64. Each case is written to OUT/rows-ALLOCATOR.jsonl once it
is measured; --resume goes on from there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastgan import measure

from . import every_case, read_rows
from .case import OURS, id_of, mode_of

ROOT = Path(__file__).parent.parent


def tests_pass(op: str) -> bool:
    """The operator's own tests, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-k", op, "tests/test_ops.py", f"tests/test_{op}.py"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def measure_all(out: Path, which: str, ops: list[str], seconds: float) -> dict:
    """Run the cases in a child process with the allocator ``which``."""
    target, kept = ((out / name).resolve() for name in (f"pytest-benchmark-{which}.json", f"rows-{which}.jsonl"))
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--seconds", str(seconds), "-k", " or ".join(ops)]
    command += [
        f"--benchmark-json={target}",
        f"--rows={kept}",
        "--benchmark-disable-gc",
        "--benchmark-columns=median,iqr",
        "-p",
        "no:cacheprovider",
    ]
    code = "import json; from fastgan import measure; print(json.dumps(measure.machine()))"
    environment = measure.allocator_environment(which)
    subprocess.run(command, cwd=ROOT, env=environment)  # a case that fails is named there, and the others are kept
    machine = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    order = {case.id: place for place, case in enumerate(every_case())}
    rows = [row for row in read_rows(kept) if row["op"] in ops]
    rows.sort(key=lambda row: order.get(id_of(row), len(order)))
    return {"machine": json.loads(machine.stdout), "cases": rows}


def goal_of(row: dict, baseline: str) -> float | None:
    return row["goals"].get(baseline, row["goals"].get("best") if baseline == row["best"] else None)


def mebibytes(value: int | None) -> str:
    return "?" if value is None else f"{value / 2**20:.0f}"


def table(results: dict, which: str) -> Table:
    machine = results[which]["machine"]
    shown = Table(title=f"{machine['processor']} ({machine['instructions']}, {machine['threads']} threads), allocator {which}")
    for column in (
        "operator",
        "shape",
        "mode",
        "baseline",
        "ms",
        "fastgan ms",
        "speed-up",
        "quartiles",
        "goal",
        "MiB",
        "fastgan MiB",
    ):
        shown.add_column(column, justify="left" if column in ("operator", "shape", "mode", "baseline") else "right")
    for row in results[which]["cases"]:
        for baseline, speedup in row["speedup"].items():
            goal = goal_of(row, baseline)
            shown.add_row(
                row["op"],
                row["shape"],
                mode_of(row),
                baseline + (" (best)" if baseline == row["best"] else ""),
                f"{row['seconds'][baseline]['median'] * 1e3:.2f}",
                f"{row['seconds'][row['ours']]['median'] * 1e3:.2f}{row['ours'].removeprefix(OURS)}",
                f"{speedup['median']:.1f}x",
                f"{speedup['low']:.1f}-{speedup['high']:.1f}",
                "" if goal is None else f"{goal:g}x {'met' if speedup['median'] >= goal else 'missed'}",
                mebibytes(row["peak_bytes"][baseline]),
                mebibytes(row["peak_bytes"][row["ours"]]),
            )
        shown.add_section()
    return shown


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    most = max(len(result["cases"]) for result in results.values())
    figure, axes = plt.subplots(1, len(results), figsize=(7 * len(results), 1.5 + 0.5 * most), squeeze=False, sharey=True)
    for axis, (which, result) in zip(axes[0], results.items(), strict=True):
        cases = result["cases"]
        baselines = list(dict.fromkeys(name for row in cases for name in row["speedup"]))
        height = 0.8 / len(baselines)
        for i, baseline in enumerate(baselines):
            rows = [(y, row["speedup"][baseline]) for y, row in enumerate(cases) if baseline in row["speedup"]]
            positions = [y + (i - (len(baselines) - 1) / 2) * height for y, _ in rows]
            middle = [s["median"] for _, s in rows]
            spread = [[s["median"] - s["low"] for _, s in rows], [s["high"] - s["median"] for _, s in rows]]
            axis.barh(positions, middle, height, xerr=spread, capsize=2, label=baseline)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}x")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.xaxis.set_minor_formatter("{x:g}x")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_yticks(range(len(cases)), [f"{row['op']} {row['shape']} {row['mode']}" for row in cases], fontsize=8)
        axis.set_title(f"allocator {which}")
        axis.set_xlabel("times faster: fastgan over the baseline (median, quartiles)")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_ylim(most - 0.4, -0.6)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    ops = sorted({case.op for case in every_case()})
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", action="append", choices=ops, help="only this operator (may be repeated)")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long the rounds of one case go on")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--resume", action="store_true", help="keep what an earlier call measured, and measure the rest")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    passed = []
    for op in arguments.op or ops:
        if tests_pass(op):
            passed.append(op)
        else:
            console.print(f"[red]{op}: its tests fail, so nothing is measured[/red] (pytest -k {op})")
    if not passed:
        return 1
    results, halves = {}, ("tuned", "default")
    for which in halves if not arguments.resume else ():
        (arguments.out / f"rows-{which}.jsonl").unlink(missing_ok=True)
    for which in halves:
        results[which] = measure_all(arguments.out, which, passed, arguments.seconds)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    wanted = sum(case.op in passed for case in every_case())
    missing = [which for which, result in results.items() if len(result["cases"]) < wanted]
    plot(results, arguments.out / "speedup.png")
    for which in results:
        console.print(table(results, which))
    console.print(f"written to {arguments.out}/: results.json, speedup.png")
    if missing:
        console.print(
            f"[red]cases failed or were cut off, allocator {', '.join(missing)}[/red]; --resume measures what is missing"
        )
    return 1 if missing or len(passed) < len(arguments.op or ops) else 0


if __name__ == "__main__":
    sys.exit(main())
