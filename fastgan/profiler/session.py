"""``fastgan.profile``: warm-up, undisturbed timing, traced iterations, results."""

import contextlib
import gc
import time

import torch

import fastgan
from fastgan import measure
from fastgan.profiler import parts as sorting
from fastgan.profiler.record import Recorder


class Finished(BaseException):
    """Ends a script that has been looked at for long enough; not an Exception, so that ``except Exception`` lets it pass."""


def _synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Profile:
    """What :func:`profile` found; ``print()`` it.

    ``parts``: list of :class:`fastgan.profiler.parts.Part`, per iteration; ``seconds``: of an iteration without tracing
    (:class:`fastgan.measure.Spread`), ``traced_seconds``: of all traced ones together; ``peak_bytes``: most that the traced
    operations had allocated at once, beside ``standing`` (bytes of parameters and of optimizer state); ``resident_bytes``: by
    which the process grew while it was timed (None where the system can't tell); ``networks``: who was recognised as what;
    ``gains``: what :meth:`measure_gains` found.
    """

    def __init__(self, critic=None, generator=None, *, warmup=2, timed=3, steps=5, stop=False, accelerate=False):
        if steps < 1 or timed < 1 or warmup < 0:
            raise ValueError(f"profile: warmup={warmup}, timed={timed}, steps={steps}; expected at least 0, 1 and 1")
        self.warmup, self.timed, self.steps, self.stop = warmup, timed, steps, stop
        self.accelerate = accelerate
        self._peak = measure.PeakMemory()
        self._peak.start()
        self.resident_bytes: int | None = None  # by which the timed iterations raised the process's memory
        self.recorder = Recorder(critic, generator, self._iteration, self._changed)
        self.recorder.keep = warmup < 2
        self.done = 0  # iterations that have ended
        self.times: list[float] = []
        self.parts: list[sorting.Part] = []
        self.standing: dict[str, int] = {}
        self.gains: list = []
        self.gains_note = ""
        self.peak_bytes = 0
        self.traced = 0
        self.traced_seconds = 0.0
        self._profiler = None
        self._calls_before: dict[int, int] = {}
        self._traced_from = 0
        self.machine = measure.machine()

    # the loop

    def __enter__(self) -> "Profile":
        self.recorder.install()
        self._since = time.perf_counter()
        return self

    def _changed(self) -> None:
        if self._profiler is None:
            self.done, self.times = 0, []

    def _iteration(self) -> None:
        _synchronise()
        now = time.perf_counter()
        if self._profiler is None and self.recorder.waiting():
            return
        self.done += 1
        if self.warmup < self.done <= self.warmup + self.timed:
            self.times.append(now - self._since)
        self.recorder.keep = self.done + 1 == max(1, self.warmup)  # not while time or memory are looked at
        if self.done == 1 and self.accelerate:
            for network in self.recorder.networks:
                fastgan.accelerate(network.module)
        if self.done == self.warmup:
            self._peak.start()
        elif self.done == self.warmup + self.timed:
            self.resident_bytes = self._peak.stop()
        if self.done == self.warmup + self.timed:
            self._start_trace()
        elif self.done == self.warmup + self.timed + self.steps:
            self._end_trace(now)
            if self.stop:
                raise Finished
        self._since = time.perf_counter()

    def _start_trace(self) -> None:
        gc.collect()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._calls_before = {n.index: n.total for n in self.recorder.networks}
        self._traced_from = self.done
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
        self._profiler.start()
        self._trace_began = time.perf_counter()

    def _end_trace(self, now: float) -> None:
        self._profiler.stop()
        self.traced, self.traced_seconds = self.done - self._traced_from, now - self._trace_began
        self._calls = {n.index: (n.total - self._calls_before.get(n.index, 0)) / self.traced for n in self.recorder.networks}
        self.recorder.remove()

    def __exit__(self, kind, error, trace) -> bool:
        failed = kind is not None and not issubclass(kind, (Finished, SystemExit, KeyboardInterrupt))
        if failed:  # out of memory, perhaps, by starting to trace: what went wrong is the error, not what that left behind
            self.recorder.remove()
            if self._profiler is not None and not self.traced:
                with contextlib.suppress(Exception):
                    self._profiler.stop()
            return False
        if self.recorder.ended():  # the last iteration, and nothing came after it
            self.done += 1
        if self._profiler is not None and not self.traced:
            _synchronise()
            if self.done == self._traced_from:
                self._profiler.stop()
            else:
                self._end_trace(time.perf_counter())
        self.recorder.remove()
        if not self.traced:
            raise RuntimeError(
                f"profile: nothing to show: the loop ended after {self.done} iterations, and the first "
                f"{self.warmup + self.timed} are for warming up and for timing without tracing (warmup={self.warmup}, "
                f"timed={self.timed}). An iteration ends when every optimizer has stepped; run more, or ask for fewer"
            )
        self._conclude()
        return kind is not None and issubclass(kind, Finished)

    def _conclude(self) -> None:
        self.recorder.assign_roles()
        self.networks = self.recorder.networks
        roles = {n.index: n.role for n in self.networks}
        self.parts, self.peak_bytes = sorting.sort(self._profiler, roles, self.traced, self.traced_seconds)
        self.standing = self.recorder.standing_bytes()

    # results

    @property
    def seconds(self) -> measure.Spread:
        return measure.Spread.of(self.times)

    def measure_gains(self, seconds: float = 2.0) -> list:
        """What fastgan would replace in these networks and what that gains, measured on calls that were captured.

        Args:
            seconds: how long each comparison goes on.

        Returns:
            A list of :class:`fastgan.profiler.gains.Gain`, also in ``gains``. The networks are left as they were.
        """
        from fastgan.profiler import gains

        self.gains, self.gains_note = gains.measure_all(self.networks, self._calls, seconds)
        return self.gains

    def to_dict(self) -> dict:
        """Everything, as plain data."""
        return {
            "machine": self.machine,
            "iterations": {"untraced": len(self.times), "traced": self.traced},
            "seconds": self.seconds.to_dict(),
            "traced_seconds": self.traced_seconds / self.traced,
            "peak_bytes": self.peak_bytes,
            "resident_bytes": self.resident_bytes,
            "standing_bytes": self.standing,
            "parts": [part.to_dict() for part in self.parts],
            "networks": [
                {
                    "name": n.name,
                    "class": type(n.module).__name__,
                    "role": n.role,
                    "parameters": sum(p.numel() for p in n.module.parameters()),
                    "calls": self._calls.get(n.index, 0.0),
                    "calls_in_update": n.update[0],
                    "penalised_calls": len(n.update[1]),
                }
                for n in self.networks
            ],
            "gains": [gain.to_dict() for gain in self.gains],
            "gains_note": self.gains_note,
        }

    def save_trace(self, path) -> None:
        """Chrome trace of the traced iterations, for chrome://tracing or ui.perfetto.dev."""
        self._profiler.export_chrome_trace(str(path))

    def save_html(self, path) -> None:
        """One page with charts that needs nothing else."""
        from fastgan.profiler import show

        with open(path, "w", encoding="utf-8") as file:
            file.write(show.page(self.to_dict()))

    def __str__(self) -> str:
        from fastgan.profiler import show

        return show.text(self.to_dict())


