"""How results of benchmarks are shown."""

import torch

from benchmarks import read_rows, readme
from benchmarks.case import OURS, STREAM, Case, run


def test_a_case_that_reads_memory_is_shown_with_its_rate():
    x = torch.ones(1 << 12)
    candidates = {OURS: lambda: (x.sum(),), "slow": lambda: (sum(part.sum() for part in x.split(8)),)}
    case = Case("sum", "4096", "forward", lambda: candidates, lambda: (torch.tensor(4096.0).double(),), reads=1 << 14)
    row = run(case, 0.01)
    assert set(row["speedup"]) == {"slow"} and row["speedup"]["slow"]["median"] > 1
    assert row["bytes_per_second"][OURS] == (1 << 14) / row["seconds"][OURS]["median"]
    row["bytes_per_second"] = {OURS: 27.4e9, STREAM: 30.2e9}
    machine = {"processor": "P", "instructions": "I", "threads": 1, "torch": "2"}
    results = {which: {"machine": machine, "cases": [row]} for which in ("tuned", "default")}
    assert "| sum | 4096 | forward (27 of 30 GB/s) |" in readme.section("x.json", results)[-1]
    assert (
        "| sum | 4096 | forward |"
        in readme.section("x.json", {k: v | {"cases": [row | {"bytes_per_second": {}}]} for k, v in results.items()})[-1]
    )


def test_results_that_were_cut_off_can_be_read(tmp_path):
    assert read_rows(tmp_path / "rows") == []
    (tmp_path / "rows").write_text('{"op": "a"}\n{"op": "b"}\n{"op": "c')
    assert [row["op"] for row in read_rows(tmp_path / "rows")] == ["a", "b"]
