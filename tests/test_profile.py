"""The profiler: who is who, which part gets what, and that nothing is changed by being looked at."""

import functools
import gc
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

import fastgan
from fastgan import html, limits
from fastgan.profiler import batches, command, gains, show, show_batches
from fastgan.profiler.session import Profile

SHORT = {"warmup": 1, "timed": 1, "steps": 2}
PAUSE = 0.01


class Slow(torch.autograd.Function):
    """The identity, with a pause forward, backward or in the backward of its backward."""

    @staticmethod
    def forward(ctx, x, forward, backward, double):
        ctx.pauses = backward, double
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.pauses[0])
        return Slow.apply(grad, 0.0, ctx.pauses[1], 0.0), None, None, None


class Net(nn.Module):
    def __init__(self, i, o, *pauses):
        super().__init__()
        self.layers, self.pauses = nn.Sequential(nn.Linear(i, 32), nn.LeakyReLU(0.2), nn.Linear(32, o)), pauses

    def forward(self, x):
        x = self.layers[0](x)
        return self.layers[1:](Slow.apply(x, *self.pauses) if self.pauses else x)


class MinibatchFeatures(nn.Module):
    def forward(self, x):
        return torch.cat([x, x.std(0, keepdim=True).expand_as(x)], 1)


def penalty(critic, real, fake):
    x = torch.lerp(fake, real, torch.rand(len(real), 1)).requires_grad_(True)
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (g.norm(2, 1) - 1).square().mean()


def train(D, G, iterations=4, n_critic=1, data=None):
    oD, oG = torch.optim.Adam(D.parameters()), torch.optim.Adam(G.parameters())
    loader = DataLoader(data or TensorDataset(torch.randn(8 * iterations * n_critic, 16)), batch_size=8)
    for step, batch in enumerate(loader, 1):
        real = batch[0] if isinstance(batch, list) else batch
        fake = G(torch.randn(8, 4)).detach()
        oD.zero_grad()
        (D(fake).mean() - D(real).mean() + penalty(D, real, fake)).backward()
        oD.step()
        if step % n_critic == 0:
            oG.zero_grad()
            (-D(G(torch.randn(8, 4))).mean()).backward()
            oG.step()


def seconds(p):
    return {part.name: part.seconds for part in p.parts}


@pytest.fixture(autouse=True)
def _no_leftovers():
    gc.collect()


def test_networks_and_updates_are_recognised():
    D, G = Net(16, 1), Net(4, 16)
    with fastgan.profile(**SHORT) as p:
        train(D, G, iterations=4, n_critic=3)
    roles = {n.role: n for n in p.networks}
    assert roles["critic"].module is D and roles["generator"].module is G and len(p.networks) == 2
    assert (roles["critic"].name, roles["generator"].name) == ("D", "G")
    assert roles["critic"].update == (3, (2,))  # fake, real and the penalised point between them
    found = p.to_dict()
    calls = {n["role"]: n["calls"] for n in found["networks"]}
    assert calls == {"critic": 3 * 3 + 1, "generator": 3 + 1}  # an iteration is three updates of the critic and one
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert "critic: D (Net" in str(p)


def test_forward_time_goes_to_its_network():
    with fastgan.profile(**SHORT) as p:
        train(Net(16, 1, PAUSE, 0, 0), Net(4, 16, 2 * PAUSE, 0, 0))
    found = seconds(p)
    assert found["critic forward"] >= 4 * PAUSE and found["generator forward"] >= 4 * PAUSE


def test_backward_time_is_told_apart_in_one_call():
    with fastgan.profile(**SHORT) as p:
        train(Net(16, 1, 0, 2 * PAUSE, 0), Net(4, 16, 0, PAUSE, 0))
    found = seconds(p)  # the critic: real and fake, and once for the generator; the penalty takes one itself, and its own again
    assert found["critic backward"] >= 6 * PAUSE
    assert found["generator backward"] >= PAUSE and found["penalty"] >= 2 * PAUSE


