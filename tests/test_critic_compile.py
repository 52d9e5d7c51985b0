"""The compiled critic step: ``compile=True``, and the step inside somebody's own torch.compile."""

import gc
import weakref

import critics
import pytest
import reference
import torch
import torch.nn as nn
import torch.nn.functional as F
from flops import FlopCounter, flops
from test_critic_step import GP, R1, R12, batch, build, textbook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import fastgan
from fastgan.critic import compiled

torch.set_num_threads(1)

BENCHMARK = {
    "DCGAN": (lambda: critics.DCGAN(4, 64), (3, 64, 64)),
    "SNGAN": (lambda: critics.SNGAN(8), (3, 32, 32)),
    "R3GAN": (lambda: critics.R3GAN(8, 2), (3, 32, 32)),
    "CTGAN": (lambda: critics.CTGAN(32, 16), (32,)),
    "HiFi": (lambda: critics.HiFi(8), (1, 256)),
}


@pytest.fixture(autouse=True)
def forget():
    yield
    torch._dynamo.reset()


def pair(make, real):
    """Two equal critics whose lazy layers have their shapes: these cannot be captured."""
    found = build(make)
    for critic in found:
        if any(isinstance(m, critics.LazyHead) for m in critic.modules()):
            before = [b.clone() for b in critic.buffers()]
            critic(real)
            for buffer, value in zip(critic.buffers(), before, strict=True):
                buffer.copy_(value)
    return found


def check(models, real, fake, *, served=True, method=None, steps=3, tolerance=1e-12, backend="eager", **kw):
    """Gradients, loss, buffers and random state of compiled steps and the textbook's. The first may run eagerly."""
    ours, eager = models
    for k in range(steps):
        ours.zero_grad()
        eager.zero_grad()
        torch.manual_seed(k)
        step = fastgan.critic_step(ours, real, fake, compile=backend, **kw)
        step.loss.backward()
        state = torch.get_rng_state()
        torch.manual_seed(k)
        loss = drawn_textbook(eager, real, fake, **kw)
        loss.backward()
        assert torch.equal(state, torch.get_rng_state()), "random state"
        torch.testing.assert_close(step.loss, loss, rtol=tolerance * 1e3, atol=tolerance)
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= tolerance
        for (name, a), b in zip(ours.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    assert ("run eagerly" not in step.why) == served, step.why
    if method is not None:
        assert step.method == method, step.why
    return step


def drawn_textbook(critic, real, fake, **kw):
    """The textbook step, alpha drawn after the forwards of real and fake, as critic_step does."""
    if not kw.get("gradient_penalty"):
        return textbook(critic, real, fake, **kw)[0]
    if "alpha" in kw:
        return textbook(critic, real, fake, **kw)[0]
    weight = kw.pop("gradient_penalty")
    loss = textbook(critic, real, fake, **kw)[0]
    alpha = torch.rand((len(real), *[1] * (real.dim() - 1)), dtype=real.dtype)
    g, _ = reference.gradient(critic, torch.lerp(fake, real, alpha), kw.get("real_args", ()))
    return loss + weight * (reference.norms(g) - 1).square().mean()


@pytest.mark.parametrize("case", [R12, R1, GP, dict(R12, gradient_penalty=3.0)], ids=["R1+R2", "R1", "WGAN-GP", "all"])
@pytest.mark.parametrize("name", BENCHMARK)
def test_benchmark_critics_share_and_count(name, case, monkeypatch):
    make, shape = BENCHMARK[name]
    torch.manual_seed(0)
    real, fake = torch.randn(2, 4, *shape, dtype=torch.float64)
    ours, eager = build(make)
    check((ours, eager), real, fake, method="fused", **case)
    if "gradient_penalty" in case and "r1" in case:
        return
    counted = []
    honest = compiled.Program.__call__
    # inside the program: Dynamo switches itself off under the mode that counts
    monkeypatch.setattr(
        compiled.Program, "__call__", lambda *a: (r := [], counted.append(flops(lambda: r.append(honest(*a)))), r[0])[2]
    )
    fastgan.critic_step(ours, real, fake, compile="eager", **case)
    limit = 8.1 if "r2" in case else 7.1 if "r1" in case else 10.1
    assert 4 <= counted[0] / flops(lambda: ours(real)) <= limit


def test_torch_compile_switched_off(monkeypatch):
    ours, eager = build(critics.SharedConv)
    with FlopCounter():
        step = check((ours, eager), *batch(), served=False, method="fused", **R12)
    assert "switched off" in step.why


CAPTURED = """shared conv|sngan spectral norm|sngan old spectral norm|relu in place|prelu|rrelu|max pool|bilinear|pixel shuffle
transposed grouped|3-D|1-D|weight norm|weight norm parametrized|equalised|dropout|alpha dropout|cat parameter|gain|division
einsum|where|maxout|split|channel roll|fft|merged batch|batch norm eval|no grad branch|baddbmm|mv"""


@pytest.mark.parametrize("name", CAPTURED.replace("\n", "|").split("|"))
def test_piecewise_linear_critics(name):
    real, fake = batch(name)
    check(pair(critics.SHARED[name], real), real, fake, method="fused", **R12)


@pytest.mark.parametrize("name", critics.CURVED)
def test_curved_critics_are_compiled_as_double_backward(name):
    real, fake = batch()
    check(pair(critics.CURVED[name], real), real, fake, method="double_backward", **R12)


@pytest.mark.parametrize("case", [R12, GP], ids=["R1+R2", "WGAN-GP"])
def test_inductor(case):
    """Dropout masks, power iterations and the order of random numbers are eager's in generated code too."""

    def make():
        first = parametrizations.spectral_norm(nn.Linear(192, 8))
        return nn.Sequential(nn.Flatten(), first, nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(8, 1))

    check(build(make), *batch(), backend=True, tolerance=1e-11, method="fused", **case)


@pytest.mark.parametrize("loss", fastgan.losses.names())
def test_every_loss(loss):
    real, fake = batch()
    for penalties in ({"r1": 1.0, "r2": 1.0}, {"r2": 2.0}, {}):
        check(build(critics.SharedConv), real, fake, loss=loss, **penalties)


def test_labels_and_gradients_of_arguments():
    y, z = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 3, 0, 4])
    check(build(critics.Projection), *batch(), real_args=(y,), fake_args=(z,), method="fused", **R12)
    torch.manual_seed(0)
    critic = critics.WithParameter(torch.randn(192, 6), lambda x, p, e: ((x.flatten(1) @ p).relu() * e).sum(1)).double()
    embed, (real, fake) = nn.Embedding(5, 6).double(), batch()
    found = []
    for backend in ("eager", "eager", "eager", False):
        critic.zero_grad()
        embed.zero_grad()
        e = embed(y)
        fastgan.critic_step(critic, real, fake, real_args=(e,), fake_args=(e,), compile=backend, **R12).loss.backward()
        found.append([p.grad.clone() for p in (*critic.parameters(), *embed.parameters())])
    assert all(reference.error(got, found[-1]) <= 1e-12 for got in found)


