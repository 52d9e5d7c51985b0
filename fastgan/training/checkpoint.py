"""Checkpoints: safetensors and JSON in a folder of its own per step, which is there whole or not at all.

``model.safetensors``: all networks, keys ``network.parameter``; ``average.safetensors``: the averaged ones;
``training.safetensors``: optimizer state ``player.index.name`` and random states; ``state.json``: all that is no tensor.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .parallel import part as part_of
from .parallel import whole

SHOWN = 4  # differences in an error
STEMS = ("model", "average", "training")
KEEP = 2  # the newest checkpoints that stay


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader, or a run after a kill, finds the old file or the new one."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync(path.parent)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1))


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
    """Write ``folder/step-NNNNNNNN`` and drop all but the newest ``KEEP``. ``tensors``: file stem -> its tensors.

    OSError says what stays where it can't be written.
    """
    final, part = folder / f"step-{step:08}", folder / ".part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for stem, content in tensors.items():
            # clones: safetensors refuses tensors that share memory, which tied weights do
            save_file({key: t.detach().cpu().contiguous().clone() for key, t in content.items()}, part / f"{stem}.safetensors")
        write_json(part / "state.json", state)
        for path in (*part.iterdir(), part):  # on disk before the folder gets its name
            _sync(path)
        _drop(final)
        os.replace(part, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        newest = found(folder)[-1:]
        stays = f"{newest[0]} stays, and --resume goes on from it" if newest else "there is none before it"
        raise OSError(f"the checkpoint {final} could not be written: {error}; {stays}") from error
    for old in found(folder)[:-KEEP]:
        _drop(old)
    return final


def _drop(path: Path) -> None:
    """Delete a checkpoint, first its name: what is half deleted must not be taken for one."""
    if path.exists():
        gone = path.with_name(".old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def found(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(tensors by file stem, state) of one checkpoint. ValueError where a file of it is damaged."""
    try:
        tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in STEMS}
        return tensors, json.loads((path / "state.json").read_text())
    except (SafetensorError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}); once it is deleted, the one before it serves") from error


# --- what PyTorch keeps, as flat dictionaries of tensors ------------------------------------------------------------


def pack_modules(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": whole(value) for name, module in modules.items() for key, value in module.state_dict().items()}


def unpack_modules(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """ValueError, before anything is changed, where these are not the networks that were saved."""
    here = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    there = {key: value for key, value in tensors.items() if key.partition(".")[0] in modules}
    wrong = [
        f"{key} is {_form(there, key)} there and {_form(here, key)} here"
        for key in sorted(here | there)
        if _form(there, key) != _form(here, key)
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"the checkpoint's networks are not the recipe's of today: {'; '.join(wrong[:SHOWN])}{more}. The version of "
            "fastgan that wrote it (config.json) reads it; training into another --out begins anew"
        )
    for name, module in modules.items():
        module.load_state_dict({key: part_of(there[f"{name}.{key}"], value) for key, value in module.state_dict().items()})


def _form(tensors: dict[str, Tensor], key: str) -> str:
    return f"of shape {tuple(tensors[key].shape)}" if key in tensors else "missing"


def pack_optimizers(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{player}.{index}.{name}": whole(torch.as_tensor(value))
        for player, optimizer in optimizers.items()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if value is not None
    }


def unpack_optimizers(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for player, optimizer in optimizers.items():
        state, parameters = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
        for key, value in tensors.items():
            owner, _, rest = key.partition(".")
            if owner == player:
                index, _, name = rest.partition(".")
                parameter = parameters[int(index)]
                value = part_of(value, parameter) if value.shape == parameter.shape else value
                state["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state)


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
