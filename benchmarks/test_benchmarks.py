"""Every case under pytest-benchmark: its statistics are fastgan's own time, the comparison goes into ``extra_info``."""

import pytest

from . import every_case
from .case import OURS, run

CASES = every_case()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_speed(benchmark, case, pytestconfig):
    seconds = float(pytestconfig.getoption("--seconds"))
    benchmark.extra_info.update(run(case, seconds))
    benchmark.pedantic(case.candidates()[OURS], rounds=5, warmup_rounds=1)