# --- what changes between steps --------------------------------------------------------------------------------------


class Rolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out, self.dim = nn.Sequential(critics.conv(3, 4), nn.ReLU()), critics.head(4), 1

    def forward(self, x):
        return self.out(self.body(x).roll(1, self.dim))


def test_a_changed_attribute_is_noticed():
    ours, eager = build(Rolled)
    for dim, method in ((1, "fused"), (0, "double_backward"), (1, "fused")):
        ours.dim = eager.dim = dim
        check((ours, eager), *batch(), method=method, **R12)


def test_a_changed_mode_shape_and_loss_are_noticed():
    real, fake = batch()
    ours, eager = pair(critics.SHARED["dropout"], real)
    factor = 1.0
    loss = lambda r, f: factor * (f - r).exp().mean()  # noqa: E731
    check((ours, eager), real, fake, loss=loss, r1=1.0)
    for module in (ours, eager):
        module.eval()
    check((ours, eager), real, fake, loss=loss, r1=1.0)
    factor = 2.0
    check((ours, eager), real, fake, loss=loss, r1=1.0)
    check((ours, eager), real[:3], fake[:3], loss=loss, r1=1.0)


def test_a_changed_weight_does_not_compile_again(monkeypatch):
    made = []
    honest = compiled.Program.__init__
    monkeypatch.setattr(compiled.Program, "__init__", lambda self, *a: (made.append(1), honest(self, *a))[1])
    models = build(critics.SharedConv)
    for weight in (1.0, 0.5, 1e-3, 7.0):
        check(models, *batch(), r1=weight, r2=2 * weight, loss="relativistic", steps=2)
    assert len(made) == 1


def test_patches():
    make = lambda: nn.Sequential(critics.conv(3, 4), nn.LeakyReLU(0.2), critics.conv(4, 1))  # noqa: E731
    real, fake = batch()
    step = check(build(make), real, fake, r1=1.0, r2=1.0, loss="hinge", method="double_backward")
    assert "patches" in step.why
    check(build(make), real, fake, r1=1.0, r2=1.0, loss="wasserstein", method="fused")
    check(build(make), real, fake, gradient_penalty=10.0, loss="least_squares", method="fused")


def test_value_dependent_permutation_is_left_to_double_backward():
    from test_critic_step import Permuted

    ours, eager = build(Permuted)
    for order in ([0, 1, 2, 3], [3, 0, 1, 2]):
        ours.order = eager.order = torch.tensor(order)
        check((ours, eager), *batch(), method="double_backward", **R12)


@pytest.mark.parametrize("name", critics.COUPLED)
def test_coupled_samples_do_not_share(name):
    real, fake = batch()
    check(pair(critics.COUPLED[name], real), real, fake, method="double_backward", **R12)


# --- what is not compiled --------------------------------------------------------------------------------------------


