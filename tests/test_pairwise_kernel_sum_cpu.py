"""What is particular to the C++ kernels of sums of kernels over pairs: instruction sets, fixed point, matrix products,
stripes, errors."""

import pytest
import torch
from samples import instruction_sets, normal

import fastgan
from fastgan import backends
from fastgan.ops import references

if not backends.extension.loaded:
    pytest.skip(f"fastgan._C is not used: {backends.extension.problem}", allow_module_level=True)

import fastgan._C as C

KERNELS = (("laplacian", 1.0, 0.0), ("gaussian", 1.0, 0.0), ("rational_quadratic", 0.5, 0.0), ("rational_quadratic", 0.7, 0.0),
           ("energy", 1.0, 0.0), ("polynomial", 2.0, 0.5))  # fmt: skip


@pytest.fixture(params=instruction_sets())
def isa(request):
    before = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(before)


def arguments(n, m, d, kernel, dtype, bandwidth=None, spread=1.0, excluded=False):
    name, exponent, offset = kernel
    generator = torch.Generator().manual_seed(0)
    x, y = (normal(size, d, dtype=dtype, generator=generator, scale=spread) for size in (n, m))
    typical = d if name in ("laplacian", "polynomial") else d**0.5
    mixture = torch.tensor([[bandwidth or typical, 3 * (bandwidth or typical)], [1.0, 0.5]], dtype=dtype)
    return x, y, *mixture.unbind(), name, exponent, offset, excluded


def all_results(values):
    """Of each operator, and the truth."""
    x, y, *options = values
    row, column = torch.linspace(-1, 1, x.shape[0]).to(x), torch.linspace(0.5, 1, y.shape[0]).to(x)
    for name, extra in (("", ()), ("_with_gradient", ()), ("_backward", (row, column)), ("_backward_both", (row,))):
        name, inputs = f"pairwise_kernel_sum{name}", (*extra, x, y, *options)
        wide = (v.double() if isinstance(v, torch.Tensor) else v for v in inputs)
        got, truth = getattr(torch.ops.fastgan, name)(*inputs), references[name](*wide)
        yield from zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, truth)), strict=True)


def assert_true(values, tolerance):
    for got, truth in all_results(values):
        assert (got.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_instruction_set(isa, kernel, dtype, tolerance):
    for shape in ((1, 1, 1), (67, 131, 19), (130, 263, 33)):
        assert_true(arguments(*shape, kernel, dtype), tolerance)
    assert_true(arguments(70, 70, 7, kernel, dtype, excluded=True), tolerance)


@pytest.mark.parametrize("bandwidth", [0.05, 0.5, 5.0, 500.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_fixed_point_where_it_is_exact_enough(isa, bandwidth, spread):
    """Wherever the limit between integers and floats lies, float32's digits are there."""
    x, y, *options = arguments(40, 50, 16, KERNELS[0], torch.float32, bandwidth * spread, spread)
    y[:20] = x[:20] * 1.000001  # close pairs, whose terms are the large ones
    for got, truth in all_results((x, y, *options)):
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=4e-6 * truth.abs().max().item())


def test_one_coordinate_that_spreads_far(isa):
    x, y, *options = arguments(9, 9, 3, KERNELS[0], torch.float32, bandwidth=1e7)
    x[3, 1], y[4, 1] = 3e7, -3e7
    assert_true((x, y, *options), 2e-6)


#: Points from which on scalar products are matrix products, in 64 dimensions or more.
MANY = 512


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_matrix_products(isa, kernel, dtype, tolerance):
    """Several tiles, none of them whole."""
    assert_true(arguments(MANY + 2, MANY + 11, 67, kernel, dtype), tolerance)
    assert_true(arguments(MANY, MANY, 64, kernel, dtype, excluded=True), tolerance)


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_the_limits_of_matrix_products(kernel):
    for shape in ((MANY, MANY - 1, 64), (MANY - 1, MANY, 64), (MANY, MANY, 63), (MANY, MANY, 300)):
        assert_true(arguments(*shape, kernel, torch.float32), 2e-6)


@pytest.mark.parametrize("kernel", [KERNELS[1], KERNELS[4], KERNELS[5]])
def test_matrix_products_in_many_dimensions(kernel):
    assert_true(arguments(MANY, MANY + 1, 2048, kernel, torch.float32), 2e-6)


def torchs_errors(values):
    """Of the reference in the dtype at hand, as all_results has its results."""
    with fastgan.use_backend("reference"):
        yield from ((got.double() - truth).abs().max() for got, truth in all_results(values))


def close_pairs(kernel, d, dtype, bandwidth=None, far=0.0):
    """Arguments with coincident and nearly coincident points, among others; all far from the origin."""
    x, y, s, w, *rest = arguments(MANY + 2, MANY + 11, d, kernel, torch.float64, bandwidth)
    x, y = x + far, y + far
    y[:5], x[9] = x[30:35], x[8]
    generator = torch.Generator().manual_seed(1)
    for at, size in enumerate((1e-1, 1e-2, 1e-3, 1e-5, 1e-7)):
        y[10 + at] = x[40 + at] + size * torch.randn(d, generator=generator)
    work = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), y.to(dtype), s.to(work), w.to(work), *rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("bandwidth", "far"), [(0.01, 0.0), (0.01, 30.0), (1.0, 0.0), (None, 30.0)])
