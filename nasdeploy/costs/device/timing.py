"""The clock around a run: warm-up, turns in random order, statistics. Needs only numpy, and Python 3.8 or newer.

Beside the wall clock stands the calling thread's CPU time; it does not grow while a rival holds the core. Linux
gives the core away where a thread calls the kernel, and with short runs that is nearly always where the CPU clock is
read, between two runs: rivals are looked for in a time that includes both readings.
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
    Sleep = Callable[[float], None]


class Clocks(NamedTuple):
    """Two clocks in nanoseconds, of the wall and of the calling thread's CPU time; and how to sleep, in seconds."""

    wall_ns: Clock
    cpu_ns: Clock
    sleep: Sleep = time.sleep


SYSTEM_CLOCKS = Clocks(time.perf_counter_ns, time.thread_time_ns)


class Plan(NamedTuple):
    """How long each model is measured. Runs come in ``rounds`` turns.

    interval_s: a run begins every so often and the process sleeps between them; 0: one right after the other.
    """

    rounds: int
    min_runs: int
    min_seconds: float
    max_seconds: float
    interval_s: float = 0.0


def clocks_of(provider: str) -> Clocks:
    """Return the clocks of a provider: beside an accelerator the thread only waits, so only wall time counts."""
    if provider == "CPUExecutionProvider":
        return SYSTEM_CLOCKS
    return Clocks(SYSTEM_CLOCKS.wall_ns, SYSTEM_CLOCKS.wall_ns)


class Times(NamedTuple):
    """Wall and CPU time of each run in ms, all of shape (n,).

    whole_ms: wall time from before the first to after the last reading of the CPU clock.
    """

    wall_ms: np.ndarray
    cpu_ms: np.ndarray
    whole_ms: np.ndarray


def time_runs(run: Run, count: int, clocks: Clocks, interval_s: float = 0.0) -> Times:
    """Call ``run`` ``count`` times and return the time of each call.

    interval_s: sleep before each call until it is so long since the last one began. A call that takes longer
    delays the next one, which then begins at once, as with a camera that waits for its reader.
    """
    wall, cpu, whole = (np.empty(count, dtype=np.int64) for _ in range(3))
    wall_ns, cpu_ns = clocks.wall_ns, clocks.cpu_ns
    due = wall_ns() + round(interval_s * 1e9)
    for n in range(count):
        if interval_s > 0.0:
            due = _sleep_until(due, clocks) + round(interval_s * 1e9)
        begun, cpu_start, wall_start = wall_ns(), cpu_ns(), wall_ns()
        run()
        wall_end, cpu_end, ended = wall_ns(), cpu_ns(), wall_ns()
        wall[n], cpu[n], whole[n] = wall_end - wall_start, cpu_end - cpu_start, ended - begun
    return Times(wall / 1e6, cpu / 1e6, whole / 1e6)


def _joined(parts: Sequence[Times]) -> Times:
    return Times(
        np.concatenate([part.wall_ms for part in parts]),
        np.concatenate([part.cpu_ms for part in parts]),
        np.concatenate([part.whole_ms for part in parts]),
    )


def _sleep_until(due_ns: int, clocks: Clocks) -> int:
    """Sleep until ``due_ns``, if that is still to come, and return the time."""
    while (now := clocks.wall_ns()) < due_ns:
        clocks.sleep((due_ns - now) / 1e9)
    return now


def _less(times: Times, cost: Times) -> Times:
    return Times(times.wall_ms - cost.wall_ms, times.cpu_ms - cost.cpu_ms, times.whole_ms - cost.whole_ms)


def clock_cost(clocks: Clocks) -> Times:
    """Return what reading the clocks adds to each time of a run, in ms.

    The CPU clock is a system call: half a microsecond, 3 % of a network that takes 16.
    """
    times = time_runs(lambda: None, 1000, clocks)
    return Times(np.median(times.wall_ms), np.median(times.cpu_ms), np.median(times.whole_ms))


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
    return _joined(parts)


def runs_per_turn(plan: Plan, run_ms: float) -> int:
    """Return how many runs a turn needs so that all turns together fulfil ``plan``; at least one."""
    run_ms = max(run_ms, 1e3 * plan.interval_s, 1e-6)
    wanted = max(plan.min_runs, plan.min_seconds * 1e3 / run_ms)
    affordable = plan.max_seconds * 1e3 / run_ms
    return max(1, int(np.ceil(max(min(wanted, affordable), MIN_RUNS) / plan.rounds)))


def measure_in_turns(
    runs: Sequence[Run], plan: Plan, clocks: Clocks, rng: Random, intervals_s: Sequence[float] | None = None
) -> list[Times]:
    """Warm every model up without a pause, then measure them in rounds of random order; return the times of each.

    A model that has used up its ``max_seconds`` (a rival came) sits out the rounds that are left, unless it has
    too few runs for a median. intervals_s: of each model, in place of the plan's.
    """
    run_ms = [warm_up(run, clocks, plan.max_seconds) for run in runs]
    intervals = [plan.interval_s] * len(runs) if intervals_s is None else intervals_s
    counts = [runs_per_turn(plan._replace(interval_s=intervals[m]), ms) for m, ms in enumerate(run_ms)]
    parts: list[list[Times]] = [[] for _ in runs]
    spent_ms = [0.0] * len(runs)
    for _ in range(plan.rounds):
        for m in rng.sample(range(len(runs)), len(runs)):
            if spent_ms[m] < 1e3 * plan.max_seconds or sum(len(p.wall_ms) for p in parts[m]) < MIN_RUNS:
                if run_ms[m] < SETTLING_LIMIT_MS:
                    time_runs(runs[m], SETTLING_RUNS, clocks)
                parts[m].append(time_runs(runs[m], counts[m], clocks, intervals[m]))
                spent_ms[m] += float(np.maximum(parts[m][-1].whole_ms, 1e3 * intervals[m]).sum())
    cost = clock_cost(clocks)
    return [_less(_joined(part), cost) for part in parts]


def percentiles(values: np.ndarray) -> dict[str, float | None]:
    """Return the percentiles of ``values`` (n,); None for one that n runs cannot support."""
    return {
        f"p{q}": float(np.percentile(values, q)) if len(values) >= needed else None
        for q, needed in RUNS_FOR_PERCENTILE.items()
    }


def statistics(times: Times, interval_s: float = 0.0) -> dict[str, Any]:
    """Return the statistics of one model in one process, in ms. interval_s: what a run must not exceed; 0: none."""
    late = times.wall_ms > 1e3 * interval_s
    return {
        "n": len(times.wall_ms),
        "late": int(late.sum()) if interval_s > 0.0 else 0,
        "min_ms": float(times.wall_ms.min()),
        "mean_ms": float(times.wall_ms.mean()),
        "wall_ms": percentiles(times.wall_ms),
        "cpu_ms": percentiles(times.cpu_ms),
        # What the model takes when nothing disturbs it: the best statistic for comparing models.
        "cpu_p25_ms": float(np.percentile(times.cpu_ms, 25)),
        "wall_over_cpu": float(times.whole_ms.sum() / max(times.cpu_ms.sum(), 1e-9)),
    }
