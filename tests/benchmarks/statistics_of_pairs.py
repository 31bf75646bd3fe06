"""Mean and 95 % interval of paired differences, for the benchmarks beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# Student's t, two-sided 95 %, by degrees of freedom (any statistics table).
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> str:
    """Return "mean [low, high]" of ``values``, at least two of them, by Student's t."""
    mean = statistics.fmean(values)
    t = T_975[len(values) - 2] if len(values) < len(T_975) + 2 else 1.96
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
