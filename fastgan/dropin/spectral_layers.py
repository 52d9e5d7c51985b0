"""Spectral norm in layers of other libraries: BigGAN-PyTorch's, mimicry's, torchgan's and christiancosgrove's wrappers.

Recognised by structure. What is copied from project to project is also changed on the way (sigma cut off from the gradient,
clamped, or by a singular value decomposition), so each layer is probed: normalised weight, gradient and what becomes of its
vectors, in training and in evaluation. The rules for weights of zeros or that are not finite are fastgan's: u and v stay.
"""

import torch
from torch import Tensor, nn

from fastgan._dtypes import accumulate_dtype
from fastgan.dropin.layers import agree
from fastgan.dropin.report import Skipped
from fastgan.dropin.served import METHODS, is_served, obstacle, swap
from fastgan.functional import top_singular_values
from fastgan.ops.spectral_norm import normalise_one

_EPS = 1e-12  # of those that have no option for it


def _normalise(weight: Tensor, u: Tensor, n_power_iterations: int, eps: float, v: Tensor | None = None):
    """(normalised, u, v, sigma). u and v may be stored in 16 bits."""
    dtype = accumulate_dtype(weight.dtype)
    v = weight.new_zeros(weight[0].numel(), dtype=dtype) if v is None else v.detach().to(dtype)
    return normalise_one(weight, u.detach().to(dtype), v, 0, n_power_iterations, eps, True, 1.0, False)


def _store(into: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(into, [value.view(to.shape) for to, value in zip(into, values, strict=True)])


def _biggan(layer) -> Tensor:
    weight, vectors = layer.weight, layer.u
    steps = layer.num_itrs if layer.training else 1  # what isn't stored starts again from the same u
    if len(vectors) == 1:
        normalised, u, _, sigma = _normalise(weight, vectors[0][0], steps, layer.eps)
        u, sigma = [u], [sigma]
    else:
        start = torch.cat(vectors).to(accumulate_dtype(weight.dtype))
        u, _, sigma = top_singular_values(weight, start, n_power_iterations=steps, eps=layer.eps)
        normalised = (weight / sigma[0]).to(weight.dtype)
    if layer.training:
        _store([*vectors, *layer.sv], [*u, *(value.detach() for value in sigma)])
    return normalised


def _mimicry(layer) -> Tensor:
    normalised, u, _, sigma = _normalise(layer.weight, layer.sn_u[0], layer.num_iters, layer.eps)
    if layer.training:
        _store([layer.sn_u, layer.sn_sigma], [u, sigma])
    return normalised


def _wrapped(layer, weight: Tensor, u: Tensor, v: Tensor) -> None:
    normalised, new_u, new_v, _ = _normalise(weight, u, layer.power_iterations, _EPS, v)
    _store([u, v], [new_u, new_v])
    setattr(layer.module, layer.name, normalised)


def _cosgrove(layer) -> None:
    _wrapped(layer, *(getattr(layer.module, f"{layer.name}_{part}") for part in ("bar", "u", "v")))


def _torchgan(layer, *args):
    _wrapped(layer, layer.w_bar, layer.u, layer.v)
    return layer.module.forward(*args)


METHODS |= {
    "biggan": ("W_", _biggan),
    "mimicry": ("sn_weights", _mimicry),
    "cosgrove": ("_update_u_v", _cosgrove),
    "torchgan": ("forward", _torchgan),
}


def _kind(module: nn.Module) -> str | None:
    """Which of them a layer looks like; "" for one of whose form nothing is known."""
    has = lambda *names: all(hasattr(module, name) for name in names)  # noqa: E731
    if has("W_", "weight", "u0", "sv0", "num_svs", "num_itrs"):
        return "biggan"
    if has("sn_weights", "weight", "sn_u", "sn_sigma", "num_iters"):
        return "mimicry"
    wraps = isinstance(getattr(module, "module", None), nn.Module) and isinstance(getattr(module, "name", None), str)
    if wraps and has("_update_u_v", "power_iterations") and hasattr(module.module, f"{module.name}_bar"):
        return "cosgrove"
    if wraps and has("w_bar", "u", "v", "power_iterations"):
        return "torchgan"
    name = type(module).__name__.lower().replace("_", "")
    return "" if (wraps and "spectralnorm" in name) or name in ("snconv2d", "snlinear", "snembedding") else None


def find(model: nn.Module):
    """Swaps, and layers that look like it but are left, with the reason."""
    for name, module in model.named_modules():
        kind = None if is_served(module) else _kind(module)
        if kind is None:
            continue
        why = _why_not(module, kind)
        if why:
            yield Skipped(name, type(module).__name__, f"another library's spectral norm: {why}")
        else:
            yield swap(name, module, kind, f"fastgan.spectral_normalize, as {kind}", {})


def _why_not(module, kind) -> str:
    if not kind:
        return "of a form that is not known; a model made with fastgan.spectral_norm loads its checkpoints"
    method, ours = METHODS[kind]
    if why := obstacle(module, method):
        return why
    try:
        theirs = getattr(type(module), method)
        same = all(agree(_observe(module, kind, theirs, mode), _observe(module, kind, ours, mode)) for mode in (True, False))
    except Exception as error:  # somebody else's layer may do anything
        return f"could not be probed: {type(error).__name__}: {error}"
    return "" if same else "computes something else (probed: normalised weight, gradient, what becomes of u and v)"


def _observe(module, kind, method, training: bool) -> tuple:
    """Normalised weight, its gradient and what is stored, after which everything is as it was."""
    wrapper = kind in ("cosgrove", "torchgan")
    holder = module.module if wrapper else module
    if kind == "cosgrove":
        weight = getattr(holder, f"{module.name}_bar")
    else:
        weight = module.w_bar if kind == "torchgan" else module.weight
    others = [t for t in (*module.parameters(), *module.buffers()) if t is not weight]
    stored = [(t, t.data, t.detach().clone()) for t in others]
    missing = object()
    attributes = {key: vars(holder).get(key, missing) for key in ("forward", getattr(module, "name", ""))}
    needs, mode = weight.requires_grad, module.training
    try:
        module.training = training
        weight.requires_grad_(True)
        if kind == "torchgan":
            holder.forward = lambda *args: None  # the weight is what matters, not what the module does with it
        with torch.enable_grad():
            result = method(module)
            result = getattr(holder, module.name) if wrapper else result
            wave = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=result.device).sin().view(result.shape)
            (gradient,) = torch.autograd.grad((result * wave).sum(), weight)
        return result.detach(), gradient, *(t.detach().clone() for t in others)
    finally:
        for tensor, data, value in stored:
            tensor.data = data.copy_(value)
        weight.requires_grad_(needs)
        for key, value in attributes.items():
            vars(holder).pop(key, None)
            if value is not missing:
                vars(holder)[key] = value
        module.training = mode
