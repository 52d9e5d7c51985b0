"""The demo's order of events."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastgan import backends, measure
from fastgan.demo import compare, report, sweep
from fastgan.demo.model import RUNS, Run, batches, digits

JUDGED = 1000  # samples


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device)


def _data(options: argparse.Namespace):
    return batches(digits()[0].to(_device(options)), options.batch_size, options.seed)


def measure_times(run: Run, options: argparse.Namespace) -> dict:
    """Step times from the initial state, under the allocator setting in force."""
    gans = compare.make_gans(run, _device(options), options.seed)
    effort = {"seconds": 0.3, "min_rounds": 2} if options.quick else {"seconds": 5.0, "min_rounds": 5}
    return compare.step_times(run, gans, next(_data(options)), **effort)


def demo(options: argparse.Namespace, other_allocator: Callable) -> int:
    """Run all of ``RUNS``, print and write what they show; the exit status."""
    console = Console() if sys.stdout.isatty() else Console(width=130)
    available = len(digits()[0])
    if options.batch_size > available:
        console.print(f"[red]--batch-size {options.batch_size} is more than the {available} digits there are[/]")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    serving = {op: backends.serving(op, _device(options).type) for run in RUNS for op in run.operators}
    machine = measure.machine()
    console.print(f"[bold]fastgan demo[/] on {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    kernels = ", ".join(sorted(set(serving.values())))
    console.print(f"device: {_device(options)}, fastgan's kernels: {kernels}, C allocator: {machine['allocator']}")
    slow = "reference" in serving.values()
    if slow:
        console.print("[yellow]Plain torch operators serve: correct, but slow, so this run is shorter. Why: fastgan doctor[/]")
    options.steps = vars(options).get("steps", 40 if slow else 160)
    with console.status("timing a step under the other allocator setting, in a process of its own"):
        elsewhere = other_allocator(options)
    results = {}
    for i, run in enumerate(RUNS):
        result = _one(run, options, slow, console)
        if elsewhere:
            result["step times"].append(elsewhere[i])
        else:
            console.print("[yellow]The child process for the other allocator setting failed: its times are left out.[/]")
        report.summary(console, run, serving, result)
        results[run.name] = result
    passed = all(result["verdict"]["passed"] for result in results.values())
    shown = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "times_only"
    }
    seconds = time.perf_counter() - begin
    document = {
        "machine": machine,
        "options": shown,
        "backends": serving,
        "passed": passed,
        "seconds": seconds,
        "runs": results,
    }
    (options.out / "results.json").write_text(json.dumps(document, indent=1))
    console.print(f"Plots and results.json in {options.out}, after {seconds:.0f} s.")
    return 0 if passed else 1


def _one(run: Run, options: argparse.Namespace, slow: bool, console: Console) -> dict:
    device, quick = _device(options), options.quick
    images, labels = digits()
    judge = report.Judge(images, labels, options.seed)
    data = _data(options)
    free_steps = 4 if quick else 40 if run.has_layer and not slow else 10
    patience = 0.5 if quick else 2.0 if slow else 8.0
    steps = min(options.steps, run.steps or options.steps)
    sizes = [2**i for i in (range(5, 7) if quick else range(6, 14))]
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        training = progress.add_task("training in lockstep", total=steps, note="")
        running_free = progress.add_task("running free", total=free_steps, note="")
        timing = progress.add_task("timing a step", total=3, note="")
        if run.has_layer:
            sweeping = progress.add_task("growing the batch", total=len(sizes) * len(run.forms), note="")

        untrained = report.sample(
            compare.make_gans(run, device, options.seed)["fastgan"].generator, JUDGED, options.seed, device
        )

        def after_step(record: dict) -> None:
            losses = f"loss D {record['discriminator']['fastgan loss']:.3f}  G {record['generator']['fastgan loss']:.3f}"
            progress.update(training, advance=1, note=losses)

        trained_gan, records = compare.lockstep(run, device, options.seed, data, steps, 2 if quick else 10, after_step)
        verdict = compare.verdict(records)
        distances = compare.divergence(run, device, options.seed, data, free_steps, lambda: progress.advance(running_free))

        times = measure_times(run, options)
        progress.advance(timing)
        gans = compare.make_gans(run, device, options.seed)
        batch = next(data)
        parts = compare.step_parts(gans, batch, rounds=2 if quick else 5) if run.has_layer else None
        progress.advance(timing)
        memory = compare.step_memory(gans, batch)
        progress.advance(timing)

        budget, points = sweep.memory_budget(options.memory_budget, device), None
        if run.has_layer:
            points = sweep.sweep(run.forms, device, sizes, budget, patience, lambda: progress.advance(sweeping))
    trained = report.sample(trained_gan.generator, JUDGED, options.seed, device)

    def plot(kind: str) -> Path:
        return options.out / f"{run.name}-{kind}.png"

    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else psutil.virtual_memory().total
    report.plot_samples(plot("samples"), images, trained, steps)
    report.plot_losses(plot("losses"), records, verdict)
    report.plot_divergence(plot("divergence"), distances)
    if run.has_layer:
        report.plot_parts(plot("parts"), parts)
        report.plot_sweep(plot("sweep"), points, budget, total)
    return {
        "allocator": measure.allocator(),
        "compared with": run.best_plain,
        "verdict": verdict,
        "step times": [times],
        "step parts": parts,
        "step memory": memory,
        "sweep": points,
        "memory budget": budget,
        "divergence": distances,
        "samples": judge.compare(untrained, trained),
        "steps": records,
    }
