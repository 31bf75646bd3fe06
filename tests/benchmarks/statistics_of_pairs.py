"""Mean and 95 % interval of paired differences, for the benchmarks beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# Student's t, two-sided 95 %, by degrees of freedom (any statistics table).
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def interval(values: Sequence[float]) -> str:
    """Return "mean [low, high]" of ``values``, at least two of them, by Student's t."""
    mean = statistics.fmean(values)
    free = len(values) - 1
    t = T_975[free - 1] if free <= len(T_975) else 1.960 + 2.372 / free  # the next term of its expansion
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
