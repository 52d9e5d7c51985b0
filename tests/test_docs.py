"""The pages of docs/: the guide's blocks run, and what the map of systems names exists."""

import inspect
import re
from functools import reduce
from pathlib import Path

import pytest

import fastgan
from fastgan import cli, recipes
from fastgan.training import options

DOCS = Path(__file__).parent.parent / "docs"
SYSTEMS = (DOCS / "systems.md").read_text()


def test_the_guide_runs():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guide.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    scope = {}
    for block in blocks:
        exec(compile(block, "guide.md", "exec"), scope)


@pytest.mark.parametrize("code", sorted(set(re.findall(r"`([^`]+)`", SYSTEMS))))
def test_the_map_names_what_exists(code):
    """Commands, recipes, options and public functions; anything else must be a file."""
    words = code.split()
    if words[0] == "fastgan":
        assert words[1] in cli.COMMANDS, code
        if words[1] in ("train", "tune") and words[2] != "RECIPE":
            kind = recipes.get(words[2])
            if "--set" in words:
                options.parse(kind.Options, [w for w in words[words.index("--set") + 1 :] if "=" in w])
        return
    if words[0] == "--set":
        settings = [word for word in words[1:] if "=" in word]
        assert any(_accepts(recipes.get(name).Options, settings) for name in recipes.names()), code
        return
    name = code.partition("(")[0]
    if ("." in name and "/" not in name) or hasattr(fastgan, name):
        found = reduce(getattr, name.split("."), fastgan)
        for keyword in re.findall(r"(\w+)=", code):
            assert keyword in inspect.signature(found).parameters, code


def _accepts(kind, settings):
    try:
        options.parse(kind, settings)
    except ValueError:
        return False
    return True
