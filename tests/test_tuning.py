"""Tiles by measurement: kernels/tuning.py. What is timed here is a stand-in: no GPU is needed."""

import json

import pytest
import torch

tuning = pytest.importorskip("fastgan.kernels.tuning", reason="triton is not installed")

TILES = [{"BLOCK_I": 4}, {"BLOCK_I": 8}, {"BLOCK_I": 16}]
DEVICE = torch.device("cuda")


def kernel():
    """Its name is all that counts."""


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """(launch, tiles that ran): tile i takes seconds[i]."""
    ran, seconds, timed = [], {4: 3.0, 8: 1.0, 16: 2.0}, []

    def fake_seconds(run):
        run()
        timed.append(ran.pop())
        return seconds[timed[-1]["BLOCK_I"]]

    monkeypatch.setenv("FASTGAN_AUTOTUNE", "1")
    monkeypatch.setenv("FASTGAN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "_seconds", fake_seconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU / 80GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def launch(shape=(64, 5), device=DEVICE, tiles=TILES):
        tuning.launch(kernel, shape, device, tiles, ran.append)
        return ran[-1]["BLOCK_I"]

    launch.timed, launch.folder, launch.seconds = timed, tmp_path, seconds
    return launch


def test_the_fastest_is_found_once_and_kept(tuned):
    assert [tuned() for _ in range(3)] == [8, 8, 8]
    assert len(tuned.timed) == 3
    tuned.seconds[4] = 0.5
    assert tuned((65, 5)) == 4, "another shape is timed for itself"
    assert tuned() == 8


def test_later_processes_read_it(tuned, monkeypatch):
    tuned()
    (file,) = tuned.folder.glob("autotune/*.json")
    assert "A_GPU___80GB" in file.name and json.loads(file.read_text()) == {"kernel 64 5": {"BLOCK_I": 8}}
    monkeypatch.setattr(tuning, "_found", {})
    assert tuned() == 8 and len(tuned.timed) == 3
    monkeypatch.setattr(tuning, "_found", {})
    assert tuned(tiles=TILES[::2]) == 16, "a tile that is none any more is not taken"
    tuned((1, 1))
    assert len(json.loads(file.read_text())) == 2


def test_damaged_files_and_homes_that_cannot_be_written_to(tuned, monkeypatch):
    tuned()
    (file,) = tuned.folder.glob("autotune/*.json")
    file.write_text("{")
    monkeypatch.setattr(tuning, "_found", {})
    assert tuned() == 8 and json.loads(file.read_text())
    blocked = tuned.folder / "a file"
    blocked.write_text("")
    monkeypatch.setenv("FASTGAN_CACHE_DIR", str(blocked))
    assert tuned() == 8 and tuned() == 8 and len(tuned.timed) == 9


def test_the_rule_holds_elsewhere(tuned, monkeypatch):
    assert tuned(device=torch.device("cpu")) == 4
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned() == 4, "nothing can be timed while a graph is captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "0")
    assert tuned() == 4
    monkeypatch.delenv("FASTGAN_AUTOTUNE")
    assert tuned() == 4 and not tuned.timed


def test_a_gpu_finds_one_that_agrees(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    import fastgan

    monkeypatch.setenv("FASTGAN_AUTOTUNE", "1")
    monkeypatch.setenv("FASTGAN_CACHE_DIR", str(tmp_path))
    m = torch.randn(130, 3, 7, device="cuda")
    with fastgan.use_backend("triton"):
        got = fastgan.minibatch_discrimination(m)
    torch.testing.assert_close(got.cpu(), fastgan.minibatch_discrimination(m.double().cpu()).float())
    assert list(tmp_path.glob("autotune/*.json"))
