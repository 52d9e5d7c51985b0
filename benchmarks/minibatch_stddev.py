"""Minibatch standard deviation at StyleGAN2's shapes against the formula in torch operators, eager and compiled."""

import math

import torch

import fastgan

from .case import OURS, Case, name_of, numbers, sized


def textbook(x):
    """StyleGAN2's arithmetic, groups of 4."""
    b, c, h, w = x.shape
    y = x.reshape(4, b // 4, c * h * w)
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean(1)
    return torch.cat([x, y.reshape(-1, 1, 1, 1).repeat(4, 1, h, w)], 1)


def _forward_backward(function, x, weight):
    def run():
        y = function(x)
        return y, *torch.autograd.grad(y, x, weight)

    return run


def _penalty(function, x, weight):
    """The gradient of a gradient penalty: what the layer costs inside a penalised critic."""

    def run():
        (g,) = torch.autograd.grad(function(x), x, weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, weight))

    return run


def _case(shape: tuple[int, ...], mode: str, memory_format=torch.contiguous_format, dtype=torch.float32) -> Case:
    double = mode == "penalty"
    run = _penalty if double else _forward_backward

    def start(work=dtype):
        generator = torch.Generator().manual_seed(0)
        b, c, h, w = shape
        x = torch.randn(shape, generator=generator).to(dtype).to(work, memory_format=memory_format)
        weight = torch.randn(b, c + 1, h, w, generator=generator).to(dtype).to(work, memory_format=memory_format)
        return x.requires_grad_(), weight.requires_grad_(double)

    def candidates():
        found = {OURS: run(fastgan.minibatch_stddev, *start()), "eager": run(textbook, *start())}
        if not double:  # what torch.compile returns can't be differentiated twice
            found["compile"] = run(torch.compile(textbook, dynamic=False), *start())
        return found

    name = sized(shape, dtype) + ("" if memory_format == torch.contiguous_format else "-channels_last")
    # what the penalty hands back has 1 / sigma^3 in it, and of 4 samples some nearly agree
    truth = lambda: run(textbook, *start(torch.float64))()  # noqa: E731
    moves = 0 if double else 5 * math.prod(shape) * dtype.itemsize  # x, y; the gradients of both and x again
    goals, kind = {"eager": 3.0}, name_of(dtype)
    return Case("minibatch_stddev", name, mode, candidates, truth, goals, 1e-3, moves=moves, dtype=kind)


def made(size: str, dtype: torch.dtype) -> list[Case]:
    form = "BxCxHxW with B a multiple of 4, such as 32x256x8x8"
    shape = numbers(size, form)
    if shape[0] % 4:
        raise ValueError(f"size {size}: expected {form}")
    return [_case(shape, mode, dtype=dtype) for mode in ("forward+backward", "penalty")]


CASES = [
    *(_case((batch, 512, 4, 4), "forward+backward") for batch in (4, 16, 64)),
    _case((64, 512, 4, 4), "forward+backward", torch.channels_last),
    *(_case((batch, 512, 4, 4), "penalty") for batch in (4, 16, 64)),
]
