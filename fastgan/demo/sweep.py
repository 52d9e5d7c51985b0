"""How far the batch can grow: time and memory of the layer, forward and backward, without endangering the machine."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from fastgan import measure
from fastgan.demo.model import FEATURES, KERNEL_DIMS, KERNELS, BroadcastMinibatchDiscrimination, CdistMinibatchDiscrimination

try:
    import resource
except ImportError:  # not on Windows: there the prediction alone guards
    resource = None

#: What else a plain call holds (outputs, projection, libraries' scratch space).
_SLACK = 64 << 20


def predicted_bytes(layer: nn.Module, batch_size: int) -> int | None:
    """Peak of a plain layer's forward and backward in fp32, from the temporaries that live at once; None: not quadratic.

    broadcast: the saved difference, its sign and the gradient, each B*B*K*D. cdist: the saved distance and exponential,
    the gradient and its negation, each B*B*K.
    """
    pairs = batch_size * batch_size * KERNELS * 4
    if isinstance(layer, CdistMinibatchDiscrimination):
        return 4 * pairs
    if isinstance(layer, BroadcastMinibatchDiscrimination):
        return 3 * pairs * KERNEL_DIMS
    return None


def memory_budget(wanted: float, device: torch.device) -> int:
    """Bytes the sweep may use: ``wanted`` GiB, at most half of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return min(int(wanted * 2**30), free // 2)


@contextmanager
def address_space_limit(extra: int, device: torch.device):
    """Let allocations beyond ``extra`` bytes from here on fail with an exception, where the system can do that."""
    if device.type != "cpu" or resource is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    limit = used + extra
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def measure_point(layer: nn.Module, batch_size: int, budget: int, patience: float, expected_seconds: float) -> dict:
    """One layer at one batch size: {"status", "seconds", "bytes", "predicted_bytes", ...}; never raises for lack of memory."""
    device = next(layer.parameters()).device
    predicted = predicted_bytes(layer, batch_size)
    point = {"batch_size": batch_size, "predicted_bytes": predicted, "predicted_seconds": expected_seconds or None}
    if predicted is not None and predicted > budget:
        return point | {"status": "over the memory budget"}
    if expected_seconds > patience:
        return point | {"status": "over the time limit"}
    features = torch.randn(batch_size, FEATURES, device=device, requires_grad=True)

    seconds = []

    def forward_backward():
        start = time.perf_counter()
        layer(features)[:, FEATURES:].sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    try:
        with address_space_limit(budget + _SLACK, device):
            if expected_seconds < patience / 20:  # the first call of a process or a size pays for what later ones reuse
                forward_backward()
            peak = measure.peak_memory(forward_backward)
            if seconds[-1] < patience / 20:
                times = measure.interleaved({"layer": forward_backward}, seconds=patience / 40, min_rounds=3, warmup=1)
                seconds = [measure.Spread.of(times["layer"]).median]
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error) and "memory" not in str(error):
            raise
        return point | {"status": "out of memory", "message": str(error).splitlines()[0] if str(error) else "MemoryError"}
    return point | {"status": "measured", "seconds": seconds[-1], "bytes": peak}


def sweep(
    factories: Mapping[str, Callable[..., nn.Module]],
    device: torch.device,
    sizes: Iterable[int],
    budget: int,
    patience: float,
    after_point: Callable,
) -> dict[str, list[dict]]:
    """Points of each form of the layer over batch sizes; ``patience``: longest single call in seconds, as extrapolated."""
    layers = {name: factory(FEATURES, KERNELS, KERNEL_DIMS).to(device) for name, factory in factories.items()}
    points = {name: [] for name in layers}
    for size in sizes:
        for name, layer in layers.items():
            last = points[name][-1] if points[name] else {}
            known = last.get("seconds") or last.get("predicted_seconds") or 0.0
            growth = (size / last["batch_size"]) ** 2 if last else 1.0
            points[name].append(measure_point(layer, size, budget, patience, known * growth))
            after_point()
    return points
