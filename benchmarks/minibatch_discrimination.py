"""Minibatch discrimination against broadcasting, cdist, torch.compile and KeOps."""

import importlib.util

import torch
from torch import Tensor

import fastgan
from fastgan.ops.minibatch_discrimination import backward_reference, forward_reference

from .case import OURS, Case, name_of, numbers, sized
from .case import cdist as distances


def broadcast(m: Tensor) -> Tensor:
    return torch.exp(-(m[:, None] - m[None]).abs().sum(-1)).sum(1)


def cdist(m: Tensor) -> Tensor:
    x = m.transpose(0, 1)
    return torch.exp(-distances(x, x, p=1)).sum(-1).T


def keops(m: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    x = m.transpose(0, 1).contiguous()
    distance = (LazyTensor(x[:, :, None]) - LazyTensor(x[:, None])).abs().sum(-1)
    return (-distance).exp().sum(2).squeeze(-1).T


#: Bytes that broadcasting may take for one of its (B, B, K, D) intermediates; it holds several at once.
BROADCAST_BYTES = 1 << 30


def baselines(m: Tensor, double: bool = False) -> dict:
    if double:  # cdist (p = 1), torch.compile and KeOps can't be differentiated twice here
        return {"broadcast": broadcast}
    torch._dynamo.reset()
    found = {"cdist": cdist, "compile": torch.compile(broadcast, dynamic=False)}
    if m.shape[0] * m.numel() * m.element_size() <= BROADCAST_BYTES:
        found["broadcast"] = broadcast
    if m.dtype.itemsize >= 4 and importlib.util.find_spec("pykeops"):
        found["keops"] = keops
    return found


def _features(b: int, k: int, d: int) -> Tensor:
    """Distances of about 1, as a trained layer has them."""
    return torch.randn(b, k, d, generator=torch.Generator().manual_seed(0)) / d


def _forward(function, m):
    def run():
        with torch.no_grad():
            return (function(m),)

    return run


def _forward_backward(function, m):
    x = m.clone().requires_grad_()

    def run():
        out = function(x)
        return torch.autograd.grad(out.sum(), x)

    return run


def _penalty(function, m):
    """The gradient of a gradient penalty: what the layer costs inside a penalised critic."""
    x = m.clone().requires_grad_()

    def run():
        (g,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)

    return run


_RUNS = {"forward": _forward, "forward+backward": _forward_backward, "penalty": _penalty}


def _truth(mode: str, m: Tensor):
    m = m.double()
    if mode == "forward":
        return (forward_reference(m, True),)
    ones = torch.ones(m.shape[:2], dtype=m.dtype)
    if mode == "forward+backward":
        return (backward_reference(ones, m),)
    with fastgan.use_backend("reference"):
        return _penalty(fastgan.minibatch_discrimination, m)()


def _case(shape: tuple[int, int, int], mode: str, goals: dict, dtype=torch.float32) -> Case:
    run = _RUNS[mode]

    def candidates():
        m = _features(*shape).to(dtype)
        functions = {OURS: fastgan.minibatch_discrimination} | baselines(m, mode == "penalty")
        return {name: run(function, m) for name, function in functions.items()}

    b, k, d = shape
    pairs = b * (b - 1) / 2 * k
    # difference, magnitude and sum per coordinate and pair; the derivative takes them again, and a sign and two sums
    flops = {"forward": 3 * d * pairs, "forward+backward": 9 * d * pairs}.get(mode, 0)
    name, truth = sized(shape, dtype), lambda: _truth(mode, _features(*shape).to(dtype))
    return Case("minibatch_discrimination", name, mode, candidates, truth, goals, flops=flops, dtype=name_of(dtype))


def made(size: str, dtype: torch.dtype) -> list[Case]:
    shape = numbers(size, "BxKxD, such as 512x128x16")
    return [_case(shape, mode, {}, dtype) for mode in _RUNS]


_LARGE = {"cdist": 12.0, "compile": 8.0}
CASES = [
    _case((64, 50, 5), "forward+backward", {"best": 8.0}),
    _case((256, 64, 16), "forward", _LARGE),
    _case((256, 64, 16), "forward+backward", _LARGE),
    _case((256, 64, 16), "penalty", {}),
    _case((1024, 64, 16), "forward", _LARGE),
    _case((1024, 64, 16), "forward+backward", _LARGE),
]
