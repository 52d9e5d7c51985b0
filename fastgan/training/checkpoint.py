"""Checkpoints: safetensors and JSON in a folder of its own per step, which is there whole or not at all.

``model.safetensors``: all networks, keys ``network.parameter``; ``average.safetensors``: the averaged ones;
``training.safetensors``: optimizer state ``player.index.name`` and random states; ``state.json``: all that is no tensor.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEEP = 2  # the newest checkpoints that stay


def write_json(path: Path, value) -> None:
    """Atomically: a reader, or a run after a kill, finds the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
    """Write ``folder/step-NNNNNNNN`` and drop all but the newest ``KEEP``. ``tensors``: file stem -> its tensors."""
    final, part = folder / f"step-{step:08}", folder / f".part-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for stem, content in tensors.items():
        # clones: safetensors refuses tensors that share memory, which tied weights do
        save_file({key: t.detach().cpu().contiguous().clone() for key, t in content.items()}, part / f"{stem}.safetensors")
    write_json(part / "state.json", state)
    for path in part.iterdir():  # on disk before the folder gets its name
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in found(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def found(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(tensors by file stem, state) of one checkpoint."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


# --- what PyTorch keeps, as flat dictionaries of tensors ------------------------------------------------------------


def pack_modules(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def unpack_modules(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    for name, module in modules.items():
        own = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own)


def pack_optimizers(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{player}.{index}.{name}": torch.as_tensor(value)
        for player, optimizer in optimizers.items()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if value is not None
    }


def unpack_optimizers(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for player, optimizer in optimizers.items():
        whole = optimizer.state_dict()
        for key, value in tensors.items():
            owner, _, rest = key.partition(".")
            if owner == player:
                index, _, name = rest.partition(".")
                whole["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(whole)


def pack_random() -> dict[str, Tensor]:
    """The states that torch draws from; recipes draw from no other."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def unpack_random(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
