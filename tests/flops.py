"""Counting arithmetic: shared with the benchmarks."""

from benchmarks.flops import FlopCounter as FlopCounter
from benchmarks.flops import flops as flops
