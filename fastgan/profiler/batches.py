"""How a training step grows with its batch: doubles the batch until memory ends, each size in a process of its own."""

import contextlib
import importlib
import inspect
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastgan
from fastgan import limits, measure
from fastgan.profiler.parts import PENALTY, REST

MEASURED, OUT_OF_MEMORY, TOO_SLOW, FAILED = "measured", "out of memory", "over the time limit", "failed"
KNEE = 0.9  # of the highest throughput
LAZY = 16  # steps from one penalty to the next, as StyleGAN2 has it
#: keyword of make_step -> (its value, what the advice is called)
KEYWORDS = {
    "microbatch": (None, "microbatches: critic_step(microbatch=batch/4), one at a time in memory"),
    "checkpoint": (True, "checkpointing: activations computed again in the backward pass"),
    "penalty": (False, f"lazy regularisation: the penalty every {LAZY} steps"),
}
SLOW = 0.5  # seconds a step takes from which on fewer are made
ADVICE = 1.0  # seconds a step may take where advice is tried
_START = 60.0  # seconds a child may take to import torch and build the step


@dataclass(frozen=True)
class Script:
    """A file or a module with ``make_step``, or with ``batch_arg`` any script that takes its batch size as an argument."""

    name: str
    arguments: tuple[str, ...] = ()
    batch_arg: str | None = None

    def globals(self) -> dict:
        from fastgan.profiler.command import run_script

        if Path(self.name).is_file():
            return run_script(self.name, list(self.arguments), "fastgan_profiled")
        with contextlib.suppress(ValueError):
            sys.path.index(os.getcwd())
        sys.path.insert(0, os.getcwd())
        return vars(importlib.import_module(self.name))

    def make_step(self) -> Callable:
        found = self.globals().get("make_step")
        if not callable(found):
            raise ValueError(
                f"profile: {self.name} has no function make_step(batch_size) that returns a function making one training step; "
                "define it, or name the script's option for its batch size: --batch-arg=--batch-size"
            )
        return found


