"""``import fastgan.auto`` at the top of a script: what it builds with torch's spectral norm afterwards is fastgan's.

``torch.nn.utils.spectral_norm``, ``remove_spectral_norm`` and ``torch.nn.utils.parametrizations.spectral_norm`` become
fastgan's of the same names, which have the same signatures, keys, random draws and numbers. Modules that imported torch's
by name before keep it; the message says which. :func:`disable` gives torch its own back; what was built stays as it is.
"""

import os
import sys

import torch.nn.utils.parametrizations as _torch_parametrizations
from torch.nn import utils as _torch_utils

from fastgan.nn import utils as _utils
from fastgan.nn.utils import parametrizations as _parametrizations

_torch_hook = sys.modules["torch.nn.utils.spectral_norm"]  # torch.nn.utils has a function of this name
#: where torch keeps it, under which name, and what takes its place
_PLACES = (
    (_torch_utils, "spectral_norm", _utils.spectral_norm),
    (_torch_utils, "remove_spectral_norm", _utils.remove_spectral_norm),
    (_torch_hook, "spectral_norm", _utils.spectral_norm),
    (_torch_hook, "remove_spectral_norm", _utils.remove_spectral_norm),
    (_torch_parametrizations, "spectral_norm", _parametrizations.spectral_norm),
)
_torchs = {(module.__name__, name): getattr(module, name) for module, name, _ in _PLACES}
_said = False


def enabled() -> bool:
    """Does torch build fastgan's now?"""
    return all(getattr(module, name) is ours for module, name, ours in _PLACES)


def enable() -> None:
    """What the import does; needed only after :func:`disable`."""
    for module, name, ours in _PLACES:
        setattr(module, name, ours)
    _say_once()


def disable() -> None:
    """torch's functions are torch's again. Modules built meanwhile stay fastgan's."""
    for module, name, _ in _PLACES:
        setattr(module, name, _torchs[module.__name__, name])


def _holders() -> list[str]:
    """Modules outside torch and fastgan that hold torch's functions already."""
    originals = list(_torchs.values())
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if not name.startswith(("torch.", "fastgan.")) and any(v is o for v in _values(module) for o in originals)
    )


def _values(module) -> list:
    names = getattr(module, "__dict__", None)
    return [names[key] for key in list(names) if "spectral" in key] if isinstance(names, dict) else []


def _say_once() -> None:
    global _said
    if _said or os.environ.get("RANK", "0") != "0":
        return
    _said = True
    text = "fastgan.auto: torch's spectral_norm now builds fastgan's; fastgan.auto.disable() undoes it"
    if holders := _holders():
        text += (
            f". Imported before, and still torch's, in: {', '.join(holders)}; import fastgan.auto first, or call "
            f"fastgan.accelerate(model)"
        )
    print(text, file=sys.stderr)


enable()
