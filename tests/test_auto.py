"""import fastgan.auto: torch's names build fastgan's, in whatever way they are imported, until disable()."""

import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm as TorchForm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from fastgan.nn.utils.parametrizations import _SpectralNorm
from fastgan.nn.utils.spectral_norm import SpectralNorm

TORCHS = torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm, torch.nn.utils.parametrizations.spectral_norm


@pytest.fixture
def auto():
    import fastgan.auto

    fastgan.auto.enable()
    yield fastgan.auto
    fastgan.auto.disable()


def hook_of(module):
    (hook,) = module._forward_pre_hooks.values()
    return hook


def test_every_way_to_import(auto):
    assert auto.enabled()
    from torch.nn.utils import parametrizations, spectral_norm
    from torch.nn.utils.parametrizations import spectral_norm as by_name
    from torch.nn.utils.spectral_norm import spectral_norm as from_module

    for build in (spectral_norm, from_module, torch.nn.utils.spectral_norm, nn.utils.spectral_norm):
        assert type(hook_of(build(nn.Linear(3, 3)))) is SpectralNorm
    for build in (by_name, parametrizations.spectral_norm, torch.nn.utils.parametrizations.spectral_norm):
        assert type(build(nn.Linear(3, 3)).parametrizations.weight[0]) is _SpectralNorm
    assert type(spectral_norm(nn.Conv2d(3, 4, 3), "weight", 2, 1e-6, 1)._forward_pre_hooks.popitem()[1]) is SpectralNorm


def test_numbers_keys_and_draws_are_torchs(auto):
    layers = []
    for builds in (TORCHS, (torch.nn.utils.spectral_norm, None, torch.nn.utils.parametrizations.spectral_norm)):
        torch.manual_seed(0)
        layers.append(nn.Sequential(builds[0](nn.Linear(5, 4)), builds[2](nn.Linear(4, 3))).double())
    torchs, ours = layers
    assert list(torchs.state_dict()) == list(ours.state_dict())
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-6)
    for (k, a), b in zip(torchs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=k)


def test_remove(auto):
    before = nn.Linear(3, 3)
    for layer in (torch.nn.utils.spectral_norm(nn.Linear(3, 3)), TORCHS[0](nn.Linear(3, 3))):
        torch.nn.utils.remove_spectral_norm(layer)
        assert set(layer.state_dict()) == set(before.state_dict()) and not layer._load_state_dict_pre_hooks


def test_disable(auto):
    built = torch.nn.utils.spectral_norm(nn.Linear(3, 3))
    auto.disable()
    assert not auto.enabled()
    assert (
        torch.nn.utils.spectral_norm,
        torch.nn.utils.remove_spectral_norm,
        torch.nn.utils.parametrizations.spectral_norm,
    ) == TORCHS
    assert type(hook_of(torch.nn.utils.spectral_norm(nn.Linear(3, 3)))) is TorchHook
    assert type(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).parametrizations.weight[0]) is TorchForm
    assert type(hook_of(built)) is SpectralNorm
    auto.disable()
    auto.enable()
    assert auto.enabled()


def test_names_who_imported_before(auto, monkeypatch, capsys):
    early = types.ModuleType("early_bird")
    early.my_spectral_norm = TORCHS[0]
    monkeypatch.setitem(sys.modules, "early_bird", early)
    monkeypatch.setattr(auto, "_said", False)
    auto.enable()
    said = capsys.readouterr().err
    assert "early_bird" in said and "fastgan.accelerate(model)" in said


def test_says_so_once_and_torch_alone_is_untouched():
    script = """
import torch, fastgan
assert torch.nn.utils.spectral_norm.__module__.startswith("torch"), "only fastgan.auto does it"
import fastgan.auto
fastgan.auto.disable(); fastgan.auto.enable()
import fastgan.auto
assert torch.nn.utils.spectral_norm.__module__.startswith("fastgan")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fastgan.auto:") == 1 and "disable()" in done.stderr
    assert "Imported before" not in done.stderr
