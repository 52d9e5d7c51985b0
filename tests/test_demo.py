"""``fastgan demo``: what it writes, that its verdict can fail, and that it can't take the machine down."""

import functools
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastgan
from fastgan import cli, demo

for module in demo.NEEDED:
    pytest.importorskip(module)

from fastgan.demo import compare, model, report, run, sweep  # noqa: E402

CPU = torch.device("cpu")
RUN, PENALISED = model.RUNS
PLOTS = {RUN.name: ("samples", "losses", "divergence", "parts", "sweep"), PENALISED.name: ("samples", "losses", "divergence")}


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(report, "TREES", 20)


def records(steps=3, factory=None, run=RUN):
    each = run if factory is None else model.Run(**{**vars(run), "fastgan": factory})
    data = model.batches(model.digits()[0], 24, 0)
    return compare.lockstep(each, CPU, 0, data, steps, 2, lambda *_: None)[1]


def test_writes_plots_and_results(tmp_path, capsys):
    from matplotlib.image import imread

    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    for plot in [f"{name}-{kind}.png" for name, kinds in PLOTS.items() for kind in kinds]:
        image = imread(tmp_path / plot)
        assert image.shape[0] > 100 and image.std() > 0.01
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["passed"] and document["machine"]["torch"] == torch.__version__
    for each in (RUN, PENALISED):
        result = document["runs"][each.name]
        assert result["verdict"]["passed"] and len(result["steps"]) == document["options"]["steps"]
        assert {times["allocator"] for times in result["step times"]} == {"default", "tuned"}
        for times in result["step times"]:
            assert times["seconds"].keys() == each.forms.keys() and times["speedup over"].keys() == each.plain.keys()
        for role in model.ROLES:
            assert all(step[role]["loss difference"] <= 1e-6 for step in result["steps"])
    assert f"{PENALISED.name}: a training step is" in capsys.readouterr().out
    result = document["runs"][RUN.name]
    assert all(share > 0 for parts in result["step parts"].values() for share in parts.values())
    assert {"minibatch layer forward", "minibatch layer backward", "optimizers"} <= result["step parts"]["fastgan"].keys()


def test_reproducible():
    for each in model.RUNS:
        assert records(2, run=each) == records(2, run=each)


class WrongForward(fastgan.nn.MinibatchDiscrimination):
    def forward(self, x):
        return super().forward(x) * 1.01


class WrongBackward(fastgan.nn.MinibatchDiscrimination):
    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 1.01)
        return y


def sabotaged(layer=WrongForward):
    return functools.partial(layer, self_term=True, init_std=model.INIT_STD)


def failed(records):
    return {row["what"] for row in compare.verdict(records)["rows"] if not row["passed"]}


def test_verdict_fails_on_a_wrong_layer():
    assert not failed(records())
    assert {"discriminator loss", "generator loss"} <= failed(records(factory=sabotaged()))
    assert {"discriminator gradient", "generator gradient"} <= failed(records(factory=sabotaged(WrongBackward)))


def test_verdict_fails_on_wrong_penalties():
    assert not failed(records(run=PENALISED))

    def twice(critic, real, fake):
        step = fastgan.critic_step(critic, real, fake, loss="relativistic", r1=model.PENALTY, r2=2 * model.PENALTY)
        return step.loss

    assert {"discriminator loss", "discriminator gradient"} <= failed(records(run=PENALISED, factory=twice))

    def spoilt(critic, real, fake):  # the loss is right, its gradient is not
        loss = model.fastgan_loss(critic, real, fake)
        loss.register_hook(lambda grad: grad * 1.01)
        return loss * 1.0

    assert "discriminator gradient" in failed(records(run=PENALISED, factory=spoilt))


def test_the_penalised_run_takes_the_shared_pass():
    critic = model.Critic()
    assert fastgan.explain(critic, torch.randn(4, 1, 8, 8)).method == "fused"


def test_verdict_fails_on_nan():
    spoilt = records()
    spoilt[1]["generator"]["gradient difference"] = float("nan")
    assert not compare.verdict(spoilt)["passed"]


