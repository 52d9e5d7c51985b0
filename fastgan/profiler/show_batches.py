"""How a sweep over batch sizes is shown: as text and as a page, both from its plain data."""

from fastgan import html
from fastgan.tables import duration, render, size, spread


def _head(data: dict) -> list[str]:
    machine = data["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, GPU {machine['gpu']}, torch {machine['torch']}, allocator "
        f"{machine['allocator']}; a step may take {size(data['memory'])}.",
    ]
    for name, points in data["points"].items():
        if name not in data["largest"]:
            lines.append(f"{name}: nothing could be measured: {points[-1]['status']}: {points[-1].get('message', '')}")
            continue
        end = points[-1]
        why = "" if end["status"] == "measured" else f"; {end['batch']}: {end['status']} ({end.get('message', '')})"
        lines.append(
            f"{name}: largest batch {data['largest'][name]}{why}. Knee (90 % of the highest throughput): {data['knee'][name]}."
        )
    return lines + data["notes"]


def _points(data: dict) -> tuple[list[str], list[list[str]]]:
    headings = ["batch", "form", "a step", "samples/s", "a sample", "peak"]
    rows = []
    for name, points in data["points"].items():
        for p in points:
            if p["status"] == "measured":
                values = [spread(p["seconds"]), f"{p['throughput']:.4g}", duration(p["per_sample"]), size(p["peak_bytes"])]
            else:
                values = [p["status"], "", "", ""]
            rows.append([str(p["batch"]), name, *values])
    return headings, sorted(rows, key=lambda row: int(row[0]))


def _exponents(data: dict) -> tuple[list[str], list[list[str]]]:
    names = list(data["exponents"])
    parts = list(dict.fromkeys(part for fits in data["exponents"].values() for part in fits))
    rows = [
        [part, *(f"{data['exponents'][n][part]:.2f}" if part in data["exponents"][n] else "" for n in names)] for part in parts
    ]
    return ["time grows as batch to the power of", *names], rows


def _advice(data: dict) -> tuple[list[str], list[list[str]]]:
    rows = []
    for a in data["advice"]:
        faster = f"{a['speedup']:.2f}x" if "speedup" in a else ""
        memory = f"{a['memory']:.2f}x" if a.get("memory") is not None else ""
        rows.append([a["what"], str(a["batch"]), faster, memory, a.get("note", "")])
    return ["what could be done", "at batch", "speed-up", "peak memory", "note"], rows


def text(data: dict) -> str:
    lines = [*_head(data), render("Batch sizes", *_points(data))]
    if any(data["exponents"].values()):
        lines.append(render("", *_exponents(data)))
    for what, batch, faster, memory, note in _advice(data)[1]:
        effect = f"{faster} the speed, {memory or 'unknown'} the peak memory at batch {batch}" if faster else ""
        lines.append(f"{what}: " + "; ".join(filter(None, (effect, note))))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value / 1000:.3g}k"


def page(data: dict) -> str:
    done = {name: [p for p in points if p["status"] == "measured"] for name, points in data["points"].items()}
    done = {name: points for name, points in done.items() if points}
    at: dict[int, list[str]] = {}
    for name, batch in data["knee"].items():
        at.setdefault(batch, []).append(name)
    knees = {"knee " + ", ".join(names): batch for batch, names in at.items()}

    def curve(title, pick, label, form, marks=None):
        return html.lines(
            title, {n: [(p["batch"], pick(p)) for p in ps] for n, ps in done.items()}, "batch size", label, form, marks
        )

    shown = [
        curve("Throughput", lambda p: p["throughput"], "samples a second", _short, knees),
        curve("Peak memory of a step", lambda p: p["peak_bytes"], "bytes", size),
        curve("Time of a sample", lambda p: p["per_sample"], "seconds a sample", duration),
    ]
    for name, points in done.items():
        parts = list(points[-1]["parts"])
        series = {part: [(p["batch"], p["parts"].get(part, 0.0)) for p in points] for part in parts}
        shown.append(html.lines(f"Time of each part, {name}", series, "batch size", "seconds", duration))
    body = [*map(html.text, _head(data)), html.charts(*shown), html.heading("Batch sizes"), html.table(*_points(data))]
    if any(data["exponents"].values()):
        body += [html.heading("How each part grows"), html.table(*_exponents(data))]
    if data["advice"]:
        body += [html.heading("What could be done, measured"), html.table(*_advice(data))]
    return html.page("Batch sizes of a training step", *body)
