"""``python -m benchmarks.readme``: write the README's table from benchmarks/results, so that no figure is typed by hand."""

import json
from pathlib import Path

from .case import OURS, mode_of

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def _key(row: dict) -> tuple:
    return row["op"], row["shape"], row["mode"], row.get("kind")


def section(name: str, results: dict) -> list[str]:
    machine = results["tuned"]["machine"]
    lines = [
        f"{machine['processor']}, {machine['instructions']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"times in ms, allocator tuned / default (–: not measured; `benchmarks/results/{name}`).",
        "",
        "| operator | shape | mode | fastgan | best alternative | speed-up | over the others | peak MiB, fastgan / best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    defaults = {_key(row): row for row in results["default"]["cases"]}
    for tuned in results["tuned"]["cases"]:
        rows = (tuned, defaults.get(_key(tuned)))
        best, fastest = tuned["best"], [row.get("ours", OURS) for row in rows if row]

        def both(pick, form, rows=rows):
            return " / ".join(form.format(pick(row)) if row else "–" for row in rows)

        ours = both(lambda row: row["seconds"][row.get("ours", OURS)]["median"] * 1e3, "{:.2f}")
        ours += "".join(dict.fromkeys(name.removeprefix(OURS) for name in fastest))
        theirs = both(lambda row, best=best: row["seconds"][best]["median"] * 1e3, "{:.2f}")
        gain = both(lambda row, best=best: row["speedup"][best]["median"], "{:.1f}x")
        others = ", ".join(
            f"{other} " + both(lambda row, other=other: row["speedup"][other]["median"], "{:.1f}x")
            for other in tuned["speedup"]
            if other != best
        )
        memory = " / ".join("?" if (b := tuned["peak_bytes"][n]) is None else f"{b / 2**20:.0f}" for n in (fastest[0], best))
        lines.append(
            f"| {tuned['op']} | {tuned['shape']} | {mode_of(tuned)} | {ours} | {best} {theirs} | {gain} | {others} | {memory} |"
        )
    return lines


def main() -> None:
    lines = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        lines += ["", *section(path.name, json.loads(path.read_text()))]
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(before + BEGIN + "\n".join(lines) + "\n\n" + END + after)


if __name__ == "__main__":
    main()
