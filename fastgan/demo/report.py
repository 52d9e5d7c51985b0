"""What the demo shows: a metric for the samples, tables in the terminal, plots as PNG."""

from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastgan.demo.model import KERNEL_DIMS, KERNELS, LATENT, ROLES, Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRID = (6, 12)
CONFIDENT = 0.5
TREES = 200
COLOURS = {"fastgan": "#0b7a75", "plain cdist": "#d1495b", "plain broadcast": "#edae49", "plain double backward": "#d1495b"}
GREY = "#7a7a7a"
plt.rcParams.update(
    {
        "figure.dpi": 130,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e5e5e5",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


class Judge:
    """A classifier of real digits: how many samples does it recognise with confidence, and how many classes?"""

    def __init__(self, images: Tensor, labels: Tensor, seed: int):
        from sklearn.ensemble import ExtraTreesClassifier
        from sklearn.model_selection import train_test_split

        train, self.held_out, targets, _ = train_test_split(
            images.flatten(1).numpy(), labels.numpy(), test_size=0.25, random_state=seed, stratify=labels
        )
        # Trees vote: unlike linear or neural classifiers they are unsure of what looks like no digit at all.
        self.classifier = ExtraTreesClassifier(TREES, random_state=seed).fit(train, targets)

    def __call__(self, images) -> dict:
        share = self.classifier.predict_proba(images)
        confident = share.max(1) > CONFIDENT
        return {"recognised": float(confident.mean()), "classes": len(set(share[confident].argmax(1).tolist()))}

    def compare(self, untrained: Tensor, trained: Tensor) -> dict[str, dict]:
        flat = lambda images: images.flatten(1).cpu().numpy()  # noqa: E731
        return {
            "real digits, held out": self(self.held_out),
            "generated, trained": self(flat(trained)),
            "generated, untrained": self(flat(untrained)),
        }


@torch.no_grad()
def sample(generator: nn.Module, count: int, seed: int, device: torch.device) -> Tensor:
    """``count`` images of a fixed latent sample, batch norm in evaluation mode."""
    noise = torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed)).to(device)
    training = generator.training
    images = generator.eval()(noise)
    generator.train(training)
    return images.cpu()


def _spread(spread: dict, scale: float, unit: str, digits: int) -> str:
    median, low, high = (f"{scale * spread[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median}{unit} ({low}–{high})"


def _mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.1f} MiB"


def print_times(console: Console, result: dict) -> None:
    """Time per step and fastgan's speed-up, under each setting of the C allocator."""
    table = Table(title="Time per training step, median (quartiles)", title_justify="left")
    table.add_column("")
    for times in result["step times"]:
        table.add_column(f"{times['allocator']} allocator", justify="right", no_wrap=True)
        table.add_column("fastgan faster by", justify="right", no_wrap=True)
    for name in result["step times"][0]["seconds"]:
        row = []
        for times in result["step times"]:
            speedup = times["speedup over"].get(name)
            row += [_spread(times["seconds"][name], 1e3, " ms", 0), _spread(speedup, 1, "x", 2) if speedup else ""]
        table.add_row(name, *row, style="bold" if name == "fastgan" else None)
    console.print(table)
    for times in result["step times"]:
        console.print(f"Fastest plain form with the {times['allocator']} allocator: {times['fastest plain']}.")


def print_parts(console: Console, result: dict) -> None:
    """The parts of a step with their shares, where one layer is compared, and its peak memory."""
    parts, names = result["step parts"] or {}, list(result["step memory"])
    title = f"Parts of a step ({result['allocator']} allocator), and its peak memory" if parts else "A step's peak memory"
    table = Table(title=title, title_justify="left")
    table.add_column("part" if parts else "")
    for name in names:
        table.add_column(name, justify="right")
    totals = {name: sum(seconds.values()) for name, seconds in parts.items()}
    for part in parts.get("fastgan", ()):
        row = (f"{1e3 * parts[name][part]:7.1f} ms {parts[name][part] / totals[name]:5.0%}" for name in parts)
        table.add_row(part, *row, style="bold" if part.startswith("minibatch layer") else None)
    table.add_row("peak memory", *(_mebibytes(result["step memory"][name]) for name in names), style="bold")
    console.print(table)


