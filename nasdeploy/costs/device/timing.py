"""The clock around a run: warm-up, turns in random order, statistics. Needs only numpy, and Python 3.8 or newer.

Beside the wall clock stands the calling thread's CPU time; it does not grow while a rival holds the core.
Where a session has several threads the caller works too and waits busily for the others, so its CPU time
is still that of a run (that of all threads together is not: idle ones sleep, or spin between the runs).
"""

from __future__ import annotations

import time
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

WARM_UP_GROUP = 10
WARM_UP_TOLERANCE = 0.02
WARM_UP_MAX_GROUPS = 20
# After another model's turn the caches hold that model's data: the first runs of a turn are not counted.
SETTLING_RUNS = 2
SETTLING_LIMIT_MS = 100.0  # beside a longer run that is nothing
# The fewest independent runs that bound a percentile at 95 % confidence: 1 - 0.9**29 and so on.
RUNS_FOR_PERCENTILE = {50: 5, 90: 29, 95: 59, 99: 299}
MIN_RUNS = RUNS_FOR_PERCENTILE[50]

if TYPE_CHECKING:  # subscripting these classes fails before Python 3.9
    from collections.abc import Callable, Sequence

    Run = Callable[[], object]
    Clock = Callable[[], int]


class Clocks(NamedTuple):
    """Two clocks in nanoseconds: of the wall, and of the calling thread's CPU time."""

    wall_ns: Clock
    cpu_ns: Clock


SYSTEM_CLOCKS = Clocks(time.perf_counter_ns, time.thread_time_ns)


class Plan(NamedTuple):
    """How long each model is measured. Runs come in ``rounds`` turns."""

    rounds: int
    min_runs: int
    min_seconds: float
    max_seconds: float


def clocks_of(provider: str) -> Clocks:
    """Return the clocks of a provider: beside an accelerator the thread only waits, so only wall time counts."""
    if provider == "CPUExecutionProvider":
        return SYSTEM_CLOCKS
    return Clocks(SYSTEM_CLOCKS.wall_ns, SYSTEM_CLOCKS.wall_ns)


class Times(NamedTuple):
    """Wall and CPU time of each run in ms, both of shape (n,)."""

    wall_ms: np.ndarray
    cpu_ms: np.ndarray


def time_runs(run: Run, count: int, clocks: Clocks) -> Times:
    """Call ``run`` ``count`` times and return the time of each call."""
    wall = np.empty(count, dtype=np.int64)
    cpu = np.empty(count, dtype=np.int64)
    wall_ns, cpu_ns = clocks.wall_ns, clocks.cpu_ns
    for n in range(count):
        cpu_start, wall_start = cpu_ns(), wall_ns()
        run()
        wall_end, cpu_end = wall_ns(), cpu_ns()
        wall[n], cpu[n] = wall_end - wall_start, cpu_end - cpu_start
    return Times(wall / 1e6, cpu / 1e6)


def clock_cost(clocks: Clocks) -> tuple[float, float]:
    """Return what reading the clocks adds to the wall and the CPU time of a run, in ms.

    The CPU clock is a system call: half a microsecond, 3 % of a network that takes 16.
    """
    times = time_runs(lambda: None, 1000, clocks)
    return float(np.median(times.wall_ms)), float(np.median(times.cpu_ms))


def warm_up(run: Run, clocks: Clocks, max_seconds: float) -> float:
    """Run until the median CPU time of ten runs moves by less than 2 %; return a run's mean wall time in ms.

    Stops after 200 runs or ``max_seconds`` at the latest, but not before ten runs; a model that needs longer than
    ``max_seconds`` for those is taken as warm after that time.
    """
    spent_ms = 0.0
    before = float("inf")
    for _ in range(WARM_UP_MAX_GROUPS):
        times = _time_group(run, clocks, 1e3 * max_seconds)
        median = float(np.median(times.cpu_ms))
        spent_ms += float(times.wall_ms.sum())
        if abs(median - before) < WARM_UP_TOLERANCE * before or spent_ms >= 1e3 * max_seconds:
            break
        before = median
    return float(times.wall_ms.mean())


def _time_group(run: Run, clocks: Clocks, limit_ms: float) -> Times:
    """Time ten runs, or as many as ``limit_ms`` allow."""
    parts: list[Times] = []
    while len(parts) < WARM_UP_GROUP and sum(float(part.wall_ms[0]) for part in parts) < limit_ms:
        parts.append(time_runs(run, 1, clocks))
    return Times(
        np.concatenate([part.wall_ms for part in parts]), np.concatenate([part.cpu_ms for part in parts])
    )


def runs_per_turn(plan: Plan, run_ms: float) -> int:
    """Return how many runs a turn needs so that all turns together fulfil ``plan``; at least one."""
    run_ms = max(run_ms, 1e-6)
    wanted = max(plan.min_runs, plan.min_seconds * 1e3 / run_ms)
    affordable = plan.max_seconds * 1e3 / run_ms
    return max(1, int(np.ceil(max(min(wanted, affordable), MIN_RUNS) / plan.rounds)))


def measure_in_turns(runs: Sequence[Run], plan: Plan, clocks: Clocks, rng: Random) -> list[Times]:
    """Warm every model up, then measure them in rounds of random order; return the times of each.

    A model that has used up its ``max_seconds`` (a rival came) sits out the rounds that are left, unless it has
    too few runs for a median.
    """
    run_ms = [warm_up(run, clocks, plan.max_seconds) for run in runs]
    counts = [runs_per_turn(plan, ms) for ms in run_ms]
    parts: list[list[Times]] = [[] for _ in runs]
    spent_ms = [0.0] * len(runs)
    for _ in range(plan.rounds):
        for m in rng.sample(range(len(runs)), len(runs)):
            if spent_ms[m] < 1e3 * plan.max_seconds or sum(len(p.wall_ms) for p in parts[m]) < MIN_RUNS:
                if run_ms[m] < SETTLING_LIMIT_MS:
                    time_runs(runs[m], SETTLING_RUNS, clocks)
                parts[m].append(time_runs(runs[m], counts[m], clocks))
                spent_ms[m] += float(parts[m][-1].wall_ms.sum())
    wall_cost, cpu_cost = clock_cost(clocks)
    return [
        Times(
            np.concatenate([p.wall_ms for p in part]) - wall_cost,
            np.concatenate([p.cpu_ms for p in part]) - cpu_cost,
        )
        for part in parts
    ]


def percentiles(values: np.ndarray) -> dict[str, float | None]:
    """Return the percentiles of ``values`` (n,); None for one that n runs cannot support."""
    return {
        f"p{q}": float(np.percentile(values, q)) if len(values) >= needed else None
        for q, needed in RUNS_FOR_PERCENTILE.items()
    }


def statistics(times: Times) -> dict[str, Any]:
    """Return the statistics of one model in one process, in ms."""
    return {
        "n": len(times.wall_ms),
        "min_ms": float(times.wall_ms.min()),
        "mean_ms": float(times.wall_ms.mean()),
        "wall_ms": percentiles(times.wall_ms),
        "cpu_ms": percentiles(times.cpu_ms),
        # What the model takes when nothing disturbs it: the best statistic for comparing models.
        "cpu_p25_ms": float(np.percentile(times.cpu_ms, 25)),
        "wall_over_cpu": float(times.wall_ms.sum() / max(times.cpu_ms.sum(), 1e-9)),
    }
