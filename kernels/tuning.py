"""Tiles by measurement instead of by rule, on demand: ``FASTGAN_AUTOTUNE=1``.

Rules of shape are what kernels go by. With the variable set, the first launch of a kernel on a shape times the rule's tile and
its neighbours and keeps the fastest, also for later processes: in ``FASTGAN_CACHE_DIR``, else ``fastgan`` in the user's
cache directory, a file for each device and version. Other tiles add up in another order, so results may differ in the last bits
from those of the rule; a choice once made stays. Nothing is timed while a CUDA graph is captured, nor in the interpreter.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from fastgan._version import __version__

_found: dict[str, dict[str, dict]] = {}  # device -> {kernel and shape: tile}, as in the file


def enabled(device: torch.device) -> bool:
    return os.environ.get("FASTGAN_AUTOTUNE", "0") not in ("", "0") and device.type == "cuda"


def _cache_file(device: torch.device) -> Path:
    root = os.environ.get("FASTGAN_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastgan")
    name = f"{torch.cuda.get_device_name(device)}-triton{triton.__version__}-fastgan{__version__}"
    return Path(root, "autotune", "".join(c if c.isalnum() or c in ".-" else "_" for c in name) + ".json")


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or one that something else has damaged
        return {}


def _write(file: Path, known: dict) -> None:
    """All at once: other processes read it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            json.dump(_read(file) | known, out, indent=1, sort_keys=True)
        os.replace(out.name, file)
    except OSError:  # a home that can't be written to: the choice lasts as long as the process
        pass


def _seconds(run: Callable[[], None]) -> float:
    return do_bench(run, warmup=5, rep=20, return_mode="median")


def launch(kernel, shape: tuple, device: torch.device, tiles: list[dict], run: Callable[[dict], None]) -> None:
    """``run`` with one of ``tiles``, the first of which is the rule's. ``shape``: all else that the fastest may depend on."""
    if not enabled(device) or len(tiles) == 1:
        return run(tiles[0])
    file = _cache_file(device)
    known = _found.setdefault(str(file), {})
    key = f"{kernel.__name__} {' '.join(map(str, shape))}"
    if key not in known:
        known.update(_read(file))
    if known.get(key) not in tiles:
        if torch.cuda.is_current_stream_capturing():
            return run(tiles[0])
        known[key] = min(tiles, key=lambda tile: _seconds(lambda: run(tile)))
        _write(file, {key: known[key]})
    return run(known[key])
