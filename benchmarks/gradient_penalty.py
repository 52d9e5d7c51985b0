"""The penalty of given per-sample gradients and its derivative with respect to them, against the textbook formula: in one call,
as the critic step does, and through autograd, as ``penalty_from_output`` does.

Also ``tangent_combine``, the critic step's elementwise work, against the same in torch operators.
"""

import math

import torch
import torch.nn.functional as F

from fastgan.ops import gradient_penalty as op
from fastgan.ops import tangent_combine

from .case import OURS, Case, name_of, numbers, sized


def _wgan_gp(g):
    return 10.0 * (g.flatten(1).norm(2, dim=1) - 1).square().mean()


def _r1(g):
    return 5.0 * g.flatten(1).square().sum(1).mean()


FORMS = {
    "WGAN-GP": (_wgan_gp, ("gradient_penalty", 10.0, 1.0, False, 2.0)),
    "R1": (_r1, ("zero_centered", 10.0, 1.0, False, 2.0)),
}


def _both(formula, g):
    def run():
        value = formula(g)
        return value, *torch.autograd.grad(value, g)

    return run


def _in_one_call(form, g):
    def run():
        penalty, _, _, seed = op.forward(g, *form)
        return penalty, seed

    return run


def _case(shape, mode, dtype=torch.float32, autograd=False) -> Case:
    textbook, form = FORMS[mode]
    ours = (lambda g: _both(lambda g: op.forward(g, *form)[0], g)) if autograd else (lambda g: _in_one_call(form, g.detach()))

    def start():
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5 / 8
        return g.to(dtype).requires_grad_()

    def candidates():
        # dynamic=False: inductor's best for the one shape; in float32 or more, as 16 bits overflow the textbook's sums
        wide = torch.promote_types(dtype, torch.float32)
        compiled = torch.compile(lambda g: textbook(g.to(wide)), dynamic=False)
        return {
            OURS: ours(start()),
            "eager": _both(lambda g: textbook(g.to(wide)), start()),
            "compile": _both(compiled, start()),
        }

    def truth():
        g = start().detach().double().requires_grad_()
        return _both(textbook, g)()

    mode += " autograd" if autograd else ""
    moves = 2 * math.prod(shape) * dtype.itemsize  # the gradient, and the penalty's derivative
    goals, kind = {"eager": 3.0}, name_of(dtype)
    return Case("gradient_penalty", sized(shape, dtype), mode, candidates, truth, goals, moves=moves, dtype=kind)


def _combine_case(shape, dtype=torch.float32) -> Case:
    def start():
        torch.manual_seed(0)
        t, a, factors = torch.randn(shape), torch.randn(shape), torch.randn(shape[0])
        return t.to(dtype), F.leaky_relu(a, 0.2).to(dtype), factors.to(torch.promote_types(dtype, torch.float32))

    def eager(t, a, factors):
        passed = torch.ops.aten.leaky_relu_backward(t, a, 0.2, False)
        return passed, torch.addcmul(passed, a, factors.to(a.dtype).view(-1, *[1] * (a.dim() - 1)))

    def candidates():
        values = start()
        compiled = torch.compile(eager, dynamic=False)
        return {
            OURS: lambda: tangent_combine.forward(*values, 0.2),
            "eager": lambda: eager(*values),
            "compile": lambda: compiled(*values),
        }

    return Case(
        "gradient_penalty",
        sized(shape, dtype),
        "tangent_combine",
        candidates,
        lambda: tangent_combine.forward_reference(*(x.double() for x in start()), 0.2),
        moves=4 * math.prod(shape) * dtype.itemsize,  # two tensors read, two written
        dtype=name_of(dtype),
    )


def made(size: str, dtype: torch.dtype) -> list[Case]:
    shape = numbers(size, "BxN or BxCxHxW and so on, such as 32x3x128x128", at_least=2)
    return [*(_case(shape, mode, dtype) for mode in FORMS), _combine_case(shape, dtype)]


CASES = [
    *(_case(shape, mode) for shape in ((64, 3, 64, 64), (16, 3, 256, 256), (512, 1280)) for mode in FORMS),
    *(_case(shape, "WGAN-GP", torch.bfloat16) for shape in ((64, 3, 64, 64), (16, 3, 256, 256))),
    _case((64, 3, 64, 64), "WGAN-GP", autograd=True),
    *(_combine_case(shape) for shape in ((16, 32, 32, 32), (64, 64, 64, 64), (256, 512))),
]
