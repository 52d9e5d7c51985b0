"""Minibatch features of other libraries: recognised by name, structure and a numeric probe, and served by fastgan's operators.

What the forward has to compute is not taken from the name: candidates are tried against the layer itself on small random
batches, with first and second derivatives, and one that agrees in everything is taken.
"""

import functools
import itertools

import torch
from torch import nn

from fastgan.critic.forward import Snapshot
from fastgan.dropin.report import Skipped
from fastgan.dropin.served import METHODS, is_served, obstacle, swap
from fastgan.functional import minibatch_discrimination, minibatch_stddev
from fastgan.nn import MinibatchDiscrimination, MinibatchStdDev

_GROUP_NAMES = ("group_size", "groups", "stddev_group", "subgroupsize", "sub_group_size", "mbstd_group_size")
_CHANNEL_NAMES = ("num_channels", "new_channels", "channel_groups", "stddev_feat", "num_new_features", "mbstd_num_channels")


def _stddev(layer, x, *, group, channels, **options):
    """``group``, ``channels``: names of the layer's attributes, which may change, or numbers."""
    read = lambda value: getattr(layer, value) if isinstance(value, str) else value  # noqa: E731
    return minibatch_stddev(x, group_size=read(group), num_channels=read(channels), **options)


def _discrimination(layer, x, *, weight, kernels, dims, self_term, mean, place, log_scale=None, bias=None):
    w = getattr(layer, weight)
    w = w.reshape(w.shape[0], kernels, dims)
    if log_scale is not None:
        w = w * (getattr(layer, log_scale).exp() / w.square().sum(0).sqrt())
    features = minibatch_discrimination((x @ w.flatten(1)).unflatten(1, (kernels, dims)), self_term=self_term)
    if mean:
        features = features / (x.shape[0] - 1)
    if bias is not None:
        features = features + getattr(layer, bias)
    return torch.cat([x, features], 1) if place == "after" else torch.cat([features, x], 1) if place == "before" else features


METHODS |= {"stddev": ("forward", _stddev), "discrimination": ("forward", _discrimination)}
_BY = {"stddev": "fastgan.minibatch_stddev", "discrimination": "fastgan.minibatch_discrimination"}


def find(model: nn.Module):
    """Swaps, and layers that look like it but are left, with the reason."""
    for name, module in model.named_modules():
        if is_served(module) or isinstance(module, (MinibatchDiscrimination, MinibatchStdDev)):
            continue
        kind = _looks_like(module)
        if kind is None:
            continue
        try:
            options = _recognise(module, kind)
        except Exception as error:  # somebody else's layer may do anything on a probe
            yield Skipped(name, type(module).__name__, f"could not be probed: {type(error).__name__}: {error}")
            continue
        if isinstance(options, str):
            yield Skipped(name, type(module).__name__, options)
        else:
            yield swap(name, module, kind, _by(kind, options), options)


def _by(kind, options) -> str:
    chosen = {k: v for k, v in options.items() if k in ("self_term", "mean", "layout", "unbiased", "remainder", "log_scale")}
    return f"{_BY[kind]}({', '.join(f'{k}={v!r}' for k, v in chosen.items() if v not in (None, False))})"


def _looks_like(module) -> str | None:
    name = type(module).__name__.lower().replace("_", "")
    batch = "minibatch" in name or "mbd" in name or "batchstd" in name or "mbstd" in name
    if batch and "std" in name:
        return "stddev"
    if batch and ("disc" in name or "mbd" in name or name == "minibatchlayer"):
        return "discrimination"
    return None


def _recognise(module, kind) -> dict | str:
    """The options that reproduce the layer, or why there are none."""
    if why := obstacle(module, "forward"):
        return why
    if next(module.children(), None) is not None:
        return "consists of other modules, whose hooks and weights would be passed over"
    across = [k for k, v in vars(module).items() if v is True and ("sync" in k or "gather" in k)]
    if across:
        return f"{across[0]} is set: it gathers the batch of all ranks; use fastgan.nn with group= in its place"
    tensor = next(module.parameters(), torch.empty(0))
    state = Snapshot(module, tensor.device)
    try:
        with torch.enable_grad():
            candidates, batches = (_stddev_candidates if kind == "stddev" else _discrimination_candidates)(module)
            wanted = [_derivatives(module, module, x) for x in batches]
            for options in candidates:
                if all(w is None or agree(w, _ours(module, kind, options, x)) for w, x in zip(wanted, batches, strict=True)):
                    return options
    finally:
        state.restore()
    return "computes something else than any of the known formulas (probed with first and second derivatives)"


