"""The critic step against the textbook formula by double backward, in float64."""

import copy
import gc
import weakref

import critics
import pytest
import reference
import torch
import torch.nn as nn
import torch.nn.functional as F
from flops import flops
from memory import peak_bytes
from ranks import on_ranks

import fastgan
from fastgan import losses
from fastgan.critic import engine, forward, passes
from fastgan.critic.forward import Forward

torch.set_num_threads(1)

PENALTIES = {"r1", "r2", "gradient_penalty"}
R12 = {"r1": 1.3, "r2": 0.7, "loss": "relativistic"}
R1 = {"r1": 1.3, "loss": "non_saturating"}
GP = {"gradient_penalty": 10.0, "loss": "wasserstein"}


def build(make, seed=0):
    """Two equal float64 critics; lazy layers are given their shapes first."""
    found = []
    for _ in range(2):
        torch.manual_seed(seed)
        found.append(make().double())
    return found


def textbook(critic, real, fake, loss="wasserstein", gradient_penalty=0.0, **kw):
    pick = kw.pop("score_fn", None) or (lambda out: out)
    function = losses.get(loss)
    return reference.step(critic, real, fake, function, gp=gradient_penalty, pick=pick, **kw)


def check(make, real, fake, *, method=None, tolerance=1e-12, repeats=2, **kw):
    """Losses, gradients, buffers and random state of our step and of the textbook's, several steps in a row."""
    ours, eager = build(make)
    alpha = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype)
    for k in range(repeats):
        ours.zero_grad()
        eager.zero_grad()
        torch.manual_seed(k)
        step = fastgan.critic_step(ours, real, fake, alpha=alpha, **kw)
        step.loss.backward()
        state = torch.get_rng_state()
        torch.manual_seed(k)
        loss, adversarial, penalty = textbook(eager, real, fake, alpha=alpha, **kw)
        loss.backward()
        assert torch.equal(state, torch.get_rng_state()), "random state"
        torch.testing.assert_close(step.loss, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(step.adversarial, adversarial.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(step.penalty, torch.as_tensor(penalty).detach().double(), rtol=1e-10, atol=1e-12)
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= tolerance
        for (name, a), b in zip(ours.named_buffers(), eager.named_buffers(), strict=False):
            assert torch.equal(a, b[1]), name
        if method is not None:
            assert step.method == method, step.why
    return step


def size_of(name):
    return 32 if name.startswith("sngan") else 16 if name == "dcgan" else 8


def batch(name="", b=4):
    torch.manual_seed(99)
    return critics.images(b, size_of(name)), critics.images(b, size_of(name))


@pytest.mark.parametrize("name", critics.SHARED)
def test_piecewise_linear_critics_take_the_shared_pass(name):
    for case in (R12, GP):
        check(critics.SHARED[name], *batch(name), method="fused", **case)


@pytest.mark.parametrize("name", critics.CURVED)
def test_curved_critics_fall_back_and_stay_exact(name):
    for case in (R12, GP):
        check(critics.CURVED[name], *batch(), method="double_backward", **case)


@pytest.mark.cpu
@pytest.mark.parametrize("name", critics.COUPLED)
def test_coupled_samples_are_noticed(name):
    step = check(critics.COUPLED[name], *batch(), r1=1.0, r2=2.0, loss=lambda r, f: (F.softplus(-r) * RAMP).sum() + f.mean())
    assert "r1: double_backward (samples are coupled" in step.why
    # with one derivative for all scores there is nothing to tell apart: sharing is exact even then
    check(critics.COUPLED[name], *batch(), method="fused", r1=1.0, r2=2.0, loss="wasserstein")
    check(critics.COUPLED[name], *batch(), method="fused", **GP)


RAMP = torch.arange(1.0, 5.0, dtype=torch.float64)


@pytest.mark.parametrize("case", [R12, R1, GP, dict(R12, gradient_penalty=3.0)], ids=["R1+R2", "R1", "WGAN-GP", "all"])
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: critics.DCGAN(4, 64), (3, 64, 64)),
        (lambda: critics.SNGAN(8), (3, 32, 32)),
        (lambda: critics.R3GAN(8, 2), (3, 32, 32)),
        (lambda: critics.CTGAN(32, 16), (32,)),
        (lambda: critics.HiFi(8), (1, 256)),
    ],
    ids=["DCGAN", "SNGAN", "R3GAN", "CTGAN", "HiFi"],
)
def test_benchmark_critics_share_and_count(make, shape, case):
    torch.manual_seed(0)
    real, fake = torch.randn(2, 4, *shape, dtype=torch.float64)
    check(make, real, fake, method="fused", **case)
    if "gradient_penalty" in case and "r1" in case:
        return
    critic = make().double()
    unit = flops(lambda: critic(real))
    run = lambda: fastgan.critic_step(critic, real, fake, **case).loss.backward()  # noqa: E731
    for _ in range(3):
        run()  # proofs are once per critic
    limit = 8.1 if "r2" in case else 7.1 if "r1" in case else 10.1
    assert flops(run) / unit <= limit


