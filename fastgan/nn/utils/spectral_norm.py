"""Spectral normalisation as a hook: ``torch.nn.utils.spectral_norm`` on fastgan's kernels."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchSpectralNorm
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.spectral_norm import remove_spectral_norm as _torch_remove

from fastgan.nn.spectral_norm import Groupable, check_options, check_weight, matrix_dim, normalise
from fastgan.nn.spectral_norm_state import AcceptAnyScheme


class SpectralNorm(Groupable, _TorchSpectralNorm):
    """The forward pre-hook. Being a kind of torch's, it is known to whatever looks for that: ``remove_spectral_norm``, the
    state_dict hooks with their version, and code that tests with ``isinstance``."""

    def __init__(self, name: str = "weight", n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        check_options(n_power_iterations, eps)
        self.name, self.dim, self.n_power_iterations, self.eps = name, dim, n_power_iterations, eps
        self._latest: Tensor | None = None

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight, u, v = (getattr(module, self.name + suffix) for suffix in ("_orig", "_u", "_v"))
        return normalise(weight, u, v, self.dim, self.iterations(do_power_iteration), self.eps, True)

    def __call__(self, module: nn.Module, inputs) -> None:
        ready = self.take()
        self._latest = self.compute_weight(module, module.training) if ready is None else ready
        setattr(module, self.name, self._latest)

    def __deepcopy__(self, memo):
        # The module's normalised weight belongs to a graph and can't be copied. A module's hooks are copied before its
        # attributes: leave a copy without the graph for when it is the weight's turn.
        if self._latest is not None and id(self._latest) not in memo:
            memo[id(self._latest)] = self._latest.detach().clone()
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self):
        return self.__dict__ | {"_latest": None}

    @staticmethod
    def apply(module: nn.Module, name: str, n_power_iterations: int, dim: int, eps: float) -> "SpectralNorm":
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _TorchSpectralNorm) and hook.name == name:
                raise RuntimeError(
                    f"spectral_norm: Cannot register two spectral_norm hooks on the same parameter {name}; "
                    f"take the first away with remove_spectral_norm"
                )
        weight = module._parameters.get(name)
        check_weight(module, name, weight)
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(
                f"spectral_norm: dim is {dim}, out of range for a weight of shape {tuple(weight.shape)} "
                f"(expected to be in range of [{-weight.dim()}, {weight.dim() - 1}])"
            )
        fn = SpectralNorm(name, n_power_iterations, dim % weight.dim(), eps)
        with torch.no_grad():
            rows = weight.shape[dim]
            u, v = (weight.new_empty(size).normal_() for size in (rows, weight.numel() // max(1, rows)))
            u, v = F.normalize(u, dim=0, eps=eps), F.normalize(v, dim=0, eps=eps)
        delattr(module, name)
        module.register_parameter(name + "_orig", weight)
        setattr(module, name, weight.data)  # something of this name has to be there before the first forward
        module.register_buffer(name + "_u", u)
        module.register_buffer(name + "_v", v)
        module.register_forward_pre_hook(fn)
        module._register_state_dict_hook(SpectralNormStateDictHook(fn))
        module.register_load_state_dict_pre_hook(AcceptAnyScheme(name, "hook", fn.dim))
        module._register_load_state_dict_pre_hook(SpectralNormLoadStateDictPreHook(fn))
        return fn


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> nn.Module:
    """Divide a module's weight by its largest singular value before every forward, as a hook.

    A drop-in for ``torch.nn.utils.spectral_norm``: same signature, state_dict keys (``<name>_orig``, ``<name>_u``,
    ``<name>_v``) and their version, random draws, order of updates (v, then u; none at registration, none in eval mode) and
    gradients. ``remove_spectral_norm`` takes it away again. Unlike torch's, the module can be copied by ``copy.deepcopy``
    after a forward, as averaging weights (EMA) wants.

    Args:
        module: any module; changed in place.
        name: its parameter, float16, bfloat16, float32 or float64.
        n_power_iterations: per forward in training mode. 0 keeps u and v as they are (torch refuses it).
        eps: lower limit of the norms that u and v are divided by.
        dim: dimension of the weight that the matrix has as rows. Default: 0, for ConvTranspose1d to 3d 1.

    Returns:
        ``module``.

    Raises:
        ValueError: the module has no such parameter, it is None or uninitialized; a negative number of iterations or eps.
        RuntimeError: the parameter has spectral norm already.
        IndexError: ``dim`` is out of range.
        TypeError: the weight is not of a floating dtype.

    Weights of zeros, with NaN in them, and of 16 bits: see :func:`fastgan.spectral_norm`.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks".
    """
    SpectralNorm.apply(module, name, n_power_iterations, matrix_dim(module, dim), eps)
    return module


def remove_spectral_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    """Take the hook of :func:`spectral_norm` (or of torch's) away; the weight stays as last normalised, a parameter again.

    Raises:
        ValueError: ``module`` has no such hook for the parameter ``name``.
    """
    _torch_remove(module, name)
    # torch leaves the hook that reads old state_dicts behind, which then misses keys in a state_dict of the plain module.
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        inner = getattr(wrapped, "hook", wrapped)
        ours = isinstance(inner, AcceptAnyScheme) and inner.to == "hook" and inner.name == name
        if ours or (isinstance(inner, SpectralNormLoadStateDictPreHook) and inner.fn.name == name):
            del hooks[key]
    return module
