"""May real and fake go through the critic as one batch? Larger products are faster, but only where nothing else changes.

Modules that hold anything but tensors, modules and plain data (functions, generators) are never joined: what they do can't be
seen. For the others three steps lead there. A step that runs them apart is *watched*: nothing of the critic (buffers,
attributes), nor any random state, may move. Then the joint batch is *proved* once: rows independent to the last bit at every
parameter, which the probe of the shared pass finds out, and scores as when run apart. From then on steps join, as long as the
critic leaves the graph that was proved; where it leaves another, or moves something, that is undone and the step runs apart.
"""

import math
import random
import sys
import weakref

import torch

from fastgan._dtypes import HALF

from . import engine
from .analyse import Refused
from .forward import Forward, Snapshot
from .outputs import score_list
from .passes import SharedPass

_KNOWN = weakref.WeakKeyDictionary()  # critic -> {situation: _WATCHED, _APART or the proved plan}
_WATCHED, _APART = object(), object()
_SITUATIONS = 32
# Elements of the largest activation up to which batches are joined. That saves time (R1 + R2 on one core: a DCGAN critic a
# fifth at batch 4, 7 % at 16, 5 % at 32; an SNGAN ResNet and one like R3GAN's 2 to 8 % at 16) and costs memory, with two
# batches of activations and cotangents at once: 0.7 to 0.8 of eager's peak, where one after the other they take half of it.
LARGEST = 1 << 20


_OWN = frozenset(vars(torch.nn.Module()))
_DATA = (
    torch.Tensor,
    torch.nn.Module,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.memory_format,
)


def _is_data(value):
    if isinstance(value, _DATA):
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    return isinstance(value, type) or (callable(value) and str(getattr(value, "__module__", "")).startswith("torch"))


def hides_state(module):
    """Could a forward of this module draw from or write to something that nobody sees: generators, closures, other objects?"""
    code = getattr(type(module), "forward", None)
    closed_over = [name for name in getattr(getattr(code, "__code__", None), "co_freevars", ()) if name != "__class__"]
    return bool(closed_over) or not all(_is_data(value) for name, value in vars(module).items() if name not in _OWN)


def situation(critic, real, fake, score_fn):
    """What a proof is keyed on besides the graph; None where real and fake can't be joined for a reason seen from outside."""
    if (
        not isinstance(critic, torch.nn.Module)
        or not torch.is_grad_enabled()
        or real.shape != fake.shape
        or real.dtype != fake.dtype
        or real.device != fake.device
    ):
        return None
    modules = list(critic.modules())
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None  # they would see one batch instead of two
    if any(map(hides_state, modules)):
        return None
    autocast = torch.is_autocast_enabled(real.device.type) and torch.get_autocast_dtype(real.device.type)
    return tuple(real.shape), real.dtype, real.device, autocast, score_fn, tuple(m.training for m in modules)


def _same(a, b):
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, bool, bytes)) and a == b)


class Watch:
    """Everything that a critic's forward may move besides its scores, as it is now."""

    def __init__(self, critic, device):
        self.critic, self.device = critic, device
        self.attributes = [dict(vars(m)) for m in critic.modules()]
        self.sizes = [self._sizes(m) for m in critic.modules()]
        self.moving = self._moving()

    @staticmethod
    def _sizes(module):
        return {name: len(v) for name, v in vars(module).items() if isinstance(v, (list, dict, set))}

    def _moving(self):
        numpy = sys.modules.get("numpy")
        drawn = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()) if numpy else None
        cuda = torch.cuda.get_rng_state(self.device).tolist() if self.device.type == "cuda" else None
        return drawn, cuda, [(b.data_ptr(), b._version) for b in self.critic.buffers()]

    def nothing_moved(self):
        modules = list(self.critic.modules())
        if len(modules) != len(self.attributes) or self._moving() != self.moving:
            return False
        return all(
            old.keys() == vars(m).keys() and all(_same(v, old[k]) for k, v in vars(m).items()) and sizes == self._sizes(m)
            for m, old, sizes in zip(modules, self.attributes, self.sizes, strict=True)
        )


def run_apart(critic, key, device, run):
    """``run()``, watched where that may lead to a proof."""
    known = {} if key is None else _KNOWN.setdefault(critic, {})
    if key is None or key in known or len(known) >= _SITUATIONS:
        return run()
    watch = Watch(critic, device)
    run()
    known[key] = _WATCHED if watch.nothing_moved() else _APART


def joint_forward(critic, key, real, fake, score_fn):
    """The :class:`Forward` of real and fake as one batch, or None where that is not known to change nothing.

    It is recorded down to the images even without a penalty, so that the engine knows its graph and gives back what
    autograd saves twice.
    """
    known = _KNOWN.get(critic, {}).get(key)
    if key is None or known is None or known is _APART:
        return None
    both = torch.cat([real.detach(), fake.detach()])
    if known is _WATCHED:
        known = _KNOWN[critic][key] = _prove(critic, real.detach(), fake.detach(), score_fn) or _APART
        if known is _APART:
            return None
    before = Snapshot(critic, both.device)
    versions = [b._version for b, _ in before.buffers]
    forward = Forward(critic, both, (), score_fn)
    quiet = versions == [b._version for b, _ in before.buffers] and torch.equal(before.cpu_state, torch.get_rng_state())
    if engine.prepare(forward)[1] is known and quiet:
        return forward
    _KNOWN[critic][key] = _APART
    before.restore()
    return None


def _prove(critic, real, fake, score_fn):
    """The plan of the joint batch, by which later ones are recognised, or None if joining could change something. Leaves no
    traces."""
    half = real.shape[0]
    both = torch.cat([real, 2 * fake + 0.5])  # statistics of a batch, be they detached, differ clearly
    snapshot = Snapshot(critic, both.device)
    try:
        forward = Forward(critic, both, (), score_fn)
        graph, plan = engine.plan_for(forward)
        if plan.refusal is not None or plan.value_dependent or not plan.taps:
            return None
        if _largest(graph, plan) > LARGEST:
            return None
        SharedPass(forward, graph, plan, [1.0] * len(forward.scores)).prove_layouts()
        with torch.no_grad():
            apart = [score_list(critic(part), score_fn) for part in (both[:half], both[half:])]
        for joint, *parts in zip(forward.scores, *apart, strict=True):
            if any(p.dim() == 0 or p.shape[0] != half for p in parts) or not _close(joint.detach(), torch.cat(parts)):
                return None
        return plan
    except (Refused, RuntimeError, ValueError, TypeError):
        return None  # whatever a critic may object to in a batch of twice the size
    finally:
        snapshot.restore()


def _largest(graph, plan):
    outputs = [m for tap in plan.taps for m in graph.nodes[tap.position]._input_metadata]
    return max(math.prod(m.shape) for m in outputs)


def _close(a, b):
    tolerance = 2e-2 if a.dtype in HALF else 1e-11 if a.dtype == torch.float64 else 2e-5
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())