@pytest.mark.parametrize("case, limit", [(R12, 0.6), (GP, 0.45)], ids=["R1+R2", "WGAN-GP"])
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: critics.DCGAN(32, 64), (3, 64, 64)),
        (lambda: critics.SNGAN(64), (3, 32, 32)),
        (lambda: critics.R3GAN(32), (3, 32, 32)),
        (lambda: critics.HiFi(16), (1, 2048)),
    ],
    ids=["DCGAN", "SNGAN", "R3GAN", "HiFi"],
)
def test_peak_memory_of_batches_run_one_after_the_other(make, shape, case, limit):
    torch.manual_seed(0)
    critic, (real, fake) = make(), torch.randn(2, 16, *shape)

    def ours():
        critic.zero_grad()
        fastgan.critic_step(critic, real, fake, alpha=0.5, joint=False, **case).loss.backward()

    def eager():
        critic.zero_grad()
        textbook(critic, real, fake, alpha=0.5, **case)[0].backward()

    ours()  # once with every activation kept, to prove what must be proved
    assert peak_bytes(ours) <= limit * peak_bytes(eager)


@pytest.mark.parametrize("loss", losses.names())
def test_every_loss(loss):
    for penalties in ({"r1": 1.0, "r2": 1.0}, {"r1": 2.0}, {"r2": 2.0}, {"gradient_penalty": 10.0}, {}):
        check(lambda: critics.SHARED["dropout"](), *batch(), loss=loss, **penalties)


def test_one_sided_target_and_own_loss():
    check(
        critics.SharedConv, *batch(), method="fused", gradient_penalty=10.0, one_sided=True, target=0.02,
        loss=lambda r, f: (f - r).exp().mean() + 0.1 * (r * f).mean(),
    )  # fmt: skip


def test_results_are_complete_and_detached():
    real, fake = batch()
    step = fastgan.critic_step(critics.SharedConv().double(), real, fake, r1=1.0, r2=1.0, gradient_penalty=1.0)
    assert set(step.grad_norms) == {"r1", "r2", "gp"}
    assert all(n.shape == (4,) and not n.requires_grad for n in step.grad_norms.values())
    assert step.real_scores.shape == step.fake_scores.shape == (4, 1)
    for t in (step.adversarial, step.penalty, step.real_scores, step.fake_scores):
        assert not t.requires_grad
    torch.testing.assert_close(step.loss.detach(), step.adversarial + step.penalty)
    assert step.method == "fused" and "r1" in step.why


# --- traps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["least_squares", "hinge", "non_saturating"])
def test_patch_scores_with_a_curved_loss_do_not_share(loss):
    make = lambda: nn.Sequential(critics.conv(3, 4), nn.LeakyReLU(0.2), critics.conv(4, 1))  # noqa: E731
    real, fake = batch()
    step = check(make, 5 * real, 5 * fake, r1=1.0, r2=1.0, loss=loss, method="double_backward")
    assert "patches" in step.why


def test_patch_scores_with_a_linear_loss_share():
    make = lambda: nn.Sequential(critics.conv(3, 4), nn.LeakyReLU(0.2), critics.conv(4, 1))  # noqa: E731
    check(make, *batch(), r1=1.0, r2=1.0, loss="wasserstein", method="fused")
    per_sample = lambda r, f: F.softplus(f.mean((1, 2, 3)) - r.mean((1, 2, 3))).mean()  # noqa: E731
    check(make, *batch(), r1=1.0, r2=1.0, loss=per_sample, method="fused")
    check(make, *batch(), gradient_penalty=10.0, loss="least_squares", method="fused")


def test_roll_with_a_cached_proof():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.dim = critics.with_layer(nn.ReLU()), 1

        def forward(self, x):
            x = self.body[2](self.body[1](self.body[0](x)))
            return self.body[3](x.roll(1, self.dim))

    ours, eager = build(Rolled)
    torch.manual_seed(0)
    real, fake = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    for dim, method in ((1, "fused"), (0, "double_backward"), (1, "fused")):
        ours.dim = eager.dim = dim
        ours.zero_grad()
        eager.zero_grad()
        step = fastgan.critic_step(ours, real, fake, **R12)
        step.loss.backward()
        textbook(eager, real, fake, **R12)[0].backward()
        assert step.method == method
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12


