"""What was done to a model, as data and as a table of plain text."""

import itertools
import textwrap
from dataclasses import dataclass, field
from typing import NamedTuple


class Replaced(NamedTuple):
    """``name``: path of the module; ``kind``: its class; ``by``: what serves it now."""

    name: str
    kind: str
    by: str


class Skipped(NamedTuple):
    """``name``: path of the module; ``kind``: its class; ``why``: the reason that it was left."""

    name: str
    kind: str
    why: str


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]], widest: int = 48) -> list[str]:
    """Lines of columns; a cell longer than ``widest`` goes on below itself."""
    wrapped = [[textwrap.wrap(cell, widest) or [""] for cell in row] for row in [headings, *rows]]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(headings))]
    lines = []
    for row in wrapped:
        for cells in itertools.zip_longest(*row, fillvalue=""):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    rule = "  ".join("-" * width for width in widths)
    head = max(len(cell) for cell in wrapped[0])
    return [*lines[:head], rule, *lines[head:]]


def _grouped(entries) -> list[tuple[str, ...]]:
    """Rows of one kind and fate together: their names, shortened, in one line."""
    groups: dict[tuple, list[str]] = {}
    for name, kind, fate in entries:
        groups.setdefault((kind, fate), []).append(name or "(the model)")
    rows = []
    for (kind, fate), names in groups.items():
        shown = ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")
        rows.append((kind, shown, fate))
    return rows


@dataclass
class Report:
    """What :func:`fastgan.accelerate` did; ``print()`` it.

    ``replaced``: :class:`Replaced` (name, kind, by) for every module that fastgan serves now. ``skipped``: :class:`Skipped`
    (name, kind, why). ``verified``: what the probe found, one line; "" without ``verify=True``.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    verified: str = ""

    def __str__(self) -> str:
        lines = []
        if self.replaced:
            lines += table(("replaced", "where", "by"), _grouped(self.replaced))
        else:
            lines.append("nothing replaced")
        if self.skipped:
            lines += ["", *table(("left", "where", "why"), _grouped(self.skipped))]
        if self.verified:
            lines += ["", self.verified]
        return "\n".join(lines)
