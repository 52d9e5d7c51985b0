"""Every case under pytest-benchmark: its statistics are fastgan's own time, the comparison goes into ``extra_info``."""

import json
from pathlib import Path

import pytest

from . import every_case, read_rows
from .case import OURS, id_of, run

CASES = every_case()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_speed(benchmark, case, pytestconfig):
    seconds, rows = float(pytestconfig.getoption("--seconds")), pytestconfig.getoption("--rows")
    if rows and case.id in map(id_of, read_rows(Path(rows))):
        pytest.skip("measured already")
    row = run(case, seconds)
    if rows:
        with open(rows, "a") as file:
            file.write(json.dumps(row) + "\n")
    benchmark.extra_info.update(row)
    benchmark.pedantic(case.candidates()[OURS], rounds=5, warmup_rounds=1)
