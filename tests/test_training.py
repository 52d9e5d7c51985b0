"""The trainer: what a run leaves behind, whatever ends it; and that every option does what it says."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import small_recipe
import torch
from torch import nn

from fastgan import recipes
from fastgan.training import checkpoint, command, data, missing_extras, run, sample
from fastgan.training import trainer as training

pytestmark = pytest.mark.skipif(bool(missing_extras()), reason=f"the extra train is not installed: {missing_extras()}")

STEPS = 40


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("uninterrupted")
    small_recipe.train(out, STEPS)
    return left_by(out)


def left_by(out):
    """(tensors, state, log without speeds) of the newest checkpoint."""
    tensors, state = checkpoint.load(checkpoint.found(out / "checkpoints")[-1])
    log = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    return tensors, state, [{k: v for k, v in row.items() if k != "steps_per_second"} for row in log]


def assert_same(got, expected):
    """Bit for bit."""
    for stem, tensors in expected[0].items():
        assert tensors.keys() == got[0][stem].keys()
        assert [key for key, value in tensors.items() if not torch.equal(value, got[0][stem][key])] == []
    assert got[1:] == expected[1:]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_goes_on_as_if_it_had_not_been_interrupted(tmp_path, name):
    """None keeps what it needs outside its networks, or draws from another generator than torch's."""
    kind = recipes.get(name)
    options = kind.Options(**{"width": 4} if "width" in {field.name for field in dataclasses.fields(kind.Options)} else {})

    def trained(out, until=5):
        trainer = training.Trainer(kind, options, source(kind.data, kind.size), batch_size=8, steps=5, out=out)
        trainer.resume()
        trainer.run(sample_every=0, save_every=2, after_step=lambda t: setattr(t, "stopping", t.done == until))
        return checkpoint.load(checkpoint.found(out / "checkpoints")[-1])

    trained(tmp_path / "interrupted", 2)
    assert_same((*trained(tmp_path / "interrupted"),), (*trained(tmp_path / "whole"),))


@functools.cache
def source(name, size):
    return data.load(name, size)


class Killed(BaseException):
    """Like SIGKILL nothing catches it, so that nothing is tidied up."""


# --- interrupted runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 7, 30])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path, uninterrupted, step):
    """Three players, batch norm, spectral norm, lazy penalties, averages, and a step that learns which way to take."""

    def interrupt(trainer):
        if trainer.done == step:
            raise Killed

    with pytest.raises(Killed):
        small_recipe.trainer(tmp_path, STEPS).run(save_every=7, sample_every=0, log_every=5, after_step=interrupt)
    small_recipe.train(tmp_path, STEPS)
    assert_same(left_by(tmp_path), uninterrupted)


POINTS = [(checkpoint, "save_file"), (checkpoint, "write_json"), (checkpoint, "_sync"), (os, "replace"), (checkpoint, "_drop")]


def test_a_run_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch, uninterrupted):
    """At points all through the saves at steps 14 and 21: the older or the newer checkpoint is whole."""
    left, armed = 0, False

    def dying(function):
        def call(*arguments, **options):
            nonlocal left
            left -= armed
            if armed and left == 0:
                raise Killed
            result = function(*arguments, **options)
            left -= armed
            if armed and left == 0:
                raise Killed
            return result

        return call

    for place, name in POINTS:
        monkeypatch.setattr(place, name, dying(getattr(place, name)))
    seen, points = set(), 0
    for points in range(1, 200, 11):
        out = tmp_path / str(points)
        trainer = small_recipe.trainer(out, STEPS)
        armed = False
        trainer.run(save_every=7, sample_every=0, log_every=5, after_step=lambda t: setattr(t, "stopping", t.done >= 7))
        assert trainer.done == 7
        trainer.stopping, left, armed = False, points, True
        try:
            trainer.run(save_every=7, sample_every=0, log_every=5, after_step=lambda t: setattr(t, "stopping", t.done == 21))
        except Killed:
            pass
        else:
            break
        found = checkpoint.found(out / "checkpoints")
        _, state = checkpoint.load(found[-1])
        assert all(checkpoint.load(path)[1]["step"] == int(path.name[5:]) for path in found)
        seen.add(state["step"])
        armed = False
        if points % 4 == 1:
            small_recipe.train(out, STEPS)
            assert_same(left_by(out), uninterrupted)
    assert seen == {7, 14, 21} and points > 30


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path, monkeypatch):
    trainer, rmtree = small_recipe.trainer(tmp_path, 3), checkpoint.shutil.rmtree

    def killed(path, **options):
        if path.exists():
            (path / "model.safetensors").unlink()
            raise Killed

    def at_the_third(trainer):
        if trainer.done == 2:
            monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)

    with pytest.raises(Killed):
        trainer.run(save_every=1, sample_every=0, after_step=at_the_third)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    assert [checkpoint.load(path)[1]["step"] for path in checkpoint.found(tmp_path / "checkpoints")] == [2, 3]
    assert all("model" in checkpoint.load(path)[0] for path in checkpoint.found(tmp_path / "checkpoints"))


