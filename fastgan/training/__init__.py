"""What ``fastgan train``, ``sample``, ``eval`` and ``tune`` run on: one trainer for the recipes of :mod:`fastgan.recipes`."""

import importlib.util

NEEDED = {
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "rich": "rich",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "torchmetrics": "torchmetrics",
}


def missing_extras() -> list[str]:
    """Distributions of the extra ``train`` that are not installed."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