def test_double_backward_is_the_penalty():
    with fastgan.profile(**SHORT) as p:
        train(Net(16, 1, 0, 0, 10 * PAUSE), Net(4, 16))
    assert seconds(p)["penalty"] >= 10 * PAUSE


class SlowData(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        time.sleep(PAUSE / 8)
        return torch.ones(16)


def test_data_features_and_spectral_norm_are_parts(monkeypatch):
    for where in (
        sys.modules["torch.nn.utils.spectral_norm"].SpectralNorm,
        nn.utils.parametrizations._SpectralNorm,
        MinibatchFeatures,
    ):
        name = "compute_weight" if hasattr(where, "compute_weight") else "forward"
        original = getattr(where, name)

        def slow(*args, _original=original, **kwargs):
            time.sleep(PAUSE)
            return _original(*args, **kwargs)

        monkeypatch.setattr(where, name, slow)
    D = nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(16, 8)),
        nn.ReLU(),
        MinibatchFeatures(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 1)),
    )
    with fastgan.profile(**SHORT) as p:
        train(D, Net(4, 16), data=SlowData())
    found = seconds(p)
    assert found["spectral norm"] >= 8 * PAUSE and found["minibatch features"] >= 4 * PAUSE and found["data"] >= PAUSE / 2
    assert "optimizer" in found


def test_fastgan_operators_are_their_parts():
    D = nn.Sequential(fastgan.spectral_norm(nn.Linear(16, 8)), nn.LeakyReLU(0.2), fastgan.nn.MinibatchDiscrimination(8, 4, 2))
    D.append(nn.Linear(12, 1))
    with fastgan.profile(**SHORT) as p:
        train(D, Net(4, 16))
    assert {"spectral norm", "minibatch features"} <= set(seconds(p))


def test_memory_belongs_to_what_allocated_it():
    class Hungry(Net):
        def forward(self, x):
            return super().forward(x) * torch.ones(1 << 20).mul(1.0).requires_grad_().square().mean()  # 4 MiB held for backward

    with fastgan.profile(**SHORT) as p:
        train(Hungry(16, 1), Net(4, 16))
    part = {part.name: part for part in p.parts}
    assert part["critic forward"].bytes_at_peak >= 4 << 20 > part["generator forward"].bytes_at_peak
    assert p.peak_bytes >= sum(x.bytes_at_peak for x in p.parts) >= 4 << 20
    assert p.standing["parameters"] == 4 * sum(q.numel() for n in p.networks for q in n.module.parameters())


def test_looking_changes_nothing():
    def trained(context):
        torch.manual_seed(0)
        D, G = Net(16, 1), Net(4, 16)
        with context:
            train(D, G, iterations=6)
        return torch.cat([p.detach().flatten() for p in (*D.parameters(), *G.parameters())])

    hooks, run = nn.modules.module, torch.autograd._engine_run_backward
    assert torch.equal(trained(fastgan.profile(**SHORT)), trained(torch.enable_grad()))
    assert not hooks._global_forward_pre_hooks and not hooks._global_forward_hooks
    assert torch.autograd._engine_run_backward is run and torch.optim.Optimizer.__init__.__name__ == "__init__"
    assert "record" not in torch.optim.Optimizer.__init__.__code__.co_filename


def test_an_error_of_the_loop_comes_out_and_hooks_go():
    with pytest.raises(ZeroDivisionError), fastgan.profile(**SHORT):
        train(Net(16, 1), Net(4, 16))
        1 / 0  # noqa: B018
    assert not nn.modules.module._global_forward_pre_hooks


def test_what_goes_wrong_as_tracing_starts_comes_out(monkeypatch):
    def start(self):
        raise MemoryError("no memory for a trace")

    monkeypatch.setattr(torch.profiler.profile, "start", start)
    with pytest.raises(MemoryError, match="for a trace"), fastgan.profile(**SHORT):
        train(Net(16, 1), Net(4, 16))
    assert not nn.modules.module._global_forward_pre_hooks


