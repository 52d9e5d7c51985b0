"""Tables in the terminal: by rich where it is installed, else as plain text."""

from collections.abc import Sequence


def render(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """The table as text; the first column is aligned left, the others right."""
    rows = [[str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _plain(title, headings, rows)
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(headings):
        shown.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console(width=width) if width else Console()
    if not console.is_terminal and width is None:
        console = Console(width=120)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().rstrip("\n")


def _plain(title, headings, rows) -> str:
    widths = [max(len(row[i]) for row in [list(headings), *rows]) for i in range(len(headings))]
    lines = [title] if title else []
    for row in [list(headings), ["-" * w for w in widths], *rows]:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.3g} GiB"


def spread(values: dict, form=duration) -> str:
    """Median and quartiles."""
    return f"{form(values['median'])} ({form(values['low'])} to {form(values['high'])})"
