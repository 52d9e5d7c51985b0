"""Critic steps on a GPU as ``python -m benchmarks.gpu`` measures them: as Python calls them, and as CUDA graphs.

A graph takes the time of a step's kernels: ``critic_step`` in one is GraphedCriticStep, and the textbook's step in one is what
a user could do instead. cuDNN searches for the fastest convolutions (``torch.backends.cudnn.benchmark``): eager needs it most.
"""

import statistics
import time
from collections.abc import Callable

import torch

import fastgan
from fastgan import losses

from . import reference
from .case import exact
from .critic_step import CRITICS, MODES

#: (critic, batch): widths of the papers
SIZES = (("sngan-wide32", 64), ("dcgan128", 64), ("r3gan-wide32", 16))
CALLED, GRAPHS = (
    ("eager", "accelerate", "critic_step"),
    tuple(f"{name} in a graph" for name in ("eager", "accelerate", "critic_step")),
)


def captured(run: Callable) -> Callable:
    """``run`` as a CUDA graph; what it returned is kept, as its memory is the graph's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay():
        graph.replay()
        return results

    return replay


def _start(name: str, batch: int):
    make, shape = CRITICS[name]
    torch.manual_seed(0)
    real, fake = torch.randn(2, batch, *shape).cuda()
    return make().cuda().eval(), real, fake, torch.rand(batch, *[1] * len(shape)).cuda()


def _candidate(kind: str, name: str, batch: int, mode: str) -> tuple[torch.nn.Module, Callable]:
    """The critic, and a step on it that leaves its gradients in ``.grad``."""
    critic, real, fake, alpha = _start(name, batch)
    options = MODES[mode]
    weights = [options.get(name, 0.0) for name in ("gradient_penalty", "r1", "r2")]
    if kind.startswith("accelerate"):
        fastgan.accelerate(critic)
    if kind == "critic_step in a graph":
        step = fastgan.GraphedCriticStep(critic, **options)
        given = {"alpha": alpha} if weights[0] else {}
        return critic, lambda: step(real, fake, **given)

    def run():
        critic.zero_grad(set_to_none=True)
        if kind == "critic_step":
            fastgan.critic_step(critic, real, fake, alpha=alpha, **options).loss.backward()
        else:
            reference.step(critic, real, fake, losses.get(options["loss"]), *weights, alpha)[0].backward()

    return critic, run if kind in CALLED else captured(run)


def _gradient(critic) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in critic.parameters() if p.grad is not None])


def _seconds(run: Callable, rounds: int, seconds: float) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - start < seconds:
            run()
            count += 1
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def _difference(name: str, batch: int, mode: str, kind: str, expected: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """The gradient, and its relative difference to the expected one, without TF32; an error where it is large."""
    with exact():
        critic, run = _candidate(kind, name, batch, mode)
        run()
    gradient = _gradient(critic)
    error = 0.0 if expected is None else ((gradient - expected).norm() / expected.norm()).item()
    if not error < 1e-3:
        raise AssertionError(f"gradients differ by {error:.2g}")
    return gradient, error


def measure(name: str, batch: int, mode: str, rounds: int = 5, seconds: float = 0.03) -> dict:
    """{"seconds", "peak_bytes", "difference", "failed"} by candidate; differences are of gradients, to eager's."""
    found = {"critic": name, "batch": batch, "mode": mode, "seconds": {}, "peak_bytes": {}, "difference": {}, "failed": {}}
    expected = None
    for kind in CALLED + GRAPHS:
        try:
            gradient, found["difference"][kind] = _difference(name, batch, mode, kind, expected)
            expected = gradient if expected is None else expected
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            _critic, run = _candidate(kind, name, batch, mode)
            for _ in range(4):
                run()
            found["peak_bytes"][kind] = torch.cuda.max_memory_allocated() - before
            found["seconds"][kind] = _seconds(run, rounds, seconds)
        except Exception as error:  # the others are still worth measuring
            found["failed"][kind] = f"{type(error).__name__}: {error}"[:300]
        _critic = run = None
        torch.cuda.empty_cache()
    return found


def _gain(taken: dict, how: str) -> str:
    eager, ours = (taken.get(name + how) for name in ("eager", "critic_step"))
    return f"{eager / ours:.2f}x" if eager and ours else "–"


def table(rows: list[dict]) -> list[str]:
    head = ["critic", "batch", "penalties", *(f"{kind}, ms" for kind in CALLED + GRAPHS)]
    head += ["critic_step over eager, called / graphs", "peak MiB, eager / critic_step"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        taken, peak = row["seconds"], row["peak_bytes"]
        times = [f"{taken[kind] * 1e3:.2f}" if kind in taken else "–" for kind in CALLED + GRAPHS]
        gains = " / ".join(_gain(taken, how) for how in ("", " in a graph"))
        peaks = " / ".join(f"{peak[kind] / 2**20:.0f}" if kind in peak else "–" for kind in ("eager", "critic_step"))
        lines.append("| " + " | ".join([row["critic"], str(row["batch"]), row["mode"], *times, gains, peaks]) + " |")
    return lines