def test_too_short_a_loop_says_so():
    with pytest.raises(RuntimeError, match="ended after 2 iterations, and the first 5"), fastgan.profile():
        train(Net(16, 1), Net(4, 16), iterations=2)
    with pytest.raises(ValueError, match="steps=0"), fastgan.profile(steps=0):
        pass


def test_names_decide_where_given():
    with fastgan.profile(critic="G", **SHORT) as p:
        train(Net(16, 1), Net(4, 16))
    assert {n.name: n.role for n in p.networks} == {"G": "critic", "D": "generator"}
    with pytest.raises(ValueError, match=r"--critic nobody: .*there are: G \(Net\), D \(Net\)"):
        profiled(critic="nobody")


# gains


def profiled(D=None, **names):
    D = D or Net(16, 1)
    with fastgan.profile(**SHORT, **names) as p:
        train(D, Net(4, 16))
    return p, D


def state(module):
    return [t.clone() for t in module.state_dict().values()], [p.grad for p in module.parameters()], torch.get_rng_state()


def test_critic_step_is_tried_on_what_was_captured(monkeypatch):
    monkeypatch.delattr(fastgan, "accelerate", raising=False)
    p, D = profiled(nn.Sequential(fastgan.spectral_norm(nn.Linear(16, 64)), nn.LeakyReLU(0.2), nn.Linear(64, 1)))
    before = state(D)
    (gain,) = p.measure_gains(0.05)
    after = state(D)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert all(a is b for a, b in zip(before[1], after[1], strict=True))
    assert gain.what == "critic_step(D, real, fake, gradient_penalty=10)" and gain.error < 1e-5, gain
    assert gain.speedup["median"] > 0 and gain.per_iteration == pytest.approx(4 / 3)
    assert "no fastgan.accelerate" in p.gains_note and "critic_step(D" in str(p)


def swap(monkeypatch, factor):
    """A stand-in for accelerate that serves Net's forward with another, right or wrong."""
    original = Net.forward

    def accelerate(model):
        found = type("Report", (), {"replaced": []})()
        if isinstance(model, Net):
            model.forward = functools.partial(lambda self, x: factor * original(self, x), model)
            found.replaced = [type("Replaced", (), {"name": "", "kind": "Net", "by": "another"})]
        return found

    monkeypatch.setattr(fastgan, "accelerate", accelerate, raising=False)
    monkeypatch.setattr(fastgan, "restore", lambda model: vars(model).pop("forward", None), raising=False)


def test_accelerate_is_measured_on_the_captured_calls(monkeypatch):
    swap(monkeypatch, 1.0)
    p, D = profiled()
    gains = p.measure_gains(0.05)
    ours = [gain for gain in gains if gain.what.startswith("accelerate(D)")]
    assert len(ours) == 2 and all(gain.speedup and gain.error < 1e-6 for gain in ours), ours
    assert "forward" not in vars(D) and "one penalised" in ours[1].what


def test_no_speed_up_where_results_differ(monkeypatch):
    swap(monkeypatch, 1.01)
    gain = next(gain for gain in profiled()[0].measure_gains(0.05) if gain.what.startswith("accelerate"))
    assert gain.speedup is None and gain.error > 1e-3 and "differ" in gain.note and gain.to_dict()["saved_seconds"] is None


class Labelled(Net):
    """As diffusers' and Hugging Face's are called: by names, and the label by name alone."""

    def forward(self, sample, scale=1.0, *, labels):
        return super().forward(scale * sample) * labels.view(-1, 1)


