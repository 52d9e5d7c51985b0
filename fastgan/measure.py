"""How fastgan measures, once for benchmarks, demo and profiler.

Candidates run interleaved, round by round in one process, so that whatever else the machine does hits all of them alike;
a speed-up is the median over rounds of that round's ratio and is given with its quartiles. On CPU the C allocator decides
much of it: glibc hands large blocks back to the kernel and pays a page fault for each page of the next one. Results are
therefore taken twice, with the default allocator and with ``TUNED_ALLOCATOR``, which must be set before Python starts.
"""

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

#: Environment for the C allocator: keep freed memory instead of returning it (glibc).
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_ARENA_MAX": "1",
}


def allocator() -> str:
    """ "tuned" where TUNED_ALLOCATOR is set, else "default"."""
    return "tuned" if all(os.environ.get(key) == value for key, value in TUNED_ALLOCATOR.items()) else "default"


def allocator_environment(which: str) -> dict[str, str]:
    """This process's environment with the allocator "tuned" or "default", for a child process."""
    rest = {key: value for key, value in os.environ.items() if key not in TUNED_ALLOCATOR}
    return rest | TUNED_ALLOCATOR if which == "tuned" else rest


def machine() -> dict[str, str | int]:
    """What a figure was measured on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "processor": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": allocator(),
    }


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 4.0,
    min_rounds: int = 7,
    max_rounds: int = 300,
    warmup: int = 2,
    shortest: float = 1e-3,
    settle: float = 1e-2,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one entry a round.

    Args:
        candidates: name -> what to time. Each round runs all of them, in turn.
        seconds: stop after this long, but not before ``min_rounds`` rounds.
        warmup: untimed calls first (compilation, thread pools, first touch of memory).
        shortest: calls are repeated within a round until it lasts about this long, in seconds.
        settle: candidates run this long untimed before they are timed, in each round, unless one call takes ten times as
            long: idle OpenMP threads of the candidate before spin for milliseconds (each library may bring its own) and
            take a core from whatever comes next.
        prepare: name -> what to do, untimed, before that candidate's turn in each round.
    """
    repeats, settled = {}, {}
    prepare = {name: (prepare or {}).get(name, lambda: None) for name in candidates}
    for name, run in candidates.items():
        prepare[name]()
        for _ in range(warmup):
            run()
        _synchronise()
        start = time.perf_counter()
        run()
        _synchronise()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, round(shortest / once))
        settled[name] = settle if once < 10 * settle else 0.0
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - begin > seconds:
            break
        for name, run in candidates.items():
            prepare[name]()
            ready = time.perf_counter() + settled[name]
            while time.perf_counter() < ready:
                run()
            _synchronise()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            _synchronise()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def reader(size: int) -> Callable[[], torch.Tensor]:
    """Reads ``size`` bytes of memory once, as fast as torch does on all its threads: how fast memory is."""
    data = torch.ones(size // 4)
    return data.sum


def copier(size: int) -> Callable[[], torch.Tensor]:
    """Moves ``size`` bytes, one half read and the other written, as fast as torch copies on all its threads."""
    source = torch.ones(max(1, size // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def multiply_add_peak(dtype: torch.dtype = torch.float32, n: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second of the fastest multiply-adds torch has: a product of n x n matrices.

    In 16 bits float32's where those are faster: processors without 16-bit arithmetic compute in float32.
    """

    def rate(n):
        a, b = (torch.full((n, n), 0.5, dtype=dtype) for _ in range(2))
        return 2.0 * n**3 / min(interleaved({"product": lambda: a @ b}, seconds=seconds, min_rounds=5)["product"])

    if dtype.itemsize >= 4:
        return rate(n)
    small = rate(n // 8)  # such a processor may take many seconds for large ones
    return max(small, rate(n) if 2.0 * n**3 / small < 1.0 else 0.0, multiply_add_peak(torch.float32, n, seconds))


def speedup(times: Mapping[str, list[float]], of: str, over: str) -> Spread:
    """How many times faster ``of`` is than ``over``, round by round."""
    return Spread.of([slow / fast for slow, fast in zip(times[over], times[of], strict=True)])


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{field}:\s+(\d+)", file.read(), re.MULTILINE).group(1))


class PeakMemory:
    """Bytes by which memory rises at its worst between :meth:`start` and :meth:`stop`.

    On a GPU what torch allocates, on CPU resident memory (Linux), so that scratch space inside kernels counts too.
    """

    def start(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)  # give back what earlier calls left, or it would be reused unseen
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # reset VmHWM
            self.before = _status_kib("VmRSS")
        except (OSError, AttributeError):
            self.before = None

    def stop(self) -> int | None:
        """None where the system can't tell."""
        if self.before is None:
            return None
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.before
        return max(0, _status_kib("VmHWM") - self.before) * 1024


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which ``run()`` raises the process's memory at its worst, results included; None where it can't be told."""
    peak = PeakMemory()
    peak.start()
    run()
    return peak.stop()
