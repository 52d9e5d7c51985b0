"""Self-contained HTML reports: text, tables and charts as inline SVG. No script, no external resource; opens offline."""

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0b7a75", "#d1495b", "#edae49", "#3d5a80", "#7b5ea7", "#5f9e3f", "#c8702a", "#4aa3c7", "#8a8a8a", "#b0578d")
_WIDTH, _ROW, _LABEL = 400, 26, 148  # of a chart's own coordinates: about CSS pixels on a phone
_SHORT = 20  # characters of a name that stands beside its bar
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2327;--soft:#5c6670;--line:#d9dee2;--paper:#fff;--panel:#f6f8f9}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebed;--soft:#a4adb5;--line:#3a4248;--paper:#15191c;--panel:#1d2226}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:16px;overflow-wrap:anywhere}h1{font-size:1.5rem;margin:.4em 0}
h2{font-size:1.15rem;margin:1.6em 0 .4em}p{margin:.4em 0;max-width:75ch}.soft{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}
figure{margin:0;padding:12px;background:var(--panel);border:1px solid var(--line);border-radius:8px;min-width:0}
figcaption{font-weight:600;margin-bottom:6px}
svg{display:block;width:100%;max-width:560px;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)}svg .soft{fill:var(--soft)}svg .grid{stroke:var(--line)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left}td.long{white-space:normal;text-align:left;min-width:14em}
"""


def text(value) -> str:
    """A paragraph."""
    return f"<p>{escape(str(value))}</p>"


def table(headings: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Scrolls sideways by itself where it is wider than the page. Cells of more than 40 characters wrap."""

    def cell(value, first):
        value = str(value)
        return f"<td{' class=long' if len(value) > 40 and not first else ''}>{escape(value)}</td>"

    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(cell(v, i == 0) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def charts(*figures: str) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _svg(height: float, body: Sequence[str], title: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title, quote=True)}">{"".join(body)}</svg>'


def _text(x, y, value, anchor="start", soft=False) -> str:
    style = ' class="soft"' if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(str(value))}</text>'


def _cut(label: str, room: int) -> str:
    return label if len(label) <= room else label[: room - 1] + "…"


def _legend(names: Sequence[str], y: float) -> tuple[list[str], float]:
    """Marks and names in as many lines as they take; the height they end at."""
    body, x = [], 4.0
    for i, name in enumerate(names):
        width = 24 + 6.6 * len(name)
        if x > 4 and x + width > _WIDTH:
            x, y = 4.0, y + 18
        body += [f'<rect x="{x:.1f}" y="{y:.1f}" width="10" height="10" rx="2" fill="{COLOURS[i % len(COLOURS)]}"/>']
        body += [_text(x + 14, y + 10, name)]
        x += width
    return body, y + 22


def bars(title: str, values: Mapping[str, float], form=lambda value: f"{value:g}", mark: float | None = None) -> str:
    """One horizontal bar per entry, its value behind it; ``mark``: a line at this value. Long names stand above their bars."""
    above = any(len(name) > _SHORT for name in values)
    left, row, down = (4, _ROW + 16, 16) if above else (_LABEL, _ROW, 0)
    room = _WIDTH - left - 84
    most = max([*values.values(), mark or 0.0, 1e-30])
    body = []
    for i, (name, value) in enumerate(values.items()):
        y, width = i * row, max(0.5, room * max(value, 0.0) / most)
        label = _text(left, y + 14, _cut(name, 60)) if above else _text(left - 6, y + 17, name, "end")
        body += [
            f"<g><title>{escape(name)}</title>{label}</g>",
            f'<rect x="{left}" y="{y + down + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2" fill="{COLOURS[0]}"/>',
            _text(left + width + 5, y + down + 17, form(value)),
        ]
        if mark is not None:  # not through the names
            x = left + room * mark / most
            body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + down}" y2="{y + row}" stroke="currentColor"/>')
    return figure(title, _svg(max(1, len(values)) * row + 4, body, title))


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    form=lambda value: f"{value:g}",
    marks: Mapping[str, float] | None = None,
) -> str:
    """Curves over two logarithmic axes; points that are not positive are left out. ``marks``: name -> x of a dashed line."""
    points = {name: [(x, y) for x, y in values if x > 0 and y > 0] for name, values in series.items()}
    every = [p for values in points.values() for p in values]
    if not every:
        return figure(title, _svg(30, [_text(4, 18, "nothing was measured", soft=True)], title))
    left, right, top, bottom = 64, _WIDTH - 22, 24, 230
    lo_x, hi_x = (f(math.log10(x) for x, _ in every) for f in (min, max))
    lo_y, hi_y = (f(math.log10(y) for _, y in every) for f in (min, max))
    hi_x, lo_y, hi_y = max(hi_x, lo_x + 0.1), lo_y - 0.05, max(hi_y + 0.05, lo_y + 0.2)

    def place(x, y):
        across = left + (right - left) * (math.log10(x) - lo_x) / (hi_x - lo_x)
        return across, bottom - (bottom - top) * (math.log10(y) - lo_y) / (hi_y - lo_y)

    body = [_text(4, 12, y_label, soft=True), _text(right, bottom + 34, x_label, "end", soft=True)]
    for step in range(4):
        value = 10 ** (lo_y + (hi_y - lo_y) * step / 3)
        y = place(10**lo_x, value)[1]
        body += [f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>']
        body += [_text(left - 5, y + 4, form(value), "end", soft=True)]
    ticks = sorted({x for x, _ in every})
    for x in ticks[:: max(1, math.ceil(len(ticks) / 7))]:
        body.append(_text(place(x, 10**lo_y)[0], bottom + 17, f"{x:g}", "middle", soft=True))
    for x in (marks or {}).values():
        if lo_x <= math.log10(x) <= hi_x:
            at = place(x, 10**lo_y)[0]
            body += [
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}" stroke="currentColor" stroke-dasharray="3 3"/>'
            ]
    for i, values in enumerate(points.values()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in values))
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in (place(x, y) for x, y in values)]
    legend, height = _legend(list(points), bottom + 44)
    for name, x in (marks or {}).items():  # below, where names of lines close together don't cover each other
        legend, height = [*legend, _text(4, height + 10, f"dashed: {name}, {x:g}", soft=True)], height + 18
    return figure(title, _svg(height, body + legend, title))


def page(title: str, *body: str) -> str:
    """A whole document of paragraphs, tables and charts."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f"{''.join(body)}</main></body></html>\n"
    )


def heading(value: str) -> str:
    return f"<h2>{escape(value)}</h2>"
