"""What an audit returns."""

from typing import NamedTuple

from fastgan.dropin.report import table


class Finding(NamedTuple):
    """``what``: the trap; ``where``: module or "penalty"; ``why``: what it does to training; ``way_out``: what to do."""

    what: str
    where: str
    why: str
    way_out: str


class Findings(list):
    """A list of :class:`Finding` that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing found"
        return "\n".join(table(("what", "where", "why it matters", "way out"), [tuple(f) for f in self]))