def _ours(module, kind, options, x):
    try:
        return _derivatives(module, functools.partial(METHODS[kind][1], module, **options), x)
    except (ValueError, RuntimeError):
        return None


def _derivatives(module, function, x):
    """Value, gradient and a penalty's gradient; None where the layer raises (a batch that does not divide)."""
    x = x.clone().requires_grad_()
    try:
        y = function(x)
    except (RuntimeError, ValueError, AssertionError):
        return None
    if y.dim() != x.dim() or y.shape[0] != x.shape[0]:
        return y, None
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).sin().view(y.shape)
    wrt = [x, *module.parameters()]
    first = torch.autograd.grad((y * weight * y).sum(), wrt, create_graph=True, allow_unused=True)
    if first[0] is None or not first[0].requires_grad:
        return y, *first
    return y, *first, *torch.autograd.grad(first[0].square().sum(), wrt, allow_unused=True)


def agree(wanted, got) -> bool:
    if got is None or len(wanted) != len(got):
        return False
    for a, b in zip(wanted, got, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
            continue
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(a.dtype, 3e-2)
        a, b = a.detach().double(), b.detach().double()
        if a.shape != b.shape or not bool(((a - b).norm() <= tolerance * a.norm() + 1e-12) & a.isfinite().all()):
            return False
    return True


def _batch(*shape, like, scale=1.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    return x.to(dtype=like.dtype, device=like.device) if like.is_floating_point() else x


def _named(module, names):
    return [key for key in vars(module) if key.lower() in names]


def _stddev_candidates(module):
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        raise ValueError("it has parameters or buffers, which no such layer has")
    numbers = [key for key, value in vars(module).items() if type(value) is int and value > 0]
    groups = _named(module, _GROUP_NAMES) or [*numbers, 4, None]
    channels = _named(module, _CHANNEL_NAMES) or [1]
    eps = next((value for key, value in vars(module).items() if key in ("eps", "epsilon")), 1e-8)
    candidates = [
        {"group": g, "channels": f, "layout": layout, "unbiased": unbiased, "remainder": remainder, "eps": eps}
        for g, f, layout, unbiased, remainder in itertools.product(
            groups, channels, ("strided", "contiguous"), (False, True), ("even", "whole")
        )
    ]
    value = lambda v: getattr(module, v) if isinstance(v, str) else v  # noqa: E731
    g, f = value(groups[0]) or 4, value(channels[0])
    return candidates, [_batch(b, 2 * f, 3, 2, like=torch.empty(0)) for b in (3 * g, g, g + 1, 1)]


def _discrimination_candidates(module):
    by_dim = {p.dim(): key for key, p in module.named_parameters(recurse=False)}
    count = len(list(module.parameters()))
    if count == 1 and 3 in by_dim:
        weight, extra = by_dim[3], {}
        sizes = [tuple(getattr(module, weight).shape[1:])]
    elif count == 1 and 2 in by_dim:
        weight, extra = by_dim[2], {}
        numbers = sorted({v for v in vars(module).values() if type(v) is int and v > 0})
        columns = getattr(module, weight).shape[1]
        sizes = [(k, d) for k, d in itertools.product(numbers, numbers) if k * d == columns]
    elif count == 3 and {1, 2, 3} <= set(by_dim):
        weight, extra = by_dim[3], {"log_scale": by_dim[2], "bias": by_dim[1]}
        sizes = [tuple(getattr(module, weight).shape[1:])]
    else:
        raise ValueError("its parameters are not those of such a layer")
    tensor = getattr(module, weight).detach()
    dims = max(d for _, d in sizes) if sizes else 1
    spread = 1.0 if extra else float(tensor.float().std()) * tensor.shape[0] ** 0.5
    scale = 1.0 / (spread * dims) if spread > 0 else 1.0  # distances around 1: exp() neither 0 nor 1
    candidates = [
        {"weight": weight, "kernels": k, "dims": d, "self_term": s, "mean": m, "place": p, **extra}
        for (k, d), s, m, p in itertools.product(sizes, (False, True), (False, True), ("after", "before", "alone"))
    ]
    return candidates, [_batch(b, tensor.shape[0], like=tensor, scale=scale) for b in (5, 2)]