@contextlib.contextmanager
def profile(*, critic: str | None = None, generator: str | None = None, warmup: int = 2, timed: int = 3, steps: int = 5):
    """Wrap a training loop: where do its time and memory go?

    An *iteration* ends when every optimizer in use has stepped, so that five critic updates and one of the generator are one.
    The first ``warmup`` iterations are let pass, the next ``timed`` are timed as they are, ``steps`` are then traced by
    ``torch.profiler``; the rest of the loop runs with all hooks gone.

    Args:
        critic, generator: name of a variable, an attribute or a class; told from who feeds whom if left out.
        warmup, timed, steps: iterations.

    Yields:
        :class:`Profile`, whose results are there when the block has ended: ``print(p)``, ``p.parts``, ``p.measure_gains()``,
        ``p.save_html(path)``, ``p.save_trace(path)``, ``p.to_dict()``.

    Raises:
        ValueError: a count that is too small, or a name that no network has.
        RuntimeError: the loop was too short.

    Time of a part is that of its operations on the CPU, in the thread of the loop and of the backward pass, and of GPU kernels
    in ``device_seconds``. Forward passes on a penalty's points count as critic forward; "penalty" is the gradient with
    respect to the input and everything that comes back through it. Operations outside networks (the loss, a penalty's norm,
    Python) are the rest. ``critic_step`` computes both gradients in one pass, which counts as penalty.
    """
    with Profile(critic, generator, warmup=warmup, timed=timed, steps=steps) as p:
        yield p