def test_a_run_killed_by_the_system(tmp_path, uninterrupted):
    """SIGKILL when the second checkpoint appears, whatever the process is doing then."""
    process = subprocess.Popen([sys.executable, small_recipe.__file__, tmp_path])
    until = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "step-00000014").exists() and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    if checkpoint.found(tmp_path / "checkpoints")[-1].name > f"step-{STEPS:08}":
        pytest.skip("the process was much faster than its observer")
    small_recipe.train(tmp_path, STEPS)
    assert_same(left_by(tmp_path), uninterrupted)


def test_pictures_leave_the_run_as_it_is(tmp_path, uninterrupted):
    trainer = small_recipe.trainer(tmp_path, STEPS)
    trainer.run(save_every=7, sample_every=15, log_every=5)
    assert_same(left_by(tmp_path), uninterrupted)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3


def test_what_is_frozen_or_evaluating_stays_so(tmp_path):
    class Recipe(small_recipe.Recipe):
        def build(self):
            networks = super().build()
            networks["generator"][0].weight.requires_grad_(False)
            networks["normed"].eval()
            return networks

    trainer = training.Trainer(
        Recipe, small_recipe.Options(), small_recipe.trainer(None).source, batch_size=8, steps=3, out=tmp_path
    )
    before = trainer.raw["generator"][0].weight.clone()
    trainer.run(sample_every=1)
    assert torch.equal(trainer.raw["generator"][0].weight, before)
    trainer._turn(trainer.players[1])
    assert [p.requires_grad for p in trainer.raw["generator"][0].parameters()] == [False, True]
    assert not trainer.raw["normed"].training and trainer.raw["generator"].training


# --- turns ------------------------------------------------------------------------------------------------------------


def test_each_update_has_a_batch_of_its_own_and_only_its_player_moves():
    trainer, seen = small_recipe.trainer(None, 4), []
    players = []
    for player in trainer.players:

        def loss(batch, player=player):
            frozen = {n for n, m in trainer.raw.items() if not any(p.requires_grad for p in m.parameters())}
            assert frozen == trainer.raw.keys() - set(player.networks)
            seen.append((player.name, batch["image"]))
            return player.loss(batch)

        players.append(small_recipe.Player(player.name, player.networks, loss, player.updates, player.every, player.is_critic))
    trainer.players = players
    trainer.run()
    turn = ["critics", "critics", "generator"]
    assert [name for name, _ in seen] == [*turn, "encoder", *turn, *turn, *turn]
    assert len({float(images.sum()) for _, images in seen}) == len(seen) == trainer.batches.drawn


def test_the_device_is_waited_for_only_when_losses_are_logged(monkeypatch, tmp_path):
    looked, finite = [], training.Trainer._finite
    monkeypatch.setattr(training.Trainer, "_finite", lambda self: looked.append(self.done) or finite(self))
    trainer = small_recipe.trainer(tmp_path, 20)
    trainer.run(log_every=8, save_every=100, sample_every=0)
    assert looked == [8, 16, 20]


