"""fastgan tune: what is searched, searches that go on, trials that are given up, and the command in the end."""

import json
import math
import shlex

import pytest
import torch

from fastgan import recipes
from fastgan.training import command, data, options, space, tune
from fastgan.training.trainer import Trainer

optuna = pytest.importorskip("optuna")
GAN = recipes.get("gan").Options
QUICK = ["gan", "--steps", "5", "-n", "50", "--batch-size", "16", "--set", "width=2"]


def search(out, *more):
    return tune.main([*QUICK, "--out", str(out), *map(str, more)])


def trials(out):
    return json.loads((out / "trials.json").read_text())


# --- ranges ---------------------------------------------------------------------------------------------------------


def test_ranges():
    assert space.parse_range(GAN, "lr=1e-5:1e-2:log") == space.Range("lr", 1e-5, 1e-2, log=True)
    assert space.parse_range(GAN, "width=8:32") == space.Range("width", 8, 32, whole=True)
    assert space.parse_range(GAN, "loss=hinge,wasserstein") == space.Range("loss", choices=("hinge", "wasserstein"))
    assert space.parse_range(GAN, "flip=true,false").choices == ("true", "false")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "expected name=low:high"),
        ("lr=1:2:3:4", "expected name=low:high"),
        ("lr=1:2:linear", "expected name=low:high"),
        ("lr=2:1", "expected low < high"),
        ("lr=0:1:log", "both above 0"),
        ("lr=1:inf", "option lr=inf: expected at least 0 and below inf"),
        ("lr=a:b", "--space lr=a: expected a number"),
        ("rate=1:2", "--space rate: no such option"),
        ("loss=hinge,hing", "option loss='hing' is none of"),
        ("flip=0:1", "expected name=low:high"),
    ],
)
def test_ranges_that_make_no_sense(text, message):
    with pytest.raises(ValueError, match=message):
        space.parse_range(GAN, text)


def test_default_space():
    chosen = options.parse(recipes.get("wgan_gp").Options, ["lr=1e-3"])
    found = {axis.name: axis for axis in space.default_space(chosen)}
    assert set(found) == {"lr", "lr_critic", "beta1", "gradient_penalty"}  # r1 and r2 are 0
    assert (found["lr"].low, found["lr"].high, found["lr"].log) == (2e-4, 5e-3, True)
    assert (found["lr_critic"].low, found["lr_critic"].high) == (2e-4, 5e-3)
    assert (found["gradient_penalty"].low, found["gradient_penalty"].high) == (1, 100)
    plain = space.default_space(options.parse(GAN, ["optimizer=rmsprop", "r1=2", "lr_critic=4e-4"]))
    assert [axis.name for axis in plain] == ["lr", "lr_critic", "r1"] and plain[1].low == pytest.approx(8e-5)


@pytest.mark.parametrize("name", recipes.names())
def test_default_spaces_hold_what_the_recipes_take(name):
    kind = recipes.get(name).Options
    axes = space.default_space(kind())
    assert {"lr", "lr_critic"} <= {axis.name for axis in axes}
    for axis in axes:
        for value in axis.points(2):
            options.parse(kind, [f"{axis.name}={value}"])
        assert axis.choices or axis.low < (getattr(kind(), axis.name) or kind().lr) < axis.high


def test_default_metric(monkeypatch):
    kind, ring, digits = recipes.get("gan"), data.load("ring", 0), data.load("digits", 8)
    assert (tune.default_metric(kind, ring), tune.default_metric(kind, digits)) == ("energy_distance", "fid")
    monkeypatch.setattr(kind, "evaluate", lambda self, n: {})
    monkeypatch.setattr(kind, "goals", {})
    with pytest.raises(ValueError, match="--metric: expected"):
        tune.default_metric(kind, digits)
    monkeypatch.setattr(kind, "goals", {"psnr": 20, "ssim": 0.5})
    assert tune.default_metric(kind, digits) == "psnr"
    monkeypatch.setattr(kind, "goals", {"psnr": 20, "fid": 0.5})
    assert tune.default_metric(kind, digits) == "fid"


