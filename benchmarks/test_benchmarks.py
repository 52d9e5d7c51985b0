"""Every case under pytest-benchmark: its statistics are fastgan's own time, the comparison goes into ``extra_info``."""

import pytest

from benchmarks import (
    accelerate,
    critic_step,
    gradient_penalty,
    minibatch_discrimination,
    minibatch_stddev,
    nearest_distances,
    pairwise_kernel_sum,
    spectral_norm,
)
from benchmarks.case import OURS, run

CASES = [
    *minibatch_discrimination.CASES,
    *minibatch_stddev.CASES,
    *nearest_distances.CASES,
    *pairwise_kernel_sum.CASES,
    *critic_step.CASES,
    *accelerate.CASES,
    *gradient_penalty.CASES,
    *spectral_norm.CASES,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_speed(benchmark, case, pytestconfig):
    seconds = float(pytestconfig.getoption("--seconds"))
    benchmark.extra_info.update(run(case, seconds))
    benchmark.pedantic(case.candidates()[OURS], rounds=5, warmup_rounds=1)
