"""What fastgan would replace in the networks that were seen, and what it would gain: by doing it.

The calls that a network got in one update are run again, plain and with fastgan, interleaved round by round. A speed-up is
given only where both give the same gradients from the same state. The networks are left as they were.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import fastgan
from fastgan import backends, measure
from fastgan.critic.forward import Snapshot
from fastgan.ops import references
from fastgan.profiler.record import CRITIC, Network

#: relative difference of all gradients, as one vector, up to which two forms count as the same, by dtype
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
SLOW = 0.5  # seconds a run takes from which on fewer are made
NO_ACCELERATE = "this version of fastgan has no fastgan.accelerate: only critic_step was tried"


@dataclass
class Gain:
    """One replacement, measured. ``seconds``: {"plain", "fastgan"} -> median and quartiles; ``speedup``: None where the results
    differ (``error``: relative difference of the gradients) or it could not be run (``note``); ``per_iteration``: how often an
    iteration does this; ``peak_bytes``: of one run."""

    network: str
    what: str
    replaced: list[str]
    seconds: dict | None = None
    speedup: dict | None = None
    peak_bytes: dict | None = None
    error: float | None = None
    per_iteration: float = 0.0
    note: str = ""

    def to_dict(self) -> dict:
        saved = None
        if self.speedup:  # by the ratio of the rounds: unlike a difference of medians, the machine's other work hardly moves it
            saved = self.seconds["plain"]["median"] * (1 - 1 / self.speedup["median"]) * self.per_iteration
        return asdict(self) | {"saved_seconds": saved}


def _flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in tensors if t is not None])


def _scores(output) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _update(network: Network, penalised: bool) -> Callable[[], Tensor]:
    """The captured calls of one update: forward, with R1's penalty where a call was penalised, and backward."""
    module = network.module
    parameters = [p for p in module.parameters() if p.requires_grad]

    def run():
        total = 0.0
        for number, call in enumerate(network.kept):
            leaves, structure = tree_flatten((call.args, call.kwargs))
            point = None
            if penalised and number in network.update[1]:
                at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
                point = leaves[at] = leaves[at].detach().requires_grad_(True)
            args, kwargs = tree_unflatten(leaves, structure)
            scores = _scores(module(*args, **kwargs))
            total = total + sum(s.float().mean() if s.dtype.itemsize < 4 else s.mean() for s in scores)
            if point is not None:
                (gradient,) = torch.autograd.grad(sum(s.sum() for s in scores), point, create_graph=True)
                total = total + gradient.flatten(1).square().sum(1).mean()
        return _flat(torch.autograd.grad(total, parameters, allow_unused=True))

    return run


def _textbook(network: Network, form: Mapping[str, float], real, fake, args, gain: Gain) -> dict[str, Callable]:
    """One penalised critic update on (real, fake), by double backward and by critic_step; each returns all gradients."""
    module = network.module
    parameters = [p for p in module.parameters() if p.requires_grad]
    alpha = torch.rand(real.shape[0], *[1] * (real.dim() - 1), device=real.device, dtype=real.dtype)

    def run(method):
        step = fastgan.critic_step(
            module, real, fake, loss="wasserstein", alpha=alpha, real_args=args, fake_args=args, method=method, **form
        )
        if method == "auto":
            gain.replaced = [f"the critic's update, by method {step.method}"]
            if step.method == "double_backward":
                gain.note = f"takes double backward like the plain update, so nothing is gained: {step.why}"
        step.loss.backward()
        flat = _flat(p.grad for p in parameters)
        for p in parameters:
            p.grad = None
        return flat

    return {"plain": lambda: run("double_backward"), "fastgan": lambda: run("auto")}


def _form(network: Network) -> tuple[dict, tuple] | None:
    """The penalty that the calls of an update look like, and (real, fake, args): what critic_step can be tried on."""
    calls, points = network.update
    kept = network.kept
    if not points or not kept or not all(call.args and isinstance(call.args[0], Tensor) and not call.kwargs for call in kept):
        return None
    first, args = kept[0].args[0], kept[0].args[1:]
    if calls == 1 or len(kept) == 1:  # reals and fakes in one batch
        half = first.shape[0] // 2
        args = tuple(a[:half] if isinstance(a, Tensor) and a.dim() and a.shape[0] == first.shape[0] else a for a in args)
        return ({"r1": 1.0, "r2": 1.0}, (first[:half], first[half : 2 * half], args)) if half else None
    pairs = [call.args[0] for n, call in enumerate(kept) if n not in points] if calls - len(points) >= 2 else None
    if pairs is not None and len(pairs) >= 2:
        return {"gradient_penalty": 10.0}, (pairs[0], pairs[1], args)
    form = {"r1": 1.0} if len(points) == 1 else {"r1": 1.0, "r2": 1.0}
    chosen = [kept[n].args[0] for n in points if n < len(kept)]
    others = [call.args[0] for n, call in enumerate(kept) if n not in points]
    both = (chosen + others)[:2]
    return (form, (*both, args)) if len(both) == 2 and both[0].shape == both[1].shape else None


