"""fastgan eval, and benchmarks.recipes with the pages that it writes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import recipes as recorder
from fastgan import recipes
from fastgan.recipes import gan
from fastgan.training import command, evaluate, options


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gan"
    assert command.main(["gan", "--steps", "3", "--batch-size", "16", "--set", "width=4", "--out", str(folder)]) == 0
    return folder


def test_metrics_beside_goals_and_real_samples(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gan.Recipe, "goals", {"modes": 0, "energy_distance": 0.01, "fid": 3})
    file = tmp_path / "new" / "eval.json"
    assert evaluate.main([str(run), "-n", "300", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["step"] == 3 and found["samples"] == 300 and found["recipe"] == "gan" and found["data"] == "grid"
    assert found["met"] == {"modes": True, "energy_distance": False, "fid": False}  # a metric that isn't there is missed
    assert found["reference"]["modes"] == 25 and found["metrics"]["modes"] < 25
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "≥ 0 met" in rows["modes"] and "25" in rows["modes"]
    assert (
        "≤ 0.01 missed" in rows["energy_distance"] and f"{found['metrics']['energy_distance']:.4g}" in rows["energy_distance"]
    )
    monkeypatch.setattr(gan.Recipe, "goals", {"modes": 0})
    assert evaluate.main([str(run), "-n", "300"]) == 0
    again = evaluate.measured(run, 300)
    assert again["metrics"] == found["metrics"] != evaluate.measured(run, 300, seed=1)["metrics"]


def test_goals_hold_for_the_recipes_own_data(run, monkeypatch):
    monkeypatch.setattr(gan.Recipe, "goals", {"modes": 25})
    monkeypatch.setattr(gan.Recipe, "data", "ring")
    assert evaluate.measured(run, 50)["goals"] == {}


def test_what_cannot_be_measured(run, tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2
    assert "holds no trained run" in capsys.readouterr().err
    assert evaluate.main([str(run), "-n", "3"]) == 2
    assert "expected at least 10" in capsys.readouterr().err


def test_samples_that_are_not_finite(run, capsys, monkeypatch):
    monkeypatch.setattr(gan.Recipe, "sample", lambda self, n: torch.full((n, 2), torch.inf))
    assert evaluate.main([str(run), "-n", "20"]) == 2
    assert "20 of 20 samples are not finite" in capsys.readouterr().err


# --- the recorder ---------------------------------------------------------------------------------------------------


def entry(when, **more):
    return {"recorded": f"2026-01-0{when}", **more}


def test_merging_keeps_what_others_recorded(tmp_path):
    path = tmp_path / "results.json"
    recorder.merge(path, {"wgan": entry(1), "gan": entry(2, steps=1)})
    recorder.merge(path, {"dcgan": entry(1), "gan": entry(1, steps=2)})
    found = json.loads(path.read_text())
    assert list(found) == ["dcgan", "gan", "wgan"] and found["gan"]["steps"] == 1
    recorder.merge(path, {"gan": entry(3, steps=3)})
    assert json.loads(path.read_text())["gan"]["steps"] == 3
    assert recorder.main(["--merge", str(path), "--out", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "results.json").read_text()) == json.loads(path.read_text())


def test_a_recorded_run_and_its_page(tmp_path):
    recorder.merge(tmp_path / "results.json", {"other": entry(1)})
    recorder.main(["gan", "--steps", "2", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"other", "gan"}
    run = found["gan"]
    assert (
        run["command"] == "fastgan train gan --steps 2" and run["steps"] == 2 and run["machine"]["torch"] == torch.__version__
    )
    assert run["cpu_seconds"] > 0 and run["seconds"] > 0
    assert set(run["metrics"]) == {"energy_distance", "modes", "high_quality"}
    assert (tmp_path / "gan.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "gan.png").stat().st_size < 1 << 17
    recorder.main(["--pages", "--out", str(tmp_path)])
    text = (tmp_path / "gan.md").read_text()
    assert f"{run['metrics']['energy_distance']:.4g}" in text and "![samples](gan.png)" in text
    assert "(gan.png)" not in (tmp_path / "wgan_gp.md").read_text() and 'src="gan.png"' in (tmp_path / "README.md").read_text()


def test_further_runs_are_on_the_recipes_page(tmp_path, monkeypatch):
    further = {"ring": ("--data ring --batch-size 16 --set width=4", {"modes": 0, "high_quality": 1})}
    monkeypatch.setattr(gan.Recipe, "further", further, raising=False)
    assert recorder.main(["gan-ring", "--steps", "2", "--out", str(tmp_path)]) == 1
    (name, found), *others = json.loads((tmp_path / "results.json").read_text()).items()
    assert (name, others) == ("gan-ring", []) and "goals" not in found and "met" not in found
    assert found["command"] == "fastgan train gan --data ring --batch-size 16 --set width=4 --steps 2"
    recorder.main(["--pages", "--out", str(tmp_path)])
    text = (tmp_path / "gan.md").read_text()
    assert "No run of it" in text and "## ring" in text and "![samples](gan-ring.png)" in text
    assert "≥ 0 met" in text and "≥ 1 missed" in text
    assert "| [gan](gan.md) | `ring` | 0 | 0.0" in (tmp_path / "README.md").read_text()
    with pytest.raises(SystemExit):
        recorder.main(["gan-rong", "--out", str(tmp_path)])


def test_a_run_with_a_picture_of_its_own(tmp_path, monkeypatch):
    further = {"digits": ("--data digits --size 8 --set width=2", {})}
    monkeypatch.setattr(recipes.get("cgan"), "further", further, raising=False)
    monkeypatch.setattr(recorder, "PICTURES", {"cgan-digits": ("--text", "07", "-n", "2")})
    assert recorder.main(["cgan-digits", "--steps", "1", "--out", str(tmp_path)]) == 0
    text = recorder.pages(tmp_path)["cgan.md"]
    assert "`fastgan sample FOLDER --text 07 -n 2`:\n\n![samples](cgan-digits.png)" in text
    with Image.open(tmp_path / "cgan-digits.png") as picture:
        assert picture.width < 3 * picture.height, "two lines of two characters, not a grid of a class each"


def test_pages_judge_by_the_goals_of_today(tmp_path, monkeypatch):
    old = json.loads((Path(__file__).parent.parent / recorder.OUT / "results.json").read_text())["gan"]
    recorder.merge(tmp_path / "results.json", {"gan": old})
    monkeypatch.setattr(gan.Recipe, "goals", {"modes": 1, "energy_distance": 0})
    text = recorder.pages(tmp_path)["gan.md"]
    assert "≥ 1 met" in text and "≤ 0 missed" in text


def test_other_seeds_stand_beside_the_recorded_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gan.Recipe, "goals", {"energy_distance": 0, "modes": 0})
    recorder.main(["gan", "--steps", "1", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "results.json").read_text())["gan"]
    picture = (tmp_path / "gan.png").read_bytes()
    assert recorder.main(["gan", "--steps", "1", "--seed", "7", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "results.json").read_text())["gan"]
    seeds = found.pop("seeds")
    assert found == first and (tmp_path / "gan.png").read_bytes() == picture
    assert list(seeds) == ["7"] and seeds["7"].keys() == first["metrics"].keys() and seeds["7"] != first["metrics"]
    text = recorder.pages(tmp_path)["gan.md"]
    assert "| real samples | seed 7 |" in text and f"| {seeds['7']['energy_distance']:.4g} missed |" in text
    recorder.main(["gan", "--steps", "2", "--out", str(tmp_path)])  # another recipe, perhaps, than that of the seeds
    assert "seeds" not in json.loads((tmp_path / "results.json").read_text())["gan"]


def test_a_run_that_fails_is_named(tmp_path, capfd):
    assert recorder.main(["gan", "--steps", "none", "--out", str(tmp_path)]) == 1
    assert "gan: Command" in capfd.readouterr().err and not (tmp_path / "results.json").exists()


def test_every_page_is_as_it_would_be_written():
    """Where this fails: python -m benchmarks.recipes --pages."""
    folder = Path(__file__).parent.parent / recorder.OUT
    assert {file.name for file in folder.glob("*.md")} == set(recorder.pages(folder))
    for name, text in recorder.pages(folder).items():
        assert (folder / name).read_text(encoding="utf-8") == text, (
            f"{name} is out of date: python -m benchmarks.recipes --pages"
        )


@pytest.mark.parametrize("name", recipes.names())
def test_a_page_says_what_the_docstring_says(name):
    text = recorder.page(name, {}, set())
    kind = recipes.get(name)
    first = sys.modules[kind.__module__].__doc__.split("\n")[0]
    assert recorder.markdown(first) in text and ":func:" not in text and "``" not in text.replace("```", "")
    assert all(f"| `{option}` | {default} |" in text for option, default in options.describe(kind.Options()))


def test_meanings_are_the_comments():
    meanings = options.meanings(recipes.get("wgan_gp").Options)
    assert meanings["gradient_penalty"].startswith("weight of (|gradient|") and meanings["lr"] == ""
    assert set(meanings) == set(vars(recipes.get("wgan_gp").Options()))
