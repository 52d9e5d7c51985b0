"""One benchmark case, and how every case is run: correctness gate, interleaved rounds, memory peaks."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgan import measure

OURS = "fastgan"
STREAM = "stream"  # the yardstick of cases that are bound by reading memory


@dataclass(frozen=True)
class Case:
    """What to compare for one operator, shape and mode."""

    op: str  # stem of the operator's files
    shape: str
    mode: str
    #: makes {"fastgan": run, baseline: run, ...}; each run returns its result tensors. Names that begin with "fastgan" are
    #: ours: the fastest of them is compared
    candidates: Callable[[], Mapping[str, Callable[[], tuple[Tensor, ...]]]]
    #: the true result, in float64
    truth: Callable[[], tuple[Tensor, ...]]
    #: baseline (or "best") -> speed-up aimed at
    goals: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 1e-4
    #: bytes that any candidate has to read; with it, the rates of ours and of reading alone are measured too
    reads: int = 0

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape}-{self.mode}"


def mode_of(row: dict) -> str:
    """A result's mode, with the rate it reads memory at where that was measured."""
    if not (rates := row.get("bytes_per_second")):
        return row["mode"]
    return f"{row['mode']} ({rates[row['ours']] / 1e9:.0f} of {rates[STREAM] / 1e9:.0f} GB/s)"


def check(case: Case, candidates: Mapping[str, Callable]) -> dict[str, float]:
    """Relative error of each candidate against float64. No speed-up of something wrong is ever reported."""
    truth = case.truth()
    errors = {}
    for name, run in candidates.items():
        results = run()
        errors[name] = max(((r.double() - t).norm() / t.norm()).item() for r, t in zip(results, truth, strict=True))
        if not errors[name] <= case.tolerance:
            raise AssertionError(f"{case.id}: {name} is off by {errors[name]:.2e} (limit {case.tolerance:.0e})")
    return errors


def run(case: Case, seconds: float) -> dict:
    """Everything measured for a case, as plain data."""
    torch.manual_seed(0)
    torch.compiler.reset()  # captures of earlier cases
    candidates = dict(case.candidates())
    errors = check(case, candidates)
    gc.collect()
    yardstick = {STREAM: measure.reader(case.reads)} if case.reads else {}
    times = measure.interleaved(candidates | yardstick, seconds=seconds)
    medians = {name: measure.Spread.of(values).to_dict() for name, values in times.items()}
    ours = min((name for name in candidates if name.startswith(OURS)), key=lambda name: medians[name]["median"])
    baselines = [name for name in candidates if not name.startswith(OURS)]
    speedups = {name: measure.speedup(times, ours, name).to_dict() for name in baselines}
    best = min(baselines, key=lambda name: medians[name]["median"])
    rates = {name: case.reads / medians[name]["median"] for name in (ours, *yardstick) if case.reads}
    return {
        "op": case.op,
        "shape": case.shape,
        "mode": case.mode,
        "seconds": medians,
        "ours": ours,
        "rounds": len(times[OURS]),
        "speedup": speedups,
        "best": best,
        "goals": dict(case.goals),
        "error": errors,
        "bytes_per_second": rates,
        "peak_bytes": {name: measure.peak_memory(run) for name, run in candidates.items()},
    }
