"""What gradient_penalty and tangent_combine mean, and what is particular to their C++ kernels."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from samples import instruction_sets

from fastgan.backends import extension
from fastgan.critic.reduction import Form, penalty_and_seed, penalty_value
from fastgan.ops import gradient_penalty as op
from fastgan.ops import tangent_combine

native = pytest.mark.skipif(not extension.loaded, reason="fastgan._C is not built")
WEIGHT, TARGET, POWER = 3.0, 0.8, 6.0


def textbook(g, kind, one_sided):
    """The penalty as it stands in papers; NaN derivative at zero gradients."""
    n = g.flatten(1).norm(2, 1)
    if kind == "zero_centered":
        return WEIGHT / 2 * n.square().mean()
    if kind == "power":
        return WEIGHT * n.pow(POWER).mean()
    if kind == "max":
        return WEIGHT * n.square().max()
    excess = n - TARGET
    return WEIGHT * (excess.clamp_min(0) if one_sided else excess).square().mean()


def penalty(g, kind, one_sided=False):
    return op.forward(g, kind, WEIGHT, TARGET, one_sided, POWER)


def gradients(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.1, 3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    g = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(math.prod(shape[1:]))
    return (g * sizes).to(dtype).requires_grad_()


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("kind", op.KINDS)
def test_textbook_formula_and_its_derivatives(kind, one_sided):
    g = gradients(7, 3, 5)
    value, norms, factors, seed = penalty(g, kind, one_sided)
    expected = textbook(g, kind, one_sided)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(norms, g.flatten(1).norm(2, 1))
    (ours,), (theirs,) = (torch.autograd.grad(p, g, create_graph=True) for p in (value, expected))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(factors.view(-1, 1, 1) * g, theirs)
    torch.testing.assert_close(seed, theirs)
    v = torch.randn_like(g)
    second = [torch.autograd.grad(first, g, v, retain_graph=True, allow_unused=True)[0] for first in (ours, theirs)]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("kind", op.KINDS)
def test_third_derivative(kind):
    g = gradients(3, 4)
    assert torch.autograd.gradgradcheck(lambda g: torch.autograd.grad(penalty(g, kind)[0], g, create_graph=True)[0], (g,))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_again_after_its_result_was_written_to(scale):
    """The first backward may hand out memory that was made in the forward."""
    g = gradients(4, 6)
    value = penalty(g, "gradient_penalty")[0] * scale
    expected = torch.autograd.grad(textbook(g, "gradient_penalty", False) * scale, g)[0]
    value.backward(retain_graph=True)
    torch.testing.assert_close(g.grad, expected)
    g.grad.zero_()
    value.backward(retain_graph=True)
    torch.testing.assert_close(g.grad, expected)
    value.backward()
    torch.testing.assert_close(g.grad, 2 * expected)


@pytest.mark.parametrize("kind", op.KINDS)
def test_zero_gradients_have_norm_and_derivative_zero(kind):
    g = gradients(4, 6).detach()
    g[1] = 0
    g.requires_grad_()
    value, norms, factors, _ = penalty(g, kind)
    value.backward()
    assert norms[1] == factors[1] == 0
    assert torch.equal(g.grad[1], torch.zeros(6, dtype=g.dtype))
    assert g.grad.isfinite().all()


def test_ties_of_the_largest_share_its_derivative():
    g = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    assert op.forward(g, "max", 1.0, 0.0, False, 2.0)[2].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_summed_in_float32(dtype):
    g = torch.full((2, 1000), 50.0, dtype=dtype)  # the sum of squares is 2.5e6: infinite in float16
    value, norms, factors, _ = op.forward(g, "zero_centered", 2.0, 0.0, False, 2.0)
    assert (value.dtype, norms.dtype, factors.dtype) == (torch.float32,) * 3
    assert value.item() == 2.5e6
    torch.testing.assert_close(norms, torch.full((2,), math.sqrt(2.5e6)))
    assert op.backward(g, factors).dtype == dtype


@pytest.mark.parametrize("kind", op.KINDS)
def test_nan_is_not_hidden(kind):
    g = gradients(4, 6).detach()
    g[2, 3] = float("nan")
    value, norms, *_ = penalty(g, kind)
    assert value.isnan()
    assert norms.isnan().tolist() == [False, False, True, False]


def test_packs_and_masks():
    g = gradients(6, 4)
    mask = (torch.arange(4) % 2).double()
    form = Form("gradient_penalty", WEIGHT, TARGET, pac=3, mask=mask)
    expected = textbook((g * mask).reshape(2, 12), "gradient_penalty", False)
    (dg,) = torch.autograd.grad(expected, g)
    value, norms, w, inner = penalty_and_seed(g.detach(), form)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(w, dg)
    torch.testing.assert_close(inner, (dg * g.detach()).reshape(2, 12).sum(1))
    assert norms.shape == (2,)
    torch.testing.assert_close(penalty_value(g, form)[0], expected)
    with pytest.raises(ValueError, match="5 rows does not divide into packs of 3"):
        penalty_value(g[:5], form)


def test_under_func_transforms():
    g = gradients(5, 3).detach()
    expected = torch.func.grad(lambda g: textbook(g, "gradient_penalty", False))(g)
    torch.testing.assert_close(torch.func.grad(lambda g: penalty(g, "gradient_penalty")[0])(g), expected)


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_instruction_set_agrees(dtype):
    import fastgan._C as C

    before, wide = C.isa(), torch.float64 if dtype == torch.float64 else torch.float32
    try:
        for level, length in itertools.product(instruction_sets(), (*range(1, 20), 63, 64, 65, 16383, 16385, 40001)):
            C.set_isa(level)
            g, a = (gradients(3, length, dtype=dtype).detach() * scale for scale in (1, -2))
            factors = torch.tensor([0.5, -2.0, 3.0], dtype=wide)
            norms = penalty(g, "zero_centered")[1]
            torch.testing.assert_close(norms, g.double().norm(2, 1).to(wide))
            torch.testing.assert_close(op.backward(g, factors), op.backward_reference(g, factors))
            for ours, theirs in zip(
                tangent_combine.forward(g, a, factors, 0.2), tangent_combine.forward_reference(g, a, factors, 0.2), strict=True
            ):
                torch.testing.assert_close(ours, theirs)
    finally:
        C.set_isa(before)


@native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_as_torch_rounds(dtype):
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    factors = torch.linspace(-3, 3, 256)
    ours, theirs = op.backward(words, factors), op.backward_reference(words, factors)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0.5), theirs.nan_to_num(0.5))


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a slice of channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other sample": lambda x: x.repeat_interleave(2, 0)[::2],
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "one sample for all": lambda x: x[:1].expand_as(x),
    "transposed pixels": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    g = LAYOUTS[layout](gradients(5, 3, 4, 6, dtype=torch.float32).detach())
    a = torch.randn(5, 3, 4, 6)
    factors = torch.randn(5)
    torch.testing.assert_close(penalty(g, "power")[1], g.flatten(1).norm(2, 1))
    scaled = op.backward(g, factors)
    assert scaled.stride() == torch.empty_like(g).stride()
    torch.testing.assert_close(scaled, g * factors.view(5, 1, 1, 1))
    for t, other in ((g, a), (a, g)):
        passed, combined = tangent_combine.forward(t, other, factors, 0.2)
        torch.testing.assert_close(passed, torch.where(other > 0, t, 0.2 * t))
        torch.testing.assert_close(combined, passed + factors.view(5, 1, 1, 1) * other)
        assert passed.stride() == combined.stride() == torch.empty_like(t).stride()


ERRORS = {
    "kind is 'l1', expected one of": lambda op, g, f: op.gradient_penalty(g, "l1", 1.0, 1.0, False, 2.0),
    "factors has shape (2)": lambda op, g, f: op.gradient_penalty_backward(g, f[:2]),
    "factors is Double": lambda op, g, f: op.gradient_penalty_backward(g, f.double()),
    "grads is Int": lambda op, g, f: op.gradient_penalty_backward(g.int(), f),
    "grads has no dimensions": lambda op, g, f: op.gradient_penalty(g[0, 0], "max", 1.0, 1.0, False, 2.0),
    "a has shape (3, 2)": lambda op, g, f: op.tangent_combine(g, g[:, :2], f, 0.0),
    "a has shape (3, 4), expected one like t, (3, 4), of its dtype": lambda op, g, f: op.tangent_combine(g, g.double(), f, 0.0),
    "factors has shape (3, 1)": lambda op, g, f: op.tangent_combine(g, g, f[:, None], 0.0),
}


@pytest.mark.parametrize("served", ["native", "triton"])
@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_came_and_what_is_expected(message, served):
    if served == "native" and not extension.loaded:
        pytest.skip("fastgan._C is not built")
    ops = torch.ops.fastgan
    if served == "triton":  # found before anything is launched
        pytest.importorskip("triton")
        from fastgan.kernels import gradient_penalty, tangent_combine

        ops = SimpleNamespace(**vars(gradient_penalty) | vars(tangent_combine))
    with pytest.raises(RuntimeError) as error:
        ERRORS[message](ops, torch.randn(3, 4), torch.randn(3))
    assert message in str(error.value)
