"""What is particular to the C++ kernels of minibatch discrimination: instruction sets, threads, memory, sorting, errors."""

import subprocess
import sys

import pytest
import torch
from samples import instruction_sets

from fastgan.backends import calls, extension
from fastgan.ops import minibatch_discrimination as md

pytestmark = pytest.mark.skipif(not extension.loaded, reason="fastgan._C is not built")

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# One block and several, whole vectors and not, few kernels (stripes) and many, coordinates around multiples of four.
SHAPES = [(1, 2, 3), (7, 3, 5), (64, 17, 5), (127, 2, 8), (129, 3, 4), (260, 2, 50), (200, 1, 1), (300, 1, 1), (24, 2, 130)]


@pytest.fixture
def set_isa():
    import fastgan._C as C

    before = C.isa()
    yield C.set_isa
    C.set_isa(before)


def inputs(shape, dtype=torch.float32, seed=0, ties=False):
    random = torch.Generator().manual_seed(seed)
    m = torch.randn(shape, generator=random, dtype=torch.float64) * (2 / max(1, shape[2])) ** 0.5
    if ties:
        m = (m * 2).round() / 2
    grad = torch.randn(shape[:2], generator=random, dtype=torch.float64)
    v = torch.randn(shape, generator=random, dtype=torch.float64)
    return m.to(dtype), grad.to(dtype), v.to(dtype)


def kernels(m, grad, v):
    return (
        md.forward(m, True),
        md.forward(m, False),
        md.backward(grad, m),
        md.jvp(v, m),
        *md.double_backward(v, grad, m),
    )


def references(m, grad, v):
    return (
        md.forward_reference(m, True),
        md.forward_reference(m, False),
        md.backward_reference(grad, m),
        md.jvp_reference(v, m),
        *md.double_backward_reference(v, grad, m),
    )


def assert_like_reference(m, grad, v):
    exact = references(m.double(), grad.double(), v.double())
    for got, want in zip(kernels(m, grad, v), exact, strict=True):
        assert got.dtype == m.dtype and got.shape == want.shape
        finite = want[want.isfinite()].abs()
        scale = max(1e-3, finite.max().item() if finite.numel() else 0)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[m.dtype] * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(level, dtype, set_isa):
    if level not in instruction_sets():
        pytest.skip(f"this processor doesn't run {level}")
    set_isa(level)
    for shape in SHAPES:
        for ties in (False, True):
            assert_like_reference(*inputs(shape, dtype, ties=ties))


def test_minus_zero_equals_zero():
    m = torch.tensor([0.0, -0.0, 1.0]).repeat(5).reshape(15, 1, 1).expand(15, 2, 3)
    assert_like_reference(m, *inputs((15, 2, 3))[1:])


def test_kernels_are_native():
    before = calls("cpp")
    kernels(*inputs((5, 2, 3)))
    assert calls("cpp") == before + 5


