"""``fastgan doctor --allocator``: which C allocator settings and how many threads train fastest on this machine, measured.

Each setting takes effect when a process starts, so each is measured in processes of its own, round by round in turn, on one
training step of a small GAN with a gradient penalty: convolutions, double backward and blocks of several MiB.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fastgan
from fastgan import measure

_THREADS = "OMP_NUM_THREADS"
#: name -> environment; what the default lacks
ALLOCATORS = {
    "default": {},
    "thresholds": {key: value for key, value in measure.TUNED_ALLOCATOR.items() if key != "MALLOC_ARENA_MAX"},
    "tuned": measure.TUNED_ALLOCATOR,
}
WORTH = 1.03  # a gain whose lower quartile is less is not worth a setting


def training_step(batch: int = 32, channels: int = 32):
    """A function that makes one step: a critic update with gradient penalty and a generator update, on 64x64 images."""
    torch.manual_seed(0)
    c = channels
    critic = nn.Sequential(
        *(nn.Conv2d(3, c, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(c, 2 * c, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(2 * c, 4 * c, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4 * c, 1, 8), nn.Flatten(0)),
    )
    generator = nn.Sequential(
        *(nn.Linear(64, 2 * c * 16 * 16), nn.Unflatten(1, (2 * c, 16, 16)), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * c, c, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(c, 3, 4, 2, 1), nn.Tanh()),
    )
    optimizers = [torch.optim.Adam(network.parameters(), 1e-4) for network in (critic, generator)]
    real = torch.randn(batch, 3, 64, 64)

    def step():
        fake = generator(torch.randn(batch, 64)).detach()
        point = torch.lerp(fake, real, torch.rand(batch, 1, 1, 1)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(critic(point).sum(), point, create_graph=True)
        penalty = (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()
        optimizers[0].zero_grad()
        (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        (-critic(generator(torch.randn(batch, 64))).mean()).backward()
        optimizers[1].step()

    return step


def _child(environment: dict[str, str], seconds: float, batch: int) -> float:
    """Median seconds a step, in a new process."""
    cleared = {key: value for key, value in os.environ.items() if key not in (*measure.TUNED_ALLOCATOR, _THREADS)}
    cleared.pop("MKL_NUM_THREADS", None)
    root = str(Path(fastgan.__file__).parents[1])
    cleared["PYTHONPATH"] = os.pathsep.join(filter(None, (root, cleared.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "fastgan.allocator", str(seconds), str(batch)]
    child = subprocess.run(command, env=cleared | environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"doctor: a training step under {environment} failed: {child.stderr.strip().splitlines()[-1:]}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def _threads() -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({*(1 << i for i in range(cores.bit_length()) if 1 << i < cores), cores})


def _compare(settings: dict[str, dict], first: str, rounds: int, seconds: float, batch: int) -> dict:
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds):
        for name, environment in settings.items():
            times[name].append(_child(environment, seconds, batch))
    return {
        name: {
            "environment": settings[name],
            "seconds": measure.Spread.of(values).to_dict(),
            "speedup": measure.speedup(times, name, first).to_dict(),
        }
        for name, values in times.items()
    }


def examine(rounds: int = 3, seconds: float = 1.5, batch: int = 32) -> dict:
    """Everything measured, as plain data: "allocators" and "threads" by setting, and "set": the variables that are worth it."""
    most = str(_threads()[-1])
    allocators = {name: environment | {_THREADS: most} for name, environment in ALLOCATORS.items()}
    if not sys.platform.startswith("linux"):  # the variables are glibc's
        allocators = {"default": allocators["default"]}
    found = _compare(allocators, "default", rounds, seconds, batch)
    best = max(found, key=lambda name: found[name]["speedup"]["median"])
    if found[best]["speedup"]["low"] < WORTH:
        best = "default"
    counts = {str(n): ALLOCATORS[best] | {_THREADS: str(n)} for n in _threads()}
    threads = _compare(counts, most, rounds, seconds, batch) if len(counts) > 1 else {}
    number = max(threads, key=lambda name: threads[name]["speedup"]["median"], default=most)
    if threads and threads[number]["speedup"]["low"] < WORTH:
        number = most
    wanted = dict(ALLOCATORS[best]) | ({_THREADS: number} if number != most else {})
    gain = found[best]["speedup"]["median"] * (threads[number]["speedup"]["median"] if threads else 1.0)
    return {
        "machine": measure.machine(),
        "rounds": rounds,
        "allocators": found,
        "threads": threads,
        "set": wanted,
        "gain": gain,
    }


def show(report: dict) -> None:
    from fastgan.tables import render, spread

    def rows(settings):
        return [
            [name, spread(entry["seconds"]), spread(entry["speedup"], lambda v: f"{v:.2f}x")]
            for name, entry in settings.items()
        ]

    print(f"A training step, {report['rounds']} processes for each setting, in turn; times faster than the default.")
    print(render("", ["allocator", "a step", "speed-up"], rows(report["allocators"])))
    if report["threads"]:
        print(render("", ["threads", "a step", "speed-up"], rows(report["threads"])))
    if report["set"]:
        print(f"Set these before Python starts; measured gain {report['gain']:.2f}x:")
        print("\n".join(f"export {key}={value}" for key, value in report["set"].items()))
    else:
        print(f"Leave everything as it is: no setting gained {WORTH - 1:.0%} beyond the spread.")


if __name__ == "__main__":
    step = training_step(int(sys.argv[2]))
    times = measure.interleaved({"step": step}, seconds=float(sys.argv[1]), min_rounds=2)["step"]
    print(json.dumps(measure.Spread.of(times).median))
