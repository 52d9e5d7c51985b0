"""Spectral normalisation as a parametrization: ``torch.nn.utils.parametrizations.spectral_norm`` on fastgan's kernels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_state
from torch.nn.utils import parametrize

from fastgan.nn.spectral_norm import Groupable, check_options, check_weight, matrix_dim, normalise
from fastgan.nn.spectral_norm_state import AcceptAnyScheme

_INITIAL_ITERATIONS = 15  # as torch: u and v start out as estimates


class _SpectralNorm(Groupable, nn.Module):
    """weight -> weight / sigma, with the buffers ``_u`` and ``_v`` of torch's class of this name."""

    def __init__(self, weight: Tensor, n_power_iterations=1, dim=0, eps=1e-12, *, target=1.0, at_most=False):
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(
                f"spectral_norm: dim is {dim}, out of range for a weight of shape {tuple(weight.shape)} "
                f"(expected to be in range of [{-weight.dim()}, {weight.dim() - 1}])"
            )
        check_options(n_power_iterations, eps, target)
        self.dim, self.eps, self.n_power_iterations = dim % weight.dim(), eps, n_power_iterations
        self.target, self.at_most = target, at_most
        if weight.dim() > 1:
            rows = weight.shape[self.dim]
            u, v = (weight.new_empty(size).normal_() for size in (rows, weight.numel() // max(1, rows)))
            self.register_buffer("_u", F.normalize(u, dim=0, eps=eps))
            self.register_buffer("_v", F.normalize(v, dim=0, eps=eps))
            with torch.no_grad():
                normalise(weight, self._u, self._v, self.dim, _INITIAL_ITERATIONS, eps, False)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:  # a vector is its own singular vector
            norm = torch.linalg.vector_norm(weight).clamp_min(self.eps) / self.target
            return weight / (norm.clamp_min(1.0) if self.at_most else norm)
        ready = self.take()
        if ready is not None:
            return ready
        iterations, buffers = self.iterations(self.training), self._buffers  # not by __getattr__, which takes longer
        return normalise(weight, buffers["_u"], buffers["_v"], self.dim, iterations, self.eps, False, self.target, self.at_most)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


class _Chain(parametrize.ParametrizationList):
    """What torch has of a parametrization and hooks around it, less the way through both where there is one and no hook."""

    def __call__(self):
        if len(self._modules) == 1 and not torch.compiler.is_compiling():
            only = self._modules["0"]
            if not (_hooks(self) or _hooks(only) or module_state._has_any_global_hook()):
                return only.forward(self.original)
        return super().__call__()


def _hooks(module: nn.Module):
    return module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    target: float = 1.0,
    at_most: bool = False,
) -> nn.Module:
    r"""Divide a module's weight by its largest singular value whenever it is used, as a parametrization.

    A drop-in for ``torch.nn.utils.parametrizations.spectral_norm``: same signature, state_dict keys
    (``parametrizations.<name>.original``, ``parametrizations.<name>.0._u``, ``..._v``), random draws, order of updates (u, then
    v; 15 iterations at construction, one per access of the weight in training mode, none in eval mode) and gradients.

    Args:
        module: any module; changed in place.
        name: its parameter. Of any rank and in float16, bfloat16, float32 or float64; a vector is divided by its length.
        n_power_iterations: per access in training mode. 0 keeps u and v as they are (torch refuses it).
        eps: lower limit of the norms that u and v are divided by.
        dim: dimension of the weight that the matrix has as rows. Default: 0, for ConvTranspose1d to 3d 1.
        target: normalise to this largest singular value instead of 1.
        at_most: leave weights alone whose largest singular value is not above ``target``: :math:`W / \max(1, \sigma / target)`.

    Returns:
        ``module``.

    Raises:
        ValueError: the module has no such parameter, it is None or uninitialized; a negative number of iterations or eps; a
            target that is not positive.
        IndexError: ``dim`` is out of range.
        TypeError: the weight is not of a floating dtype.

    Differences from torch: a weight of zeros stays zero and keeps u, v and its gradient finite, and one with NaN or Inf in it
    leaves u and v as they were, where torch fills them all with NaN. ``load_state_dict`` accepts any scheme of
    :func:`fastgan.convert_spectral_state_dict`. Weights of 16 bits have u and v of 16 bits, as after
    ``.half()`` in torch, but the arithmetic is float32.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks"; ``at_most`` is TF-GAN's
    ``equality_constrained=False``.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"spectral_norm: {type(module).__name__} has no parameter or buffer with name {name!r}; "
            f"it has {', '.join(repr(n) for n, _ in module.named_parameters(recurse=False)) or 'none'}"
        )
    check_weight(module, name, weight)
    made = _SpectralNorm(weight, n_power_iterations, matrix_dim(module, dim), eps, target=target, at_most=at_most)
    parametrize.register_parametrization(module, name, made)
    chain = module.parametrizations[name]
    if len(chain) == 1:
        chain.__class__ = _Chain
    if weight.dim() > 1:
        module.register_load_state_dict_pre_hook(AcceptAnyScheme(name, "parametrize", made.dim))
    return module