def test_what_cannot_be_compiled_runs_eagerly_and_says_so():
    class Decides(critics.SharedConv):
        def forward(self, x):
            return super().forward(x) * (2 if x.sum() > 0 else 1)

    real, fake = batch()
    step = check(build(Decides), real, fake, served=False, method="fused", **R12)
    assert "run eagerly: Unsupported: Data-dependent branching" in step.why
    ours, eager = build(critics.SharedConv)
    for options, why in (
        ({"method": "jvp"}, "repeats"),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "GradScaler"),
        ({"microbatch": 2}, "microbatch"),
        ({"joint": True}, "joint"),
    ):
        ours.zero_grad()
        eager.zero_grad()
        kw = {"r1": 1.0, "r2": 1.0, "loss": "relativistic"}
        step = fastgan.critic_step(ours, real, fake, compile="eager", **options, **kw)
        step.loss.backward()
        textbook(eager, real, fake, **kw)[0].backward()
        assert "run eagerly" in step.why and why in step.why
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-6
    step = fastgan.critic_step(lambda x: ours(x), real, fake, compile="eager", **R12)
    assert "must be a module" in step.why
    with pytest.raises(ValueError, match="backend"):
        fastgan.critic_step(ours, real, fake, compile="fast", **R12)


def test_a_generator_is_drawn_from_once():
    real, fake = batch()
    module = critics.SharedConv().double()
    for critic in (module, lambda x: module(x)):
        found = []
        for backend in (False, "eager", "eager", "eager"):
            generator = torch.Generator().manual_seed(3)
            step = fastgan.critic_step(critic, real, fake, generator=generator, compile=backend, **GP)
            found.append((step.penalty, generator.get_state()))
        for penalty, state in found[1:]:
            torch.testing.assert_close(penalty, found[0][0])
            assert torch.equal(state, found[0][1])


def test_nothing_keeps_the_critic_alive():
    critic = critics.SharedConv().double()
    for _ in range(3):
        fastgan.critic_step(critic, *batch(), compile="eager", **R12).loss.backward()
    alive = weakref.ref(critic)
    del critic
    gc.collect()
    assert alive() is None


# --- inside somebody's torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [R12, GP], ids=["R1+R2", "WGAN-GP"])
@pytest.mark.parametrize("name", ["shared conv", "equalised", "dropout", "silu", "layer norm"])
def test_inside_torch_compile(name, case):
    real, fake = batch(name)
    ours, eager = pair(critics.SHARED.get(name) or critics.CURVED[name], real)
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    function = torch.compile(
        lambda r, f: fastgan.critic_step(ours, r, f, alpha=alpha, **case), fullgraph=True, backend="aot_eager"
    )
    for k in range(2):
        ours.zero_grad()
        eager.zero_grad()
        torch.manual_seed(k)
        step = function(real, fake)
        step.loss.backward()
        torch.manual_seed(k)
        loss = textbook(eager, real, fake, alpha=alpha, **case)[0]
        loss.backward()
        torch.testing.assert_close(step.loss, loss, rtol=1e-10, atol=1e-12)
        assert step.method == "double_backward" and "torch.compile" in step.why
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
        for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"method": "fused"}, {"joint": True}, {"microbatch": 2}], ids=str)
def test_refusals_inside_torch_compile(options):
    ours = critics.SharedConv().double()
    function = torch.compile(
        lambda r, f: fastgan.critic_step(ours, r, f, **options, **R12).loss, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"outside torch\.compile"):
        function(*batch())


def test_flash_attention_runs_eagerly_by_forward_mode():
    """It cannot be differentiated twice, and a capture cannot be repeated: nothing may have moved when that is found out."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out, self.norm = nn.Linear(4, 24), nn.Linear(8, 1), nn.BatchNorm1d(6)
            self.dropout = nn.Dropout(0.3)

        def forward(self, x):
            q, k, v = self.first(self.dropout(self.norm(x.unflatten(1, (6, 4))))).unsqueeze(1).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    ours, eager = build(Attention)
    real, fake = torch.randn(2, 8, 24, dtype=torch.float64)
    for k in range(3):
        ours.zero_grad()
        eager.zero_grad()
        torch.manual_seed(k)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            step = fastgan.critic_step(ours, real, fake, compile="eager", **R12)
        step.loss.backward()
        state = torch.get_rng_state()
        torch.manual_seed(k)
        with sdpa_kernel(SDPBackend.MATH):
            textbook(eager, real, fake, **R12)[0].backward()
        assert step.method == "jvp" and "run eagerly" in step.why and "differentiated twice" in step.why
        assert torch.equal(state, torch.get_rng_state())
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-10
        for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_first_step_without_finite_numbers_decides_nothing():
    torch.manual_seed(3)
    critic, _ = build(lambda: critics.DCGAN(4, 16))
    real, fake = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    step = lambda r: fastgan.critic_step(critic, r, fake, compile="eager", **R12)  # noqa: E731
    assert not bool(step(torch.full_like(real, torch.nan)).loss.isfinite())
    assert "first step" in step(real).why
    compiled_step = step(real)
    assert compiled_step.method == "fused" and "run eagerly" not in compiled_step.why
