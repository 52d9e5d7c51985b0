"""How a profile is shown: as text and as a page, both from its plain data."""

from fastgan import html
from fastgan.tables import duration, render, size, spread


def _head(data: dict) -> list[str]:
    machine, times = data["machine"], data["seconds"]
    count = data["iterations"]
    lines = [
        f"An iteration takes {spread(times)}, {count['untraced']} timed without tracing; with tracing "
        f"{duration(data['traced_seconds'])}, {count['traced']} traced: parts are shares of that.",
        f"{machine['processor']}, {machine['threads']} threads, GPU {machine['gpu']}, torch {machine['torch']}, "
        f"allocator {machine['allocator']}.",
    ]
    for n in data["networks"]:
        lines.append(
            f"{n['role']}: {n['name']} ({n['class']}, {n['parameters']:,} parameters), {n['calls']:g} calls with gradients an "
            f"iteration"
            + (f", {n['penalised_calls']} of {n['calls_in_update']} in an update penalised" * bool(n["penalised_calls"]))
        )
    standing = ", ".join(f"{name} {size(value)}" for name, value in data["standing_bytes"].items())
    lines.append(f"Peak of what the iterations allocated: {size(data['peak_bytes'])}; beside it {standing}.")
    return lines


def _parts(data: dict) -> tuple[list[str], list[list[str]]]:
    on_gpu = any(p["device_seconds"] for p in data["parts"])
    headings = ["part", "time", "share", *(["GPU time"] if on_gpu else []), "alive at the peak", "allocated"]
    rows = []
    for p in data["parts"]:
        row = [p["name"], duration(p["seconds"]), f"{p['share']:.1%}"]
        row += [duration(p["device_seconds"])] if on_gpu else []
        rows.append([*row, size(p["bytes_at_peak"]), size(p["bytes_allocated"])])
    return headings, rows


def _gains(data: dict) -> tuple[list[str], list[list[str]]]:
    headings = ["what fastgan would do", "plain", "fastgan", "speed-up", "peak", "an iteration saves", "note"]
    rows = []
    for g in data["gains"]:
        if g["speedup"]:
            times = [spread(g["seconds"][name]) for name in ("plain", "fastgan")]
            faster = spread(g["speedup"], lambda value: f"{value:.2f}x")
            faster += " no more than the spread" * (g["speedup"]["low"] <= 1 <= g["speedup"]["high"])
            peak = " / ".join(size(g["peak_bytes"][name]) for name in ("plain", "fastgan"))
            saved = f"{g['saved_seconds'] * 1e3:.3g} ms" if g["per_iteration"] else ""
        else:
            times, faster, peak, saved = ["", ""], "", "", ""
        replaced = "; ".join(g["replaced"][:3]) + (f"; {len(g['replaced'])} in all" if len(g["replaced"]) > 3 else "")
        rows.append([g["what"], *times, faster, peak, saved, g["note"] or replaced])
    return headings, rows


def text(data: dict) -> str:
    lines = [*_head(data), render("Parts of an iteration", *_parts(data))]
    if data["gains"]:
        lines += ["What fastgan would replace, measured on the captured calls:"]
        for what, plain, ours, faster, peak, saved, note in _gains(data)[1]:
            measured = f"{faster}, {plain} becomes {ours}, peak {peak}" + f", saves {saved} an iteration" * bool(saved)
            lines.append(f"  {what}: " + "; ".join(filter(None, (measured if faster else "", note))))
    if data["gains_note"]:
        lines.append(data["gains_note"])
    return "\n".join(lines)


def page(data: dict) -> str:
    parts = data["parts"]
    body = [html.text(line) for line in _head(data)]
    shown = [
        html.bars("Time of an iteration", {p["name"]: p["seconds"] for p in parts}, duration),
        html.bars("Memory alive at the peak, by what allocated it", {p["name"]: p["bytes_at_peak"] for p in parts}, size),
    ]
    faster = {f"{g['network']}: {g['what']}": g["speedup"]["median"] for g in data["gains"] if g["speedup"]}
    if faster:
        shown.append(html.bars("Times faster with fastgan", faster, lambda value: f"{value:.2f}x", mark=1.0))
    body += [html.charts(*shown), html.heading("Parts of an iteration"), html.table(*_parts(data))]
    if data["gains"]:
        body += [html.heading("What fastgan would replace, measured on the captured calls"), html.table(*_gains(data))]
    if data["gains_note"]:
        body.append(html.text(data["gains_note"]))
    return html.page("Profile of a training loop", *body)
