"""Benchmarks: fastgan against the best a user could do instead. ``fastgan bench --help`` or ``make bench``.

A folder of its own, as kernels are, and installed as ``fastgan.benchmarks``, so that ``fastgan bench`` measures wherever
fastgan is installed; its files therefore import each other relatively.
"""

import importlib
import json
import pkgutil


def every_case() -> list:
    """The cases of all files that have some, in the order of their names."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    names = [name for name in names if not name.startswith(("test_", "conftest", "__"))]
    return [case for name in names for case in getattr(importlib.import_module(f".{name}", __name__), "CASES", ())]


def read_rows(path) -> list[dict]:
    """Results of cases, a line each; a line that was being written when the machine went down is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def make_cases(op: str, size: str, dtype) -> list:
    """Cases of an operator that are of this size and ``torch.dtype``, one a mode, by the ``made`` of its file.

    Raises:
        ValueError: sizes have another form.
    """
    return importlib.import_module(f".{op}", __name__).made(size, dtype)