# --- options ----------------------------------------------------------------------------------------------------------


def after_one_step(**options):
    trainer = small_recipe.trainer(None, 10, **options)
    trainer.step()
    return trainer


def test_optimizers_and_rates():
    rates = {"lr": 0.25, "lr_critic": 0.5, "beta1": 0.3, "beta2": 0.8}
    for name, kind in (("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop), ("sgd", torch.optim.SGD)):
        made = small_recipe.trainer(None, optimizer=name, **rates).optimizers
        assert all(type(optimizer) is kind for optimizer in made.values())
        assert [made[player].defaults["lr"] for player in ("critics", "generator", "encoder")] == [0.5, 0.25, 0.25]
    assert small_recipe.trainer(None, **rates).optimizers["generator"].defaults["betas"] == (0.3, 0.8)
    assert small_recipe.trainer(None, optimizer="sgd", beta1=0.3).optimizers["generator"].defaults["momentum"] == 0.3


def test_learning_rates_fall_to_zero_over_the_last_share_of_steps():
    trainer, rates = small_recipe.trainer(None, 10, lr=1.0, lr_decay=0.4), []
    trainer.run(after_step=lambda t: rates.append(t.optimizers["critics"].param_groups[0]["lr"]))
    assert rates == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])


def test_a_resumed_run_has_the_learning_rate_of_its_step(tmp_path):
    first = small_recipe.trainer(tmp_path, 10, lr=1e-3, lr_decay=0.4)
    first.run(sample_every=0, after_step=lambda t: setattr(t, "stopping", t.done == 8))
    again = small_recipe.trainer(tmp_path, 10, lr=1e-3, lr_decay=0.4)
    assert again.resume() and again.done == 8
    again.run(sample_every=0)
    assert again.optimizers["critics"].param_groups[0]["lr"] == pytest.approx(0.25e-3)


def test_clipping():
    clipped = after_one_step(optimizer="sgd", beta1=0.0, lr=1.0, clip_gradient=1e-3, clip_weight=0.0)
    fresh = small_recipe.trainer(None)
    moved = torch.cat([(clipped.raw["generator"][i].weight - fresh.raw["generator"][i].weight).flatten() for i in (0, 3)])
    assert 0.5e-3 < float(moved.detach().norm()) <= 1.001e-3
    clipped = after_one_step(clip_weight=0.05)
    assert max(float(p.abs().max()) for p in clipped.raw["critic"].parameters()) <= 0.0500001
    assert max(float(p.abs().max()) for p in clipped.raw["generator"].parameters()) > 0.05


def test_initialisation():
    def spread(trainer):
        layer = trainer.raw["generator"][0]
        return float(layer.weight.detach().std()), float(layer.bias.detach().abs().max())

    assert spread(small_recipe.trainer(None, init="normal"))[0] == pytest.approx(0.02, rel=0.5)
    assert spread(small_recipe.trainer(None, init="xavier"))[1] == 0 < spread(small_recipe.trainer(None))[1]
    weight = small_recipe.trainer(None, init="orthogonal").raw["generator"][0].weight
    torch.testing.assert_close(weight.mT @ weight, torch.eye(4))
    normed = small_recipe.trainer(None, init="orthogonal").raw["normed"]  # through spectral norm's parametrization
    assert float(torch.linalg.matrix_norm(normed[0].weight.detach(), 2)) == pytest.approx(1, rel=0.3)


def test_latents():
    normal, uniform = (small_recipe.trainer(None, z=z).recipe.latent(4000) for z in ("normal", "uniform"))
    assert normal.abs().max() > 3 and normal.std() == pytest.approx(1, rel=0.05)
    assert uniform.min() < -0.99 and 0.99 < uniform.max() <= 1 and uniform.std() == pytest.approx(3**-0.5, rel=0.05)


def test_averages():
    trainer = small_recipe.trainer(None, ema=0.75)
    trainer.step()
    first = trainer.raw["generator"][0].weight.clone()
    trainer.step()
    expected = 0.75 * first + 0.25 * trainer.raw["generator"][0].weight
    torch.testing.assert_close(trainer.averages["generator"].module[0].weight, expected)
    assert trainer.for_sampling().generator is trainer.averages["generator"].module
    assert not small_recipe.trainer(None, ema=0.0).averages


