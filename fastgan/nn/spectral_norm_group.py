"""All normalised weights of a model in one call."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan.nn.utils.parametrizations import _SpectralNorm
from fastgan.nn.utils.spectral_norm import SpectralNorm
from fastgan.ops import spectral_norm as _ops

_REFRESH = ("per_forward", "per_step")


class _Member:
    """One normalised weight: where it, its u and its v are, and how it is normalised."""

    def __init__(self, module: nn.Module, name: str, form):
        self.form, self.hook = form, isinstance(form, SpectralNorm)
        if self.hook:
            self.places = [(module, name + suffix) for suffix in ("_orig", "_u", "_v")]
            self.training_of = module
        else:
            self.places = [(module.parametrizations[name], "original"), (form, "_u"), (form, "_v")]
            self.training_of = form

    def options(self, iterate: bool) -> tuple:
        form = self.form
        steps = form.n_power_iterations if iterate and self.training_of.training else 0
        return steps, form.eps, self.hook, form.target, form.at_most


def _read(places: list[tuple[nn.Module, str]], kind: str) -> list[Tensor]:
    """The tensors there, most of them in the modules' dict ``kind``: __getattr__ would take longer than all else per weight."""
    found = [vars(module)[kind].get(name) for module, name in places]
    return [getattr(*place) if x is None else x for x, place in zip(found, places, strict=True)]


def _members(model: nn.Module) -> list[_Member]:
    found = []
    for module in model.modules():
        found += [
            _Member(module, hook.name, hook) for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)
        ]
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                # Alone in its chain, and of a matrix: a vector is normalised without u and v.
                if len(chain) == 1 and isinstance(chain[0], _SpectralNorm) and hasattr(chain[0], "_u"):
                    found.append(_Member(module, name, chain[0]))
    return found


class SpectralNormGroup:
    """Normalise all weights of a model in one call instead of one per layer; the model's code stays as it is.

    Args:
        model: a module whose weights were given to :func:`fastgan.spectral_norm` or
            :func:`fastgan.nn.utils.spectral_norm` (either, mixed).
        refresh: ``"per_forward"``: one power iteration in every forward in training mode, with the numbers of a model
            without group, first reads of a weight in a forward being served from the one call. ``"per_step"``: one power
            iteration after each change of the weights, that is per optimizer step; the forwards of a step (real, fake,
            penalty) all see the same normalised weights. This is another algorithm than torch's, with fewer iterations.

    ``with group.freeze():`` leaves u and v as they are, for extra passes. ``group.remove()`` undoes the group. Weights read
    outside the model's forward, or a second time in it, are normalised for themselves, as without group. u and v of what a
    forward has read advance together: at its end, also where it raises, or before such a second read.

    u and v stay the modules' buffers: state_dicts don't change. They are never saved for backward, so that what
    ``DistributedDataParallel`` broadcasts into them does no harm; ranks with equal weights compute equal bits. Backward
    hands out all weights' gradients at once, when the last is known.

    "per_step" notices in-place changes by the weights' version counters, which ``optimizer.step()`` and ``load_state_dict``
    raise. Writing through ``weight.data`` doesn't; call ``group.refresh()`` after that.

    Raises:
        ValueError: an unknown ``refresh``; a model without weights that fastgan normalises, or with one in another group.
        RuntimeError: at the forward: weights sharded over ranks (FSDP2's DTensor). The group looks at weights before the
            layers' own hooks have gathered them, when no rank has all rows: there, normalise layer by layer.
    """

    def __init__(self, model: nn.Module, *, refresh: str = "per_forward"):
        if refresh not in _REFRESH:
            raise ValueError(f"SpectralNormGroup: refresh is {refresh!r}, expected one of {', '.join(map(repr, _REFRESH))}")
        self._members = _members(model)
        if not self._members:
            raise ValueError(
                "SpectralNormGroup: the model has no weight that fastgan normalises; apply fastgan.spectral_norm to its layers "
                "first (torch's own spectral_norm doesn't count)"
            )
        if any(member.form._group is not None for member in self._members):
            raise ValueError("SpectralNormGroup: a weight of the model is in a group already; call remove() of that one first")
        self._forms = [member.form for member in self._members]
        kinds = "_parameters", "_buffers", "_buffers"
        places = zip(*(member.places for member in self._members), strict=True)
        self._places = list(zip(places, kinds, strict=True))
        self._per_step, self.frozen, self._stale = refresh == "per_step", False, True
        self._versions: list[tuple] = []
        #: form -> (normalised weight, what u and v are and become, or None), until the layer reads it
        self._ready: dict = {}
        #: what u and v are and become, of layers that have read their weight in this forward
        self._moving: list[tuple] = []
        for member in self._members:
            member.form._group = self
        self._handles = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def __len__(self) -> int:
        return len(self._members)

    def refresh(self) -> None:
        """In "per_step": take another power iteration in the next forward, whatever the version counters say."""
        self._stale = True

    @contextlib.contextmanager
    def freeze(self):
        """Leave u and v as they are within."""
        before, self.frozen = self.frozen, True
        try:
            yield self
        finally:
            self.frozen = before

    def remove(self) -> None:
        """Every weight is normalised for itself again."""
        for handle in self._handles:
            handle.remove()
        for member in self._members:
            member.form._group = None
        self._ready.clear()

    def take(self, form) -> Tensor | None:
        """For a layer that reads its weight: the normalised one, once per forward."""
        normalised, move = self._ready.pop(form, (None, None))
        if move is not None:
            self._moving.append(move)
        elif normalised is None:
            self._move()  # read again: from where the first read left u and v
        return normalised

    def _move(self) -> None:
        """Advance u and v of the layers that have read their weight, all in one call."""
        if self._moving:
            u, v, new_u, new_v = zip(*self._moving, strict=True)
            self._moving.clear()
            torch._foreach_copy_([*u, *v], [*new_u, *new_v])

    def _has_changed(self, weights: list[Tensor]) -> bool:
        if not self._per_step:
            return True
        versions = [(id(weight), weight._version) for weight in weights]
        changed = self._stale or versions != self._versions
        if not self.frozen:
            self._stale, self._versions = False, versions
        return changed

    def _before(self, model, inputs) -> None:
        weights, u, v = (_read(*place) for place in self._places)
        if any(type(weight) not in (nn.Parameter, Tensor) and hasattr(weight, "full_tensor") for weight in weights):
            raise RuntimeError(
                "SpectralNormGroup: a weight is sharded over ranks (DTensor), and no rank has all of its rows; "
                "call group.remove() and normalise layer by layer, or leave these layers unsharded"
            )
        iterate = not self.frozen and self._has_changed(weights)
        batches: dict[tuple, list[int]] = {}
        for i, (member, weight) in enumerate(zip(self._members, weights, strict=True)):
            batches.setdefault((*member.options(iterate), weight.device, weight.dtype), []).append(i)
        for (*options, _, dtype), which in batches.items():
            forms, some, old_u, old_v = ([values[i] for i in which] for values in (self._forms, weights, u, v))
            vectors = old_u, old_v
            if dtype in (torch.float16, torch.bfloat16):
                vectors = ([x.float() for x in old] for old in vectors)
            results = _ops.normalise_many(some, *vectors, [form.dim for form in forms], *options)
            # A layer that this forward never reads doesn't advance, as without group: u and v wait for the read.
            moves = zip(old_u, old_v, *results[1:], strict=True) if options[0] else [None] * len(forms)
            self._ready.update(zip(forms, zip(results[0], moves, strict=True), strict=True))

    def _after(self, model, inputs, output) -> None:
        self._move()
        self._ready.clear()
