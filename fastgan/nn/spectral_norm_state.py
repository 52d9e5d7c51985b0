"""Spectral norm's checkpoints: between torch's two key schemes and those of the model zoos."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: scheme -> keys of weight, u, v (None where it isn't kept) and sigma, after the module's prefix; {} is the parameter's name
_KEYS = {
    "hook": ("{}_orig", "{}_u", "{}_v", None),
    "parametrize": ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v", None),
    "biggan": ("{}", "u0", None, "sv0"),
    "mimicry": ("{}", "sn_u", None, "sn_sigma"),
    "torchgan": ("w_bar", "u", "v", None),
    "cosgrove": ("module.{}_bar", "module.{}_u", "module.{}_v", None),
}
#: torch's forms divide by u^T W v as stored. The others take one iteration from u (v, then u) in every forward, in eval too.
_AS_STORED = ("hook", "parametrize")
#: where BigGAN's layers, and fastgan's with num_svs, have their estimates of further singular values: u1, ... and sv0, sv1, ...
_FURTHER = {"biggan": "", "parametrize": "parametrizations.{}.0."}
#: these wrap the layer, whose other parameters (the bias) are then one level down
_WRAPPERS = ("torchgan", "cosgrove")


@dataclass
class _Layer:
    """One normalised weight found in a state_dict."""

    scheme: str
    prefix: str
    name: str

    def keys(self, scheme: str | None = None) -> list[str | None]:
        return [key and self.prefix + key.format(self.name) for key in _KEYS[scheme or self.scheme]]


def _is_further(name: str) -> bool:
    return name.rstrip("0123456789") in ("u", "sv") and name[-1].isdigit()


def _found_at(state: Mapping, key: str, name: str | None = None) -> _Layer | None:
    """The layer whose weight is at ``key``."""
    for scheme, (weight_key, *_) in _KEYS.items():
        before, parameter, after = weight_key.partition("{}")
        if not key.endswith(after) or (scheme == "torchgan" and not ("." + key).endswith(".w_bar")):
            continue
        head = key[: len(key) - len(after)]
        if not parameter:
            layer = _Layer(scheme, key[: len(key) - len(weight_key)], "weight")
        elif before:
            prefix, separator, own = head.rpartition(before)
            if not separator or "." in own or (prefix and not prefix.endswith(".")):
                continue
            layer = _Layer(scheme, prefix, own)
        else:
            prefix, dot, own = head.rpartition(".")
            if scheme in ("biggan", "mimicry") and own != "weight":
                continue  # their keys of u don't say whose it is, but they normalise nothing else
            layer = _Layer(scheme, prefix + dot, own)
        if layer.name and name in (None, layer.name) and all(k is None or k in state for k in layer.keys()[:3]):
            return layer
    return None


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=0, eps=1e-12)


def _dim_of(weight: Tensor, u: Tensor, dim: int | None, layer: _Layer) -> int:
    """Which dimension u belongs to: dim 0 of the two where both fit and nothing was said."""
    candidates = [
        d for d in ((0, 1) if dim is None else (dim % weight.dim(),)) if d < weight.dim() and weight.shape[d] == u.numel()
    ]
    if not candidates:
        raise ValueError(
            f"convert_spectral_state_dict: {layer.keys()[1]} has {u.numel()} elements, which is no dimension that "
            f"{layer.keys()[0]} {tuple(weight.shape)} could have as rows"
        )
    return candidates[0]


def _convert_layer(state: dict, layer: _Layer, to: str, dim: int | None) -> None:
    weight_key, u_key, v_key, sigma_key = layer.keys()
    weight, u = state.pop(weight_key), state.pop(u_key)
    v = state.pop(v_key) if v_key else None
    if sigma_key:
        state.pop(sigma_key, None)
    dtype, u = u.dtype, u.flatten().double()
    dim = _dim_of(weight, u, dim, layer)
    matrix = weight.detach().double().movedim(dim, 0).reshape(u.numel(), -1)
    if to not in _AS_STORED and dim != 0:
        raise ValueError(
            f"convert_spectral_state_dict: {weight_key} is normalised with dimension {dim} as rows, the scheme {to!r} knows "
            f"only 0, and its outputs would differ; convert to one of {', '.join(map(repr, _AS_STORED))}"
        )
    if layer.scheme in _AS_STORED:
        v = v.flatten().double()
        if to not in _AS_STORED:
            # The u whose iteration gives this v: what the other library computes is then what was stored.
            u = _unit(
                torch.linalg.lstsq(matrix.T, v[:, None], driver="gelsd" if matrix.device.type == "cpu" else None)[0][:, 0]
            )
    else:
        v = _unit(matrix.T @ u)
        if to in _AS_STORED:
            u = _unit(matrix @ v)
    if layer.scheme in _FURTHER:
        holder = layer.prefix + _FURTHER[layer.scheme].format(layer.name)
        for key in [k for k in state if k.startswith(holder) and _is_further(k[len(holder) :])]:
            value = state.pop(key)  # nothing is divided by these, and other layers have no place for them
            if to == "biggan":
                state[layer.prefix + key[len(holder) :]] = value
    new_weight, new_u, new_v, new_sigma = layer.keys(to)
    row = (1, -1) if to in ("biggan", "mimicry") else (-1,)
    state[new_weight], state[new_u] = weight, u.to(dtype).view(row)
    if new_v:
        state[new_v] = v.to(dtype)
    if new_sigma:
        state[new_sigma] = (matrix @ _unit(matrix.T @ u)).norm().to(dtype).view(1)
    before, after = (layer.prefix + "module." * (scheme in _WRAPPERS) for scheme in (layer.scheme, to))
    if before != after:
        own = set(layer.keys(to))
        for key in [k for k in state if k.startswith(before) and "." not in k[len(before) :] and k not in own]:
            state[after + key[len(before) :]] = state.pop(key)


def convert_spectral_state_dict(sd: Mapping[str, Tensor], to: str, *, dims: Mapping[str, int] | None = None) -> dict:
    """A state_dict with every spectrally normalised weight in another library's keys; the scheme it has is recognised.

    ========================  ================================================================================
    ``"hook"``                ``torch.nn.utils.spectral_norm``: ``weight_orig``, ``weight_u``, ``weight_v``
    ``"parametrize"``         ``torch.nn.utils.parametrizations.spectral_norm``: ``parametrizations.weight.original``, ...
    ``"biggan"``              BigGAN-PyTorch's ``SNConv2d``, ...: ``weight``, ``u0`` (1, h), ``sv0``
    ``"mimicry"``             mimicry's ``SNConv2d``, ...: ``weight``, ``sn_u`` (1, h), ``sn_sigma``
    ``"torchgan"``            torchgan's ``SpectralNorm2d``: ``w_bar``, ``u``, ``v``, ``module.bias``
    ``"cosgrove"``            christiancosgrove's ``SpectralNorm``: ``module.weight_bar``, ``module.weight_u``, ...
    ========================  ================================================================================

    In eval mode the converted model's outputs are those of the model that the state_dict comes from. torch's two divide by
    sigma of the u and v they store, the others by sigma after an iteration that starts from u, which is therefore moved on by
    that iteration in one direction and solved for in the other. The latter is exact from "hook" as its last forward left it;
    from "parametrize" the other library's sigma is half an iteration more accurate than the one stored.

    Layers of one state_dict may be in different schemes. Modules normalised by fastgan do this by themselves when they load.

    Args:
        sd: a state_dict; left as it is. Tensors that need no conversion are shared with the result.
        to: the scheme wanted.
        dims: module path -> dimension of the weight that u belongs to, for square weights normalised along dimension 1
            (ConvTranspose with as many channels in as out). Elsewhere the length of u tells.

    Returns:
        A new dict of sd's class, with its metadata.

    Raises:
        ValueError: an unknown ``to``; u of a length that fits no dimension; a weight normalised along dimension 1, for a
            scheme that knows none but 0.
    """
    if to not in _KEYS:
        raise ValueError(f"convert_spectral_state_dict: to is {to!r}, expected one of {', '.join(map(repr, _KEYS))}")
    state = type(sd)(sd) if isinstance(sd, dict) else dict(sd)
    metadata = {key: dict(value) for key, value in getattr(sd, "_metadata", {}).items()}
    for key in list(sd):
        layer = _found_at(sd, key)
        if layer is None or layer.scheme == to:
            continue
        path = layer.prefix.rstrip(".")
        _convert_layer(state, layer, to, (dims or {}).get(path))
        versions = metadata.setdefault(path, {})
        versions.pop("spectral_norm", None)
        if to == "hook":
            versions["spectral_norm"] = {f"{layer.name}.version": 1}
    if metadata and hasattr(state, "__dict__"):
        state._metadata = metadata
    return state


class AcceptAnyScheme:
    """A load_state_dict pre-hook of a module: its own weight, found in any scheme, is loaded.

    With estimates of further singular values (num_svs) BigGAN's are loaded into them, and a state_dict without any leaves
    them as they are.
    """

    def __init__(self, name: str, to: str, dim: int):
        self.name, self.to, self.dim = name, to, dim

    def __call__(self, module: nn.Module, state_dict, prefix, *_) -> None:
        if hasattr(module, "parametrizations") != (self.to == "parametrize"):
            return  # taken away since
        for key in [k for k in state_dict if k.startswith(prefix)]:
            layer = _found_at(state_dict, key, self.name)
            if layer is not None and layer.prefix == prefix:
                if self.to == "parametrize":
                    for further, value in module.parametrizations[self.name][0].named_buffers():
                        if _is_further(further):
                            found = state_dict.get(prefix + further, value) if layer.scheme == "biggan" else value
                            state_dict.setdefault(prefix + _FURTHER["parametrize"].format(self.name) + further, found)
                if layer.scheme != self.to:
                    _convert_layer(state_dict, layer, self.to, self.dim)
                return
