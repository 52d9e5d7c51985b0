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
            self._places = [(module, name + suffix) for suffix in ("_orig", "_u", "_v")]
            self.training_of = module
        else:
            self._places = [(module.parametrizations[name], "original"), (form, "_u"), (form, "_v")]
            self.training_of = form

    @property
    def weight(self) -> Tensor:
        return getattr(*self._places[0])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, u and v."""
        weight, u, v = self._places
        return getattr(*weight), getattr(*u), getattr(*v)

    @property
    def options(self) -> tuple:
        form = self.form
        return form.n_power_iterations, form.eps, self.hook, getattr(form, "target", 1.0), getattr(form, "at_most", False)


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
    outside the model's forward, or a second time in it, are normalised for themselves, as without group.

    u and v stay the modules' buffers: state_dicts don't change. They are never saved for backward, so that what
    ``DistributedDataParallel`` broadcasts into them does no harm; ranks with equal weights compute equal bits. Backward
    hands out all weights' gradients at once, when the last is known.

    "per_step" notices in-place changes by the weights' version counters, which ``optimizer.step()`` and ``load_state_dict``
    raise. Writing through ``weight.data`` doesn't; call ``group.refresh()`` after that.

    Raises:
        ValueError: an unknown ``refresh``; a model without weights that fastgan normalises.
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
        self._per_step, self.frozen, self._stale = refresh == "per_step", False, True
        self._versions: list[tuple] = []
        #: form -> (normalised weight, u, v), the last two None where they don't advance; until the layer reads it
        self.ready: dict = {}
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
        self.ready.clear()

    def _has_changed(self) -> bool:
        if not self._per_step:
            return True
        versions = [(id(member.weight), member.weight._version) for member in self._members]
        changed = self._stale or versions != self._versions
        if not self.frozen:
            self._stale, self._versions = False, versions
        return changed

    def _before(self, model, inputs) -> None:
        iterate = not self.frozen and self._has_changed()
        batches: dict[tuple, tuple[list, ...]] = {}
        for member in self._members:
            weight, u, v = member.tensors()
            if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "full_tensor"):
                raise RuntimeError(
                    "SpectralNormGroup: a weight is sharded over ranks (DTensor), and no rank has all of its rows; "
                    "call group.remove() and normalise layer by layer, or leave these layers unsharded"
                )
            iterations, *rest = member.options
            steps = iterations if iterate and member.training_of.training else 0
            batch = batches.setdefault((steps, *rest, weight.device, weight.dtype), ([], [], [], [], []))
            for values, value in zip(batch, (member.form, weight, u, v, member.form.dim), strict=True):
                values.append(value)
        for (*options, _, dtype), (forms, weights, u, v, dims) in batches.items():
            if dtype in (torch.float16, torch.bfloat16):
                u, v = [x.float() for x in u], [x.float() for x in v]
            results = _ops.normalise_many(weights, u, v, dims, *options)
            for form, normalised, new_u, new_v in zip(forms, *results, strict=True):
                # A layer that this forward never reads doesn't advance, as without group: u and v wait for the read.
                self.ready[form] = (normalised, new_u, new_v) if options[0] else (normalised, None, None)

    def _after(self, model, inputs, output) -> None:
        self.ready.clear()
