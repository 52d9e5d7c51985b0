"""Benchmarks: fastgan against the best a user could do instead. ``make bench`` or ``python -m benchmarks --help``."""
