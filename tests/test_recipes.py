"""Every recipe of ``fastgan train``: its players learn and leave the others alone, fast and plain steps are the same numbers,
samples are what they should be, and a checkpoint gives them back."""

# ruff: noqa: E402

import dataclasses
import functools
import re
import sys

import pytest
import torch

torch.set_num_threads(1)
for needed in ("matplotlib", "rich", "safetensors", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)

import fastgan
from fastgan import recipes
from fastgan.training import checkpoint, data, metrics, options, run
from fastgan.training.trainer import Trainer

BATCH, STEPS = 8, 3
TINY = {"width": 8, "z_dim": 8}
every_recipe = pytest.mark.parametrize("name", recipes.names())


@functools.cache
def source(spec, size):
    return data.load(spec, size)


def trainer(name, out=None, spec=None, **changed):
    kind = recipes.get(name)
    known = {field.name for field in dataclasses.fields(kind.Options)}
    chosen = kind.Options(**{key: value for key, value in (TINY | changed).items() if key in known})
    return Trainer(kind, chosen, source(spec or kind.data, kind.size), batch_size=BATCH, steps=STEPS, out=out)


def state(trainer):
    """All parameters and buffers, by network and name; copies."""
    return {key: value.clone() for key, value in checkpoint.pack_modules(trainer.raw).items()}


def parameters(trainer):
    return {f"{name}.{key}" for name, module in trainer.raw.items() for key, _ in module.named_parameters()}


@every_recipe
def test_players_learn_and_leave_others_alone(name, monkeypatch):
    trained, moved, turns = trainer(name), set(), []
    turn = Trainer._turn

    def watched(self, player):
        before = state(self)
        turn(self, player)
        changed = {key for key, value in state(self).items() if not torch.equal(value, before[key])} & parameters(self)
        assert {key.partition(".")[0] for key in changed} == set(player.networks), f"{player.name}'s turn"
        moved.update(changed)
        turns.append(player.name)

    monkeypatch.setattr(Trainer, "_turn", watched)
    for _ in range(STEPS):
        trained.step()
        assert trained.losses and all(value.isfinite() for value in trained.losses.values()), trained.losses
    assert set(turns) == {player.name for player in trained.players}
    own = {name for player in trained.players for name in player.networks}
    assert own == {name for name, module in trained.raw.items() if list(module.parameters())}, "a network that nobody trains"
    still = {key for key in parameters(trained) if key.partition(".")[0] in own} - moved
    # the bias of a score cancels where scores are only subtracted from each other
    assert all(key.endswith("bias") and state(trained)[key].numel() == 1 for key in still), still


@every_recipe
def test_fast_and_plain_steps_are_the_same_numbers(name):
    """Of four steps, as the critic step takes some of its ways from the third on. In float64 they are to differ by rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = []
        for fast in (True, False):
            trained = trainer(name, fast=fast)
            trained.batches = Doubled(trained.batches)
            for _ in range(4):
                trained.step()
            found.append((state(trained), trained.losses))
    finally:
        torch.set_default_dtype(before)
    for got, want in zip(*found, strict=True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            scale = value.abs().max().clamp_min(1e-3) if value.numel() else 1.0
            assert not value.numel() or (got[key] - value).abs().max() <= 1e-9 * scale, key


class Doubled:
    """Batches in float64."""

    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        return {key: value.double() if value.is_floating_point() else value for key, value in next(self.batches).items()}


@torch.no_grad()
def drawn(recipe, seed, n=12):
    torch.manual_seed(seed)
    return recipe.sample(n)


@every_recipe
def test_samples(name, tmp_path):
    trained = trainer(name)
    trained.step()
    recipe, shape = trained.for_sampling(), trained.source.shape
    samples = drawn(recipe, 0)
    assert len(samples) == 12 and samples.dim() == 1 + len(shape) and samples.isfinite().all()
    if len(shape) == 3:
        assert samples.abs().max() <= 1
    torch.testing.assert_close(samples, drawn(recipe, 0), rtol=0, atol=0)
    assert (samples - drawn(recipe, 1)).abs().max() > 1e-4, "samples don't depend on the random state"
    assert (samples - samples[:1]).abs().max() > 1e-4, "all samples are the same"
    trained.back_to_training()
    before = state(trained), torch.get_rng_state()
    trained.picture(tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert all(torch.equal(value, before[0][key]) for key, value in state(trained).items())
    assert torch.equal(before[1], torch.get_rng_state())


@every_recipe
def test_metrics_of_goals_are_measured(name):
    trained = trainer(name)
    recipe = trained.for_sampling()
    found = recipe.evaluate(40)
    assert recipe.goals and recipe.goals.keys() <= found.keys()
    assert not all(metrics.better(key, found[key], goal) for key, goal in recipe.goals.items()), "reached without training"


@every_recipe
def test_documentation_and_options(name):
    kind = recipes.get(name)
    text = sys.modules[kind.__module__].__doc__
    assert re.search(r'"[^"]+",\s+(\w+ )?(19|20)\d\d\b', text), "no paper"
    assert len(recipes.summary(name)) < 130 and recipes.summary(name).endswith((".", ","))
    settings = [f"{key}={default}" for key, default in options.describe(kind.Options())]
    assert options.parse(kind.Options, settings) == kind.Options()


@every_recipe
def test_a_checkpoint_gives_the_same_samples(name, tmp_path):
    trained = trainer(name, out=tmp_path)
    trained.step()
    kind = recipes.get(name)
    config = {"recipe": name, "data": kind.data, "size": kind.size, "options": dataclasses.asdict(trained.recipe.options)}
    checkpoint.write_json(tmp_path / "config.json", config)
    trained.save()
    want = drawn(trained.for_sampling(), 0)
    recipe, _ = run.load(tmp_path)
    torch.testing.assert_close(drawn(recipe, 0), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, changed", [("wgan_gp", {}), ("r3gan", {}), ("mrgan", {"gradient_penalty": 1.0}), ("sngan", {"r1": 1.0})]
)
def test_penalised_critics_share_a_pass(name, changed, monkeypatch):
    """From the second step on: r3gan's first step has zeros where later ones prove that samples don't depend on each other."""
    trained, found = trainer(name, **changed), []
    critic_step = fastgan.critic_step

    def watched(*arguments, **options):
        found.append(critic_step(*arguments, **options))
        return found[-1]

    trained.step()
    monkeypatch.setattr(fastgan, "critic_step", watched)
    trained.step()
    assert found and all(step.method == "fused" for step in found), [step.why for step in found]