@dataclass
class Sweep:
    """What :func:`profile_batches` found; ``print()`` it.

    ``points``: {"plain": [...], "fastgan": [...]}, a dictionary per batch size with "status" ("measured", "out of memory", ..)
    and where measured "seconds" (median and quartiles), "throughput" (samples a second), "per_sample" (seconds),
    "peak_bytes" and "parts" (seconds). ``exponents``: per part, p of seconds ~ batch^p. ``knee``: smallest batch that has 90 %
    of the highest throughput. ``largest``: largest batch that was measured. ``advice``: measured effects.
    """

    points: dict[str, list[dict]]
    memory: int
    machine: dict = field(default_factory=measure.machine)
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)
    knee: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    advice: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def conclude(self) -> None:
        for name, points in self.points.items():
            done = [p for p in points if p["status"] == MEASURED]
            if not done:
                continue
            self.largest[name] = max(p["batch"] for p in done)
            best = max(p["throughput"] for p in done)
            self.knee[name] = min(p["batch"] for p in done if p["throughput"] >= KNEE * best)
            series = {part: [(p["batch"], p["parts"].get(part, 0.0)) for p in done] for part in done[-1]["parts"]}
            series = {"whole step": [(p["batch"], p["seconds"]["median"]) for p in done], **series}
            fits = {part: exponent(values) for part, values in series.items() if part != REST}
            self.exponents[name] = {part: value for part, value in fits.items() if value is not None}

    def to_dict(self) -> dict:
        keys = ("machine", "memory", "points", "exponents", "knee", "largest", "advice", "notes")
        return {key: getattr(self, key) for key in keys}

    def save_html(self, path) -> None:
        """One page with charts that needs nothing else."""
        from fastgan.profiler import show_batches

        with open(path, "w", encoding="utf-8") as file:
            file.write(show_batches.page(self.to_dict()))

    def __str__(self) -> str:
        from fastgan.profiler import show_batches

        return show_batches.text(self.to_dict())


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """p of y ~ x^p by least squares of the logarithms, over the last four points: small ones are overhead."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0][-4:]
    if len(logs) < 3:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def sizes(batches) -> list[int]:
    """ "16:4096" doubles from 16 to 4096; a sequence of sizes is taken as it is."""
    try:
        if isinstance(batches, str):
            low, high = (int(part) for part in batches.split(":"))
            found = [low << i for i in range(high.bit_length()) if low << i <= high] if low > 0 else []
        else:
            found = sorted({int(size) for size in batches})
    except (TypeError, ValueError):
        found = []
    if not found or found[0] < 1:
        raise ValueError(f"profile: batches is {batches!r}, expected FROM:TO such as 16:4096, or a list of positive sizes")
    return found


# in the child process


def _run(source, size: int, variant: str, slow: bool) -> dict:
    """``slow``: steps are long, so that few will do."""
    from fastgan.profiler.command import profile_script
    from fastgan.profiler.session import Profile

    # networks are accelerated after the first iteration, and what they then do once is no part of a step
    first = 2 if variant == "fastgan" else 1
    options = {"warmup": first, "timed": 2, "steps": 1} if slow else {"warmup": 2, "timed": 7, "steps": 2}
    options["stop"] = True
    if isinstance(source, Script) and source.batch_arg is not None:
        if variant == "fastgan":
            options["accelerate"] = True
        with _autocast(variant):
            profile = profile_script(source.name, [*source.arguments, source.batch_arg, str(size)], **options)
    else:
        make_step = source.make_step() if isinstance(source, Script) else source
        keywords, options["accelerate"] = keywords_for(make_step, variant, size)
        step = make_step(size, **keywords)
        if not callable(step):
            raise ValueError(
                f"profile: make_step({size}) returned {type(step).__name__}, expected a function without arguments"
            )
        with Profile(**options) as profile, _autocast(variant):
            for _ in range(options["warmup"] + options["timed"] + options["steps"] + 2):
                step()
    seconds = profile.seconds
    peak = profile.resident_bytes if profile.resident_bytes else profile.peak_bytes
    return {
        "batch": size,
        "status": MEASURED,
        "seconds": seconds.to_dict(),
        "throughput": size / seconds.median,
        "per_sample": seconds.median / size,
        "peak_bytes": peak,
        "parts": {part.name: part.seconds for part in profile.parts},
        "peak_parts": {part.name: part.bytes_at_peak for part in profile.parts},
    }


def _autocast(variant: str):
    if variant != "bf16":
        return contextlib.nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def keywords_for(make_step, variant: str, size: int) -> tuple[dict, bool]:
    """What to hand to make_step for a variant, and whether its networks are to be accelerated instead."""
    parameters = inspect.signature(make_step).parameters
    if variant == "fastgan":
        return ({"fastgan": True}, False) if "fastgan" in parameters else ({}, True)
    if variant == "microbatch":
        return {"microbatch": max(1, size // 4)}, False
    return ({variant: KEYWORDS[variant][0]}, False) if variant in KEYWORDS else ({}, False)


def _context(variant: str):
    """Children of a process that has imported torch once; a C allocator setting takes a new one."""
    if variant == "allocator" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgan.profiler.command"])
    return context


def _child(connection, source, size, variant, memory, slow) -> None:
    quiet = open(os.devnull, "w")  # noqa: SIM115 the process ends here
    sys.stdout = sys.stderr = quiet
    os.dup2(quiet.fileno(), 2)  # torch's profiler writes there; what matters is in the result
    cuda = torch.cuda.is_available()
    limits.confine(memory, cuda)
    try:
        result = _run(source, size, variant, slow)
    except BaseException as error:
        status = OUT_OF_MEMORY if limits.is_out_of_memory(error) else FAILED
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        result = {"batch": size, "status": status, "message": message}
    connection.send(result)
    connection.close()


# in the parent


def _point(source, size: int, variant: str, memory: int, patience: float, slow: bool = False) -> dict:
    """One size in a process of its own, whose end, whatever it is, ends nothing else."""
    context = _context(variant)
    receiver, sender = context.Pipe(duplex=False)
    wanted = "tuned" if variant == "allocator" else measure.allocator()
    before = dict(os.environ)
    os.environ.update(measure.allocator_environment(wanted))
    child = context.Process(target=_child, args=(sender, source, size, variant, memory, slow), daemon=True)
    try:
        child.start()
    except (AttributeError, TypeError, ValueError) as error:  # pickle's ways to say that it can't
        raise ValueError(
            f"profile: make_step has to be a function that another process can import, at the top level of a file: {error}"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(_START + 12 * patience) else None
    except EOFError:
        child.join()
        code = child.exitcode
        killed = f"its process was ended by signal {-code}" if code < 0 else f"its process ended with status {code}"
        status = OUT_OF_MEMORY if code in (-9, -6, -11, -7) else FAILED  # as aborted allocations end
        return {"batch": size, "status": status, "message": killed}
    finally:
        if child.is_alive():
            child.join(1.0)
        if child.is_alive():
            child.kill()
    return result or {"batch": size, "status": TOO_SLOW, "message": f"more than {patience:g} s a step"}


def _budget(memory: int | None) -> int:
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = limits.available_memory()
    if free is None:
        if memory is None:
            raise ValueError("profile: this system does not tell how much memory is available; say it: memory= or --memory")
        return memory
    return min(memory, int(0.9 * free)) if memory is not None else free // 2


def _with_fastgan(source) -> bool:
    if not (isinstance(source, Script) and source.batch_arg is not None):
        make_step = source.make_step() if isinstance(source, Script) else source
        if "fastgan" in inspect.signature(make_step).parameters:
            return True
    return hasattr(fastgan, "accelerate")


def sweep(source, batches, *, memory=None, patience=10.0, advice=True, progress=False) -> Sweep:
    wanted, budget = sizes(batches), _budget(memory)
    if isinstance(source, Script) and source.batch_arg is None:
        source.make_step()  # says what is wrong before anything is started
    variants = ["plain"]
    found = Sweep({"plain": []}, budget)
    if _with_fastgan(source):
        variants.append("fastgan")
        found.points["fastgan"] = []
    else:
        found.notes.append("this fastgan has no fastgan.accelerate and make_step takes no fastgan=True: plain only")
    try:
        _grow(source, found, wanted, variants, patience, progress)
        found.conclude()
        if advice and "plain" in found.largest:
            _advise(source, found, patience, progress)
    except KeyboardInterrupt:
        found.conclude()
        found.notes.append("interrupted: what had been measured until then")
    return found


def _grow(source, found: Sweep, wanted: list[int], variants: list[str], patience: float, progress: bool) -> None:
    going = list(variants)
    for size in wanted:
        for variant in list(going):
            last = found.points[variant][-1] if found.points[variant] else None
            guess = last["seconds"]["median"] * size / last["batch"] if last else 0.0
            if guess > patience:
                point = {"batch": size, "status": TOO_SLOW, "message": f"a step would take about {guess:.0f} s"}
            else:
                point = _point(source, size, variant, found.memory, patience, slow=guess > SLOW)
            found.points[variant].append(point)
            if progress:
                print(f"batch {size}, {variant}: {_said(point)}", file=sys.stderr, flush=True)
            if point["status"] != MEASURED:
                going.remove(variant)
        if not going:
            return


def _said(point: dict) -> str:
    if point["status"] == MEASURED:
        return f"{point['seconds']['median'] * 1e3:.4g} ms a step"
    return f"{point['status']} ({point.get('message', '')})"


def _advise(source, found: Sweep, patience: float, progress: bool) -> None:
    """What else could be done, each tried; what can't be tried is said not to be. At the largest plain batch whose step doesn't
    take long: each way is timed between two plain runs, because the machine may have become busier meanwhile."""
    done = [p for p in found.points["plain"] if p["status"] == MEASURED]
    seconds = {p["batch"]: p["seconds"]["median"] for p in done}
    size = max((batch for batch, taken in seconds.items() if taken <= ADVICE), default=done[0]["batch"])
    scripted = isinstance(source, Script) and source.batch_arg is not None
    parameters = {} if scripted else inspect.signature(source.make_step() if isinstance(source, Script) else source).parameters
    slow = seconds[size] > SLOW
    plain = _point(source, size, "plain", found.memory, patience, slow)
    if plain["status"] != MEASURED:
        found.notes.append(f"no advice: batch {size}, tried again: {_said(plain)}")
        return
    names = {"bf16": "bf16: torch.autocast around the step"}
    if measure.allocator() == "default" and not torch.cuda.is_available() and sys.platform == "linux":
        names["allocator"] = "C allocator that keeps freed memory: " + " ".join(
            f"{key}={value}" for key, value in measure.TUNED_ALLOCATOR.items()
        )
    names |= {keyword: text for keyword, (_, text) in KEYWORDS.items()}
    for variant, text in names.items():
        entry = {"what": text, "batch": size}
        if variant in KEYWORDS and variant not in parameters:
            if variant == "penalty" and plain["parts"].get(PENALTY, 0.0) == 0.0:
                continue
            there = "a script's own step can't be changed; a make_step with" if scripted else "make_step takes no"
            entry["note"] = f"not measured: {there} keyword {variant!r}" + " can" * scripted
        else:
            point = _point(source, size, variant, found.memory, patience, slow)
            if progress:
                print(f"batch {size}, {variant}: {_said(point)}", file=sys.stderr, flush=True)
            if point["status"] == MEASURED:
                after = _point(source, size, "plain", found.memory, patience, slow)
                entry |= _effect(plain, point, after, variant)
                plain = after if after["status"] == MEASURED else plain
            else:
                entry["note"] = _said(point)
        found.advice.append(entry)


def _effect(plain: dict, point: dict, again: dict, variant: str) -> dict:
    both = [p["seconds"]["median"] for p in (plain, again) if p["status"] == MEASURED]
    before, after = sum(both) / len(both), point["seconds"]["median"]
    found = {"seconds": point["seconds"], "plain_seconds": both, "peak_bytes": point["peak_bytes"]}
    found["plain_peak_bytes"] = plain["peak_bytes"]
    notes = []
    if variant == "penalty":
        after = (before + (LAZY - 1) * after) / LAZY
        notes.append(f"the mean of one step with and {LAZY - 1} without; memory is that of a step without")
    if min(both) <= after <= max(both):
        notes.append("no faster or slower than plain steps are among themselves")
    return found | {
        "note": "; ".join(notes),
        "speedup": before / after,
        "memory": point["peak_bytes"] / plain["peak_bytes"] if plain["peak_bytes"] else None,
    }


def profile_batches(make_step, batches="16:4096", *, memory: int | None = None, patience: float = 10.0, advice: bool = True):
    """Double the batch until memory ends: throughput, memory, which part grows how, with and without fastgan.

    Args:
        make_step: ``make_step(batch_size)`` returns a function that makes one training step: every forward, backward and
            optimizer step, on data of that size. It is called in child processes, so it has to be importable: at the top level
            of a file, whose own loop is under ``if __name__ == "__main__":``. Keywords it takes are used: ``fastgan=True`` for
            the step written with fastgan (without it the networks are passed to ``fastgan.accelerate``), ``microbatch=n``,
            ``checkpoint=True``, and ``penalty=False`` for a step without the penalty.
        batches: "FROM:TO", doubling, or a sequence of sizes.
        memory: bytes that a step may take; half of what is available by default, and never more than nine tenths of it.
        patience: seconds one step may take.
        advice: try bf16, the C allocator and the keywords above, at the largest plain batch whose step takes at most a second.

    Returns:
        :class:`Sweep`. Lack of memory is a result, whatever it does to the child process.

    Raises:
        ValueError: ``batches`` is no range or list of sizes; ``make_step`` can't be imported by a child process.
    """
    return sweep(make_step, batches, memory=memory, patience=patience, advice=advice)