def test_mirrored_images(tmp_path):
    recipe, digits = recipes.get("dcgan"), source("digits", 8)
    seen = {}
    for flip in (False, True):
        trainer = training.Trainer(recipe, recipe.Options(flip=flip, width=2), digits, batch_size=64, steps=1)
        trainer.players[0] = small_recipe.Player("critic", ("critic",), lambda b, f=flip: seen.update({f: b}) or stop())
        with pytest.raises(Killed):
            trainer.step()
    same = (seen[True]["image"] == seen[False]["image"]).flatten(1).all(1)
    turned = (seen[True]["image"] == seen[False]["image"].flip(3)).flatten(1).all(1)
    assert (same | turned).all() and 15 < same.sum() < 49 and 15 < turned.sum() < 49


def stop():
    raise Killed


# --- precision and compilation ------------------------------------------------------------------------------------------


def test_autocast_in_losses_and_float32_parameters():
    trainer, seen = small_recipe.trainer(None, 3, amp=True), []
    for name in ("generator", "critic", "encoder"):
        layer = trainer.raw[name]["used"] if name == "encoder" else trainer.raw[name][0]
        layer.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for m in trainer.raw.values() for p in m.parameters())


def scaled(scale):
    trainer = small_recipe.trainer(None, 5, clip_gradient=0.05)
    if scale:
        trainer.scaler = trainer.recipe.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return trainer


def test_scaled_gradients_are_those_without_a_scale(tmp_path):
    plain = scaled(None)
    plain.run()
    ours = scaled(2.0**10)
    ours.out = tmp_path
    ours.run(sample_every=0)
    for name, module in plain.raw.items():
        for a, b in zip(module.parameters(), ours.raw[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    again = scaled(2.0)
    again.out = tmp_path
    assert again.resume() and again.scaler.get_scale() == 2.0**10


def test_a_step_whose_scaled_gradients_overflow_is_left_out():
    trainer = scaled(2.0**10)
    before = [p.clone() for p in trainer.raw["generator"].parameters()]
    player = trainer.players[1]
    huge = small_recipe.Player("generator", ("generator",), lambda b: {"generator": player.loss(b)["generator"] * 1e38})
    trainer._turn(huge)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.raw["generator"].parameters(), strict=True))
    assert trainer.scaler.get_scale() == 2.0**9


def test_compiled_networks_train_as_eager_ones(monkeypatch):
    """With a backend that only traces: what the default one makes of it is its own business, and takes half a minute."""
    compiled, compile = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m: compiled.append(m) or compile(m, backend="eager"))
    plain = small_recipe.trainer(None, 4)
    plain.run()
    ours = small_recipe.trainer(None, 4, compile=True)
    ours.recipe.compile = "eager"
    ours.run()
    assert compiled == [ours.raw["generator"], ours.raw["encoder"]]
    for name, module in plain.raw.items():  # weights: the gradient of the critic's last bias is rounding alone
        for a, b in zip(module.parameters(), ours.raw[name].parameters(), strict=True):
            assert a.dim() < 2 or (a - b).abs().max() < 1e-5


# --- what goes wrong, and what is said about it -------------------------------------------------------------------------


def test_losses_that_are_not_finite(tmp_path):
    trainer = small_recipe.trainer(tmp_path, 40, lr=1e30)
    with pytest.raises(training.Diverged, match=r"the loss of \w+ is (nan|inf|-inf) at step \d+"):
        trainer.run(save_every=1000, sample_every=0)
    trainer = small_recipe.trainer(tmp_path, 40)
    trainer.run(save_every=10, sample_every=0, after_step=lambda t: setattr(t, "stopping", t.done == 9))
    with torch.no_grad():
        trainer.raw["encoder"]["unused"].weight[0, 0] = float("nan")  # no loss sees it
    with pytest.raises(training.Diverged, match="parameters of encoder are not finite at step"):
        trainer.save()
    assert checkpoint.load(checkpoint.found(tmp_path / "checkpoints")[-1])[1]["step"] == 9