@pytest.mark.parametrize("wrap", ["plain", "compile"])
@pytest.mark.parametrize("kind", [Net, Labelled])
def test_networks_called_by_keywords(kind, wrap):
    D, G = kind(16, 1), kind(4, 16)
    names = {"x": None} if kind is Net else {"sample": None, "labels": torch.ones(8)}
    given = {G: G, D: D} if wrap != "compile" else {n: torch.compile(n, backend="eager") for n in (G, D)}

    def call(network, points):
        return given[network](**{name: points if value is None else value for name, value in names.items()})

    oD, oG = torch.optim.Adam(D.parameters()), torch.optim.Adam(G.parameters())
    with fastgan.profile(**SHORT) as p:
        for _ in range(4):
            real, fake = torch.randn(8, 16), call(G, torch.randn(8, 4)).detach()
            oD.zero_grad()
            (call(D, fake).mean() - call(D, real).mean() + penalty(lambda x: call(D, x), real, fake)).backward()
            oD.step()
            oG.zero_grad()
            (-call(D, call(G, torch.randn(8, 4))).mean()).backward()
            oG.step()
    critic, generator = (next(n for n in p.networks if n.role == role) for role in ("critic", "generator"))
    inside = getattr(critic.module, "_orig_mod", critic.module), getattr(generator.module, "_orig_mod", generator.module)
    assert inside == (D, G) and critic.update == (3, (2,))
    real = critic.kept[1]
    assert [a.shape if isinstance(a, torch.Tensor) else a for a in real.args] == ([(8, 16)] if kind is Net else [(8, 16), 1.0])
    assert list(real.kwargs) == ([] if kind is Net else ["labels"])
    found = p.measure_gains(0.05)
    assert not any("could not" in gain.note for gain in found), found
    assert any("critic_step(" in gain.what for gain in found) == (kind is Net), found
    assert ("by keyword alone, which critic_step does not" in str(p)) == (kind is Labelled)


def test_networks_that_are_frozen_in_turn_are_tried():
    """As Lightning has it: one module, optimizer.step(closure), and only what is updated requires gradients."""
    D, G = Net(16, 1), Net(4, 16)
    optimizers = {"D": torch.optim.Adam(D.parameters()), "G": torch.optim.Adam(G.parameters())}

    def closure(which):
        optimizers[which].zero_grad()
        D.requires_grad_(which == "D")
        G.requires_grad_(which == "G")
        real, fake = torch.randn(8, 16), G(torch.randn(8, 4))
        loss = -D(fake).mean() if which == "G" else D(fake).mean() - D(real).mean() + penalty(D, real, fake.detach())
        loss.backward()
        return loss

    with fastgan.profile(**SHORT) as p:
        for _ in range(4):
            for which, optimizer in optimizers.items():
                optimizer.step(functools.partial(closure, which))
    assert {n.name: n.role for n in p.networks} == {"D": "critic", "G": "generator"}
    found = p.measure_gains(0.05)
    assert not any("could not" in gain.note for gain in found) and any("critic_step(D" in g.what for g in found), found
    assert not any(q.requires_grad for q in D.parameters()) and all(q.requires_grad for q in G.parameters())


def test_compiled_networks():
    """Dynamo and AOTAutograd run modules and the engine on fake tensors, which are none of the loop's."""
    torch.compiler.reset()
    D, G = (torch.compile(net, backend="aot_eager") for net in (Net(16, 1), Net(4, 16)))
    oD, oG = (torch.optim.Adam(net.parameters()) for net in (D, G))
    with fastgan.profile(**SHORT) as p:
        for _ in range(4):
            oD.zero_grad()
            (D(G(torch.randn(8, 4)).detach()).mean() - D(torch.randn(8, 16)).mean()).backward()
            oD.step()
            oG.zero_grad()
            (-D(G(torch.randn(8, 4))).mean()).backward()
            oG.step()
    assert {n.role: n.name for n in p.networks} == {"critic": "D", "generator": "G"}
    assert {"critic forward", "critic backward", "generator backward"} <= set(seconds(p)) and "penalty" not in seconds(p)


@pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")
def test_what_compilers_trace_is_none_of_the_loop():
    """Inductor differentiates patterns of its own, on tensors without data."""

    class Compiled(Net):
        def forward(self, x):
            with torch._guards.tracing(torch._guards.TracingContext(None)), FakeTensorMode():
                y = torch.ones(2, requires_grad=True)
                with torch.enable_grad():
                    torch.autograd.grad(y.square().sum(), y)
            return super().forward(x)

    with fastgan.profile(**SHORT) as p:
        train(Net(16, 1), Compiled(4, 16))
    assert {n.role: n.update for n in p.networks} == {"critic": (3, (2,)), "generator": (1, ())}


def _profile_a_rank(rank):
    D, G = (nn.parallel.DistributedDataParallel(net) for net in (Net(16, 1), Net(4, 16)))
    oD, oG = (torch.optim.Adam(net.parameters()) for net in (D, G))
    with fastgan.profile(**SHORT) as p:
        for _ in range(4):
            oD.zero_grad()
            D(torch.cat([torch.randn(8, 16), G(torch.randn(8, 4)).detach()])).mean().backward()
            oD.step()
            oG.zero_grad()
            (-D(G(torch.randn(8, 4))).mean()).backward()
            oG.step()
    assert {n.name: n.role for n in p.networks} == {"D": "critic", "G": "generator"}
    if rank == 0:  # the other doesn't take part, and calls of the wrapper would wait for it
        nn.parallel.DistributedDataParallel.forward = None
        found = p.measure_gains(0.05)
        assert not any("could not" in gain.note for gain in found), found
        assert {gain.network for gain in found} == {"D", "G"}


def test_ranks_are_profiled_one_by_one():
    on_ranks(_profile_a_rank)


def test_a_rank_does_not_wait_for_others():
    D = nn.Sequential(nn.Linear(16, 8), nn.SyncBatchNorm(8), nn.Linear(8, 1))
    assert gains._speaks(D) and not gains._speaks(Net(16, 1))


# the command

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_profile import Net, train
print("arguments", sys.argv[1:], __name__)
train(Net(16, 1), Net(4, 16), iterations=int(sys.argv[2]))
print("the end")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(SCRIPT.format(tests=str(__file__).rpartition("/")[0]))
    return str(path)


