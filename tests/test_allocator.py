"""``fastgan doctor --allocator``: what is measured and what is recommended."""

import json
from types import SimpleNamespace

import pytest

from fastgan import allocator, doctor, measure

_THREADS = "OMP_NUM_THREADS"


@pytest.fixture
def machine(monkeypatch):
    """Four cores, and how long a step takes is a table."""
    seconds = {}
    monkeypatch.setattr(allocator, "_threads", lambda: [1, 2, 4])
    monkeypatch.setattr(allocator.sys, "platform", "linux")

    def child(environment, *_):
        kind = "tuned" if "MALLOC_ARENA_MAX" in environment else "thresholds" if len(environment) > 1 else "default"
        return seconds.get(kind, 1.0) * seconds.get(environment[_THREADS], 1.0)

    monkeypatch.setattr(allocator, "_child", child)
    return seconds


def test_what_gains_is_set(machine, capsys, monkeypatch):
    machine |= {"thresholds": 0.9, "tuned": 0.5, "2": 0.8}
    report = allocator.examine()
    assert report["set"] == measure.TUNED_ALLOCATOR | {_THREADS: "2"} and report["gain"] == pytest.approx(2.5)
    assert report["allocators"]["thresholds"]["speedup"]["median"] == pytest.approx(1 / 0.9)
    assert doctor.main(["--allocator"]) == 0
    output = capsys.readouterr().out
    assert "export MALLOC_ARENA_MAX=1" in output and "export OMP_NUM_THREADS=2" in output and "2.50x" in output
    assert doctor.main(["--allocator", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["set"] == report["set"]


def test_nothing_is_set_for_noise(machine, capsys):
    machine |= {"tuned": 0.98, "1": 0.99}
    assert allocator.examine()["set"] == {}
    assert doctor.main(["--allocator"]) == 0
    assert "Leave everything as it is" in capsys.readouterr().out


def test_a_step_is_measured_in_a_process_of_its_own():
    assert 0 < allocator._child({_THREADS: "1"}, 0.01, 2) < 60


def test_a_step_that_fails_says_why(monkeypatch):
    lost = SimpleNamespace(returncode=1, stderr="Traceback\nMemoryError: no more", stdout="")
    monkeypatch.setattr(allocator.subprocess, "run", lambda *_, **__: lost)
    with pytest.raises(RuntimeError, match="MemoryError: no more"):
        allocator._child({_THREADS: "1"}, 0.01, 2)