@pytest.mark.parametrize("shape", [(64, 50, 5), (2500, 1, 3), (600, 2, 1), (300, 2, 8)])
def test_results_do_not_depend_on_threads(shape):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels(*inputs(shape)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernel_count", [1, 2, 3])
def test_stripes(kernel_count):
    """Few kernels are cut into stripes, many are not: the same ones among many have to come out the same."""
    m, grad, v = inputs((2500, kernel_count, 3))
    many = [torch.cat((x, x.new_zeros(2500, 16, *x.shape[2:])), 1) for x in (m, grad, v)]
    for few, other in zip(kernels(m, grad, v), kernels(*many), strict=True):
        torch.testing.assert_close(few, other[:, :kernel_count], rtol=0, atol=2e-7 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch", [255, 256, 600])
def test_sorting_agrees_with_pairs(batch, ties, dtype):
    m, grad, v = inputs((batch, 3, 1), dtype, ties=ties)
    assert_like_reference(m, grad, v)
    # A second coordinate that is constant changes nothing but the way there: pairs.
    wide = torch.cat((m, torch.zeros_like(m)), -1)
    padded = kernels(wide, grad, torch.cat((v, torch.zeros_like(v)), -1))
    for one, two in zip(kernels(m, grad, v), padded, strict=True):
        two = two[..., :1] if two.dim() == 3 else two
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE[dtype] * two.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 2, 2), (5, 2, 3), (33, 2, 4), (140, 1, 2), (520, 1, 1)])
def test_not_finite_like_reference(shape):
    for seed in range(4):
        tensors = inputs(shape, seed=seed)
        random = torch.Generator().manual_seed(seed)
        for which, values in enumerate(([torch.nan], [torch.inf], [torch.inf, torch.inf, -torch.inf], [torch.nan, torch.inf])):
            flat = tensors[(seed + which) % 3].view(-1)
            for value in values:
                flat[torch.randint(flat.numel(), (1,), generator=random)] = value
            for got, want in zip(kernels(*tensors), references(*tensors), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_distant_samples_contribute_exactly_nothing():
    m = torch.tensor([0.0, 100.0, 1e30, -3e38]).reshape(4, 1, 1)
    assert torch.equal(md.forward(m, True), torch.ones(4, 1))
    assert torch.equal(md.forward(m, False), torch.zeros(4, 1))


def test_any_strides():
    m, grad, v = inputs((37, 3, 5))
    for view in (m.permute(2, 0, 1).contiguous().permute(1, 2, 0), m[:, :, :1].expand(-1, -1, 5), m.flip(0)[::2], m[:, ::2]):
        batch, kernel_count, _ = view.shape
        assert_like_reference(view, grad[0, 0].expand(batch, kernel_count), v[:batch, :1].expand(-1, kernel_count, -1))


def test_fresh_memory_is_not_read():
    """Freed blocks full of NaN are what the kernels' scratch and outputs come from."""
    for shape in [(13, 3, 5), (64, 20, 5), (130, 2, 9), (700, 1, 1)]:
        poison = [torch.full((size,), torch.nan) for size in (16, 64, 1000, 5000, 20000, 80000) for _ in range(8)]
        del poison
        assert_like_reference(*inputs(shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g, v: torch.ops.fastgan.minibatch_discrimination(g, True), r"m has shape \(6, 2\), expected \(B, K, D\)"),
        (lambda m, g, v: torch.ops.fastgan.minibatch_discrimination(m.long(), True), "m is Long, expected a floating-point"),
        (lambda m, g, v: torch.ops.fastgan.minibatch_discrimination_backward(g[:5], m), r"grad has shape \(5, 2\), expected"),
        (
            lambda m, g, v: torch.ops.fastgan.minibatch_discrimination_backward(g.double(), m),
            "grad is Double, expected the dtype",
        ),
        (lambda m, g, v: torch.ops.fastgan.minibatch_discrimination_jvp(v[..., :2], m), r"t has shape \(6, 2, 2\), expected"),
        (
            lambda m, g, v: torch.ops.fastgan.minibatch_discrimination_double_backward(g, g, m),
            r"v has shape \(6, 2\), expected",
        ),
    ],
)
def test_errors_teach(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(*inputs((6, 2, 3)))


MEMORY = """
import resource, torch
from fastgan.ops import minibatch_discrimination as md
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
shape = (8192, 32, 8)
warm = torch.zeros(16, 32, 8)
md.backward(md.forward(warm, True), warm)
before = peak()
m = torch.randn(shape)
f = md.forward(m, True)
d = md.backward(torch.ones(()).expand(shape[:2]), m)
print(peak() - before - sum(x.numel() * x.element_size() for x in (m, f, d)))
"""


def test_memory_is_linear_in_batch():
    output = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=600)
    assert int(output.stdout) <= 48 << 20


def broadcast(m):
    return torch.exp(-(m[:, None] - m[None]).abs().sum(-1)).sum(1)


def spreads():
    """Where distances are summed in fixed point (AVX2 and up, samples close together) and where they can't be."""
    random = torch.Generator().manual_seed(0)
    m = torch.randn(150, 3, 7, generator=random, dtype=torch.float64) / 7
    yield "close together", m
    yield "far from zero", m + 1000
    yield "very close together", m * 1e-6 + 3
    yield "all the same", torch.ones_like(m)
    yield "apart", m * 5
    yield "at the limit", m * 17
    yield "far apart", m * 300
    yield "many coordinates", torch.randn(150, 2, 90, generator=random, dtype=torch.float64) / 90
    yield "one coordinate that spreads", m * torch.tensor([20.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    outlier = m.clone()
    outlier[17, 1, 2] = 1e6
    yield "one far away", outlier
    twins = m.clone()
    twins[75:] = twins[:75] * (1 + 1e-6)
    yield "near twins", twins
    infinite = m.clone()
    infinite[3, 0, 1], infinite[5, 1, 2], infinite[9, 2, 0] = float("inf"), -float("inf"), float("nan")
    yield "not finite", infinite


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(("spread", "m"), [pytest.param(*case, id=case[0]) for case in spreads()])
def test_as_exact_as_torch_however_samples_spread(spread, m, level, set_isa):
    if level not in instruction_sets():
        pytest.skip(f"this processor doesn't run {level}")
    set_isa(level)
    m = m.float()
    grad = torch.linspace(0.5, 1.5, m[:, :, 0].numel()).reshape(m.shape[:2])
    x = m.clone().requires_grad_()
    own = (broadcast(x), *torch.autograd.grad(broadcast(x), x, grad))
    exact = (md.forward_reference(m.double(), True), md.backward_reference(grad.double(), m.double()))
    for got, torch_own, want in zip((md.forward(m, True), md.backward(grad, m)), own, exact, strict=True):
        floor = 2**-24 * want.nan_to_num(0, 0, 0).abs().max()
        error, allowed = (got - want).abs().nan_to_num(0).max(), 2 * (torch_own - want).abs().nan_to_num(0).max() + floor
        assert torch.equal(got.isnan(), want.isnan())
        assert error <= allowed, f"{spread}: error {error:.2e}, torch's own {(allowed - floor) / 2:.2e}"


def test_twins_are_at_distance_zero():
    """Fixed point doesn't round equal samples apart."""
    pair = torch.rand(1, 6, 5) + 7
    assert md.forward(torch.cat((pair, pair, pair + 4)), True)[:2].eq(2).all()