class Permuted(nn.Module):
    """Adds another sample's features: which one, a tensor of indices says."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = critics.conv(3, 5), critics.conv(5, 5), critics.head(5)
        self.order = torch.arange(4)

    def forward(self, x):
        h = F.leaky_relu(self.a(x), 0.2)
        return self.out(F.leaky_relu(self.b(h), 0.2) + self.b(h[self.order]).abs())


def check_step(ours, eager, real, fake, method):
    ours.zero_grad()
    eager.zero_grad()
    step = fastgan.critic_step(ours, real, fake, **R12)
    step.loss.backward()
    textbook(eager, real, fake, **R12)[0].backward()
    assert step.method == method, step.why
    assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12


@pytest.mark.cpu
def test_value_dependent_permutation_with_a_cached_proof():
    ours, eager = build(Permuted)
    real, fake = batch()
    for order, method in (([0, 1, 2, 3], "fused"), ([0, 1, 2, 3], "fused"), ([3, 0, 1, 2], "double_backward")):
        ours.order = eager.order = torch.tensor(order)
        check_step(ours, eager, real, fake, method)


@pytest.mark.cpu
def test_permutation_by_a_constant_matrix_with_a_cached_proof():
    class Matrix(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(192, 8), nn.Linear(8, 1)
            self.register_buffer("order", torch.eye(4))

        def forward(self, x):
            h = F.relu(self.a(x.flatten(1)))
            return self.b(F.relu(h + self.order @ h))

    ours, eager = build(Matrix)
    real, fake = batch()
    for shift, method in ((0, "fused"), (0, "fused"), (1, "double_backward")):
        ours.order = eager.order = torch.eye(4).double().roll(shift, 0)
        check_step(ours, eager, real, fake, method)


@pytest.mark.cpu
def test_coupling_that_slips_past_a_proof_is_an_error_not_a_wrong_gradient(monkeypatch):
    # as if batch flips had been proved harmless: the check of every step must notice
    make = critics.COUPLED["batch flip"]
    critic = build(make)[0]
    real, fake = batch()
    honest = engine.SharedPass.prove_layouts

    def gullible(self):
        if self.plan.layouts is None:
            self.plan.layouts = [((0, True, 1), (0, True, 1)) for _ in self.plan.taps]
        return self.plan.layouts

    monkeypatch.setattr(engine.SharedPass, "prove_layouts", gullible)
    step = fastgan.critic_step(critic, real, fake, **R12)
    assert step.method == "double_backward"  # first time: the graph is still there
    engine.forget_plans()
    _, plan = engine.plan_for(Forward(critic, real))
    plan.trusted = True
    with pytest.raises(RuntimeError, match="interact"):
        fastgan.critic_step(critic, real, fake, **R12)
    monkeypatch.setattr(engine.SharedPass, "prove_layouts", honest)
    assert fastgan.critic_step(critic, real, fake, **R12).method == "double_backward"


def test_a_proof_is_not_reused_for_another_critic_of_the_same_graph():
    class Flip(nn.Module):
        def __init__(self, matrix):
            super().__init__()
            self.a, self.b = nn.Linear(192, 4), nn.Linear(4, 1)
            self.register_buffer("matrix", matrix)

        def forward(self, x):
            return self.b(F.relu(self.a(x.flatten(1)) @ self.matrix))

    real, fake = batch()
    for matrix in (torch.eye(4), torch.rand(4, 4)):
        check(lambda m=matrix: Flip(m.clone()), real, fake, method="fused", **R12)


def test_batch_size_equal_to_channels_and_to_sides():
    make = lambda: nn.Sequential(critics.conv(3, 8), nn.ReLU(), critics.conv(8, 8), nn.LeakyReLU(0.1), critics.head(8))  # noqa: E731
    torch.manual_seed(0)
    check(make, *torch.randn(2, 8, 3, 8, 8, dtype=torch.float64), method="fused", **R12)


def test_dead_layers_are_not_taken_for_evidence():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = critics.conv(3, 4), critics.conv(4, 4), critics.head(4)
            self.shift = 100.0

        def forward(self, x):
            h = F.relu(self.a(x))
            return self.out(h + F.relu(self.b(h) - self.shift))

    ours, eager = build(Dead)
    real, fake = batch()
    for shift in (100.0, 0.0, 0.0):
        ours.shift = eager.shift = shift
        ours.zero_grad()
        eager.zero_grad()
        fastgan.critic_step(ours, real, fake, **R12).loss.backward()
        textbook(eager, real, fake, **R12)[0].backward()
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12


def test_two_heads():
    step = check(critics.TwoHeads, *batch(), r1=1.0, r2=1.0, loss="hinge")
    assert step.method in ("double_backward", "mixed")
    check(critics.TwoHeads, *batch(), r1=1.0, r2=1.0, loss="wasserstein")
    check(critics.TwoHeads, *batch(), r1=1.0, r2=1.0, score_fn=lambda out: out[0], loss="hinge", method="fused")
    equal = lambda r, f: F.softplus(f[0] + f[1].sum((1, 2, 3)) - r[0] - r[1].sum((1, 2, 3))).mean()  # noqa: E731
    check(critics.TwoHeads, *batch(), r1=1.0, r2=1.0, loss=equal, method="fused")


@pytest.mark.parametrize(
    "wrap, pick",
    [
        (lambda s: {"adv_output": s, "label": 3}, lambda out: out["adv_output"]),
        (lambda s: (s, 2 * s.view(-1)), None),
        (lambda s: [s], None),
    ],
    ids=["dict", "tuple", "list of one"],
)
@pytest.mark.parametrize("case", [R12, GP], ids=["R1+R2", "WGAN-GP"])
def test_scores_in_dicts_and_tuples(wrap, pick, case):
    (ours, eager), (real, fake) = build(critics.SharedConv), batch()
    step = fastgan.critic_step(lambda x: wrap(ours(x)), real, fake, alpha=0.3, **case)
    step.loss.backward()
    textbook(lambda x: wrap(eager(x)), real, fake, alpha=0.3, score_fn=pick, **case)[0].backward()
    assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
    assert isinstance(step.real_scores, list if isinstance(wrap(real), tuple) else torch.Tensor)


def test_a_head_that_does_not_see_the_input():
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.prior = critics.with_layer(nn.ReLU()), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return [self.body(x), self.prior.sin()]

    check(Prior, *batch(), r1=1.0, r2=1.0, loss="wasserstein", method="fused")
    check(Prior, *batch(), loss="hinge", **{"gradient_penalty": 1.0}, method="fused")


def test_label_projection():
    y, z = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 3, 0, 4])
    for case in (R12, GP):
        check(critics.Projection, *batch(), real_args=(y,), fake_args=(z,), method="fused", **case)


def test_arguments_made_by_other_modules_get_their_gradients():
    torch.manual_seed(0)
    critic = critics.WithParameter(torch.randn(192, 6), lambda x, p, e: ((x.flatten(1) @ p).relu() * e).sum(1)).double()
    embed = nn.Embedding(5, 6).double()
    (real, fake), y = batch(), torch.tensor([0, 1, 2, 1])
    found = []
    for run in (
        lambda e: fastgan.critic_step(critic, real, fake, real_args=(e,), fake_args=(e,), **R12).loss,
        lambda e: textbook(critic, real, fake, real_args=(e,), fake_args=(e,), **R12)[0],
    ):
        critic.zero_grad()
        embed.zero_grad()
        run(embed(y)).backward()
        found.append([p.grad for p in (*critic.parameters(), *embed.parameters())])
    assert reference.error(*found) <= 1e-12


def test_functions_methods_and_wrappers_as_critics():
    real, fake = batch()
    modules = build(critics.SharedConv)
    want = None
    for critic in (modules[0], modules[0].forward, lambda x: modules[0](x), torch.compile(modules[0], backend="eager")):
        for _ in range(2):
            modules[0].zero_grad()
            step = fastgan.critic_step(critic, real, fake, **R12)
            step.loss.backward()
            got = reference.grads(modules[0])
            want = want or [g.clone() for g in got]
            assert step.method == "fused" and reference.error(got, want) <= 1e-12


def test_inputs_are_not_touched():
    critic = critics.SharedConv().double()
    real, fake = batch()
    fake.requires_grad_(True)
    copies = real.clone(), fake.detach().clone()
    fastgan.critic_step(critic, real, fake, r1=1.0, r2=1.0, gradient_penalty=1.0).loss.backward()
    assert fake.grad is None and not real.requires_grad
    assert torch.equal(real, copies[0]) and torch.equal(fake.detach(), copies[1])


@pytest.mark.parametrize("case", [R12, GP], ids=["R1+R2", "WGAN-GP"])
@pytest.mark.parametrize("method", ["jvp", "double_backward"])
@pytest.mark.parametrize("name", ["dropout", "layer norm", "batch norm train"])
def test_other_methods_are_exact(name, method, case):
    _by(method, critics.SHARED.get(name) or critics.CURVED[name], case)


def _by(method, make, case):
    ours, eager = build(make)
    real, fake = batch()
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    torch.manual_seed(1)
    step = fastgan.critic_step(ours, real, fake, alpha=alpha, method=method, **case)
    step.loss.backward()
    torch.manual_seed(1)
    textbook(eager, real, fake, alpha=alpha, **case)[0].backward()
    assert step.method == method
    assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-11


@pytest.mark.parametrize("name", critics.CURVED)
def test_jvp_through_curved_layers(name):
    _by("jvp", critics.CURVED[name], R12)


def test_finite_difference_step():
    ours, eager = build(lambda: nn.Sequential(critics.conv(3, 4), nn.Softplus(), critics.head(4)))
    real, fake = batch()
    fastgan.critic_step(ours, real, fake, method="finite_difference", **R12).loss.backward()
    textbook(eager, real, fake, **R12)[0].backward()
    assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-6
    with pytest.raises(ValueError, match="kinks"):
        fastgan.critic_step(critics.SharedConv().double(), real, fake, method="finite_difference", **R12)


# --- autograd around the step ----------------------------------------------------------------------------------------


def test_accumulation_hooks_and_scaled_loss():
    ours, eager = build(critics.SharedConv)
    real, fake = batch()
    seen = []
    ours.out.bias.register_hook(lambda g: seen.append(g.clone()))
    ours.out.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    for _ in range(2):
        (0.5 * fastgan.critic_step(ours, real, fake, **R12).loss).backward()
        (0.5 * textbook(eager, real, fake, **R12)[0]).backward()
    assert len(seen) == 4
    assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12


def test_second_backward_and_create_graph_raise():
    critic = critics.SharedConv().double()
    step = fastgan.critic_step(critic, *batch(), **R12)
    step.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        step.loss.backward()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(fastgan.critic_step(critic, *batch(), **R12).loss, critic.out.weight, create_graph=True)


def test_no_grad_and_frozen_parameters():
    critic = critics.SharedConv().double()
    critic.stem.requires_grad_(False)
    real, fake = batch()
    step = fastgan.critic_step(critic, real, fake, **R12)
    step.loss.backward()
    assert critic.stem.weight.grad is None and critic.twice.weight.grad is not None
    want = critic.twice.weight.grad.clone()
    critic.zero_grad()
    textbook(critic, real, fake, **R12)[0].backward()
    torch.testing.assert_close(want, critic.twice.weight.grad)
    with torch.no_grad():
        assert not fastgan.critic_step(critic, real, fake, **R12).loss.requires_grad


def test_grad_scaler_and_optimizer():
    ours, eager = build(critics.SharedConv)
    ours, eager = ours.float(), eager.float()
    real, fake = (t.float() for t in batch())
    for critic, run in (
        (ours, lambda s: fastgan.critic_step(ours, real, fake, grad_scaler=s, **R12).loss),
        (eager, lambda s: textbook(eager, real, fake, **R12)[0]),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(run(scaler)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    for a, b in zip(ours.parameters(), eager.parameters(), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [R12, GP], ids=["R1+R2", "WGAN-GP"])
def test_float32_is_as_good_as_eager(case):
    torch.manual_seed(0)
    base = critics.DCGAN(8, 32)
    real, fake = torch.randn(2, 6, 3, 32, 32)
    alpha = torch.rand(6, 1, 1, 1)
    found = {}
    for name, dtype in (("ours", torch.float32), ("eager", torch.float32), ("truth", torch.float64)):
        critic = copy.deepcopy(base).to(dtype)
        args = critic, real.to(dtype), fake.to(dtype)
        run = fastgan.critic_step if name == "ours" else textbook
        out = run(*args, alpha=alpha.to(dtype), **case)
        (out.loss if name == "ours" else out[0]).backward()
        found[name] = reference.grads(critic)
    eager = reference.error(found["eager"], found["truth"])
    assert reference.error(found["ours"], found["truth"]) <= max(2e-5, 2 * eager)


@pytest.mark.parametrize("mode", ["bfloat16 weights", "autocast"])
def test_bfloat16_keeps_each_term(mode):
    """The penalty's gradient is what remains when the loss's is subtracted: a merged sum in bfloat16 would round a
    penalty a thousand times smaller away."""
    torch.manual_seed(0)
    base = nn.Sequential(critics.conv(3, 8), nn.LeakyReLU(0.2), critics.conv(8, 8), nn.LeakyReLU(0.2), critics.head(8))
    real, fake = torch.randn(2, 8, 3, 8, 8)

    def gradients(run, r1, weight):
        critic = copy.deepcopy(base).to(torch.bfloat16 if mode == "bfloat16 weights" else torch.float32)
        r, f = (real.bfloat16(), fake.bfloat16()) if mode == "bfloat16 weights" else (real, fake)
        loss = lambda a, b: weight * F.softplus(b.float() - a.float()).mean()  # noqa: E731
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = run(critic, r, f, loss=loss, r1=r1, r2=r1)
        step = out if run is fastgan.critic_step else None
        (out.loss if step else out[0]).backward()
        if step:
            assert step.method == "fused", step.why
        return [g.double() for g in reference.grads(critic)]

    for r1, weight in ((1.0, 0.0), (1e-9, 1.0), (1.0, 1.0)):
        ours, eager = gradients(fastgan.critic_step, r1, weight), gradients(textbook, r1, weight)
        assert reference.error(ours, eager) <= 3e-2
    if mode == "autocast":
        both, alone = gradients(fastgan.critic_step, 1e-3, 1.0), gradients(fastgan.critic_step, 1e-12, 1.0)
        want = [1e-3 * g for g in gradients(fastgan.critic_step, 1.0, 1e-12)]
        # the bfloat16 weight gradients of the loss carry an error of their own, the same in both
        assert reference.error([b - a for b, a in zip(both, alone, strict=False)], want) <= 5e-2


def test_float16_with_a_scaler_does_not_underflow():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    with torch.no_grad():
        base[1].weight.mul_(1e-3)
        base[3].weight.mul_(1e-3)
    real, fake = torch.randn(2, 8, 3, 8, 8)
    found = []
    for enabled in (True, False):
        critic = copy.deepcopy(base)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            step = fastgan.critic_step(critic, real, fake, grad_scaler=scaler, loss="wasserstein", r1=1e3, r2=1e3)
        step.loss.backward()
        assert step.method == "fused", step.why
        found.append(reference.grads(critic))
    assert reference.error(*found) <= 2e-2


def outcomes(critic, real, fake, steps, around, **kw):
    """Per step, is its loss finite and are its gradients? ``around(k)``: the critic is changed before step k."""
    found = []
    for k in range(steps):
        around(k)
        critic.zero_grad()
        step = fastgan.critic_step(critic, real, fake, **kw)
        step.loss.backward()
        found.append((bool(step.loss.isfinite()), all(bool(g.isfinite().all()) for g in reference.grads(critic))))
    assert step.method == "fused", step.why
    return found


@pytest.mark.parametrize("joint", ["auto", False])
@pytest.mark.parametrize("case", [dict(R12, r2=1.3), GP], ids=["R1+R2", "WGAN-GP"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"compile": "aot_eager"}], ids=["eager", "compiled"])
def test_numbers_that_are_not_finite_arrive_as_eager_would_deliver_them(bad, case, joint, options):
    critic, (real, fake) = build(lambda: critics.DCGAN(4, 16))[0], batch("dcgan")
    weight = critic[2].weight.detach()
    good = weight[0, 0, 0, 0].clone()

    spoilt = (4,) if options else (0, 4)  # before anything is proved, too; what is compiled stays as the first step found it

    def spoil(k):
        weight[0, 0, 0, 0] = bad if k in spoilt else good

    found = outcomes(critic, real, fake, 6, spoil, joint=joint, **options, **case)
    assert found == [(k not in spoilt,) * 2 for k in range(6)]


@pytest.mark.cpu
@pytest.mark.parametrize("scale", [2.0**30, 2.0**60])
def test_a_scaler_that_is_too_large_finds_inf_and_backs_off(scale):
    critic, (real, fake) = critics.DCGAN(4, 16), [t.float() for t in batch("dcgan")]
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    for init in (2.0**8, scale):
        before = [p.detach().clone() for p in critic.parameters()]
        scaler = torch.amp.GradScaler("cpu", init_scale=init)
        with torch.autocast("cpu", torch.float16):
            step = fastgan.critic_step(critic, real, fake, grad_scaler=scaler, **R12)
        scaler.scale(step.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (scaler.get_scale() < init) == (init == scale)
        assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True)) == (init == scale)


@pytest.mark.cpu
@pytest.mark.parametrize("case", [R12, GP], ids=["r1+r2", "gp"])
def test_fakes_of_fewer_bits_as_autocast_makes_them(case):
    real, fake = [t.float() for t in batch("dcgan")]
    found = []
    for narrow in (fake.bfloat16(), fake.bfloat16().float()):
        torch.manual_seed(0)
        critic = critics.DCGAN(4, 16)
        with torch.autocast("cpu", torch.bfloat16):
            fastgan.critic_step(critic, real, narrow, alpha=0.25, **case).loss.backward()
        found.append(reference.grads(critic))
    assert reference.error(*found) <= 0.02


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Sequential(critics.conv(3, 4), nn.ReLU(), nn.Dropout(0.3)), critics.head(4)

        def forward(self, x):
            return self.out(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=reentrant))

    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            check(Checkpointed, *batch(), **R12)
    else:
        step = check(Checkpointed, *batch(), **R12)
        assert "checkpoint" in step.why
        check(Checkpointed, *batch(), **GP)


def test_memory_goes_back_and_no_cycle_keeps_the_critic_alive():
    critic = critics.SharedConv().double()
    real, fake = batch()
    for case in (R12, GP):
        for _ in range(2):
            fastgan.critic_step(critic, real, fake, **case).loss.backward()
    alive = weakref.ref(critic)
    gc.collect()
    gc.disable()
    try:
        del critic
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("case", [R12, R1, GP], ids=["R1+R2", "R1", "WGAN-GP"])
def test_microbatch(case):
    for make in (critics.SharedConv, critics.CURVED["silu"]):
        ours, eager = build(make)
        torch.manual_seed(0)
        real, fake = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
        alpha = torch.rand(5, 1, 1, 1, dtype=torch.float64)
        step = fastgan.critic_step(ours, real, fake, alpha=alpha, microbatch=2, **case)
        step.loss.backward()
        loss = textbook(eager, real, fake, alpha=alpha, **case)[0]
        loss.backward()
        torch.testing.assert_close(step.loss, loss)
        assert step.real_scores.shape[0] == 5 and all(n.shape == (5,) for n in step.grad_norms.values())
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
    with pytest.raises(ValueError, match="mean over samples"):
        fastgan.critic_step(ours, real, fake, loss="relativistic_average", microbatch=2)


def test_joint_runs_one_batch():
    check(critics.SharedConv, *batch(), method="fused", r1=1.0, r2=1.0, loss="relativistic")
    ours, eager = build(critics.SharedConv)
    real, fake = batch()
    calls = []
    ours.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    for kw in ({"r1": 1.5, "r2": 1.5, "loss": "hinge"}, {"loss": "relativistic"}, GP):
        calls.clear()
        ours.zero_grad()
        eager.zero_grad()
        step = fastgan.critic_step(ours, real, fake, joint=True, alpha=torch.full((4,), 0.5), **kw)
        step.loss.backward()
        textbook(eager, real, fake, alpha=0.5, **kw)[0].backward()
        assert calls[0] == 8 and reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
        assert step.real_scores.shape == (4, 1)
    with pytest.raises(ValueError, match="equal"):
        fastgan.critic_step(ours, real, fake, joint=True, r1=1.0)


def test_forwards_that_need_no_repeating_are_not_recorded_for_it(monkeypatch):
    taken = []
    monkeypatch.setattr(forward.Snapshot, "take", lambda self: taken.append(self))
    monkeypatch.setattr(forward.Snapshot, "restore", lambda self: None)
    for make in (critics.SharedConv, critics.CURVED["softplus"]):
        critic = make().double()
        fastgan.critic_step(critic, *batch(), joint=False, **R1)  # not known yet
        taken.clear()
        fastgan.critic_step(critic, *batch(), joint=False, **R1)
        assert not taken
        fastgan.critic_step(critic, *batch(), joint=False, method="jvp", **R1)
        assert taken


@pytest.mark.parametrize("options", [{"joint": True}, {"microbatch": 6}, {}], ids=str)
@pytest.mark.parametrize("case", [dict(R12, r1=0.7), GP, dict(R1, r2=1.3, loss="hinge")], ids=lambda c: c["loss"])
def test_packed_critic(case, options):
    ours, eager = build(lambda: critics.CTGAN(6, 8, dropout=0.0, pac=3))
    torch.manual_seed(3)
    real, fake = torch.randn(2, 12, 6, dtype=torch.float64)
    alpha = torch.rand(4, 1, dtype=torch.float64).repeat_interleave(3, 0)
    for _ in range(3):
        ours.zero_grad()
        eager.zero_grad()
        step = fastgan.critic_step(ours, real, fake, pac=3, alpha=alpha, **options, **case)
        step.loss.backward()
        textbook(eager, real, fake, pac=3, alpha=alpha, **case)[0].backward()
        assert step.method == "fused" and reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
        assert step.real_scores.shape == step.fake_scores.shape == (4, 1)
        assert all(norms.shape == (4,) for norms in step.grad_norms.values())


def test_hard_sigmoid_has_no_second_derivative_in_torch_and_needs_none_here():
    ours, eager = build(lambda: critics.with_layer(nn.Hardsigmoid()))
    written_out = critics.with_layer(critics.Lambda(lambda x: (x / 6 + 0.5).clamp(0, 1))).double()
    written_out[0], (real, fake) = eager[0], batch()
    step = fastgan.critic_step(ours, real, fake, **R12)
    step.loss.backward()
    textbook(written_out, real, fake, **R12)[0].backward()
    assert step.method == "fused"
    # torch's own kernel rounds 1/6 to float32
    assert reference.error(reference.grads(ours), reference.grads(written_out)) <= 1e-7


def test_bad_arguments():
    critic, (real, fake) = critics.SharedConv().double(), batch()
    for bad, match in (
        ({"loss": "wgan"}, "unknown loss"),
        ({"method": "fast"}, "unknown method"),
        ({"r1": -1.0}, "negative"),
        ({"joint": "always"}, "joint"),
        ({"microbatch": 0}, "microbatch"),
        ({"loss": lambda r, f: r - f}, "scalar"),
        ({"compile": "fast"}, "backend"),
    ):
        with pytest.raises(ValueError, match=match):
            fastgan.critic_step(critic, real, fake, **bad)
    with pytest.raises(RuntimeError, match=r"not exact.*Silu"):
        fastgan.critic_step(critics.CURVED["silu"]().double(), real, fake, r1=1.0, method="fused")


# --- two processes ---------------------------------------------------------------------------------------------------


def _rank(rank, find_unused, results):
    torch.manual_seed(0)
    critic = nn.Sequential(critics.SharedConv()).double()
    wrapped = nn.parallel.DistributedDataParallel(critic, find_unused_parameters=find_unused)
    torch.manual_seed(10)
    real, fake = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64)
    rows = slice(4 * rank, 4 * rank + 4)
    out = []
    for case in (R12, GP):
        for _ in range(2):
            wrapped.zero_grad()
            step = fastgan.critic_step(wrapped, real[rows], fake[rows], alpha=0.25, **case)
            step.loss.backward()
        out.append((step.method, [p.grad.clone() for p in critic.parameters()]))
    if rank == 0:
        torch.save(out, results)


@pytest.mark.cpu
@pytest.mark.parametrize("find_unused", [False, True])
def test_distributed_data_parallel(find_unused, tmp_path):
    on_ranks(_rank, find_unused, str(tmp_path / "out"))
    torch.manual_seed(0)
    eager = nn.Sequential(critics.SharedConv()).double()
    torch.manual_seed(10)
    real, fake = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64)
    for case, (method, got) in zip((R12, GP), torch.load(str(tmp_path / "out")), strict=False):
        eager.zero_grad()
        for rows in (slice(0, 4), slice(4, 8)):
            (textbook(eager, real[rows], fake[rows], alpha=0.25, **case)[0] / 2).backward()
        assert method == "fused"
        assert reference.error(got, reference.grads(eager)) <= 1e-12


def test_large_activations_are_given_back_and_the_fallback_does_not_miss_them():
    make = lambda: nn.Sequential(  # noqa: E731
        critics.conv(3, 16), nn.LeakyReLU(0.2), nn.MaxPool2d(2), critics.conv(16, 16), nn.AvgPool2d(2), nn.ReLU(),
        critics.conv(16, 1),
    )  # fmt: skip
    torch.manual_seed(0)
    real, fake = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    check(make, real, fake, r1=1.0, r2=1.0, loss="least_squares", method="double_backward", repeats=3)
    check(make, real, fake, r1=1.0, r2=1.0, loss="wasserstein", method="fused", repeats=3)


@pytest.mark.parametrize(
    "first",
    [
        lambda: nn.Conv2d(3, 8, 4, 2, 1),
        lambda: nn.Conv2d(3, 8, 3, 2, (1, 0), dilation=(1, 2)),
        lambda: nn.Conv2d(3, 8, (5, 2), (3, 1), padding="valid", bias=False),
        lambda: nn.Conv2d(3, 8, 1),
        lambda: nn.Conv2d(3, 6, 3, groups=3),
        lambda: nn.ConvTranspose2d(3, 8, 3, 2),
        lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["strided", "dilated", "oblong", "pointwise", "grouped", "transposed", "padded"],
)
def test_gradient_of_images_through_the_first_layer(first):
    """The first convolution's input gradient has a way of its own: sizes, also those that windows don't reach the end of."""
    for size in (9, 12, 13):
        real, fake = torch.randn(2, 4, 3, size, size, dtype=torch.float64)
        check(lambda: nn.Sequential(first(), nn.LeakyReLU(0.2), critics.LazyHead()), real, fake, r1=1.0, r2=2.0, method="fused")


@pytest.mark.parametrize(
    "case", [{"r1": 1.0, "r2": 2.0, "loss": "relativistic"}, {"r1": 1.0, "loss": "wasserstein"}], ids=["own", "one"]
)
@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.2), nn.LeakyReLU(0.1, inplace=True), nn.ReLU(), nn.LeakyReLU(-0.3)], ids=str
)
def test_tangents_combined_by_the_operator(monkeypatch, activation, case):
    """As on GPUs: the activation's tangent and the weight gradient's operand from one kernel, also where two layers read it."""
    monkeypatch.setattr(passes, "COMBINE_ON", ("cpu", "cuda"))
    ran = []
    forward = passes.tangent_combine.forward
    monkeypatch.setattr(passes.tangent_combine, "forward", lambda *values: ran.append(values) or forward(*values))

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6, 6))
            self.out = nn.Linear(6, 1)

        def forward(self, x):
            h = activation(self.b(activation(self.a(x))))
            return self.out((self.c(h) + self.d(h)).mean((2, 3)))

    real, fake = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    check(Branches, real, fake, method="fused", **case)
    assert bool(ran) == (getattr(activation, "negative_slope", 0) >= 0)


@pytest.mark.parametrize(
    "case, hidden, method",
    [(GP, 16, "double_backward"), ({"r1": 1.0}, 16, "double_backward"), (R12, 16, "fused"), (GP, 2048, "fused")],
    ids=["gp", "r1", "r1+r2", "large"],
)
def test_slight_perceptrons_take_what_is_faster(case, hidden, method):
    """One penalty on a few thousand multiply-adds: in a training loop the textbook's one graph, with the same gradients."""

    def make():
        return nn.Sequential(
            nn.Linear(64, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )

    ours, eager = reference.twins(make)
    real, fake = torch.randn(2, 64, 64, dtype=torch.float64)
    for step in range(20):
        for twin in (ours, eager):
            twin.zero_grad()
        result = fastgan.critic_step(ours, real, fake, alpha=0.25, **case)
        result.loss.backward()
        textbook(eager, real, fake, alpha=0.25, **case)[0].backward()
        assert result.method == ("fused" if step < engine.SLIGHT_SURE else method)
        assert ("multiply-adds" in result.why) == (result.method == "double_backward")
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12


@pytest.mark.parametrize("case", [R12, GP, {"r1": 1.0, "loss": "least_squares"}], ids=["r1+r2", "gp", "r1"])
def test_refused_steps_become_the_textbooks_one_graph(monkeypatch, case):
    """A small critic that shares nothing, step after step, has one graph, as eager has; looked into again in time."""
    monkeypatch.setattr(engine, "_SURE", 2)
    monkeypatch.setattr(engine, "_BELIEVED", 2)
    found, double_backward = [], engine.double_backward
    monkeypatch.setattr(engine, "double_backward", lambda *a, **k: found.append(1) or double_backward(*a, **k))

    def make():
        layers = nn.Conv2d(3, 8, 3), nn.Dropout(0.3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten()
        return nn.Sequential(*layers, fastgan.spectral_norm(nn.Linear(288, 1)))

    ours, eager = reference.twins(make)
    real, fake = batch()
    penalties = len(PENALTIES.intersection(case))
    for step, ran in enumerate((1, 1, 0, 0, 1, 0)):
        found.clear()
        for twin in (ours, eager):
            twin.zero_grad()
        torch.manual_seed(step)
        result = fastgan.critic_step(ours, real, fake, alpha=0.25, **case)
        result.loss.backward()
        torch.manual_seed(step)
        want = textbook(eager, real, fake, alpha=0.25, **case)
        want[0].backward()
        assert len(found) == ran * penalties and result.method == "double_backward" and "BatchNorm" in result.why
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
        for got, expected in zip((result.loss, result.adversarial, result.penalty), want, strict=True):
            torch.testing.assert_close(got.detach(), torch.as_tensor(expected).detach())
        assert not result.penalty.requires_grad and not any(n.requires_grad for n in result.grad_norms.values())
        for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(RuntimeError, match="already delivered"):
            result.loss.backward()
    with pytest.raises(RuntimeError, match="create_graph"):
        fastgan.critic_step(ours, real, fake, alpha=0.25, **case).loss.backward(create_graph=True)
