"""Watches a training loop through hooks, without changing it: networks, who feeds whom, updates, penalties.

A *network* is the outermost module called whose parameters all belong to one optimizer. It is a critic if another optimizer's
network feeds it and it feeds none (its input is the other's output, by graph or by storage); the networks of the other
optimizers are generators. ``critic=`` and ``generator=`` name them where that says nothing.
"""

import gc
import inspect
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves, tree_map

PREFIX = "fastgan/"
SPECTRAL, MINIBATCH, PENALTY, BACKWARD = "spectral norm", "minibatch features", "penalty", "backward"
CRITIC, GENERATOR, OTHER = "critic", "generator", "other network"
_KEPT_CALLS = 4  # of one network, for measuring gains
_MARK = "fastgan network"  # key in the metadata of an output's graph node
_WALK = 300  # nodes looked at from an input upwards
_PATIENCE = 64  # steps of other optimizers that one may take to come to its first


@dataclass(eq=False)
class Call:
    """Detached arguments of one call of a network; ``kwargs`` are those that can't be given by position."""

    args: tuple
    kwargs: dict = field(default_factory=dict)


@dataclass(eq=False)
class Network:
    """``names``: what the script calls it; ``update``: (calls, which of them had their input gradient taken) from another
    optimizer's step to its own, and ``kept`` the first of these calls; ``total``: calls so far."""

    index: int
    module: nn.Module
    optimizer: int
    names: list[str]
    feeds: set[int] = field(default_factory=set)
    fed_by: set[int] = field(default_factory=set)
    role: str = OTHER
    total: int = 0
    update: tuple[int, tuple[int, ...]] = (0, ())
    kept: list[Call] = field(default_factory=list)
    _calls: list[Call] = field(default_factory=list)
    _kept_last: bool = False  # are the arguments of the last call among these?
    _pointers: list[int] = field(default_factory=list)  # to the data of each call's first argument since the last step
    _penalised: list[int] = field(default_factory=list)

    def called(self, args: tuple, keep: bool) -> None:
        self.total += 1
        self._pointers.append(_pointer(args))
        self._kept_last = keep and len(self._calls) < _KEPT_CALLS
        if self._kept_last:
            self._calls.append(Call(_detached(args)))

    def had_keywords(self, args: tuple, kwargs: dict) -> None:
        """Of the call that :meth:`called` was the last to hear of."""
        args, kwargs = _by_position(self.module, args, kwargs)
        self._pointers[-1] = _pointer((args, kwargs))
        if self._kept_last:
            self._calls[-1] = Call(_detached(args), _detached(kwargs))

    def penalise(self, pointer: int) -> bool:
        """The gradient with respect to the input at ``pointer`` is taken: was it a call of this network?"""
        for number in reversed(range(len(self._pointers))):
            if self._pointers[number] == pointer:
                self._penalised.append(number)
                return True
        return False

    def stepped(self, its_own: bool) -> None:
        if its_own:
            self.update = len(self._pointers), tuple(sorted(set(self._penalised)))
            self.kept = self._calls or self.kept
        self._calls, self._pointers, self._penalised = [], [], []

    @property
    def name(self) -> str:
        return self.names[0] if self.names else type(self.module).__name__


