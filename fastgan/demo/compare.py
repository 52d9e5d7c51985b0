"""Comparing runs: step by step from the same state, free-running, in time and in memory."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fastgan import measure
from fastgan.demo.model import ROLES, Batch, Gan, Run, Stopwatch

QUANTITIES = ("loss", "gradient")
#: How much larger than plain PyTorch's own rounding error a difference may be. Two results that are each one such error
#: from the truth are up to 2 apart; the errors are sampled, so as much again is left for the steps in between.
ALLOWED = 4.0
#: Rounding error granted at least, for steps that happen to agree with fp64 almost exactly.
LEAST_ERROR = 16 * torch.finfo(torch.float32).eps


def make_gans(run: Run, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Gan]:
    """One Gan for each form, all in the same initial state."""
    torch.manual_seed(seed)
    gans = {name: run.gan(form, device, dtype) for name, form in run.forms.items()}
    first = next(iter(gans.values()))
    for gan in gans.values():
        gan.copy_from(first)
    return gans


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in fp64."""
    b = b.double()
    return ((a.double() - b).norm() / b.norm()).item()


def lockstep(
    run: Run, device: torch.device, seed: int, data: Iterator[Batch], steps: int, audit_every: int, after_step: Callable
) -> tuple[Gan, list[dict]]:
    """Train with fastgan; before each update the plain twin takes over its state and makes the same update.

    Every ``audit_every`` steps an fp64 twin does so too: distance from it is error, for either.
    ``after_step(record)`` is called after each step. Returns the trained Gan and a record per step.
    """
    gans = make_gans(run, device, seed)
    ours, plain = gans["fastgan"], gans[run.best_plain]
    truth = make_gans(run, device, seed, torch.float64)[run.best_plain]
    records = []
    for step in range(steps):
        batch, audited = next(data), step % audit_every == 0
        record = {"step": step, "audited": audited}
        # Before each update and not each step: Adam turns the sign of a gradient of rounding size into a full-size move.
        for role in ROLES:
            results = {}
            for name, gan in {"plain": plain, "truth": truth}.items():
                if name == "plain" or audited:
                    loss = gan.copy_from(ours).update(role, batch)
                    results[name] = {"loss": loss, "gradient": gan.gradient(role)}
            results["fastgan"] = {"loss": ours.update(role, batch), "gradient": ours.gradient(role)}
            record[role] = {"fastgan loss": results["fastgan"]["loss"].item(), "plain loss": results["plain"]["loss"].item()}
            for quantity in QUANTITIES:
                record[role][f"{quantity} difference"] = relative(results["fastgan"][quantity], results["plain"][quantity])
                if audited:
                    for name in ("plain", "fastgan"):
                        record[role][f"{quantity} error of {name}"] = relative(
                            results[name][quantity], results["truth"][quantity]
                        )
        records.append(record)
        after_step(record)
    return ours, records


def verdict(records: list[dict]) -> dict:
    """Does rounding explain every difference? The yardstick is plain PyTorch's own error against fp64.

    Its median, for now and then a rounding takes an activation across a kink, in either run alike, and then fp32 is far
    from fp64: the largest error would excuse wrong gradients.
    """
    rows = []
    for role in ROLES:
        for quantity in QUANTITIES:
            steps = [record[role] for record in records]
            audited = [record[role] for record in records if record["audited"]]
            plain_error = statistics.median(step[f"{quantity} error of plain"] for step in audited)
            fastgan_error = statistics.median(step[f"{quantity} error of fastgan"] for step in audited)
            difference = _largest(step[f"{quantity} difference"] for step in steps)
            limit = ALLOWED * max(plain_error, LEAST_ERROR)
            rows.append(
                {
                    "what": f"{role} {quantity}",
                    "largest difference": difference,
                    "median fp64 error of plain": plain_error,
                    "median fp64 error of fastgan": fastgan_error,
                    "limit": limit,
                    "passed": difference <= limit and fastgan_error <= limit,  # False for NaN
                }
            )
    return {"passed": all(row["passed"] for row in rows), "allowed": ALLOWED, "rows": rows}


def _largest(values) -> float:
    """max() that does not lose a NaN."""
    return torch.tensor(list(values)).max().item()


@torch.no_grad()
def _nudge(gan: Gan) -> None:
    """Move one weight of the discriminator to the next floating-point number."""
    weight = next(gan.discriminator.parameters()).view(-1)[:1]
    weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))


def divergence(run: Run, device: torch.device, seed: int, data: Iterator[Batch], steps: int, after_step: Callable) -> dict:
    """Free-running from the same start: relative distance of all parameters from plain PyTorch's, per step."""
    gans = make_gans(run, device, seed)
    reference = gans[run.best_plain]
    followers = {"fastgan": gans["fastgan"], "plain, one weight moved by one ulp": run.gan(run.plain[run.best_plain], device)}
    nudged = followers["plain, one weight moved by one ulp"].copy_from(reference)
    _nudge(nudged)
    distances = {name: [] for name in followers}
    for _ in range(steps):
        batch = next(data)
        reference.step(batch)
        for name, gan in followers.items():
            gan.step(batch)
            distances[name].append(relative(gan.parameters(), reference.parameters()))
        after_step()
    return distances


def step_times(run: Run, gans: Mapping[str, Gan], batch: Batch, **effort) -> dict:
    """Seconds per step of each form, interleaved, and fastgan's speed-up over each plain one. ``effort``: see measure."""
    times = measure.interleaved({name: lambda gan=gan: gan.step(batch) for name, gan in gans.items()}, **effort)
    return {
        "allocator": measure.allocator(),
        "rounds": len(times["fastgan"]),
        "seconds": {name: measure.Spread.of(values).to_dict() for name, values in times.items()},
        "speedup over": {name: measure.speedup(times, "fastgan", name).to_dict() for name in run.plain},
        "fastest plain": min(run.plain, key=lambda name: statistics.median(times[name])),
    }


def step_parts(gans: Mapping[str, Gan], batch: Batch, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each part of a step, per form, in interleaved rounds."""
    seconds = {name: defaultdict(list) for name in gans}
    for _ in range(rounds):
        for name, gan in gans.items():
            watch = Stopwatch(gan.device)
            with watch.inside(gan.discriminator.minibatch, "minibatch layer"):
                gan.step(batch, watch)
            for part, value in watch.seconds.items():
                seconds[name][part].append(value)
    return {name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in seconds.items()}


def step_memory(gans: Mapping[str, Gan], batch: Batch) -> dict[str, int | None]:
    """Bytes by which one step raises this process's memory, per form; None where the system can't tell."""
    return {name: measure.peak_memory(lambda gan=gan: gan.step(batch)) for name, gan in gans.items()}
