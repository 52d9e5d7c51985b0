"""What was done to a model, as data and as a table of plain text."""

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


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of columns, the last of which may be of any width."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in [headings, *rows]
    ]
    return [lines[0], "  ".join(["-" * width for width in widths] + ["-" * len(headings[-1])]), *lines[1:]]


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