def test_command_runs_a_script_unchanged_and_stops_it(script, tmp_path, capsys):
    page, trace = tmp_path / "p.html", tmp_path / "t.json"
    options = ["--warmup", "1", "--timed", "1", "--no-gains", "--html", str(page), "--trace", str(trace)]
    argv = sys.argv
    assert command.main([*options, "--steps", "2", script, "--iterations", "50"]) == 0
    output = capsys.readouterr().out
    assert "arguments ['--iterations', '50'] __main__" in output and "the end" not in output and "critic forward" in output
    assert sys.argv is argv and "<svg" in page.read_text()
    assert any(e.get("name") == "fastgan/penalty" for e in json.loads(trace.read_text())["traceEvents"])
    assert command.main([*options, "--finish", "--json", script, "--iterations", "8"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["iterations"]["traced"] == 5 and "the end" in captured.err


def test_command_tells_its_errors_from_the_scripts(script, tmp_path, capsys):
    assert command.main([script, "--iterations", "1"]) == 2
    assert "ended after 1 iterations" in capsys.readouterr().err
    assert command.main([str(tmp_path / "nowhere.py")]) == 2
    bad = tmp_path / "bad.py"
    bad.write_text("raise RuntimeError('the script itself')")
    with pytest.raises(RuntimeError, match="the script itself"):
        command.main([str(bad)])


def test_scripts_that_leave_end_themselves_or_are_a_rank(tmp_path, monkeypatch, capsys):
    """A script that changes its folder and exits: relative paths are those of the command, and its status is told."""
    path = tmp_path / "leaves.py"
    path.write_text(
        f"import os, sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
        "from test_profile import Net, train\nos.chdir('/')\ntrain(Net(16, 1), Net(4, 16), iterations=8)\nsys.exit(3)"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--warmup", "1", "--timed", "1", "--no-gains", "--html", "page.html"]
    assert command.main([*options, "--finish", "leaves.py"]) == 0
    assert (tmp_path / "page.html").exists() and "the script ended itself: 3" in capsys.readouterr().err
    assert command.main(["--html", "nowhere/page.html", "leaves.py"]) == 2 and "no folder nowhere" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert command.main([*options, "leaves.py"]) == 0 and "critic" not in capsys.readouterr().out


# growing the batch

STEP = """
import os, torch
from torch import nn

def make_step(batch_size, fastgan=False):
    if batch_size == 3:
        os.abort()
    D, G = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 1)), nn.Linear(8, 64)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (D, G)]
    def step():
        for optimizer in optimizers:
            optimizer.zero_grad()
            x = G(torch.randn(batch_size, 8))
            held = torch.ones(batch_size, 8 << 20, dtype=torch.uint8)
            D(x * held[0, 0]).mean().backward()
            optimizer.step()
    return step
"""


@pytest.fixture
def stepper(tmp_path):
    path = tmp_path / "stepper.py"
    path.write_text(STEP)
    return batches.Script(str(path))


@pytest.mark.skipif(limits.resource is None or sys.platform != "linux", reason="needs RLIMIT_AS")
def test_sweep_ends_where_memory_ends(stepper, monkeypatch):
    monkeypatch.setattr(batches, "_with_fastgan", lambda source: False)  # the other form only takes as long again
    found = batches.sweep(stepper, [4, 512, 1024], memory=1 << 30, advice=False, patience=60.0)
    first, last = found.points["plain"]
    assert first["status"] == "measured" and first["seconds"]["median"] > 0 and "critic forward" in first["parts"], first
    assert first["peak_bytes"] is None or 32 << 20 <= first["peak_bytes"] < 128 << 20
    assert last["status"] == "out of memory", last
    assert found.largest == found.knee == {"plain": 4}
    assert "512: out of memory" in str(found) and "<svg" in show_batches.page(found.to_dict())
    assert torch.empty(1 << 20).numel()  # and this process is well


def test_an_interrupted_sweep_shows_what_it_has(stepper, monkeypatch):
    def point(source, size, *rest, **options):
        if size == 8:
            raise KeyboardInterrupt
        return {"batch": size, "status": "measured", "seconds": {"median": 1.0, "low": 1.0, "high": 1.0}, "throughput": size,
                "per_sample": 1.0, "peak_bytes": 100, "parts": {}}  # fmt: skip

    monkeypatch.setattr(batches, "_point", point)
    found = batches.sweep(stepper, [2, 4, 8, 16], memory=1 << 30)
    assert found.largest["plain"] == 4 and "interrupted" in str(found) and not found.advice


def test_a_child_that_dies_is_a_result(stepper):
    assert batches._point(stepper, 3, "plain", 1 << 30, 5.0)["message"] == "its process was ended by signal 6"


def test_forms_of_a_step(stepper, monkeypatch):
    assert batches._with_fastgan(stepper)  # its make_step takes fastgan=True
    point = batches._run(stepper, 4, "fastgan", slow=True)
    assert point["status"] == "measured" and point["throughput"] == 4 / point["seconds"]["median"]
    accelerated = []
    monkeypatch.setattr(fastgan, "accelerate", accelerated.append, raising=False)
    monkeypatch.setattr(batches, "keywords_for", lambda *_: ({}, True))
    batches._run(stepper, 4, "fastgan", slow=True)
    assert [type(model) for model in accelerated] == [nn.Linear, nn.Sequential]


def test_scripts_that_take_their_batch_size(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(STEP + "import sys\nstep = make_step(int(sys.argv[sys.argv.index('--batch') + 1]))\nwhile True: step()\n")
    point = batches._run(batches.Script(str(path), ("--other", "1"), "--batch"), 4, "plain", slow=True)
    assert point["status"] == "measured" and point["batch"] == 4


def test_sizes():
    assert batches.sizes("16:100") == [16, 32, 64] and batches.sizes([8, 4, 8]) == [4, 8] and batches.sizes("5:5") == [5]
    for wrong in ("16", "0:4", "a:b", "8:4", [], [0], None):
        with pytest.raises(ValueError, match="expected FROM:TO"):
            batches.sizes(wrong)


def test_what_is_fitted():
    assert batches.exponent([(n, 3e-3 * n**1.5) for n in (4, 8, 16, 32)]) == pytest.approx(1.5)
    assert batches.exponent([(1, 9.0), *((n, n**2) for n in (4, 8, 16, 32))]) == pytest.approx(2)  # overhead is left out
    assert batches.exponent([(1, 1.0), (2, 0.0), (4, 2.0)]) is None

    def point(n, seconds):
        times = {"median": seconds, "low": seconds, "high": seconds}
        return {
            "batch": n, "status": "measured", "seconds": times, "throughput": n / seconds, "per_sample": seconds / n,
            "peak_bytes": n << 20, "parts": {"critic forward": seconds / 2},
        }  # fmt: skip

    lost = {"batch": 16, "status": "out of memory", "message": "m"}
    found = batches.Sweep({"plain": [point(2, 1.0), point(4, 1.1), point(8, 2.1), lost]}, 1 << 30)
    found.conclude()
    assert (found.knee, found.largest) == ({"plain": 4}, {"plain": 8})
    assert set(found.exponents["plain"]) == {"whole step", "critic forward"}


def test_keywords_of_make_step():
    def own(batch_size, fastgan=False, microbatch=None, penalty=True): ...

    def bare(batch_size): ...

    assert batches.keywords_for(own, "fastgan", 8) == ({"fastgan": True}, False)
    assert batches.keywords_for(bare, "fastgan", 8) == ({}, True)
    assert batches.keywords_for(own, "microbatch", 8) == ({"microbatch": 2}, False)
    assert batches.keywords_for(own, "penalty", 8) == ({"penalty": False}, False)
    assert batches.keywords_for(own, "bf16", 8) == ({}, False)


def test_advice_claims_only_what_was_measured(stepper, monkeypatch):
    asked = []

    def point(source, size, variant, memory, patience, slow=False):
        asked.append(variant)
        seconds = {"plain": 1.0, "bf16": 0.5}.get(variant, 1.0)
        return {"batch": size, "status": "measured", "seconds": {"median": seconds, "low": seconds, "high": seconds},
                "throughput": size, "per_sample": 1.0, "peak_bytes": 100, "parts": {"penalty": 0.1}}  # fmt: skip

    monkeypatch.setattr(batches, "_point", point)
    found = batches.sweep(stepper, [4], memory=1 << 30)
    advice = {entry["what"].split(":")[0]: entry for entry in found.advice}
    assert advice["bf16"]["speedup"] == 2.0 and advice["bf16"]["memory"] == 1.0
    assert "speedup" not in advice["microbatches"] and "not measured" in advice["microbatches"]["note"]
    assert "microbatch" not in asked and "lazy regularisation" in advice


def test_make_step_has_to_be_there(tmp_path, capsys):
    empty = tmp_path / "empty.py"
    empty.write_text("")
    assert command.main(["--sweep-batch", "2:4", str(empty)]) == 2
    assert "no function make_step(batch_size)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another process can import"):
        batches.sweep(lambda batch_size: None, [2], memory=1 << 30)


def test_memory_that_is_available(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "memory.max").write_text("3000\n")
    (tmp_path / "a" / "memory.current").write_text("1000\n")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    read = limits.Path.read_text
    monkeypatch.setattr(limits.Path, "read_text", lambda path: "0::/a" if str(path) == "/proc/self/cgroup" else read(path))
    assert limits.available_memory() == 2000
    assert limits.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")) and limits.is_out_of_memory(
        MemoryError()
    )
    assert not limits.is_out_of_memory(RuntimeError("shapes differ")) and not limits.is_out_of_memory(KeyError("out of memory"))


# the pages

LOOK = """<!doctype html><body><script>
window.found = []; const pages = PAGES;
async function look(html, width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  const errors = []; window.addEventListener("error", e => errors.push(e.message));
  await new Promise(done => { frame.onload = done; frame.srcdoc = html; document.body.append(frame); });
  const d = frame.contentDocument, r = d.documentElement;
  const drawn = [...d.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
  const sizes = [...d.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
  const out = [...d.querySelectorAll("svg text")].filter(t => { const a = t.getBoundingClientRect(),
    b = t.ownerSVGElement.getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1; }).map(t => t.textContent);
  found.push({width, inner: r.clientWidth, scroll: r.scrollWidth, errors, out, smallest: Math.min(...sizes),
    charts: drawn.length,
    empty: drawn.filter(b => b.width < 200 || b.height < 20).length, marks: d.querySelectorAll("svg rect,svg circle").length});
}
(async () => { for (const p of pages) for (const w of [1280, 390]) await look(p, w);
  const pre = document.createElement("pre"); pre.id = "found"; pre.textContent = JSON.stringify(found);
  document.body.replaceChildren(pre); })();
</script></body>"""


def look_at(pages, tmp_path):
    """What a real browser makes of pages at laptop and phone width."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    path = tmp_path / "look.html"
    path.write_text(LOOK.replace("PAGES", json.dumps(pages).replace("</", "<\\/")))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/browser",
        "--virtual-time-budget=8000",
    ]
    child = subprocess.run([browser, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', child.stdout, re.DOTALL)
    assert found, child.stderr[-2000:]
    return json.loads(found[1])


def test_pages_in_a_browser(tmp_path):
    from test_bench import RESULT

    from fastgan import bench

    p = profiled()[0]
    p.measure_gains(0.05)
    sweep = batches.Sweep({"plain": [], "fastgan": []}, 1 << 30)
    for name, factor in (("plain", 1.0), ("fastgan", 0.6)):
        for n in (16, 32, 64, 128, 1024, 4096):
            t = factor * (1e-3 + 1e-4 * n)
            sweep.points[name].append(
                {"batch": n, "status": "measured", "seconds": {"median": t, "low": t, "high": t}, "throughput": n / t,
                 "per_sample": t / n, "peak_bytes": n << 20, "parts": {part.name: t / 10 for part in p.parts}}
            )  # fmt: skip
    sweep.conclude()
    pages = [show.page(p.to_dict()), show_batches.page(sweep.to_dict()), bench.page(RESULT)]
    for page in pages:
        assert not re.search(r"(src|href)=|url\(|@import|<script", page)  # nothing but itself
    found = look_at(pages, tmp_path)
    assert [entry["width"] for entry in found] == [1280, 390] * 3
    for entry, charts in zip(found, (2, 2, 5, 5, 2, 2), strict=True):
        assert not entry["errors"] and entry["charts"] >= charts and not entry["empty"] and entry["marks"] > 1, entry
        assert entry["scroll"] <= entry["inner"] <= entry["width"] and entry["smallest"] >= 9, entry
        assert not entry["out"], entry["out"]


def test_names_of_lines_do_not_cover_each_other():
    chart = html.lines("c", {"a": [(1, 1), (2, 2)]}, "x", "y", marks={"knee a": 1, "knee b": 2})
    heights = re.findall(r'y="([0-9.]+)"[^>]*>dashed: knee', chart)
    assert len(heights) == 2 and float(heights[1]) - float(heights[0]) >= 12


def test_pages_escape_what_scripts_are_called():
    name = "<script>alert(1)</script>"
    page = html.page(name, html.text(name), html.bars(name, {name: 1.0}), html.table([name], [[name]]))
    assert "<script" not in page and "alert(1)" in page


def test_profile_can_be_used_by_hand():
    with Profile(stop=True, **SHORT) as p:
        train(Net(16, 1), Net(4, 16), iterations=1000)
        raise AssertionError("the loop was to be stopped")
    assert p.traced == 2
