"""The battery: every operator, on every backend, against its fp64 reference. Inputs come from samples.py."""

import os

import pytest
import torch
from samples import LAYOUTS, OPERATORS, inputs, map_tensors, tensors_of
from torch.utils._pytree import tree_leaves, tree_map

from fastgan.backends import NO_KERNEL, problem
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


tensors = tensors_of


def requiring_grad(op, values):
    leaf = lambda x: x.detach().clone().requires_grad_()  # noqa: E731
    return tuple(v if i in OPERATORS[op].constants else map_tensors(leaf, v) for i, v in enumerate(values))


def flat_call(op, values):
    """The operator as a function of its differentiable tensors alone, with its differentiable results alone; and the former."""
    leaves = [x for x in tensors(values) if x.requires_grad]
    differentiable = [x.requires_grad for x in tensors(call(op, *values))]

    def function(*replacements):
        replaced = dict(zip(map(id, leaves), replacements, strict=True))
        results = tensors(call(op, *map_tensors(lambda x: replaced.get(id(x), x), values)))
        return tuple(x for x, wanted in zip(results, differentiable, strict=True) if wanted)

    return function, leaves


def error_of(result, truth):
    """Root mean square over the result: the largest single error of so few elements is mostly luck."""
    return (result.cpu().double() - truth).square().mean().sqrt().item()


def truth_of(op, values):
    """In float64 and on the CPU: on a GPU torch's own sums in float64 were six roundings off."""
    return tensors(references[op](*map_tensors(lambda x: x.cpu().double(), values)))


def own_errors(op, values):
    """Plain torch's error in each result, against float64. Float64 itself: as many roundings as float32 has, of its size."""
    if any(value.dtype == torch.float64 for value in tensors(values)):
        singles = own_errors(op, map_tensors(torch.Tensor.float, values))
        return [error * (torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps) for error in singles]
    return [error_of(plain, truth) for plain, truth in zip(tensors(references[op](*values)), truth_of(op, values), strict=True)]


def assert_close_to_truth(op, values, results):
    """Error against float64 at most twice that of plain torch in the same dtype, or of one rounding of the result."""
    truths = truth_of(op, values)
    dtypes = [plain.dtype for plain in tensors(references[op](*values))]
    for result, truth, dtype, own in zip(tensors(results), truths, dtypes, own_errors(op, values), strict=True):
        # In float64 the truth has errors, too; on a GPU, where its sums are of another order than ours.
        eps, factor = torch.finfo(dtype).eps, (5 if result.is_cuda else 3) if dtype == torch.float64 else 2
        assert result.shape == truth.shape
        assert result.dtype == dtype
        if truth.numel() == 0:
            continue
        error, rounding = error_of(result, truth), eps * truth.square().mean().sqrt().item()
        # On GPUs exponentials are approximated to two roundings.
        floor = rounding if dtype == torch.float64 or result.is_cuda else rounding / 2
        assert error <= factor * max(own, floor), f"error {error:.3g}, torch's own {own:.3g}, rounding {rounding:.3g}"
        assert (result.cpu().double() - truth).abs().max() <= 16 * max(own, rounding), (
            "one element is off by far more than the rest"
        )


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
    for value, copy in zip(tensors(values), tensors(before), strict=True):
        assert torch.equal(value, copy), "an input was written to"


@pytest.mark.parametrize(("op", "shape"), [case for case in SMALL if OPERATORS[case[0]].differentiable], ids=name_of)
def test_gradcheck(backend, op, shape):
    function, leaves = flat_call(op, requiring_grad(op, inputs(op, shape)))
    forward = OPERATORS[op].forward_mode
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=forward)


def test_gradgradcheck(backend):
    for op, operator in OPERATORS.items():
        if operator.forward_mode:  # the operators users call, not the last derivatives
            if op.endswith("_backward") or (backend == "cuda" and problem("cuda", op, "cuda") == NO_KERNEL):
                continue
            function, leaves = flat_call(op, requiring_grad(op, inputs(op, operator.small[0 if INTERPRETED else 1])))
            assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("op", [op for op in OPS if not OPERATORS[op].differentiable])
def test_one_derivative_more_is_refused(backend, op):
    results = tensors(call(op, *requiring_grad(op, inputs(op, OPERATORS[op].small[1]))))
    with pytest.raises(RuntimeError, match="no reverse-mode derivative"):
        results[0].sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op):
    operator = getattr(torch.ops.fastgan, op).default
    shape = OPERATORS[op].small[1]
    torch.library.opcheck(operator, inputs(op, shape))
    if OPERATORS[op].differentiable:
        torch.library.opcheck(operator, requiring_grad(op, inputs(op, shape)))


@pytest.mark.parametrize("op", OPS)
def test_vmap_equals_a_loop(backend, op):
    shape = OPERATORS[op].small[1]
    several = [inputs(op, shape, seed=seed) for seed in range(3)]
    stacked = tree_map(lambda *x: torch.stack(x, min(1, x[0].dim())) if isinstance(x[0], torch.Tensor) else x[0], *several)
    dims = tree_map(lambda x: min(1, x.dim() - 1) if isinstance(x, torch.Tensor) else None, stacked)
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
    values = requiring_grad(op, inputs(op, OPERATORS[op].small[1]))
    leaves = [value for value in tensors(values) if value.requires_grad]

    def loss(*v):
        return sum((result * result).sum() for result in tree_leaves(call(op, *v)))

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
    values = inputs(op, OPERATORS[op].bad_shape, torch.float32)
    which, where = OPERATORS[op].bad
    tensors(values[which])[0][where] = bad
    for result, expected in zip(tensors(call(op, *values)), tensors(references[op](*values)), strict=True):
        assert torch.equal(result.isnan(), expected.isnan())
        torch.testing.assert_close(result, expected, equal_nan=True)
