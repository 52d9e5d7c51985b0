"""The textbook formulas, by eager double backward."""

import copy

import torch

from benchmarks.reference import gradient as gradient
from benchmarks.reference import listed as listed
from benchmarks.reference import norms as norms
from benchmarks.reference import step as step


def grads(module):
    return [p.grad for p in module.parameters()]


def error(got, want):
    """Norm of the difference over norm of all gradients; None counts as zero."""
    diff = size = 0.0
    for g, w in zip(got, want, strict=False):
        if w is None and g is None:
            continue
        g = torch.zeros_like(w) if g is None else g.double()
        w = torch.zeros_like(g) if w is None else w.double()
        diff += float((g - w).square().sum())
        size += float(w.square().sum())
    return (diff / size) ** 0.5 if size else diff**0.5


def twins(make, seed=0, dtype=torch.float64):
    """Two critics in one state, lazy layers initialised."""
    torch.manual_seed(seed)
    critic = make().to(dtype)
    return critic, None if critic is None else copy.deepcopy(critic)
