"""torch's two forms of spectral norm become fastgan's: the same hook or parametrization object, of another class."""

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchParametrization
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from fastgan.dropin.report import Skipped
from fastgan.dropin.swap import Swap, undo_class, with_class
from fastgan.nn.spectral_norm import check_weight
from fastgan.nn.utils.parametrizations import _Chain, _SpectralNorm
from fastgan.nn.utils.spectral_norm import SpectralNorm

_HOOK_NEEDS, _PARAMETRIZATION_NEEDS = ("_latest", "_group"), ("num_svs", "_group")


def find(model: nn.Module):
    """Swaps, and what has to stay with the reason."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, TorchHook) and not isinstance(hook, SpectralNorm):
                yield _checked(name, module, hook, TorchHook, hook.name, f"{hook.name}_orig", _of_hook)
        for parameter, chain in getattr(module, "parametrizations", {}).items() if parametrize.is_parametrized(module) else ():
            for form in chain:
                if isinstance(form, TorchParametrization):
                    yield _checked(name, module, form, TorchParametrization, parameter, None, _of_parametrization)


def _checked(name, module, form, exact, parameter, key, swap):
    kind = f"spectral norm of {parametrize.type_before_parametrizations(module).__name__}.{parameter}"
    weight = getattr(module, key) if key else module.parametrizations[parameter].original
    try:
        if type(form) is not exact:
            raise TypeError(f"{type(form).__name__} is a subclass of torch's, which may compute something else")
        check_weight(module, parameter, weight)
    except (TypeError, ValueError) as reason:
        return Skipped(name, kind, str(reason))
    return swap(name, kind, module, form, parameter)


def _of_hook(name, kind, module, hook, parameter):
    # the weight as last normalised by torch belongs to a graph: copies of the module are to leave that behind, as ours do
    latest = module.__dict__.get(parameter)
    by = "fastgan.nn.utils.spectral_norm"
    return Swap(name, kind, by, *with_class(hook, SpectralNorm, _latest=latest, _group=None))


def _of_parametrization(name, kind, module, form, parameter):
    apply_form, _ = with_class(form, _SpectralNorm, num_svs=1)
    chain = module.parametrizations[parameter]
    short = len(chain) == 1 and type(chain) is parametrize.ParametrizationList
    apply_chain, _ = with_class(chain, _Chain)

    def apply():
        apply_form()
        if short:
            apply_chain()

    return Swap(name, kind, "fastgan.spectral_norm", apply, lambda: _undo(module, form))


def _undo(module, form):
    if isinstance(form, SpectralNorm):
        undo_class(form, _HOOK_NEEDS)
        return
    undo_class(form, _PARAMETRIZATION_NEEDS)
    for chain in module.parametrizations.values():
        if "_fastgan_was" in chain.__dict__ and any(form is other for other in chain):
            undo_class(chain)


def swapped(module: nn.Module) -> list:
    """Undo functions of the spectral norms of one module that were torch's."""
    forms = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    if parametrize.is_parametrized(module):
        forms += [form for chain in module.parametrizations.values() for form in chain]
    forms = [form for form in forms if "_fastgan_was" in form.__dict__]
    if any(form._group is not None for form in forms):
        raise RuntimeError(
            f"restore: a weight of {type(module).__name__} is in a SpectralNormGroup; call remove() of the group first"
        )
    return [lambda form=form: _undo(module, form) for form in forms]