def test_points_of_a_grid():
    assert space.Range("x", 1, 100, log=True).points(3) == pytest.approx([1, 10, 100])
    assert space.Range("x", 0, 1).points(5) == [0, 0.25, 0.5, 0.75, 1]
    assert space.Range("x", 1, 3, whole=True).points(9) == [1, 2, 3]
    assert space.Range("x", choices=("a", "b")).points(1) == ["a", "b"]
    low, high = 2e-4 / 5, 2e-4 * 5
    assert all(low <= value <= high for value in space.Range("x", low, high, log=True).points(7))


# --- searches -------------------------------------------------------------------------------------------------------


def test_a_search_and_its_command(tmp_path, capsys):
    out = tmp_path / "search"
    assert search(out, "--trials", 3, "--sampler", "random", "--seed", 4, "--pruner", "none") == 0
    printed = capsys.readouterr().out
    found = trials(out)
    assert [trial["state"] for trial in found] == ["complete"] * 3 and len({trial["value"] for trial in found}) == 3
    assert all(list(trial["steps"]) == ["1", "2", "3", "4", "5"] for trial in found)
    assert all(trial["steps"]["5"] == trial["value"] for trial in found)
    best = min(found, key=lambda trial: trial["value"])
    line = printed.strip().splitlines()[-1]
    assert line == "fastgan train gan --steps 5 --batch-size 16 --seed 4 --set " + " ".join(best["settings"])
    assert best["settings"][0] == "width=2" and [s.partition("=")[0] for s in best["settings"][1:]] == [
        "lr",
        "lr_critic",
        "beta1",
    ]
    assert command.main([*shlex.split(line)[2:], "--out", str(tmp_path / "run")]) == 0


def test_a_metric_of_which_more_is_better(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "measured", lambda trainer, n, metric: trainer.recipe.options.lr)
    assert search(tmp_path, "--trials", 2, "--metric", "high_quality", "--space", "lr=1e-4,1e-3", "--sampler", "grid") == 0
    assert "lr=1e-3" in capsys.readouterr().out.splitlines()[-1]


def test_a_search_goes_on(tmp_path, capsys):
    assert search(tmp_path, "--trials", 2, "--sampler", "random") == 0
    first = trials(tmp_path)
    assert search(tmp_path, "--trials", 2) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert search(tmp_path, "--trials", 4, "--resume", "--space", "lr=1:2") == 2
    assert "was begun with space" in capsys.readouterr().err
    assert search(tmp_path, "--trials", 4, "--sampler", "random", "--resume") == 0
    assert trials(tmp_path)[:2] == first and len(trials(tmp_path)) == 4
    assert len({tuple(trial["settings"]) for trial in trials(tmp_path)}) == 4  # not the first draws again
    assert search(tmp_path, "--trials", 4, "--resume") == 0 and len(trials(tmp_path)) == 4
    assert "4 trials trained" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["grid", "bayes"])