def test_exit_status_tells(tmp_path, monkeypatch):
    result = {"verdict": compare.verdict(records(factory=sabotaged())), "step times": []}
    monkeypatch.setattr(run, "_one", lambda *_: result)
    monkeypatch.setattr(report, "summary", lambda *_: None)
    monkeypatch.setattr(demo, "_other_allocator", lambda options: None)
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 1
    assert not json.loads((tmp_path / "results.json").read_text())["passed"]


def test_more_samples_than_there_are(tmp_path, capsys):
    assert demo.main(["--batch-size", "4096", "--out", str(tmp_path)]) == 2
    assert "more than the 1797 digits" in capsys.readouterr().out


@pytest.mark.parametrize("each", model.RUNS, ids=lambda each: each.name)
def test_all_forms_agree(each):
    gans = compare.make_gans(each, CPU, 0, torch.float64)
    batch = next(model.batches(model.digits()[0], 16, 0))
    losses = [gan.update("discriminator", batch).item() for gan in gans.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)


@pytest.mark.parametrize("name", RUN.plain)
def test_predicted_memory_is_what_it_takes(name):
    layer = RUN.plain[name](model.FEATURES, model.KERNELS, model.KERNEL_DIMS)
    # Blocks of 64 MiB, which glibc maps one by one; of smaller ones it keeps some back.
    batch_size = 128 if "broadcast" in name else 512
    predicted = sweep.predicted_bytes(layer, batch_size)
    point = sweep.measure_point(layer, batch_size, 1 << 30, 4.0, 0.0)
    if point["bytes"] is None:
        pytest.skip("this system does not tell the peak")
    assert 0.8 * predicted <= point["bytes"] <= predicted + sweep._SLACK


def test_memory_guard_refuses():
    layer = RUN.plain["plain broadcast"](model.FEATURES, model.KERNELS, model.KERNEL_DIMS)
    point = sweep.measure_point(layer, 1 << 17, 1 << 30, 60.0, 0.0)
    assert point["status"] == "over the memory budget" and "seconds" not in point
    assert "GiB" in report._describe(point)


@pytest.mark.skipif(sweep.resource is None or sys.platform != "linux", reason="needs RLIMIT_AS")
def test_memory_guard_catches_what_was_not_predicted(monkeypatch):
    monkeypatch.setattr(sweep, "predicted_bytes", lambda *_: None)
    layer = RUN.plain["plain broadcast"](model.FEATURES, model.KERNELS, model.KERNEL_DIMS)
    point = sweep.measure_point(layer, 1024, 256 << 20, 60.0, 0.0)
    assert point["status"] == "out of memory"
    torch.empty(400 << 20, dtype=torch.uint8)  # the limit is gone afterwards


def test_budget_is_at_most_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(sweep.psutil, "virtual_memory", lambda: SimpleNamespace(available=4 << 30))
    assert sweep.memory_budget(100.0, CPU) == 2 << 30
    assert sweep.memory_budget(1.0, CPU) == 1 << 30


def test_allocator_option_starts_a_child(monkeypatch):
    seen = {}

    def pretend(command, env, **_):
        seen.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(demo.subprocess, "run", pretend)
    monkeypatch.setattr(demo.measure, "allocator", lambda: "default")
    assert demo.main(["--quick", "--allocator", "tuned"]) == 7
    assert seen["env"].items() >= demo.measure.TUNED_ALLOCATOR.items() and "--allocator" in seen["command"]


def test_missing_extras_are_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert demo.main(["--quick"]) == 2
    assert capsys.readouterr().err == "fastgan demo: scikit-learn missing; pip install 'fastgan[train]'\n"


def test_help_needs_no_extras():
    code = """import sys
from fastgan.cli import main
for arguments in (["--help"], ["demo", "--help"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code
assert not {"rich", "matplotlib", "sklearn"} & set(sys.modules)"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0 and "--memory-budget" in child.stdout, child.stderr
