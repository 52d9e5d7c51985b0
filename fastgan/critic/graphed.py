"""The critic step as one CUDA graph, for GPUs that run its kernels faster than Python launches them."""

import contextlib
import dataclasses
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .deliver import unread
from .forward import Snapshot, unwrap
from .step import CriticStep, critic_step

__all__ = ["GraphedCriticStep"]

_WARMUP = 4  # steps before the capture, in which the engine proves what it goes by from then on, and libraries choose kernels
_AT_CALL = ("alpha", "real_args", "fake_args", "interpolate_args")
_NOT_IN_A_GRAPH = ("generator", "grad_scaler", "compile")


@dataclasses.dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list  # tensors that replays read
    result: CriticStep
    gradients: list  # (parameter, gradient that replays write)


class GraphedCriticStep:
    """:func:`fastgan.critic_step` and its backward, captured in a CUDA graph and replayed::

        step = fastgan.GraphedCriticStep(critic, loss="relativistic", r1=1.0, r2=1.0)
        result = step(real, fake)  # gradients are in .grad of the critic's parameters
        optimizer.step()

    A step launches hundreds of small kernels; where the GPU runs them faster than Python launches them, a graph takes the time
    of the kernels alone. The first call with given shapes takes some steps longer: it runs the step a few times, puts
    buffers, random state and ``.grad`` back, and captures it. On a CPU the step is run as it is.

    Args:
        critic: a module. Its parameters have to stay the same tensors: optimizers and ``load_state_dict`` write into them.
        options: those of :func:`fastgan.critic_step` but ``generator``, ``grad_scaler`` and ``compile``. ``alpha`` and
            ``real_args``, ``fake_args``, ``interpolate_args`` are given at each call; their tensors are copied as the batches
            are, and what else is in them is captured.

    Calling it with ``real`` and ``fake`` (B, ...) on a GPU returns a :class:`CriticStep` whose tensors are copies and whose
    ``loss`` needs no backward. ``.grad`` of the parameters is *replaced*, not added to. Autocast, training mode and which
    parameters are trained are as they were when the call's shapes were captured; where these change, it is captured again.

    Nothing can be read in a graph: where samples interact in a way that depends on values, for which ``critic_step``
    raises, gradients are NaN.

    Raises:
        ValueError: an option that can't be captured; a critic wrapped for several processes.
        RuntimeError: the critic or loss does what a graph can't hold, for example reads a value; with nothing changed.

    Source: ``torch.cuda.CUDAGraph``; NVIDIA, "Getting Started with CUDA Graphs", 2019.
    """

    def __init__(self, critic, **options):
        if isinstance(critic, DistributedDataParallel):
            raise ValueError("GraphedCriticStep: a critic in DistributedDataParallel can't be captured: use critic_step")
        for name in _NOT_IN_A_GRAPH:
            if options.get(name):
                raise ValueError(f"GraphedCriticStep: {name} can't be part of a graph: leave it out, or use critic_step")
        for name in _AT_CALL:
            if name in options:
                raise ValueError(f"GraphedCriticStep: {name} is given with the batches: step(real, fake, {name}=...)")
        self.critic, self.options = unwrap(critic), options
        self._captured: dict = {}
        self._pool = None

    def __call__(self, real, fake, **given) -> CriticStep:
        for name in given:
            if name not in _AT_CALL:
                raise TypeError(f"GraphedCriticStep: {name!r} is none of {', '.join(_AT_CALL)}")
        parameters = list(self.critic.parameters())
        if real.device.type != "cuda":
            for parameter in parameters:
                parameter.grad = None
            return _copied(self._run(real, fake, given))
        flat, structure = tree_flatten((real, fake, given))
        inputs = [x for x in flat if isinstance(x, torch.Tensor)]
        key = (
            tuple((x.shape, x.dtype, x.device, x.stride()) if isinstance(x, torch.Tensor) else x for x in flat), structure,
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            tuple(p.requires_grad for p in parameters), tuple(m.training for m in self.critic.modules()),
        )  # fmt: skip
        found = self._captured.get(key)
        if found is None:
            found = self._captured[key] = self._capture(flat, structure, parameters)
        for held, new in zip(found.inputs, inputs, strict=True):
            held.copy_(new)
        found.graph.replay()
        for parameter in parameters:
            parameter.grad = None
        for parameter, gradient in found.gradients:
            parameter.grad = gradient
        return _copied(found.result)

    def _run(self, real, fake, given) -> CriticStep:
        result = critic_step(self.critic, real, fake, **given, **self.options)
        result.loss.backward()
        return result

    def _capture(self, flat, structure, parameters) -> _Captured:
        device = flat[0].device
        held = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in flat]
        real, fake, given = tree_unflatten(held, structure)
        before, gradients = Snapshot(self.critic, device), [p.grad for p in parameters]
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()

        def run():
            for parameter in parameters:
                parameter.grad = None
            # what autocast keeps of weights in 16 bits would be read in every replay
            dtype = torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
                return self._run(real, fake, given)

        generator = torch.cuda.default_generators[device.index]
        state = generator.clone_state()
        try:
            with torch.cuda.device(device):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(_WARMUP):
                        run()
                    with unread(), _no_waiting():  # what a graph can't hold fails here, where it leaves nothing behind
                        run()
                torch.cuda.current_stream().wait_stream(stream)
                before.restore()
                with torch.cuda.graph(graph, pool=self._pool):
                    result = run()
            made = [(p, p.grad) for p in parameters if p.grad is not None]
        except RuntimeError as error:
            generator.graphsafe_set_state(state)  # a capture that failed has left it capturing
            before.restore()
            why = str(error).partition("\n")[0]
            what = "GraphedCriticStep: this step can't be captured in a CUDA graph"
            raise RuntimeError(f"{what}: {why}. Use critic_step") from error
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        self._pool = graph.pool()
        return _Captured(graph, [x for x in held if isinstance(x, torch.Tensor)], result, made)


@contextlib.contextmanager
def _no_waiting():
    """Whatever waits for the GPU raises RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # that this mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _copied(step: CriticStep) -> CriticStep:
    fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    return CriticStep(**tree_map_only(torch.Tensor, lambda x: x.detach().clone(), fields))