def _trainable(network: Network) -> list[nn.Parameter]:
    """What its optimizer moves, also where the loop freezes one network while the other trains and stopped in between."""
    parameters = list(network.module.parameters())
    return [p for p in parameters if p.requires_grad] or parameters


def _speaks(module: nn.Module) -> bool:
    """Would its forward wait for other ranks, which may have ended?"""
    return any(isinstance(m, nn.SyncBatchNorm) or getattr(m, "group", None) is not None for m in module.modules())


def _compare(gain: Gain, module: nn.Module, runs: Mapping[str, Callable], prepare: Mapping[str, Callable], seconds) -> Gain:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    snapshot = Snapshot(module, device)
    try:
        results = {}
        for name, run in runs.items():
            prepare[name]()
            snapshot.restore()
            began = time.perf_counter()
            results[name] = run()
            long = time.perf_counter() - began > SLOW
        gain.error = ((results["fastgan"] - results["plain"]).norm() / results["plain"].norm()).item()
        if gain.note:
            return gain
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        if not gain.error <= TOLERANCE.get(dtype, 5e-2):
            gain.note = "the gradients differ, so no speed-up is given"
            return gain
        fewer = {"min_rounds": 3, "warmup": 0} if long else {"min_rounds": 5}
        times = measure.interleaved(runs, seconds=seconds, prepare=prepare, **fewer)
        gain.seconds = {name: measure.Spread.of(values).to_dict() for name, values in times.items()}
        gain.speedup = measure.speedup(times, "fastgan", "plain").to_dict()
        gain.peak_bytes = {}
        for name, run in runs.items():
            prepare[name]()
            gain.peak_bytes[name] = measure.peak_memory(run)
    except Exception as error:  # somebody else's network may do anything
        gain.seconds = gain.speedup = gain.peak_bytes = None
        gain.note = f"could not be measured: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        snapshot.restore()
    return gain


def _accelerated(network: Network, calls: float, seconds: float) -> list[Gain]:
    module = network.module
    try:
        report = fastgan.accelerate(module)
    except Exception as error:
        return [Gain(network.name, "accelerate", [], note=f"accelerate failed: {type(error).__name__}: {error}")]
    replaced = [f"{r.name or type(module).__name__} ({r.kind}): {r.by}" for r in report.replaced]
    fastgan.restore(module)
    if not replaced:
        return [Gain(network.name, "accelerate", [], note="nothing that it could replace")]
    prepare = {"plain": lambda: fastgan.restore(module), "fastgan": lambda: fastgan.accelerate(module)}
    found = []
    try:
        for penalised in (False, True) if network.update[1] else (False,):
            what = f"accelerate({network.name}): {len(network.kept)} calls forward and backward"
            run = _update(network, penalised)
            gain = Gain(network.name, what + (", one penalised" if penalised else ""), replaced)
            gain.per_iteration = calls / max(1, len(network.kept)) if penalised or not network.update[1] else 0.0
            found.append(_compare(gain, module, {"plain": run, "fastgan": run}, prepare, seconds))
    finally:
        fastgan.restore(module)
    return found


def measure_all(networks: list[Network], calls: Mapping[int, float], seconds: float) -> tuple[list[Gain], str]:
    """Gains, and what to know about them."""
    gains, notes = [], []
    able = hasattr(fastgan, "accelerate") and hasattr(fastgan, "restore")
    if not able:
        notes.append(NO_ACCELERATE)
    device = next((p.device.type for n in networks for p in n.module.parameters()), "cpu")
    if device in backends.DEVICES and any(backends.serving(op, device) == "reference" for op in references):
        notes.append("plain torch operators serve for some of fastgan's kernels here; fastgan doctor says why")
    for network in networks:
        inside = any(network.module is m for other in networks if other is not network for m in other.module.modules())
        if not network.kept or inside:  # an embedding that is also called by itself, say
            continue
        if isinstance(network.module, nn.parallel.DistributedDataParallel):  # a rank measures by itself
            network = replace(network, module=network.module.module)
        module = network.module
        if _speaks(module):
            notes.append(f"{network.name} was not tried: its batch statistics come from all ranks")
            continue
        saved = [(p, p.grad, p.requires_grad) for p in module.parameters()]
        training = module.training
        try:
            for p in _trainable(network):
                p.requires_grad_(True)
            if able:
                gains += _accelerated(network, calls.get(network.index, 0.0), seconds)
            if network.role == CRITIC and network.update[1] and any(call.kwargs for call in network.kept):
                notes.append(f"{network.name} takes arguments by keyword alone, which critic_step does not")
            if network.role == CRITIC and (found := _form(network)) is not None:
                form, (real, fake, args) = found
                shown = ", ".join(f"{key}={value:g}" for key, value in form.items())
                gain = Gain(network.name, f"critic_step({network.name}, real, fake, {shown})", ["the critic's update"])
                gain.per_iteration = calls.get(network.index, 0.0) / max(1, network.update[0])
                runs = _textbook(network, form, real, fake, args, gain)
                for p, *_ in saved:
                    p.grad = None
                gains.append(_compare(gain, module, runs, dict.fromkeys(runs, lambda: None), seconds))
        finally:
            for p, grad, required in saved:
                p.grad = grad
                p.requires_grad_(required)
            module.train(training)
    return gains, "; ".join(notes)
