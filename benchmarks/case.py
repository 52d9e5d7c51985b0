"""One benchmark case, and how every case is run: correctness gate, interleaved rounds, memory peaks."""

import contextlib
import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgan import measure

from .flops import flops as flops_of

OURS = "fastgan"
STREAM = "stream"  # the yardstick of cases that are bound by reading memory
#: what torch does by itself, in the order of preference: in 16 bits its error is what ours is judged by
_TORCH = ("eager", "torch", "broadcast", "cdist", "compile")


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
    #: relative error that any candidate may have; in 16 bits, ours may have twice what torch's own has
    tolerance: float = 1e-4
    #: bytes that any candidate has to read; with it, the rates of ours and of reading alone are measured too
    reads: int = 0
    #: bytes that any candidate has to read and write; the same against copying
    moves: int = 0
    #: floating-point operations that the mathematics takes (multiply-add: 2); -1: count each candidate's products as it runs
    flops: float = 0
    dtype: str = "float32"

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape}-{self.mode}"

    @property
    def kind(self) -> str:
        """fwd, bwd (with the first derivative), double (the derivative of a penalty) or step (a training step)."""
        if self.op == "critic_step" or "step" in self.mode:
            return "step"
        if self.mode == "penalty":
            return "double"
        return "bwd" if "backward" in self.mode or (self.op == "gradient_penalty" and self.mode != "tangent_combine") else "fwd"


def id_of(row: dict) -> str:
    """The id of the case that a result is of."""
    return f"{row['op']}-{row['shape']}-{row['mode']}"


def mode_of(row: dict) -> str:
    """A result's mode, with the rate it reads memory at where that was measured."""
    if not (rates := row.get("bytes_per_second")):
        return row["mode"]
    return f"{row['mode']} ({rates[row['ours']] / 1e9:.0f} of {rates[STREAM] / 1e9:.0f} GB/s)"


def numbers(size: str, form: str, at_least: int = 0) -> tuple[int, ...]:
    """The numbers of a size such as 512x128x16. ``form``: what it is like, "BxKxD, such as 512x128x16"; ``at_least``: so many.

    Raises:
        ValueError: another form.
    """
    parts = size.split("x")
    right = len(parts) >= at_least if at_least else len(parts) == form.partition(",")[0].count("x") + 1
    if not right or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"size {size}: expected {form}")
    return tuple(map(int, parts))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sized(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    """What a case is called: its numbers, and its dtype unless that is float32."""
    return "x".join(map(str, shape)) + ("" if dtype == torch.float32 else "-" + name_of(dtype))


def cdist(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """torch.cdist, which has no float16 for p = 1 on a CPU: users go through float32 there."""
    narrow = p != 2 and x.dtype.itemsize < 4
    return torch.cdist(x.float(), y.float(), p).to(x.dtype) if narrow else torch.cdist(x, y, p)


@contextlib.contextmanager
def exact():
    """Without TF32, which convolutions on a GPU otherwise compute in: it would hide what a candidate gets wrong."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@exact()
def check(case: Case, candidates: Mapping[str, Callable], making=contextlib.nullcontext) -> dict[str, float]:
    """Relative error of each candidate against float64. No speed-up of something wrong is ever reported."""
    with making():
        truth = case.truth()
    errors = {}
    for name, run in candidates.items():
        results = run()
        errors[name] = max(((r.double() - t).norm() / t.norm()).item() for r, t in zip(results, truth, strict=True))
    limits = dict.fromkeys(errors, case.tolerance)
    if getattr(torch, case.dtype).itemsize < 4:
        own = next(errors[name] for name in _TORCH if name in errors)
        limits = {name: 2 * own for name in errors if name.startswith(OURS)}
    for name, limit in limits.items():
        if not errors[name] <= limit:
            raise AssertionError(f"{case.id}: {name} is off by {errors[name]:.2e} (limit {limit:.1e})")
    return errors


def run(case: Case, seconds: float, only: Collection[str] = (), making=contextlib.nullcontext) -> dict:
    """Everything measured for a case, as plain data. ``only``: baselines to run; all where there are none of them.
    ``making()``: a context in which tensors and networks are made, elsewhere than on the CPU.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # captures of earlier cases
    with making():
        candidates = dict(case.candidates())
    if any(name in only for name in candidates):
        candidates = {name: run for name, run in candidates.items() if name in only or name.startswith(OURS)}
    errors = check(case, candidates, making)
    gc.collect()
    moved = case.moves or case.reads
    with making():
        yardstick = {STREAM: measure.copier(case.moves) if case.moves else measure.reader(case.reads)} if moved else {}
    times = measure.interleaved(candidates | yardstick, seconds=seconds)
    medians = {name: measure.Spread.of(values).to_dict() for name, values in times.items()}
    ours = min((name for name in candidates if name.startswith(OURS)), key=lambda name: medians[name]["median"])
    baselines = [name for name in candidates if not name.startswith(OURS)]
    speedups = {name: measure.speedup(times, ours, name).to_dict() for name in baselines}
    best = min(baselines, key=lambda name: medians[name]["median"])
    rates = {name: moved / medians[name]["median"] for name in (ours, *yardstick) if moved}
    flops = dict.fromkeys((ours, best), case.flops) if case.flops > 0 else {}
    if case.flops < 0:  # what is compiled or fused hides its operators
        flops = {name: flops_of(candidates[name]) for name in (ours, best) if "compile" not in name}
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
        "flops_per_second": {name: count / medians[name]["median"] for name, count in flops.items() if count},
        "dtype": case.dtype,
        "kind": case.kind,
        "peak_bytes": {name: measure.peak_memory(run) for name, run in candidates.items()},
    }
