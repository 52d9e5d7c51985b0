"""Spectral normalisation as a parametrization: ``torch.nn.utils.parametrizations.spectral_norm`` on fastgan's kernels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_state
from torch.nn.utils import parametrize

from fastgan._dtypes import accumulate_dtype
from fastgan.functional import top_singular_values
from fastgan.nn.spectral_norm import Groupable, check_num_svs, check_options, check_weight, matrix_dim, normalise
from fastgan.nn.spectral_norm_state import AcceptAnyScheme

_INITIAL_ITERATIONS = 15  # as torch: u and v start out as estimates


class _SpectralNorm(Groupable, nn.Module):
    """weight -> weight / sigma, with the buffers ``_u`` and ``_v`` of torch's class of this name.

    With num_svs, also BigGAN's ``u1``, ... and ``sv0``, ``sv1``, ... of BigGAN's shapes, (1, h) and (1,).
    """

    def __init__(self, weight: Tensor, n_power_iterations=1, dim=0, eps=1e-12, *, target=1.0, at_most=False, num_svs=1):
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(
                f"spectral_norm: dim is {dim}, out of range for a weight of shape {tuple(weight.shape)} "
                f"(expected to be in range of [{-weight.dim()}, {weight.dim() - 1}])"
            )
        check_options(n_power_iterations, eps, target)
        self.dim, self.eps, self.n_power_iterations = dim % weight.dim(), eps, n_power_iterations
        self.target, self.at_most, self.num_svs = target, at_most, num_svs
        if weight.dim() > 1:
            rows = weight.shape[self.dim]
            u, v = (weight.new_empty(size).normal_() for size in (rows, weight.numel() // max(1, rows)))
            self.register_buffer("_u", F.normalize(u, dim=0, eps=eps))
            self.register_buffer("_v", F.normalize(v, dim=0, eps=eps))
            with torch.no_grad():
                normalise(weight, self._u, self._v, self.dim, _INITIAL_ITERATIONS, eps, False)
            check_num_svs(num_svs, rows, weight.numel() // max(1, rows))
            if num_svs > 1:
                for i in range(1, num_svs):
                    self.register_buffer(f"u{i}", weight.new_empty(1, rows).normal_())
                for i in range(num_svs):
                    self.register_buffer(f"sv{i}", weight.new_ones(1))
                self._track(weight, _INITIAL_ITERATIONS)
        else:
            check_num_svs(num_svs, 1, 1)

    @torch.no_grad()
    def _track(self, weight: Tensor, n_power_iterations: int) -> None:
        """Advance the estimates of further singular values; one that is zero or not finite is not taken."""
        buffers = self._buffers
        kept = [buffers[f"u{i}"] for i in range(1, self.num_svs)]
        u = torch.cat([buffers["_u"][None], *kept]).to(accumulate_dtype(weight.dtype))
        new_u, _, sigma = top_singular_values(weight, u, dim=self.dim, n_power_iterations=n_power_iterations, eps=self.eps)
        usable = new_u.isfinite().all() & new_u.any(1).all()
        torch._foreach_copy_(kept, list(torch.where(usable, new_u, u)[1:, None]))
        torch._foreach_copy_([buffers[f"sv{i}"] for i in range(self.num_svs)], list(sigma[:, None]))

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:  # a vector is its own singular vector
            norm = torch.linalg.vector_norm(weight).clamp_min(self.eps) / self.target
            return weight / (norm.clamp_min(1.0) if self.at_most else norm)
        if self.num_svs > 1 and (iterations := self.iterations(self.training)):
            self._track(weight, iterations)
        steps = self.n_power_iterations if self.training else 0
        if self._group is not None:
            ready = self.take()
            if ready is not None:
                return ready
            steps = self.iterations(self.training)
        buffers = self._buffers  # not by __getattr__, which takes longer
        return normalise(weight, buffers["_u"], buffers["_v"], self.dim, steps, self.eps, False, self.target, self.at_most)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


class _Chain(parametrize.ParametrizationList):
    """What torch has of a parametrization and hooks around it, less the way through both where there is one and no hook."""

    def __call__(self):
        modules = self._modules
        if len(modules) == 1 and not torch.compiler.is_compiling():
            only, original = modules["0"], self._parameters.get("original")
            if original is not None and not (_hooks(self) or _hooks(only) or module_state._has_any_global_hook()):
                return only.forward(original)
        return super().__call__()


def _hooks(module: nn.Module):
    found = vars(module)  # a plain look-up each: this runs at every read of every weight
    return found["_forward_pre_hooks"] or found["_forward_hooks"] or found["_backward_pre_hooks"] or found["_backward_hooks"]


def _shorten_read(module: nn.Module, name: str) -> None:
    """Reading the weight, without the two look-ups through ``__getattr__`` that torch's property makes."""
    kind = type(module)  # the module's own: register_parametrization has made it
    theirs = vars(kind)[name]

    def read(self):
        return theirs.fget(self) if parametrize._cache_enabled else self._modules["parametrizations"]._modules[name]()

    setattr(kind, name, property(read, theirs.fset))


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    target: float = 1.0,
    at_most: bool = False,
    num_svs: int = 1,
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
        num_svs: keep estimates of this many of the largest singular values, for logging; the weight is divided by the first.
            They are BigGAN's buffers, in the parametrization: ``sv0``, ``sv1``, ... of shape (1,), and ``u1``, ... (1, h). Each
            access in training mode then also takes :func:`fastgan.functional.top_singular_values`'s products.

    Returns:
        ``module``.

    Raises:
        ValueError: the module has no such parameter, it is None or uninitialized; a negative number of iterations or eps; a
            target that is not positive; ``num_svs`` below 1 or above the smaller side of the matrix.
        IndexError: ``dim`` is out of range.
        TypeError: the weight is not of a floating dtype.

    Differences from torch: a weight of zeros stays zero and keeps u, v and its gradient finite, and one with NaN or Inf in it
    leaves u and v as they were, where torch fills them all with NaN. ``load_state_dict`` accepts any scheme of
    :func:`fastgan.convert_spectral_state_dict`. Weights of 16 bits have u and v of 16 bits, as after
    ``.half()`` in torch, but the arithmetic is float32.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks"; ``at_most`` is TF-GAN's
    ``equality_constrained=False``; ``num_svs`` is of Brock et al. 2018, "Large Scale GAN Training for High Fidelity Natural
    Image Synthesis".
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"spectral_norm: {type(module).__name__} has no parameter or buffer with name {name!r}; "
            f"it has {', '.join(repr(n) for n, _ in module.named_parameters(recurse=False)) or 'none'}"
        )
    check_weight(module, name, weight)
    options = {"target": target, "at_most": at_most, "num_svs": num_svs}
    made = _SpectralNorm(weight, n_power_iterations, matrix_dim(module, dim), eps, **options)
    parametrize.register_parametrization(module, name, made)
    chain = module.parametrizations[name]
    if len(chain) == 1:
        chain.__class__ = _Chain
        _shorten_read(module, name)
    if weight.dim() > 1:
        module.register_load_state_dict_pre_hook(AcceptAnyScheme(name, "parametrize", made.dim))
    return module