@pytest.mark.parametrize("kernel", KERNELS[1:5])
def test_products_are_as_exact_as_differences(kernel, bandwidth, far, dtype):
    values = close_pairs(kernel, 64, dtype, bandwidth, far)
    digits = 16 if dtype == torch.float64 else 1  # where the truth has no more
    for (got, truth), limit in zip(all_results(values), torchs_errors(values), strict=True):
        assert (got.double() - truth).abs().max() <= 2 * limit + digits * torch.finfo(dtype).eps * truth.abs().max()


def test_coincident_points_in_matrix_products(isa):
    """Where nothing else reaches, a point's own term is exactly 1, and the slope of a close pair that of their difference."""
    x, y, s, w, *rest = arguments(MANY, MANY, 64, KERNELS[1], torch.float32, bandwidth=1e-3)
    ops = torch.ops.fastgan
    assert torch.equal(ops.pairwise_kernel_sum(x, x, s, w, *rest), w.sum().expand(MANY))
    value, gradient = ops.pairwise_kernel_sum_with_gradient(x, x, s, w, *rest)
    assert torch.equal(value, w.sum().expand(MANY)) and torch.equal(gradient, torch.zeros_like(gradient))
    y = x + 1e-4 * normal(MANY, 64, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    for got, truth in all_results((x, y, s, w, *rest)):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=2e-6 * truth.abs().max().item())


@pytest.mark.parametrize("kernel", KERNELS[1:5])
def test_clusters_tight_and_far_apart(kernel):
    """Half of the pairs are close: all are taken from differences."""
    x, y, *options = arguments(MANY, MANY, 64, kernel, torch.float32)
    for z in (x, y):
        z *= 0.1
        z[::2] += 50
    for got, truth in all_results((x, y, *options)):
        assert (got.double() - truth).abs().max() <= 4e-6 * truth.abs().max()


def test_matrix_products_of_what_is_not_finite():
    x, y, *options = arguments(MANY, MANY, 64, KERNELS[1], torch.float32)
    for bad in (float("nan"), float("inf"), 1e25):
        x[3, 5] = bad
        got, truth = next(all_results((x, y, *options)))
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("kernel", "d"), [(KERNELS[0], 21), (KERNELS[1], 64), (KERNELS[5], 64)])
def test_the_number_of_threads_changes_nothing(kernel, d):
    values = arguments(700, 533, d, kernel, torch.float32)
    first, threads = [got for got, _ in all_results(values)], torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, (b, _) in zip(first, all_results(values), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_kernels_are_counted_and_check_what_they_get():
    x, y, s, w, *rest = arguments(5, 6, 2, KERNELS[0], torch.float32)
    op, before = torch.ops.fastgan.pairwise_kernel_sum, C.calls()
    op(x, y, s, w, *rest)
    assert C.calls() == before + 1
    for bad, message in (
        ((x, y[:, :1], s, w, *rest), r"x has shape \(5, 2\) and y \(6, 1\), expected \(N, D\) and \(M, D\)"),
        ((x, y.double(), s, w, *rest), "of one dtype"),
        ((x, y, s, w[:1], *rest), r"bandwidths and weights have shapes \(2\) and \(1\)"),
        ((x, y, s.double(), w.double(), *rest), "of dtype Float"),
        ((x, y, s, w, "cosine", *rest[1:]), "kernel is 'cosine', expected one of laplacian, gaussian"),
        ((x, y, s, w, *rest[:-1], True), "expected as many points in both where the diagonal is left out"),
        ((x.long(), y.long(), s, w, *rest), "x is Long, expected a floating-point tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*bad)
    with pytest.raises(RuntimeError, match=r"row has shape \(6\), expected a number for each point of x"):
        torch.ops.fastgan.pairwise_kernel_sum_backward(y[:, 0], y[:, 0], x, y, s, w, *rest)