def _tracing() -> bool:
    """Is torch.compile at work? Its tensors are fake, and what runs is no part of the training loop."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _detached(tree):
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def _pointer(arguments) -> int:
    """To the data of the first floating-point tensor among them."""
    return next((t.data_ptr() for t in _tensors(arguments) if t.is_floating_point()), 0)


def _by_position(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same arguments with as few keywords as its ``forward`` allows."""
    inner = getattr(module, "_orig_mod", module)  # torch.compile's
    inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
    try:
        bound = inspect.signature(inner.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # it has no signature, or takes what it didn't get from a hook
        return args, kwargs
    bound.apply_defaults()
    return bound.args, bound.kwargs


def _names_of(module: nn.Module) -> list[str]:
    """Variables and attributes that hold the module, in the frames that led to its call."""
    frame, found = inspect.currentframe(), []
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/fastgan/profiler/" not in file:
            for space in (frame.f_locals, frame.f_globals):
                for name, value in list(space.items()):
                    if value is module and name != "self":
                        found.append(name)
                    elif name == "self" and hasattr(value, "__dict__"):
                        members = {**vars(value), **getattr(value, "_modules", {})}
                        found += [key for key, held in members.items() if held is module]
        frame = frame.f_back
    return [name for name in dict.fromkeys(found) if not name.startswith("__")]


class Recorder:
    """Hooks into torch between :meth:`install` and :meth:`remove`.

    ``on_iteration()`` is called at the first event after every optimizer that is in use has stepped: one iteration;
    ``on_change()`` when an optimizer steps for the first time, by which an iteration may have become longer. ``keep``:
    remember the arguments of calls from now on.
    """

    def __init__(self, critic=None, generator=None, on_iteration=lambda: None, on_change=lambda: None):
        self.named = {CRITIC: critic, GENERATOR: generator}
        self.on_iteration, self.on_change, self.keep = on_iteration, on_change, False
        self.networks: list[Network] = []
        self.optimizers: list[Optimizer] = []
        self.steps: list[int] = []  # of each optimizer
        self._owner: dict[int, int] = {}  # id of a parameter -> index of its optimizer
        self._kinds: dict[int, tuple] = {}  # id of a module -> (module, what it is)
        self._stack: list = []  # (module, range, network) of the calls that are open
        self._outputs: list = []  # (weak reference to storage, network index) of this iteration
        self._stepped: set[int] = set()
        self._due = False
        self._undo: list = []

    # hooks in and out

    def install(self) -> None:
        hooks = nn.modules.module
        self._undo = [
            hooks.register_module_forward_pre_hook(self._before).remove,
            hooks.register_module_forward_hook(self._after, with_kwargs=True, always_call=True).remove,
            register_optimizer_step_post_hook(self._optimizer_stepped).remove,
        ]
        self._patch(Optimizer, "__init__", self._making_optimizer)
        self._patch(torch.autograd, "_engine_run_backward", self._backward)
        self._patch(sys.modules["torch.nn.utils.spectral_norm"].SpectralNorm, "__call__", self._spectral_hook)
        for found in gc.get_objects():
            if issubclass(type(found), Optimizer) and hasattr(found, "param_groups"):
                self._add_optimizer(found)

    def remove(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        while self._stack:
            self._close()

    def _patch(self, holder, name, make):
        original = getattr(holder, name)
        setattr(holder, name, make(original))
        self._undo.append(lambda: setattr(holder, name, original))

    # optimizers

    def _making_optimizer(self, original):
        def __init__(optimizer, *args, **kwargs):
            original(optimizer, *args, **kwargs)
            self._add_optimizer(optimizer)

        return __init__

    def _index(self, optimizer) -> int | None:
        return next((i for i, known in enumerate(self.optimizers) if known is optimizer), None)

    def _add_optimizer(self, optimizer) -> int:
        index = self._index(optimizer)
        if index is None:
            index = len(self.optimizers)
            self.optimizers.append(optimizer)
            self.steps.append(0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._owner[id(parameter)] = index
        self._kinds.clear()
        return index

    def _optimizer_stepped(self, optimizer, args, kwargs) -> None:
        known = self._index(optimizer)
        index = self._add_optimizer(optimizer) if known is None or not self.steps[known] else known
        self.steps[index] += 1
        if self.steps[index] == 1:  # iterations are counted from here
            self.on_change()
            self._stepped = {i for i, n in enumerate(self.steps) if n}
        self._stepped.add(index)
        for network in self.networks:
            network.stepped(network.optimizer == index)
        if self._stepped >= {i for i, n in enumerate(self.steps) if n}:
            self._due = True

    def waiting(self) -> bool:
        """Is there an optimizer of a network in use that has not stepped yet, and may still?"""
        return any(not self.steps[n.optimizer] for n in self.networks) and sum(self.steps) < _PATIENCE

    def ended(self) -> bool:
        """Has an iteration ended that ``on_iteration`` was not called for?"""
        return self._due and not self.waiting()

    def _tick(self) -> None:
        if not self._due or self._stack:
            return
        self._due = False
        self._stepped.clear()
        self._outputs.clear()
        self.on_iteration()

    # modules

    def _kind(self, module):
        known = self._kinds.get(id(module))
        if known is None or known[0] is not module:
            known = self._kinds[id(module)] = module, self._look_at(module)
        return known[1]

    def _look_at(self, module):
        name = type(module).__name__.lower().replace("_", "")
        where = type(module).__module__
        if name == "spectralnorm" and (where.startswith("torch.nn.utils.param") or where.startswith("fastgan.")):
            return SPECTRAL
        if any(word in name for word in ("minibatch", "mbdis", "batchstd", "mbstd")):
            return MINIBATCH
        parameters = list(module.parameters())
        owners = {self._owner.get(id(p)) for p in parameters if p.requires_grad or id(p) in self._owner}
        if len(owners) != 1 or None in owners:
            return None
        return owners.pop()

    def _network(self, module, optimizer) -> Network:
        for network in self.networks:
            if network.module is module:
                network.optimizer = optimizer
                return network
        network = Network(len(self.networks), module, optimizer, _names_of(module))
        self.networks.append(network)
        return network

    def _open(self, module, label, network=None):
        entered = record_function(PREFIX + label)
        entered.__enter__()
        self._stack.append((module, entered, network))

    def _close(self):
        self._stack.pop()[1].__exit__(None, None, None)

    def _before(self, module, args):
        if _tracing():
            return
        self._tick()
        kind = self._kind(module)
        if kind is None:
            return
        if isinstance(kind, str):
            self._open(module, kind)
        elif not any(network is not None for *_, network in self._stack):
            network = self._network(module, kind)
            self._follow(network, args)
            if torch.is_grad_enabled():
                network.called(args, self.keep)
            self._open(module, f"network {network.index}", network)

    def _after(self, module, args, *rest):
        if _tracing() or not self._stack or self._stack[-1][0] is not module:
            return
        network = self._stack[-1][2]
        self._close()
        if network is None or len(rest) < 2:  # of a forward that has failed torch tells no keywords
            return
        kwargs, output = rest
        if kwargs:  # hooks on all modules that come before a call don't get them
            self._follow(network, tuple(kwargs.values()))
            if torch.is_grad_enabled():
                network.had_keywords(args, kwargs)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.metadata[_MARK] = network.index
            self._outputs.append((StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr(), network.index))

    def _follow(self, network, args) -> None:
        """Which networks made these arguments? By graph, and for detached outputs by storage."""
        tensors = [t for t in _tensors(args) if t.is_floating_point()]
        sources = {self._source(t.grad_fn) for t in tensors if t.grad_fn is not None}
        pointers = {t.data_ptr() for t in tensors if t.numel()}
        sources |= {index for ref, pointer, index in self._outputs if pointer in pointers and not ref.expired()}
        for index in sources - {None, network.index}:
            network.fed_by.add(index)
            self.networks[index].feeds.add(network.index)

    @staticmethod
    def _source(node) -> int | None:
        queue, seen = [node], set()
        while queue and len(seen) < _WALK:
            node = queue.pop(0)
            if node is None or node in seen:
                continue
            if _MARK in node.metadata:
                return node.metadata[_MARK]
            seen.add(node)
            queue += [next_node for next_node, _ in node.next_functions]
        return None

    # autograd

    def _backward(self, original):
        def run(outputs, *args, **kwargs):
            if _tracing():
                return original(outputs, *args, **kwargs)
            self._tick()
            inputs = args[3] if len(args) > 3 else ()
            first = next(iter(inputs or ()), None)
            own = isinstance(first, Tensor) and id(first) not in self._owner
            label = PENALTY if not kwargs.get("accumulate_grad", True) and own else BACKWARD
            if label == PENALTY:
                any(network.penalise(first.data_ptr()) for network in reversed(self.networks))
            with record_function(PREFIX + label):
                return original(outputs, *args, **kwargs)

        return run

    def _spectral_hook(self, original):
        def __call__(hook, *args, **kwargs):
            with record_function(PREFIX + SPECTRAL):
                return original(hook, *args, **kwargs)

        return __call__

    # roles

    def assign_roles(self) -> None:
        """Give every network its role, from the names asked for, else from who feeds whom.

        Raises:
            ValueError: a name that no network has.
        """
        roles: dict[int, str] = {}
        for role, name in self.named.items():
            if name is None:
                continue
            found = [n for n in self.networks if name in (*n.names, type(n.module).__name__)]
            if not found:
                there = ", ".join(f"{n.name} ({type(n.module).__name__})" for n in self.networks) or "none"
                raise ValueError(f"--{role} {name}: no network of that name was called; there are: {there}")
            roles |= {n.optimizer: role for n in found}
        if CRITIC not in roles.values():
            for n in self.networks:
                outside = {self.networks[i].optimizer for i in n.fed_by} - {n.optimizer}
                forwards = {self.networks[i].optimizer for i in n.feeds} - {n.optimizer}
                if outside and not forwards:
                    roles.setdefault(n.optimizer, CRITIC)
        if CRITIC in roles.values():
            for n in self.networks:
                roles.setdefault(n.optimizer, GENERATOR)
        for n in self.networks:
            n.role = roles.get(n.optimizer, OTHER)

    def standing_bytes(self) -> dict[str, int]:
        """Parameters and optimizer state: memory that was there before the first traced operation."""
        parameters = {id(p): p for o in self.optimizers for g in o.param_groups for p in g["params"]}
        state = [t for o in self.optimizers for t in _tensors(list(o.state.values()))]
        return {
            "parameters": sum(p.numel() * p.element_size() for p in parameters.values()),
            "optimizer state": sum(t.numel() * t.element_size() for t in state),
        }
