"""What only a GPU shows: streams, CUDA graphs, calls that wait for nothing, several devices, more than 2^31 elements."""

import gc
import math

import critics
import pytest
import reference
import torch
from samples import OPERATORS, inputs, map_tensors, tensors_of

import fastgan
from benchmarks.gpu_steps import captured
from fastgan import backends, losses, recipes

pytestmark = [pytest.mark.gpu_check, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
large = pytest.mark.xdist_group("gibibytes of memory")

BACKENDS = ("triton", "cuda")
GIB = 1 << 30


@pytest.fixture(params=BACKENDS)
def served(request):
    """(backend, operator): each that has kernels for GPUs."""
    return request.param


def call(backend: str, op: str, values: tuple):
    if (problem := backends.problem(backend, op, "cuda")) == backends.NO_KERNEL:
        pytest.skip(f"{op}: {problem}")
    before = backends.calls(backend)
    with fastgan.use_backend(backend):
        results = tensors_of(getattr(torch.ops.fastgan, op)(*values))
    assert backends.calls(backend) > before
    return results


def on_gpu(op: str, seed: int = 0) -> tuple:
    return map_tensors(torch.Tensor.cuda, inputs(op, OPERATORS[op].large, torch.float32, seed))


@pytest.mark.parametrize("op", OPERATORS)
def test_waits_for_nothing(served, op):
    values = on_gpu(op)
    call(served, op, values)  # compiles, and sends tables
    try:
        torch.cuda.set_sync_debug_mode("error")
        call(served, op, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPERATORS)
def test_runs_on_the_current_stream(served, op):
    """Its inputs are there only once the stream has done what is before it."""
    values, late = on_gpu(op), map_tensors(lambda x: torch.full_like(x, math.nan), on_gpu(op))
    expected = call(served, op, values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(served, op, values)
        torch.cuda._sleep(20_000_000)
        for x, value in zip(tensors_of(late), tensors_of(values), strict=True):
            x.copy_(value)
        found = call(served, op, late)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPERATORS)
def test_in_a_cuda_graph(served, op):
    held, other = on_gpu(op), on_gpu(op, seed=1)
    replay = captured(lambda: call(served, op, held))
    expected = call(served, op, other)
    for _ in range(2):
        for x, value in zip(tensors_of(held), tensors_of(other), strict=True):
            x.copy_(value)
        for a, b in zip(replay(), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPERATORS)
def test_on_a_device_that_is_not_the_current_one(served, op):
    expected = call(served, op, on_gpu(op))
    found = call(served, op, map_tensors(lambda x: x.to("cuda:1"), on_gpu(op)))
    for a, b in zip(found, expected, strict=True):
        assert b.device.index == 0 and a.device.index == 1 and torch.equal(a.cpu(), b.cpu())


def room(gibibytes: float):
    if torch.cuda.mem_get_info()[0] < gibibytes * GIB:
        pytest.skip(f"needs {gibibytes} GiB of free memory on the GPU")


@large
def test_minibatch_discrimination_of_more_than_2_31_elements(served):
    room(30)
    m = torch.randn(3, (1 << 21) + 1, 350, dtype=torch.bfloat16, device="cuda") / 350
    last = m[:, -2:].clone()
    (found,) = call(served, "minibatch_discrimination", (m, True))
    (expected,) = call(served, "minibatch_discrimination", (last, True))
    assert torch.equal(found[:, -2:], expected)
    grad = torch.randn_like(found)
    (found,) = call(served, "minibatch_discrimination_backward", (grad, m))
    (expected,) = call(served, "minibatch_discrimination_backward", (grad[:, -2:].contiguous(), last))
    assert torch.equal(found[:, -2:], expected)


@large
def test_penalty_of_more_than_2_31_elements(served):
    room(16)
    grads = torch.ones(3, (1 << 30) + 9, dtype=torch.bfloat16, device="cuda")
    grads[2] = 0.5
    penalty, norms, _, seeds = call(served, "gradient_penalty", (grads, "zero_centered", 1.0, 1.0, False, 2.0))
    expected = torch.tensor([1.0, 1.0, 0.5], device="cuda") * math.sqrt((1 << 30) + 9)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(penalty, expected.square().mean() / 2, rtol=1e-6, atol=0)
    assert seeds[2, -1] == (0.5 / 3 * torch.ones((), dtype=torch.float64)).bfloat16()


@large
def test_tangents_of_more_than_2_31_elements(served):
    room(24)
    t = torch.ones(3, (1 << 30) + 9, dtype=torch.bfloat16, device="cuda")
    a = torch.full_like(t, -2.0)
    passed, combined = call(served, "tangent_combine", (t, a, torch.tensor([1.0, 2.0, 3.0], device="cuda"), 0.25))
    assert (passed[:, -9:] == 0.25).all() and (combined[2, -9:] == -5.75).all() and (combined[0, :9] == -1.75).all()


@large
def test_spectral_norm_of_more_than_2_31_elements(served):
    room(24)
    rows, columns = 46_341, 46_352
    left, right = torch.rand(rows, device="cuda") + 0.5, torch.rand(columns, device="cuda") + 0.5
    weight = torch.outer(left.bfloat16(), right.bfloat16())  # of rank one but for rounding
    u, v = left / left.norm(), right / right.norm()
    normalised, new_u, new_v, sigma = call(served, "spectral_norm", (weight, u, v, 0, 1, 1e-12, False, 1.0, False))
    torch.testing.assert_close(sigma, left.norm() * right.norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(new_u, u, rtol=0, atol=1e-4)
    torch.testing.assert_close(new_v, v, rtol=0, atol=1e-4)
    assert torch.equal(normalised[-1], (weight[-1].float() / sigma).bfloat16())
    (gradient,) = call(served, "spectral_norm_backward", (weight, weight, new_u, new_v, sigma, 0, 1.0, False))
    assert (gradient[-1].float() * sigma).abs().max() < 0.05  # along u v^T, of which W is a multiple, there is none


@large
def test_stddev_of_more_than_2_31_elements(served):
    room(24)
    x = torch.zeros(4, (1 << 15) + 1, 128, 129, dtype=torch.bfloat16, device="cuda")
    x[::2] = 1.0
    x[:, -1] *= 3
    (out,) = call(served, "minibatch_stddev", (x, 1, True, 1, False, 1e-8))
    assert torch.equal(out[:, -2], x[:, -1])
    torch.testing.assert_close(out[:, -1].float().mean(), torch.tensor(0.5, device="cuda"), rtol=1e-2, atol=0)


def test_pairwise_sums_of_many_points(served):
    """Nine hundred million pairs, none of which is kept."""
    room(8)
    points = torch.randn(3000, 4, device="cuda")
    x = points.repeat(100, 1)
    (found,) = call(served, "pairwise_kernel_sum", (x, points, x.new_tensor([1.0]), x.new_ones(1), "gaussian", 1.0, 0.0, False))
    (expected,) = call(
        served, "pairwise_kernel_sum", (points, points, x.new_tensor([1.0]), x.new_ones(1), "gaussian", 1.0, 0.0, False)
    )
    torch.testing.assert_close(found[-3000:], expected)


def test_compiled_into_cuda_graphs():
    """As torch.compile(mode="reduce-overhead") makes them, forward and backward."""
    m = torch.randn(64, 10, 5, device="cuda", requires_grad=True)

    def loss(m):
        return fastgan.minibatch_discrimination(m).square().sum()

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    (expected,) = torch.autograd.grad(loss(m), m)
    for _ in range(4):
        (found,) = torch.autograd.grad(compiled(m), m)
        torch.testing.assert_close(found.clone(), expected)


# Whole steps


CASES = {
    "r1+r2": {"r1": 1.0, "r2": 1.0, "loss": "relativistic"},
    "gp": {"gradient_penalty": 10.0, "loss": "wasserstein"},
}


def critic_and_batches(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    critic = critics.SNGAN(8).to("cuda", dtype)
    real, fake = torch.randn(2, 4, 3, 16, 16, dtype=dtype)
    return critic, real.cuda(), fake.cuda(), torch.rand(4, 1, 1, 1, dtype=dtype).cuda()


def gradient_of(critic):
    return torch.cat([p.grad.flatten() for p in critic.parameters() if p.grad is not None])


def textbook(critic, real, fake, alpha, case):
    weights = (case.get("gradient_penalty", 0.0), case.get("r1", 0.0), case.get("r2", 0.0))
    return reference.step(critic, real, fake, losses.get(case["loss"]), *weights, alpha)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_critic_step_under_autocast_and_a_scaler(case, dtype):
    """As close to float64 as the textbook's step under the same autocast."""
    errors, truth = [], None
    for kind in ("truth", "ours", "textbook"):
        critic, *batches = critic_and_batches(torch.float64 if kind == "truth" else torch.float32)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
        with torch.autocast("cuda", dtype, enabled=kind != "truth"):
            if kind == "ours":
                real, fake, alpha = batches
                loss = fastgan.critic_step(critic, real, fake, alpha=alpha, grad_scaler=scaler, **CASES[case]).loss
            else:
                loss = textbook(critic, *batches, CASES[case])
        (loss if kind == "truth" else scaler.scale(loss)).backward()
        if kind == "truth":
            truth = gradient_of(critic)
            continue
        gradient = gradient_of(critic) / scaler.get_scale()
        errors.append(((gradient.double() - truth).norm() / truth.norm()).item())
    assert errors[0] <= 2 * errors[1] + 1e-3, errors


@pytest.mark.parametrize("case", CASES)
def test_critic_step_in_a_cuda_graph(case):
    critic, real, fake, alpha = critic_and_batches()

    def step():
        critic.zero_grad(set_to_none=True)
        result = fastgan.critic_step(critic, real, fake, alpha=alpha, **CASES[case])
        assert result.method == "fused"
        result.loss.backward()
        return result

    replay = captured(step)
    for seed in (1, 2):
        _, *batches = critic_and_batches(seed=seed)
        for held, new in zip((real, fake, alpha), batches, strict=True):
            held.copy_(new)
        for p in critic.parameters():
            p.grad.zero_()
        found = replay().loss.clone(), gradient_of(critic).clone()
        other, *_ = critic_and_batches()
        loss = textbook(other, *batches, CASES[case])
        loss.backward()
        torch.testing.assert_close(found[0], loss.detach(), rtol=1e-4, atol=1e-5)
        expected = gradient_of(other)
        assert (found[1] - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("norm", ["none", "spectral", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_graphed_critic_step_trains_as_the_critic_step_does(case, norm):
    """Over a few updates: parameters, buffers and what is returned; of two sizes of batches, and over zero_grad()."""
    found = []
    for graphed in (True, False):
        torch.manual_seed(0)
        wrap = {"spectral": fastgan.spectral_norm}.get(norm, lambda m: m)
        critic = critics.SNGAN(8, norm=wrap)
        if norm == "batch":
            critic = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), critic)
        critic = critic.to("cuda", torch.float64)
        optimizer = torch.optim.SGD(critic.parameters(), 1e-3)
        step = fastgan.GraphedCriticStep(critic, **CASES[case])
        returned = []
        for i, size in enumerate((4, 4, 3, 4)):
            torch.manual_seed(i)
            real, fake = torch.randn(2, size, 3, 16, 16, dtype=torch.float64).cuda()
            given = {"alpha": torch.rand(size, 1, 1, 1, dtype=torch.float64).cuda()} if case == "gp" else {}
            optimizer.zero_grad(set_to_none=i % 2 == 0)
            if graphed:
                result = step(real, fake, **given)
            else:
                result = fastgan.critic_step(critic, real, fake, **given, **CASES[case])
                result.loss.backward()
            optimizer.step()
            returned += [result.loss.detach(), result.real_scores, *result.grad_norms.values()]
        found.append((critic.state_dict(), returned))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_graphed_critic_step_draws_anew_and_says_what_it_cannot_hold():
    critic, real, fake, _ = critic_and_batches()
    step = fastgan.GraphedCriticStep(critic, **CASES["gp"])
    norms = [step(real, fake).grad_norms["gp"] for _ in range(3)]
    assert not torch.equal(norms[0], norms[1]) and not torch.equal(norms[1], norms[2])  # other interpolates

    class Reading(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = critic

        def forward(self, x):
            return self.inner(x) * float(x.mean() < 100)

    critic.zero_grad()
    before = torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match=r"can't be captured in a CUDA graph: .*Use critic_step"):
        fastgan.GraphedCriticStep(Reading(), **CASES["r1+r2"])(real, fake)
    assert all(p.grad is None for p in critic.parameters())
    assert torch.equal(before, torch.cuda.get_rng_state()) and torch.rand(3, device="cuda").isfinite().all()
    fastgan.critic_step(Reading(), real, fake, **CASES["r1+r2"]).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graphed_critic_step_under_autocast(dtype):
    """Weights in 16 bits are those of each step, not of the capture."""
    found = []
    for graphed in (True, False):
        critic, real, fake, alpha = critic_and_batches()
        step = fastgan.GraphedCriticStep(critic, **CASES["gp"])
        for i in range(3):
            critic.zero_grad()
            with torch.autocast("cuda", dtype):
                if graphed:
                    step(real, fake, alpha=alpha)
                else:
                    fastgan.critic_step(critic, real, fake, alpha=alpha, **CASES["gp"]).loss.backward()
            with torch.no_grad():
                for p in critic.parameters():
                    p -= (i < 2) * 1e-3 * p.grad
        found.append(gradient_of(critic))
    assert (found[0] - found[1]).norm() <= 0.03 * found[1].norm()


def test_memory_does_not_grow_over_steps():
    """Of a critic step and of a penalty that a user wrote, after accelerate; with the cycles' collector off."""
    for kind in ("step", "accelerate"):
        critic, real, fake, alpha = critic_and_batches()
        if kind == "accelerate":
            fastgan.accelerate(critic)

        def step():
            if kind == "step":  # noqa: B023
                fastgan.critic_step(critic, real, fake, alpha=alpha, **CASES["gp"]).loss.backward()  # noqa: B023
            else:
                textbook(critic, real, fake, alpha, CASES["gp"]).backward()  # noqa: B023
            critic.zero_grad(set_to_none=True)  # noqa: B023

        for _ in range(25):
            step()
        gc.collect()
        gc.disable()
        try:
            step()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            for _ in range(20):
                step()
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() <= before
        finally:
            gc.enable()


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("name", recipes.names())
def test_recipes_train(name, amp):
    pytest.importorskip("torchmetrics")
    from fastgan.training import data
    from fastgan.training.trainer import Trainer

    kind = recipes.get(name)
    trained = Trainer(kind, kind.Options(), data.load(kind.data, kind.size), batch_size=16, steps=4, device="cuda", amp=amp)
    before = {key: value.clone() for module in trained.raw.values() for key, value in module.named_parameters()}
    for _ in range(4):
        trained.step()
    after = {key: value for module in trained.raw.values() for key, value in module.named_parameters()}
    assert all(value.isfinite().all() for value in after.values())
    assert amp or any(not torch.equal(before[key], after[key]) for key in before)  # a scaler may skip all four
    assert all(value.isfinite() or amp for value in trained.losses.values()), trained.losses
