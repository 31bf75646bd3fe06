"""How sure a count of trials makes one, for the benchmarks beside it."""

from __future__ import annotations

Z_975 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's score (Wilson 1927): fit for shares near 0 and 1."""
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_975**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_975 / (1 + z2 / trials) * (share * (1 - share) / trials + z2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def counted(successes: int, trials: int) -> str:
    """Return "95 of 100 (88.8 to 97.8 %)"."""
    low, high = wilson(successes, trials)
    return f"{successes} of {trials} ({100 * low:.1f} to {100 * high:.1f} %)"