def test_a_killed_trial_is_tried_again(tmp_path, sampler, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    two = ["--space", "lr=1e-4,1e-3", "--trials", 2, "--sampler", sampler]
    monkeypatch.setattr(tune, "measured", killed)
    with pytest.raises(Killed):
        search(tmp_path, *two)
    monkeypatch.undo()
    assert search(tmp_path, *two, "--resume") == 0
    settings = [tuple(trial["settings"]) for trial in trials(tmp_path)]
    assert sorted(trial["state"] for trial in trials(tmp_path)) == ["complete", "complete", "fail"]
    assert settings[0] in settings[1:]
    if sampler == "grid":
        assert set(settings[1:]) == {("width=2", "lr=1e-4"), ("width=2", "lr=1e-3")}


def test_a_grid_is_tried_out(tmp_path):
    assert search(tmp_path, "--trials", 9, "--sampler", "grid", "--space", "lr=1e-4:1e-2:log", "beta1=0,0.5") == 0
    found = {tuple(trial["settings"][1:]) for trial in trials(tmp_path)}
    assert found == {(f"lr={lr}", f"beta1={b}") for lr in ("0.0001", "0.0004642", "0.002154", "0.01") for b in ("0", "0.5")}


@pytest.mark.parametrize("sampler", ["bayes", "evolution"])
def test_samplers_find_what_is_best(tmp_path, sampler, monkeypatch):
    """A function instead of training: a search comes nearer to its lowest point than what it began with."""
    monkeypatch.setattr(tune, "trained", lambda recipe, chosen, *a: trained(chosen, *a))

    def trained(chosen, *arguments):
        arguments[-1].set_user_attr("seconds", 0)
        return (math.log10(chosen.lr) + 3) ** 2

    assert search(tmp_path, "--trials", 40, "--sampler", sampler, "--space", "lr=1e-6:1:log") == 0
    values = [trial["value"] for trial in trials(tmp_path)]
    assert sum(values[-10:]) < sum(values[:10]) / 2 and min(values) < 0.1


# --- trials that are given up ---------------------------------------------------------------------------------------


def test_what_does_badly_is_given_up(tmp_path, monkeypatch):
    """Six trials whose metric falls as they train; some are worse than the median of those before."""
    rates = ["1e-4", "2e-4", "3e-4", "4e-4", "5e-4", "9e-4"]
    monkeypatch.setattr(tune, "measured", lambda trainer, n, metric: trainer.recipe.options.lr / (1 + trainer.done))
    for pruner, states in (("median", {"complete", "pruned"}), ("none", {"complete"})):
        out = tmp_path / pruner
        assert search(out, "--trials", 6, "--sampler", "grid", "--space", f"lr={','.join(rates)}", "--pruner", pruner) == 0
        found = trials(out)
        assert {trial["state"] for trial in found} == states
        assert all(len(trial["steps"]) == 5 for trial in found if trial["state"] == "complete")
        assert all(len(trial["steps"]) < 5 for trial in found if trial["state"] == "pruned")


def test_what_diverges_is_given_up(tmp_path, capsys):
    settings = ["--trials", 2, "--sampler", "grid", "--space", "lr=1e-4,1e30"]
    assert search(tmp_path, *settings, "--set", "loss=wasserstein") == 0
    found = {trial["settings"][-1]: trial for trial in trials(tmp_path)}
    assert found["lr=1e-4"]["state"] == "complete" and found["lr=1e30"]["state"] == "pruned"
    assert "not finite" in found["lr=1e30"]["why"] or "nan" in found["lr=1e30"]["why"] or "inf" in found["lr=1e30"]["why"]
    assert "1 trials trained, 1 given up" in capsys.readouterr().out


def test_nothing_was_trained(tmp_path, capsys):
    assert search(tmp_path, "--trials", 1, "--space", "lr=1e30,2e30", "--set", "loss=wasserstein") == 1
    assert "none of 1 trials" in capsys.readouterr().err


# --- measuring on the way -------------------------------------------------------------------------------------------


def test_measuring_changes_nothing(monkeypatch):
    kind, source = recipes.get("dcgan"), data.load("digits", 8)  # batch norm tells training from evaluation
    monkeypatch.setattr(kind, "features", "random")

    def parameters(measure):
        trainer = Trainer(kind, kind.Options(width=2), source, batch_size=16, steps=6)
        trainer.run(after_step=lambda t: measure and tune.measured(t, 20, "fid"))
        return torch.cat([p.flatten() for module in trainer.raw.values() for p in module.parameters()])

    assert torch.equal(parameters(True), parameters(False))


def test_arguments_that_make_no_sense(tmp_path, capsys):
    assert search(tmp_path / "a", "--metric", "beauty") == 2
    assert "--metric beauty: expected one of energy_distance, modes, high_quality" in capsys.readouterr().err
    assert search(tmp_path / "b", "--space", "lr=1:2", "lr=3:4") == 2
    assert "names an option twice" in capsys.readouterr().err


def test_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None if name == "optuna" else object())
    assert search(tmp_path) == 2
    assert capsys.readouterr().err == "fastgan tune: optuna missing; pip install 'fastgan[tune]'\n"
