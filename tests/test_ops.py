"""The battery: every operator, on every backend, against its fp64 reference. Inputs come from samples.py."""

import os

import pytest
import torch
from samples import LAYOUTS, OPERATORS, inputs, map_tensors

from fastgan.ops import references

OPS = list(OPERATORS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = [
    (op, shape) for op, operator in OPERATORS.items() for shape in (operator.interpreted if INTERPRETED else operator.shapes)
]
# numeric derivatives call an operator hundreds of times
SMALL = [(op, shape) for op, operator in OPERATORS.items() for shape in operator.small[: 1 if INTERPRETED else None]]


def name_of(case):
    return (
        case
        if isinstance(case, str)
        else "x".join(map(str, case))
        if isinstance(case, tuple)
        else str(case).removeprefix("torch.")
    )


def call(op, *values):
    return getattr(torch.ops.fastgan, op)(*values)


def tensors(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def requiring_grad(values):
    return map_tensors(lambda x: x.detach().clone().requires_grad_(), values)


def error_of(result, truth):
    """Root mean square over the result: the largest single error of so few elements is mostly luck."""
    return (result.double() - truth).square().mean().sqrt().item()


def own_errors(op, values):
    """Plain torch's error in each result, against float64. Float64 itself: as many roundings as float32 has, of its size."""
    if any(value.dtype == torch.float64 for value in values if isinstance(value, torch.Tensor)):
        singles = own_errors(op, map_tensors(torch.Tensor.float, values))
        return [error * (torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps) for error in singles]
    truths, plains = (tensors(references[op](*v)) for v in (map_tensors(torch.Tensor.double, values), values))
    return [error_of(plain, truth) for plain, truth in zip(plains, truths, strict=True)]


def assert_close_to_truth(op, values, results):
    """Error against float64 at most twice that of plain torch in the same dtype, or of one rounding of the result.

    Float64 is compared with plain torch in float64, whose own error comes on top.
    """
    truths = tensors(references[op](*map_tensors(torch.Tensor.double, values)))
    dtype = next(value.dtype for value in values if isinstance(value, torch.Tensor))
    eps, factor = torch.finfo(dtype).eps, 3 if dtype == torch.float64 else 2
    for result, truth, own in zip(tensors(results), truths, own_errors(op, values), strict=True):
        assert result.shape == truth.shape
        assert result.dtype == dtype
        if truth.numel() == 0:
            continue
        error, rounding = error_of(result, truth), eps * truth.square().mean().sqrt().item()
        assert error <= factor * max(own, rounding / 2), f"error {error:.3g}, torch's own {own:.3g}, rounding {rounding:.3g}"
        assert (result.double() - truth).abs().max() <= 16 * max(own, rounding), "one element is off by far more than the rest"


def test_every_operator_has_samples():
    assert set(OPERATORS) == set(references)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("op", "shape"), CASES, ids=name_of)
def test_values(backend, poisoned, op, shape, dtype):
    values = inputs(op, shape, dtype)
    assert_close_to_truth(op, values, call(op, *values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(backend, poisoned, op, layout):
    values = map_tensors(LAYOUTS[layout], inputs(op, OPERATORS[op].interpreted[2], torch.float32))
    before = map_tensors(torch.clone, values)
    assert_close_to_truth(op, values, call(op, *values))
    for value, copy in zip(values, before, strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, copy), "an input was written to"


@pytest.mark.parametrize(("op", "shape"), [case for case in SMALL if OPERATORS[case[0]].differentiable], ids=name_of)
def test_gradcheck(backend, op, shape):
    values = requiring_grad(inputs(op, shape))
    forward = OPERATORS[op].forward_mode
    assert torch.autograd.gradcheck(lambda *v: call(op, *v), values, check_forward_ad=forward)


def test_gradgradcheck(backend):
    for op, operator in OPERATORS.items():
        if operator.forward_mode:  # the operators users call, not the last derivatives
            values = requiring_grad(inputs(op, operator.small[0 if INTERPRETED else 1]))
            if op.endswith("_backward"):
                continue
            assert torch.autograd.gradgradcheck(lambda *v, op=op: call(op, *v), values)


@pytest.mark.parametrize("op", [op for op in OPS if not OPERATORS[op].differentiable])
def test_one_derivative_more_is_refused(backend, op):
    results = tensors(call(op, *requiring_grad(inputs(op, OPERATORS[op].small[1]))))
    with pytest.raises(RuntimeError, match="no reverse-mode derivative"):
        results[0].sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op):
    operator = getattr(torch.ops.fastgan, op).default
    shape = OPERATORS[op].small[1]
    torch.library.opcheck(operator, inputs(op, shape))
    if OPERATORS[op].differentiable:
        torch.library.opcheck(operator, requiring_grad(inputs(op, shape)))


@pytest.mark.parametrize("op", OPS)
def test_vmap_equals_a_loop(backend, op):
    shape = OPERATORS[op].small[1]
    several = [inputs(op, shape, seed=seed) for seed in range(3)]
    stacked = [
        torch.stack(column, 1) if isinstance(column[0], torch.Tensor) else column[0] for column in zip(*several, strict=True)
    ]
    dims = tuple(1 if isinstance(column, torch.Tensor) else None for column in stacked)
    batched = tensors(torch.func.vmap(lambda *v: call(op, *v), in_dims=dims)(*stacked))
    for i, values in enumerate(several):
        for whole, single in zip(batched, tensors(call(op, *values)), strict=True):
            torch.testing.assert_close(whole[i], single)


@pytest.mark.parametrize(
    ("compiler", "op"),
    # one operator through inductor is enough: operators are opaque to it, and it compiles for 10 s each
    [("inductor", OPS[0]), *(("aot_eager", op) for op in OPS if OPERATORS[op].differentiable)],
)
def test_compile_fullgraph(backend, op, compiler):
    torch._dynamo.reset()
    values = requiring_grad(inputs(op, OPERATORS[op].small[1]))
    leaves = [value for value in values if isinstance(value, torch.Tensor)]

    def loss(*v):
        return sum((result * result).sum() for result in tensors(call(op, *v)))

    expected = torch.autograd.grad(loss(*values), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(*values), leaves)
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_again(backend, op):
    values = inputs(op, OPERATORS[op].interpreted[2] if INTERPRETED else OPERATORS[op].large, torch.float32)
    first = tensors(call(op, *values))
    threads = torch.get_num_threads()
    try:
        for count in (1, threads, 2 * threads):
            if backend != "reference":  # plain torch may sum in another order
                torch.set_num_threads(count)
            for a, b in zip(first, tensors(call(op, *values)), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_like_the_reference(backend, op, bad):
    values = inputs(op, (9, 2, 3), torch.float32)
    values[-1 if op != "minibatch_discrimination" else 0][4, 1, 2] = bad
    for result, expected in zip(tensors(call(op, *values)), tensors(references[op](*values)), strict=True):
        assert torch.equal(result.isnan(), expected.isnan())
        torch.testing.assert_close(result, expected, equal_nan=True)
