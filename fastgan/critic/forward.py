"""One recorded call of the critic: its input leaf, its scores, and how to repeat it without side effects."""

import contextlib
import weakref
from functools import cached_property

import torch
from torch.nn.parameter import is_lazy

from .analyse import Graph
from .outputs import score_list


def unwrap(critic):
    """The module to run: a torch.compile wrapper is replaced by the module it wraps, because a compiled forward leaves
    one opaque node which can be neither analysed nor differentiated twice."""
    return getattr(critic, "_orig_mod", critic) if isinstance(critic, torch.nn.Module) else critic


def owner(critic):
    """The object whose lifetime a cached proof is tied to, or None if it cannot be weakly referenced."""
    anchor = getattr(critic, "__self__", critic)
    try:
        hash(anchor)
        weakref.ref(anchor)
    except TypeError:
        return None
    return anchor


class Snapshot:
    """Buffers of a critic and the random state of the devices in use, to be put back later.

    So are parameters that are vectors and not trained: several libraries keep u and v of spectral norm in such.
    """

    def __init__(self, critic, device):
        module = critic if isinstance(critic, torch.nn.Module) else getattr(critic, "__self__", None)
        self.module = module if isinstance(module, torch.nn.Module) else None
        self.cuda = device if device.type == "cuda" else None
        self.take()

    def take(self):
        self.buffers = []
        if self.module is not None:
            vectors = (p for p in self.module.parameters() if not (p.requires_grad or is_lazy(p)) and p.dim() == 1)
            self.buffers = [(b, b.detach().clone()) for b in (*self.module.buffers(), *vectors)]
        self.cpu_state = torch.get_rng_state()
        self.cuda_state = torch.cuda.get_rng_state(self.cuda) if self.cuda is not None else None

    def restore(self):
        for buffer, value in self.buffers:
            # .data: graphs that saved a buffer stay valid, as after batch norm's own updates
            buffer.data.copy_(value)
        torch.set_rng_state(self.cpu_state)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda_state, self.cuda)


class Forward:
    """scores = critic(inputs, *args) under autograd, on a detached alias of the inputs.

    ``penalised``: record the graph down to the input. ``replayable``: remember buffers and random state, so that
    :meth:`replay` can run the same forward again and leave no trace.
    """

    def __init__(self, critic, inputs, args=(), score_fn=None, *, penalised=True, replayable=False):
        self.critic, self.args, self.score_fn = critic, tuple(args), score_fn
        self.snapshot = Snapshot(critic, inputs.device) if replayable else None
        self.x = inputs.detach()
        if penalised:
            self.x.requires_grad_(True)
        with torch.enable_grad():
            self.scores = score_list(critic(self.x, *self.args), score_fn)
        self.prepared = None  # (graph, plan) once the engine has looked at it
        self.always_per_sample = self.traced = False

    @classmethod
    def captured(cls, critic, x, scores, traced):
        """A forward that ran elsewhere. What is found out about it must hold for other values too: the loss's derivative
        counts as different for each sample. ``traced``: its tensors have no values to read."""
        self = cls.__new__(cls)
        self.critic, self.x, self.scores, self.snapshot, self.prepared = critic, x, scores, None, None
        self.always_per_sample, self.traced = True, traced
        return self

    @property
    def samples(self):
        """N: scores per output tensor along its first dimension."""
        return self.scores[0].shape[0] if self.scores[0].dim() else 1

    @cached_property
    def graph(self):
        """The :class:`Graph` above the scores."""
        return Graph(self.scores)

    def leaves(self):
        """{id: leaf} of what the scores depend on, without the input."""
        found = leaves_of(self.graph.nodes)
        found.pop(id(self.x), None)
        return found

    def detached(self):
        return [s.detach() for s in self.scores]

    @contextlib.contextmanager
    def replay(self):
        """Inside, ``run(x)`` repeats the recorded forward on another input: same dropout masks, same spectral-norm and
        batch statistics; afterwards buffers and random state are as if it had never run."""
        after = Snapshot(self.critic, self.x.device)

        def run(x):
            self.snapshot.restore()
            return score_list(self.critic(x, *self.args), self.score_fn)

        try:
            yield run
        finally:
            after.restore()


def leaves_of(nodes):
    """{id: leaf} of the AccumulateGrad nodes in a list of graph nodes."""
    found = {}
    for node in nodes:
        if node.name() == "torch::autograd::AccumulateGrad":
            leaf = node.variable
            found[id(leaf)] = leaf
    return found