def command_line(*arguments):
    return command.main([*map(str, arguments), "--device", "cpu"])


@pytest.fixture
def points(tmp_path):
    """Arguments of a run that takes a moment, on points of a file."""
    import numpy

    numpy.savez(tmp_path / "points.npz", x=torch.randn(64, 2).numpy(), y=torch.arange(64).numpy() % 4)
    few = ["--steps", 6, "--batch-size", 8, "--set", "width=4", "lr=0.0002"]
    return ["gan", "--data", tmp_path / "points.npz", *few, "--out", tmp_path / "out"]


def test_resuming_with_other_arguments_names_them(points, capsys, tmp_path):
    assert command_line(*points) == 0
    assert command_line(*points) == 2
    assert "holds a run already: --resume goes on with it, --out names another" in capsys.readouterr().err
    assert command_line(*points, "--resume", "--set", "lr=0.5", "width=8", "--seed", 3) == 2
    said = capsys.readouterr().err
    assert "--seed was 0 and is 3" in said and "--set lr was 0.0002 and is 0.5" in said and "--set width was 4 and is 8" in said
    assert command_line(*points, "--resume", "--steps", 8) == 0
    assert "going on from step 6" in capsys.readouterr().out
    steps = [json.loads(row)["step"] for row in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert steps == [6, 8]


def test_sampling_where_the_data_is_gone(points, capsys, tmp_path):
    assert command_line(*points) == 0
    (tmp_path / "points.npz").unlink()
    assert sample.main([str(tmp_path / "out"), "-n", "5", "--out", str(tmp_path / "s.npz"), "--device", "cpu"]) == 0
    recipe, config = run.load(tmp_path / "out")
    assert recipe.source.classes == 4 and config["shape"] == [2]
    with pytest.raises(ValueError, match=r"points\.npz does not exist"):
        len(recipe.source)


def test_ctrl_c_saves(points, capsys, tmp_path, monkeypatch):
    step = training.Trainer.step

    def interrupted(self):
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self)

    monkeypatch.setattr(training.Trainer, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert command_line(*points) == 130
    assert "stopped after step 4; the same command with --resume goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in checkpoint.found(tmp_path / "out" / "checkpoints")] == ["step-00000004"]
    monkeypatch.setattr(training.Trainer, "step", step)
    assert command_line(*points, "--resume") == 0
    monkeypatch.setattr(run.data, "load", lambda *a: signal.raise_signal(signal.SIGINT))
    assert command_line(*points, "--resume", "--steps", 9) == 130
    assert capsys.readouterr().err == "fastgan train: stopped at once\n"


def test_divergence_ends_the_command(points, capsys):
    assert command_line(*points, "--set", "lr=1e30", "--steps", 60) == 1
    assert "at step" in capsys.readouterr().out


def test_a_full_disk(points, capsys, tmp_path, monkeypatch):
    real, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert command_line(*points, "--save-every", 3) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and "step-00000003 stays, and --resume goes on from it" in said
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-00000003"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert command_line(*points, "--resume") == 0


def test_folders_that_can_not_be_written(points, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert command_line(*points[:-1], tmp_path / "file" / "out") == 2
    said = capsys.readouterr().err
    assert "--out " in said and "can't be written to" in said and "Not a directory" in said
    assert command_line(*points) == 0
    for name in ("s.png", "s.npz"):
        assert sample.main([str(tmp_path / "out"), "-n", "2", "--out", str(tmp_path / "file" / name), "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastgan sample: ") and "file" in said
    assert sample.main([str(tmp_path / "out"), "-n", "2", "--out", str(tmp_path / "new" / "s.npz"), "--device", "cpu"]) == 0


def test_damaged_files_of_a_run(points, capsys, tmp_path):
    assert command_line(*points, "--save-every", 3) == 0
    newest = checkpoint.found(tmp_path / "out" / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"\0" * 20)
    assert command_line(*points, "--resume") == 2
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert sample.main([str(tmp_path / "out")]) == 2
    (newest / "training.safetensors").unlink()
    (newest / "model.safetensors").unlink()
    assert command_line(*points, "--resume") == 2
    assert f"{newest} is damaged" in capsys.readouterr().err
    for text in ("{", "{}", "1"):
        (tmp_path / "out" / "config.json").write_text(text)
        assert command_line(*points, "--resume") == 2
        assert "config.json is not the configuration of a run" in capsys.readouterr().err


def test_networks_that_are_others_by_now(points, capsys, tmp_path):
    assert command_line(*points) == 0
    newest = checkpoint.found(tmp_path / "out" / "checkpoints")[-1]
    for stem in ("model", "average"):
        tensors = checkpoint.load_file(newest / f"{stem}.safetensors")
        key = next(key for key in tensors if key.startswith("generator.") and key.endswith("weight"))
        tensors["generator.old.weight"] = tensors.pop(key)
        grown = next(key for key in tensors if key.endswith("bias"))
        tensors[grown] = torch.zeros(99)
        checkpoint.save_file(tensors, newest / f"{stem}.safetensors")
    for tried in (lambda: command_line(*points, "--resume"), lambda: sample.main([str(tmp_path / "out"), "--device", "cpu"])):
        assert tried() == 2
        said = capsys.readouterr().err
        assert f"{key} is missing there and of shape" in said and "generator.old.weight is of shape" in said
        assert "of shape (99,) there" in said and "into another --out begins anew" in said and "Traceback" not in said


def test_options_that_are_gone(points, capsys, tmp_path):
    assert command_line(*points) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    checkpoint.write_json(tmp_path / "out" / "config.json", config | {"options": config["options"] | {"warmth": 3}})
    assert sample.main([str(tmp_path / "out")]) == 2
    assert "with options that gan no longer has: warmth. fastgan " in capsys.readouterr().err


def test_data_that_is_other_by_now(points, capsys, tmp_path):
    import numpy

    assert command_line(*points) == 0
    numpy.savez(tmp_path / "points.npz", x=torch.randn(65, 2).numpy(), y=torch.arange(65).numpy() % 4)
    assert command_line(*points, "--resume", "--steps", 8) == 2
    said = capsys.readouterr().err
    assert "has changed since" in said and "samples was 64 and is 65. Put it back, or give another --out" in said
    numpy.savez(tmp_path / "points.npz", x=torch.randn(64, 3).numpy(), y=torch.arange(64).numpy() % 4)
    assert command_line(*points, "--resume", "--steps", 8) == 2
    assert "shape was [2] and is [3]" in capsys.readouterr().err
    assert sample.main([str(tmp_path / "out"), "-n", "5", "--out", str(tmp_path / "s.npz"), "--device", "cpu"]) == 0
    with pytest.raises(ValueError, match="has changed since"):
        len(run.load(tmp_path / "out")[0].source)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "gpu"), "--device gpu"),
        (("--device", "meta"), "--device meta"),
        (("--set", "lr=nan"), "option lr=nan: expected at least 0 and below inf"),
        (("--set", "width=0"), "option width=0: expected at least 1"),
        (("--set", "ema=1"), "option ema=1.0: expected at least 0 and below 1"),
        (("--batch-size", 65), "--batch-size 65 is more than the 64 samples"),
        (("--parallel", "fsdp"), "torchrun --nproc-per-node"),
        (("--parallel", "fsdp", "--compile"), "--compile does not go with --parallel fsdp"),
    ],
)
def test_arguments_that_can_not_be(points, capsys, tmp_path, arguments, says):
    assert command.main([*map(str, points), *map(str, arguments)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing that the next attempt would stumble over


def test_list_names_recipes_and_data(capsys):
    assert command.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "wgan_gp" in said and "glyphs" in said and "torchvision:NAME" in said


def test_tensorboard(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    small_recipe.trainer(tmp_path, 4).run(sample_every=0, log_every=2)
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert tensorboard.SummaryWriter
