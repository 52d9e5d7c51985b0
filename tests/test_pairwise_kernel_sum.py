"""What sums of kernels, MMD and energy distance mean: against the formulas written down, in float64."""

import math
from functools import partial

import pytest
import torch
from memory import peak_bytes

import fastgan
from fastgan import measure
from fastgan.functional import median_bandwidth

KERNELS = ("laplacian", "gaussian", "rational_quadratic", "energy", "polynomial")


def textbook(x, y, kernel, s, alpha=1.0, degree=3, offset=1.0):
    """(N, M), composed of plain operators."""
    difference = x[:, None] - y
    if kernel == "laplacian":
        return torch.exp(-difference.abs().sum(-1) / s)
    if kernel == "gaussian":
        return torch.exp(-difference.square().sum(-1) / (2 * s**2))
    if kernel == "rational_quadratic":
        return (1 + difference.square().sum(-1) / (2 * alpha * s**2)) ** -alpha
    if kernel == "energy":
        return -difference.square().sum(-1).sqrt() / s
    return (x @ y.T / s + offset) ** degree


def points(n, m, d=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, d, generator=generator, dtype=torch.float64) for size in (n, m))
    return x.to(dtype).requires_grad_(), (0.8 * y + 0.3).to(dtype).requires_grad_()


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.linspace(0.5, 1.5, max(1, ours.numel()), dtype=ours.dtype).reshape(ours.shape)
    for a, b in zip(*(torch.autograd.grad(f, inputs, cotangent) for f in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_the_textbook_formula(kernel):
    x, y = points(23, 31)
    options = {"alpha": 0.5, "degree": 2, "offset": 0.3}
    ours = fastgan.pairwise_kernel_sum(x, y, kernel=kernel, bandwidths=1.7, **options)
    assert_same(ours, textbook(x, y, kernel, 1.7, **options).sum(1), (x, y))


def test_defaults():
    x, y = points(9, 7)
    for kernel in KERNELS:
        s = x.shape[1] if kernel == "polynomial" else 1.0
        ours = fastgan.functional.pairwise_kernel_sum(x, y, kernel=kernel)
        torch.testing.assert_close(ours, textbook(x, y, kernel, s).sum(1))
    torch.testing.assert_close(fastgan.pairwise_kernel_sum(x, y), fastgan.pairwise_kernel_sum(x, y, kernel="gaussian"))


def test_named_special_cases():
    """The inverse multiquadric, and the kernel of Wasserstein autoencoders."""
    x, y = points(9, 7)
    squares = (x[:, None] - y).square().sum(-1)
    ours = fastgan.pairwise_kernel_sum(x, y, kernel="rational_quadratic", alpha=0.5, bandwidths=1.3)
    torch.testing.assert_close(ours, (1 + squares / 1.3**2).rsqrt().sum(1))
    ours = fastgan.pairwise_kernel_sum(x, y, kernel="rational_quadratic", alpha=1, bandwidths=math.sqrt(10 / 2))
    torch.testing.assert_close(ours, (10 / (10 + squares)).sum(1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_several_bandwidths_are_the_sum_of_single_ones(kernel, as_tensor):
    x, y = points(17, 40)
    bandwidths, weights = [0.5, 1.0, 4.0], [1.0, -0.25, 3.0]
    given = (torch.tensor(bandwidths), torch.tensor(weights)) if as_tensor else (bandwidths, weights)
    together = fastgan.pairwise_kernel_sum(x, y, kernel=kernel, bandwidths=given[0], weights=given[1])
    single = [
        w * fastgan.pairwise_kernel_sum(x, y, kernel=kernel, bandwidths=s) for s, w in zip(bandwidths, weights, strict=True)
    ]
    assert_same(together, sum(single), (x, y))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_diagonal_left_out(kernel):
    x, y = points(33, 33)
    for other in (x, y):
        full = textbook(x, other, kernel, 1.5)
        kept = full * (1 - torch.eye(33, dtype=x.dtype)) if kernel != "energy" else None
        ours = fastgan.pairwise_kernel_sum(x, other, kernel=kernel, bandwidths=1.5, exclude_diagonal=True)
        if kept is None:  # the derivative of a root of 0 is NaN, times 0 too
            torch.testing.assert_close(ours, full.sum(1) - full.diagonal())
        else:
            assert_same(ours, kept.sum(1), (x, y) if other is y else (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_diagonal_is_not_subtracted_but_left_out(dtype):
    """Each point's own term is 1, all others are too small to survive a subtraction of it."""
    x = (torch.arange(6, dtype=torch.float64)[:, None] * 40).to(dtype)
    ours = fastgan.pairwise_kernel_sum(x, x, kernel="laplacian", exclude_diagonal=True)
    truth = torch.exp(-40 * torch.tensor([1.0, 2, 2, 2, 2, 1], dtype=torch.float64)) * 0 + math.exp(-40)
    truth[1:-1] *= 2
    torch.testing.assert_close(ours.double(), truth, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_sample_against_itself(kernel):
    """One tensor for both arguments takes a shorter way, with the gradient of both."""
    x, _ = points(50, 1)
    copy = x.detach().clone().requires_grad_()
    g = torch.linspace(-1, 1, 50, dtype=x.dtype)
    (one,) = torch.autograd.grad(fastgan.pairwise_kernel_sum(x, x, kernel=kernel), x, g)
    both = torch.autograd.grad(fastgan.pairwise_kernel_sum(x, copy, kernel=kernel), (x, copy), g)
    torch.testing.assert_close(one, both[0] + both[1])
    assert one.norm() > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_of_one_argument_alone(kernel):
    """Of x it is found with the sum, and is still that of both."""
    x, y = points(23, 31)
    g = torch.linspace(-1, 1, 23, dtype=x.dtype)
    both = torch.autograd.grad(fastgan.pairwise_kernel_sum(x, y, kernel=kernel), (x, y), g)
    for alone, wanted, expected in (((x, y.detach()), x, both[0]), ((x.detach(), y), y, both[1])):
        (got,) = torch.autograd.grad(fastgan.pairwise_kernel_sum(*alone, kernel=kernel), wanted, g)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", ["laplacian", "gaussian", "rational_quadratic", "energy"])
def test_coincident_points(kernel, dtype):
    """Their distance is exactly 0, whatever their size, and so is the derivative."""
    x = (1000 + torch.arange(12, dtype=torch.float64).reshape(4, 3)).to(dtype).requires_grad_()
    y = x.detach()[[2, 2, 2]].clone().requires_grad_()
    x = x[2:3]
    value = fastgan.pairwise_kernel_sum(x, y, kernel=kernel)
    assert value.item() == (0 if kernel == "energy" else 3)
    for gradient in torch.autograd.grad(value.sum(), (x, y)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian", "energy"])
def test_points_far_from_the_origin_and_close_together(kernel):
    """Float32 resolves distances between them that a formula of scalar products would lose."""
    offset, generator = 1000.0, torch.Generator().manual_seed(0)
    x, y = (offset + torch.rand(40, 64, generator=generator).mul(64).round() / 64 for _ in range(2))
    ours = fastgan.pairwise_kernel_sum(x, y, kernel=kernel, bandwidths=4.0)
    truth = textbook(x.double(), y.double(), kernel, 4.0).sum(1)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """8000 terms of 1: a running sum of 16 bits would stop at 256 or 2048."""
    x, y = torch.zeros(3, 4, dtype=dtype), torch.zeros(8000, 4, dtype=dtype)
    assert fastgan.pairwise_kernel_sum(x, y).tolist() == torch.full((3,), 8000.0).to(dtype).tolist()


def test_without_others():
    x = torch.randn(4, 3, requires_grad=True)
    value = fastgan.pairwise_kernel_sum(x, torch.empty(0, 3))
    assert torch.equal(value, torch.zeros(4))
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros(4, 3))
    assert fastgan.pairwise_kernel_sum(torch.empty(0, 3), x).shape == (0,)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_points(kernel, bad):
    """As the formulas have it: NaN where a NaN or a difference of equal infinities takes part."""
    x, y = (z.detach().float() for z in points(40, 30))
    x[4, 1] = y[7, 1] = bad
    ours = fastgan.pairwise_kernel_sum(x, y, kernel=kernel, bandwidths=2.0)
    theirs = textbook(x, y, kernel, 2.0).sum(1)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours[4].isfinite().logical_not() and (ours[0].isfinite() or bad != bad or kernel in ("energy", "polynomial"))


def test_memory_is_linear():
    """20,000 x 20,000 distances would be 1.6 GB."""
    x, y = (z.detach() for z in points(20_000, 20_000, 8, torch.float32))
    assert peak_bytes(lambda: fastgan.pairwise_kernel_sum(x, y, kernel="laplacian")) < 64 << 20
    x.requires_grad_()
    resident = measure.peak_memory(lambda: torch.autograd.grad(fastgan.pairwise_kernel_sum(x, y, kernel="laplacian").sum(), x))
    assert resident is None or resident < 128 << 20


def test_a_second_derivative_is_refused_with_a_way_out():
    x, y = points(4, 5)
    for other in (x, y, y.detach()):
        (g,) = torch.autograd.grad(fastgan.pairwise_kernel_sum(x, other).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate a composition of plain torch operators"):
            torch.autograd.grad(g.square().sum(), x)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: fastgan.pairwise_kernel_sum(x, y.detach()), (x.detach(),), (x.detach(),))


def test_under_func_and_compile():
    x, y = points(8, 9)
    f = lambda x, y: fastgan.mmd(x, y, bandwidths=[1.0, 2.0]) + fastgan.energy_distance(x, y)  # noqa: E731
    expected = torch.autograd.grad(f(x, y), (x, y))
    for got in (
        torch.func.grad(f, (0, 1))(x.detach(), y.detach()),
        torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x, y), (x, y)),
    ):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


# MMD and energy distance


def textbook_mmd(x, y, unbiased, kernel, s, **options):
    def mean(a, b):
        k = textbook(a, b, kernel, s, **options)
        if a is not b or not unbiased:
            return k.mean()
        n = len(a)
        return k.masked_fill(torch.eye(n, dtype=torch.bool), 0).sum() / (n * (n - 1))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", ["laplacian", "gaussian", "rational_quadratic", "polynomial"])
def test_mmd_is_the_textbook_formula(kernel, unbiased):
    x, y = points(23, 31)
    ours = fastgan.mmd(x, y, kernel=kernel, bandwidths=1.7, unbiased=unbiased)
    assert_same(ours, textbook_mmd(x, y, unbiased, kernel, 1.7), (x, y))


@pytest.mark.parametrize("unbiased", [False, True])
def test_energy_distance_is_the_textbook_formula(unbiased):
    x, y = points(23, 31)
    distance = lambda a, b: (a[:, None] - b).square().sum(-1).clamp_min(1e-300).sqrt()  # noqa: E731
    within = [distance(z, z).sum() / (len(z) * (len(z) - unbiased)) for z in (x, y)]
    assert_same(fastgan.energy_distance(x, y, unbiased=unbiased), 2 * distance(x, y).mean() - sum(within), (x, y))


def test_known_values():
    """Two points at distance 3 and 4: 2 * 3.5 - 0 - 0.5; and the root."""
    x, y = torch.tensor([[0.0]]), torch.tensor([[3.0], [4.0]])
    assert fastgan.energy_distance(x, y).item() == pytest.approx(7 - 0.5)
    assert fastgan.energy_distance(x, y, squared=False).item() == pytest.approx(math.sqrt(6.5))
    value = 1 + (1 + math.exp(-1)) / 2 - (math.exp(-3) + math.exp(-4))
    assert fastgan.mmd(x, y, kernel="laplacian", bandwidths=1).item() == pytest.approx(value)


def test_a_sample_is_at_distance_zero_from_itself():
    x, _ = points(20, 1, dtype=torch.float32)
    for root in (fastgan.mmd(x, x.detach().clone(), squared=False), fastgan.energy_distance(x, x.detach(), squared=False)):
        assert root.item() < 1e-3
        assert torch.autograd.grad(root, x)[0].isfinite().all()


def test_unbiased_is_unbiased():
    """Samples of one distribution: the mean over many pairs of them is 0 within its standard error; the biased one's isn't."""
    found = {unbiased: [] for unbiased in (False, True)}
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(10, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        for unbiased, values in found.items():
            values.append(fastgan.mmd(x, y, bandwidths=1.5, unbiased=unbiased))
    for unbiased, values in found.items():
        values = torch.stack(values)
        assert bool(values.mean().abs() < 3 * values.std() / math.sqrt(200)) == unbiased


def test_median_heuristic():
    x, y = points(30, 21)
    pooled = torch.cat([x, y])
    for p, kernel in ((1, "laplacian"), (2, "gaussian"), (2, "rational_quadratic")):
        distances = sorted(
            (pooled[i] - pooled[j]).abs().pow(p).sum().item() ** (1 / p) for j in range(len(pooled)) for i in range(j)
        )
        median = distances[(len(distances) - 1) // 2]
        assert median_bandwidth(x, y, p=p).item() == pytest.approx(median)
        torch.testing.assert_close(fastgan.mmd(x, y, kernel=kernel), fastgan.mmd(x, y, kernel=kernel, bandwidths=median))
    assert not median_bandwidth(x, y).requires_grad


def test_median_heuristic_is_bounded_and_survives_equal_points():
    x, y = (z.detach() for z in points(100_000, 90_001, 2, torch.float32))
    assert peak_bytes(lambda: median_bandwidth(x, y)) < 16 << 20
    assert median_bandwidth(x, y).item() == pytest.approx(median_bandwidth(x[:4000], y[:4000]).item(), rel=0.05)
    ones = torch.ones(5, 2)
    assert median_bandwidth(ones, ones).item() == 1
    assert fastgan.mmd(ones, ones).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mmd_of_half_precision_is_float32(dtype):
    x, y = (z.detach().to(dtype) for z in points(400, 300))
    value = fastgan.mmd(x, y, bandwidths=2.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), textbook_mmd(x.double(), y.double(), False, "gaussian", 2.0), rtol=1e-4, atol=0)
    x.requires_grad_()
    assert torch.autograd.grad(fastgan.energy_distance(x, y), x)[0].dtype == dtype


def test_descending_moves_one_sample_onto_another():
    """A minimum at the wrong place, or a sign turned in a gradient, would show."""
    target = points(1, 200, 2)[1].detach()
    for distance in (partial(fastgan.mmd, bandwidths=[1, 2, 4, 8]), fastgan.energy_distance):
        x = torch.zeros(200, 2, dtype=torch.float64) + torch.randn(200, 2, generator=torch.Generator().manual_seed(1)) - 3
        x.requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.2)
        before = distance(x, target, unbiased=True).item()
        for _ in range(80):
            optimizer.zero_grad()
            distance(x, target).backward()
            optimizer.step()
        assert distance(x, target, unbiased=True).item() < 0.02 * before
        # of most points: those far off feel little of a kernel's pull
        torch.testing.assert_close(x.median(0).values, target.median(0).values, atol=0.2, rtol=0)


ERRORS = [
    ({"x": [1.0]}, TypeError, r"x is a list, expected a torch.Tensor of shape \(N, D\)"),
    ({"y": torch.ones(3, 1, 2)}, ValueError, r"y has 3 dimensions \(3, 1, 2\), expected 2: \(M, D\).*y.flatten\(1\)"),
    ({"x": torch.ones(3, 2, dtype=torch.long)}, TypeError, r"x has dtype torch.int64.*x.float\(\)"),
    ({"y": torch.ones(3, 5)}, ValueError, r"x \(4, 2\) and y \(3, 5\) have points of different dimensions"),
    ({"y": torch.ones(3, 2).double()}, TypeError, r"x is torch.float32 on cpu, y torch.float64 on cpu.*y.to\(x\)"),
    ({"kernel": "cosine"}, ValueError, "kernel is 'cosine', expected one of 'laplacian', 'gaussian'"),
    ({"bandwidths": []}, ValueError, r"bandwidths is \[\], expected a finite number"),
    ({"bandwidths": [1.0, 0.0]}, ValueError, r"bandwidths is \[1.0, 0.0\], expected numbers above 0"),
    ({"bandwidths": torch.ones(2, 2)}, ValueError, r"bandwidths has shape \(2, 2\), expected \(\) or \(n,\)"),
    ({"bandwidths": torch.ones(2, requires_grad=True)}, ValueError, r"bandwidths requires grad.*bandwidths.detach\(\)"),
    ({"weights": [1.0, 2.0]}, ValueError, "there are 2 weights for 1 bandwidths"),
    ({"weights": float("nan")}, ValueError, "weights is nan"),
    ({"degree": 1.5}, ValueError, "degree is 1.5, expected a positive integer"),
    ({"alpha": 0}, ValueError, "alpha is 0, expected a number above 0"),
]


@pytest.mark.cpu
@pytest.mark.parametrize("function", [fastgan.pairwise_kernel_sum, fastgan.mmd])
@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_errors_name_the_argument(function, changed, error, message):
    arguments = {"x": torch.ones(4, 2), "y": torch.ones(3, 2), "bandwidths": 1.0} | changed
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_errors_of_too_few_points():
    x, y = torch.ones(4, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"exclude_diagonal with x \(4, 2\) and y \(3, 2\)"):
        fastgan.pairwise_kernel_sum(x, y, exclude_diagonal=True)
    with pytest.raises(ValueError, match="mmd: y has 1 points, expected at least 2 where unbiased=True"):
        fastgan.mmd(x, y[:1], unbiased=True)
    with pytest.raises(ValueError, match="energy_distance: x has 0 points, expected at least 1"):
        fastgan.energy_distance(x[:0], y)
    with pytest.raises(ValueError, match="fewer than 2 points together"):
        median_bandwidth(x[:1], y[:0])