def print_verdict(console: Console, verdict: dict, steps: int) -> None:
    table = Table(title=f"Relative differences in {steps} steps, each from the same state", title_justify="left")
    for heading in ("", "fastgan – plain, largest", "plain – fp64, median", "fastgan – fp64, median", "limit", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in verdict["rows"]:
        figures = (
            row[key] for key in ("largest difference", "median fp64 error of plain", "median fp64 error of fastgan", "limit")
        )
        mark = "[green]pass[/]" if row["passed"] else "[bold red]FAIL[/]"
        table.add_row(row["what"], *(f"{figure:.1e}" for figure in figures), mark)
    console.print(table)
    meaning = f"the limit is {verdict['allowed']:.0f} times plain PyTorch's own rounding error against fp64"
    if verdict["passed"]:
        console.print(f"[bold green]PASS[/] rounding explains every difference ({meaning}).")
    else:
        console.print(f"[bold red]FAIL[/] fastgan and plain PyTorch differ by more than rounding explains ({meaning}).")


def print_sweep(console: Console, points: dict[str, list[dict]], budget: int) -> None:
    table = Table(title=f"The layer, forward + backward, memory budget {budget / 2**30:.1f} GiB", title_justify="left")
    table.add_column("batch", justify="right")
    for name in points:
        table.add_column(name, justify="right")
    for row in zip(*points.values(), strict=True):
        table.add_row(str(row[0]["batch_size"]), *map(_describe, row))
    console.print(table)


def _describe(point: dict) -> str:
    if point["status"] == "measured":
        return f"{1e3 * point['seconds']:.1f} ms, {_mebibytes(point['bytes'])}"
    if point["status"] == "over the memory budget":
        return f"[red]predicted: needs {point['predicted_bytes'] / 2**30:.1f} GiB[/]"
    if point["status"] == "over the time limit":
        return f"[yellow]predicted: takes {point['predicted_seconds']:.0f} s[/]"
    return "[red]out of memory[/]"


def print_samples(console: Console, judged: dict[str, dict]) -> None:
    table = Table(title=f"Digits that a classifier recognises (> {CONFIDENT:.0%} of its votes)", title_justify="left")
    for heading in ("", "recognised", "classes"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in judged.items():
        table.add_row(name, f"{row['recognised']:.0%}", f"{row['classes']} of 10")
    console.print(table)


def _grid(images: Tensor) -> Tensor:
    rows, columns = GRID
    padded = nn.functional.pad(images[: rows * columns, 0], (1, 1, 1, 1), value=-1.0)
    return padded.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)


def plot_samples(path: Path, real: Tensor, generated: Tensor, steps: int) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.1))
    for axis, images, title in zip(axes, (real, generated), ("real digits", f"generated after {steps} steps"), strict=True):
        axis.imshow(_grid(images).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    _save(figure, path)


def plot_losses(path: Path, records: list[dict], verdict: dict) -> None:
    """Above: both losses of both runs, one on the other. Below: the difference of their gradients, with the limit."""
    figure, (losses, differences) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    steps = [record["step"] for record in records]
    limits = {row["what"]: row["limit"] for row in verdict["rows"]}
    for role, colour in zip(ROLES, ("#30638e", "#d1495b"), strict=True):
        losses.plot(
            steps, [r[role]["plain loss"] for r in records], color=colour, alpha=0.35, linewidth=5, label=f"{role}, plain"
        )
        losses.plot(steps, [r[role]["fastgan loss"] for r in records], color=colour, linewidth=1, label=f"{role}, fastgan")
        differences.semilogy(steps, [r[role]["gradient difference"] for r in records], color=colour, linewidth=1, label=role)
        differences.axhline(limits[f"{role} gradient"], color=colour, linestyle="--", linewidth=1, label=f"{role}, limit")
    losses.set(ylabel="loss", title="Plain PyTorch and fastgan, each step from the same state")
    differences.set(xlabel="step", ylabel="relative difference of gradients")
    losses.legend(ncols=2)
    differences.legend(ncols=2)
    _save(figure, path)


def plot_divergence(path: Path, distances: dict[str, list[float]]) -> None:
    figure, axis = plt.subplots(figsize=(8, 4))
    for (name, values), colour in zip(distances.items(), (COLOURS["fastgan"], GREY), strict=True):
        axis.semilogy(range(1, len(values) + 1), values, color=colour, label=name, linestyle="-" if name == "fastgan" else "--")
    axis.set(xlabel="step", ylabel="relative distance of all parameters\nfrom plain PyTorch's")
    axis.set_title("Free-running, every rounding grows: fastgan beside plain PyTorch nudged by one ulp")
    axis.legend()
    _save(figure, path)


def plot_sweep(path: Path, points: dict[str, list[dict]], budget: int, total: int) -> None:
    figure, (time, memory) = plt.subplots(1, 2, figsize=(12, 4.2))
    for name, row in points.items():
        colour = COLOURS.get(name, GREY)
        done = [point for point in row if point["status"] == "measured"]
        time.loglog([p["batch_size"] for p in done], [1e3 * p["seconds"] for p in done], "o-", color=colour, label=name)
        known = [p for p in done if p["bytes"]]
        memory.loglog([p["batch_size"] for p in known], [p["bytes"] / 2**20 for p in known], "o-", color=colour, label=name)
        rest = known[-1:] + [p for p in row if p["status"] != "measured" and p["predicted_bytes"]]
        predicted = [(p["bytes"] if p in known else p["predicted_bytes"]) / 2**20 for p in rest]
        if len(rest) > 1:
            memory.loglog([p["batch_size"] for p in rest], predicted, ":", color=colour, label=f"{name}, predicted")
    memory.axhline(budget / 2**20, color=GREY, linestyle="--", linewidth=1, label="budget of this sweep")
    memory.axhline(total / 2**20, color="black", linestyle="--", linewidth=1, label="memory of this machine")
    time.set(ylabel="milliseconds", title="time")
    memory.set(ylabel="MiB", title="peak memory")
    sizes = [point["batch_size"] for point in next(iter(points.values()))]
    for axis in (time, memory):
        axis.set(xlabel="batch size", xlim=(0.8 * sizes[0], 1.25 * sizes[-1]))
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
    time.legend(fontsize=8, loc="upper left")
    memory.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"Minibatch discrimination, forward + backward, {KERNELS} kernels of {KERNEL_DIMS} dimensions")
    _save(figure, path)


def plot_parts(path: Path, parts: dict[str, dict[str, float]]) -> None:
    figure, axis = plt.subplots(figsize=(9, 0.7 * len(parts) + 1.6))
    names = list(parts)[::-1]
    left = dict.fromkeys(names, 0.0)
    palette = ("#30638e", "#5b9bd5", "#edae49", "#9bb8d3", "#d1495b", "#c9c9c9")
    for part, colour in zip(parts["fastgan"], palette, strict=True):
        widths = [1e3 * parts[name][part] for name in names]
        axis.barh(names, widths, left=list(left.values()), color=colour, label=part)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axis.set(xlabel="milliseconds", title="Parts of a training step")
    axis.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def summary(console: Console, run: Run, backends: dict[str, str], result: dict) -> None:
    """Everything about one run."""
    steps = len(result["steps"])
    console.rule(f"[bold]{run.name}[/]: fastgan against {', '.join(run.plain)}")
    print_times(console, result)
    print_parts(console, result)
    if result["sweep"]:
        print_sweep(console, result["sweep"], result["memory budget"])
    print_samples(console, result["samples"])
    print_verdict(console, result["verdict"], steps)
    for times in result["step times"]:
        gain = times["speedup over"][run.best_plain]["median"]
        setting = f"{times['allocator']} allocator"
        console.print(f"[bold]{run.name}[/]: a training step is {gain:.2f}x faster than {run.best_plain} ({setting}).")
    if any(backends[op] == "reference" for op in run.operators):
        console.print(
            "[yellow]No native kernel served here, so what was measured as fastgan is its plain-torch reference: it bounds "
            "memory, it does not save time.[/] fastgan doctor says why."
        )
