"""The protocol against a fake clock that drifts, jumps and loses its core, and its statistics against exact values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from random import Random

import numpy as np
import pytest

from nasdeploy.costs.certification import MIN_BLOCKS, check_cap, is_unstable
from nasdeploy.costs.comparison import relative
from nasdeploy.costs.device.timing import (
    MIN_RUNS,
    RUNS_FOR_PERCENTILE,
    SETTLING_RUNS,
    WARM_UP_GROUP,
    Clocks,
    Plan,
    Times,
    measure_in_turns,
    percentiles,
    statistics,
    time_runs,
    warm_up,
)
from nasdeploy.costs.latency import (
    CONTENDED_RATIO,
    BlockStats,
    ModelLatency,
    block_ratios,
    collect,
    noise_floor,
)
from nasdeploy.costs.sessions import Answers
from nasdeploy.profiles import Runtime

NS = 1_000_000  # a millisecond
LONG = Plan(rounds=40, min_runs=800, min_seconds=0.0, max_seconds=60.0)


class FakeMachine:
    """Two clocks that only runs move.

    slowness: how many times as long work takes at a moment, in ms of wall time. rival: (free, taken) in ms: after every
    ``free`` it holds the core for ``taken``.
    """

    def __init__(
        self,
        *,
        slowness: Callable[[float], float] = lambda now_ms: 1.0,
        rival: tuple[float, float] | None = None,
    ) -> None:
        self.wall = self.cpu = 0
        self.slowness = slowness
        self.free, self.taken = (round(ms * NS) for ms in rival or (0.0, 0.0))
        self.clocks = Clocks(lambda: self.wall, lambda: self.cpu)
        self.num_runs: dict[str, int] = {}

    def model(self, name: str, work_ms: Callable[[int], float] | float) -> Callable[[], None]:
        """Return a run of this much work; a function is asked for the work of run 0, 1, …."""

        def run() -> None:
            n = self.num_runs.get(name, 0)
            self.num_runs[name] = n + 1
            work = work_ms(n) if callable(work_ms) else work_ms
            self._work(round(work * self.slowness(self.wall / NS) * NS))

        return run

    def _work(self, left: int) -> None:
        self.cpu += left
        if not self.taken:
            self.wall += left
            return
        while left > 0:
            until_taken = self.free - self.wall % (self.free + self.taken)
            done = min(left, max(until_taken, 0))
            left -= done
            self.wall += done
            if done == until_taken or until_taken <= 0:  # the slice that begins now, or what is left of it
                self.wall += self.taken + min(until_taken, 0)


def measured(
    machine: FakeMachine, plan: Plan = LONG, *, blocks: int = 1, **models: float
) -> list[list[Times]]:
    """Return the times of ``models`` in each block: one after the other on one machine."""
    runs = [machine.model(name, work) for name, work in models.items()]
    return [measure_in_turns(runs, plan, machine.clocks, Random(block)) for block in range(blocks)]


def latencies(blocks: Sequence[Sequence[Times]], *names: str) -> list[ModelLatency]:
    """Return what nasdeploy makes of such times."""
    results = tuple(
        {
            "models": {
                name: {**statistics(times), "session_ms": 1.0, "first_run_ms": 1.0, "batch_size": 1}
                for name, times in zip(names, block, strict=True)
            },
            "pinned": True,
            "spinning": True,
            "shared_pool": False,
            "onnxruntime": "1.20.0",
            "peak_memory_bytes": None,
        }
        for block in blocks
    )
    found = collect(Answers(results=results, machine={}), Runtime())
    return [found[name] for name in names]


def constant(wall_ms: float, cpu_ms: float) -> Times:
    wall = np.full(10, wall_ms)
    return Times(wall_ms=wall, cpu_ms=np.full(10, cpu_ms), whole_ms=wall)


def block_of(wall_ms: float, *, cpu_ms: float | None = None) -> BlockStats:
    cpu_ms = wall_ms if cpu_ms is None else cpu_ms
    (latency,) = latencies([[constant(wall_ms, cpu_ms)]], "model")
    return latency.blocks[0]


def of_medians(*medians_ms: float) -> ModelLatency:
    (latency,) = latencies([[constant(ms, ms)] for ms in medians_ms], "model")
    return latency


# ---- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [50, 90, 95, 99])
def test_percentiles_are_order_statistics(q: int, rng: np.random.Generator) -> None:
    ordered = np.cumsum(rng.uniform(0.1, 5.0, 401))  # 400 gaps: every percentile is a run that happened
    shuffled = rng.permutation(ordered)
    assert percentiles(shuffled)[f"p{q}"] == pytest.approx(ordered[4 * q], rel=1e-12)


def test_percentiles_between_two_runs_lie_on_the_line_between_them() -> None:
    values = np.array([4.0, 1.0, 2.0, 8.0, 16.0, 32.0])
    assert percentiles(values)["p50"] == 6.0  # half way from the third to the fourth
    row = statistics(Times(wall_ms=values, cpu_ms=values, whole_ms=values))
    assert row["cpu_p25_ms"] == 2.5  # a quarter of the way from the second to the third
    assert (row["min_ms"], row["mean_ms"], row["n"]) == (1.0, 10.5, 6)


@pytest.mark.parametrize(("q", "needed"), [(50, 5), (90, 29), (95, 59), (99, 299)])
def test_a_percentile_needs_the_runs_that_bound_it_with_95_per_cent(q: int, needed: int) -> None:
    # The largest of n independent runs is below the percentile with probability (q / 100)**n.
    assert needed == math.ceil(math.log(0.05) / math.log(q / 100)) == RUNS_FOR_PERCENTILE[q]
    assert (q / 100) ** needed <= 0.05 < (q / 100) ** (needed - 1)
    assert percentiles(np.arange(needed - 1.0))[f"p{q}"] is None
    assert percentiles(np.arange(float(needed)))[f"p{q}"] is not None


def test_a_cap_below_the_median_block_passes_in_one_case_of_32() -> None:
    # Each block is below or above the median block with the same probability; the cap lies just below it.
    cases = list(product([0.9, 1.1], repeat=MIN_BLOCKS))
    passing = [case for case in cases if check_cap(of_medians(*case), 0.999).status == "holds"]
    assert len(passing) / len(cases) == 0.5**MIN_BLOCKS == 1.0 - 0.96875
    assert 0.5**MIN_BLOCKS < 0.05 < 0.5 ** (MIN_BLOCKS - 1)


def test_one_block_less_certifies_nothing() -> None:
    assert check_cap(of_medians(*[1.0] * MIN_BLOCKS), 2.0).status == "holds"
    assert check_cap(of_medians(*[1.0] * (MIN_BLOCKS - 1)), 2.0).status == "undecided"


def test_a_block_is_contended_above_its_limit_and_not_at_it() -> None:
    at, above = block_of(21.0, cpu_ms=20.0), block_of(21.0 + 1e-9, cpu_ms=20.0)
    assert at.wall_over_cpu == CONTENDED_RATIO
    assert (at.contended, at.contended_at(50)) == (False, False)
    assert (above.contended, above.contended_at(50)) == (True, True)


def test_a_difference_of_exactly_twice_the_noise_floor_is_none() -> None:
    base, model = of_medians(1.0, 2.0, 4.0), of_medians(1.5, 3.0, 6.0)
    assert relative(model, base, floor=0.25).verdict == "no difference"
    assert relative(model, base, floor=math.nextafter(0.25, 0.0)).verdict == "slower"


def test_the_noise_floor_is_that_of_the_worst_block_on_either_side() -> None:
    first = of_medians(1.0, 2.0, 4.0, 8.0)
    assert block_ratios(of_medians(1.25, 2.0, 3.0, 8.0), first) == [1.25, 1.0, 0.75, 1.0]
    assert noise_floor(first, of_medians(1.25, 2.0, 3.5, 8.0)) == 0.25
    assert noise_floor(first, of_medians(1.25, 2.0, 2.0, 8.0)) == 0.5


# ---- drift ----------------------------------------------------------------------------------------------------

DRIFT = 1e-4  # a ten-thousandth slower with every ms: after 800 runs of 1 ms by more than a twelfth


def drifting() -> FakeMachine:
    return FakeMachine(slowness=lambda now_ms: 1.0 + DRIFT * now_ms)


def test_one_model_after_the_other_would_be_compared_wrongly_under_drift() -> None:
    machine = drifting()
    first, second = (
        time_runs(machine.model(name, ms), 800, machine.clocks) for name, ms in (("a", 1), ("b", 2))
    )
    # A run of c ms makes the machine slower by the factor 1 + DRIFT * c: the times are geometric series.
    growth_a, growth_b = (1.0 + DRIFT) ** 800, (1.0 + 2.0 * DRIFT) ** 800
    expected = growth_a * (growth_b - 1.0) / (growth_a - 1.0)
    ratio = second.cpu_ms.mean() / first.cpu_ms.mean()
    assert ratio == pytest.approx(expected, rel=1e-5)
    assert ratio > 2.25  # although the second model has just twice the work


def test_turns_keep_the_ratio_of_models_under_drift() -> None:
    machine = drifting()
    ((first, second),) = measured(machine, a=1.0, b=2.0)
    assert len(first.cpu_ms) == len(second.cpu_ms) == 800
    assert first.cpu_ms.max() > 1.25 * first.cpu_ms.min()  # the drift was there
    assert second.cpu_ms.mean() / first.cpu_ms.mean() == pytest.approx(2.0, rel=2e-3)
    # A turn of both takes 64 ms, settling runs included: no median is further off than the drift of one.
    assert np.median(second.cpu_ms) / np.median(first.cpu_ms) == pytest.approx(2.0, rel=64 * DRIFT)


def test_blocks_of_a_drifting_machine_spread_but_their_ratios_do_not() -> None:
    first, second, again = latencies(measured(drifting(), blocks=5, a=1.0, b=2.0, c=1.0), "a", "b", "c")
    assert first.spread > 0.5
    assert is_unstable(first)
    assert block_ratios(second, first) == pytest.approx([2.0] * 5, rel=84 * DRIFT)
    assert noise_floor(first, again) < 84 * DRIFT


# ---- jumps ----------------------------------------------------------------------------------------------------


def blocks_around_a_jump(after: float) -> list[list[Times]]:
    """Return five blocks of models of 1, 2 and 1 ms; a share ``after`` of the third one is slower by half."""
    length = (
        20 + 40 + 20 + 40 * (20 + SETTLING_RUNS) * (1 + 2 + 1)
    )  # ms of a block: warm-up of ten runs twice, turns
    moment = (3.0 - after) * length
    machine = FakeMachine(slowness=lambda now_ms: 1.0 if now_ms < moment else 1.5)
    return measured(machine, blocks=5, a=1.0, b=2.0, c=1.0)


@pytest.mark.parametrize(("after", "regime"), [(0.2, 1.0), (0.8, 1.5)])
def test_the_median_of_a_block_is_of_one_regime(after: float, regime: float) -> None:
    blocks = blocks_around_a_jump(after)
    first, second, again = latencies(blocks, "a", "b", "c")
    assert [block.cpu_ms[50] for block in first.blocks] == [1.0, 1.0, regime, 1.5, 1.5]
    assert 1.0 < first.blocks[2].mean_ms < 1.5  # the mean is of neither
    assert first.p50_range_ms == (1.0, 1.5)
    assert block_ratios(second, first) == [2.0] * 5
    assert noise_floor(first, again) == 0.0


def test_a_jump_is_an_unstable_machine_and_certifies_nothing() -> None:
    first, second, _ = latencies(blocks_around_a_jump(0.8), "a", "b", "c")
    assert first.spread == pytest.approx(0.5)
    assert is_unstable(first)
    assert check_cap(second, 10.0).status == "holds"
    check = check_cap(second, 10.0, reference=first)
    assert (check.status, check.disturbed) == ("undecided", True)
    assert "50.0 % longer in one block than in another" in check.reason


def test_a_steady_machine_is_stable() -> None:
    first, again = latencies(measured(FakeMachine(), blocks=5, a=1.0, b=1.0), "a", "b")
    assert (first.spread, noise_floor(first, again), is_unstable(first)) == (0.0, 0.0, False)


# ---- warm-up --------------------------------------------------------------------------------------------------


def test_warm_up_follows_an_exponential_to_where_it_moves_by_less_than_2_per_cent() -> None:
    machine = FakeMachine()
    run = machine.model("a", lambda n: 1.0 + 7.0 * math.exp(-n / 20.0))
    warm_up(run, machine.clocks, 10.0)
    # The median of group g is 1 + D(g), D(g) = 7 (exp(-0.2) + exp(-0.25)) / 2 exp(-g / 2) = 5.591 exp(-g / 2). From g
    # to g + 1 it moves by 0.3935 D(g) < 0.02 (1 + D(g)) where D(g) < 0.0536: first at g = 10, so after group 11.
    assert machine.num_runs["a"] == 12 * WARM_UP_GROUP


def test_times_of_the_warm_up_are_not_counted() -> None:
    machine = FakeMachine()
    runs = [machine.model("a", lambda n: 50.0 if n < 20 else 1.0)]  # cold for two groups
    (times,) = measure_in_turns(runs, LONG, machine.clocks, Random(0))
    assert times.cpu_ms.max() == 1.0


# ---- rivals ---------------------------------------------------------------------------------------------------


def test_a_rival_makes_the_wall_clock_go_on_and_leaves_cpu_time_alone() -> None:
    blocks = measured(FakeMachine(rival=(3.0, 1.0)), blocks=5, a=1.0, b=2.0)
    first, second = latencies(blocks, "a", "b")
    for latency, ms in ((first, 1.0), (second, 2.0)):
        assert latency.contended_blocks == 5
        assert (latency.cpu_p50_ms, latency.spread) == (ms, 0.0)
        assert [block.wall_over_cpu for block in latency.blocks] == pytest.approx([4.0 / 3.0] * 5, rel=0.02)
    assert block_ratios(second, first) == [2.0] * 5
    assert relative(second, first, floor=0.0).ratio == 2.0
    assert not is_unstable(first)


def test_a_median_sees_the_rival_only_where_most_runs_meet_it() -> None:
    ((first, second),) = measured(FakeMachine(rival=(3.0, 1.0)), a=1.0, b=2.0)
    # It takes 1 ms after every 3: one run of 1 ms in three meets it, and two of 2 ms in three.
    assert sorted(set(first.wall_ms.tolist())) == [1.0, 2.0]
    assert (np.median(first.wall_ms), np.median(second.wall_ms)) == (1.0, 3.0)
    short, long = (latency.blocks[0] for latency in latencies([[first, second]], "a", "b"))
    assert (short.contended, short.contended_at(50), short.contended_at(90)) == (True, False, True)
    assert (long.contended, long.contended_at(50)) == (True, True)


def test_a_rival_that_takes_less_than_a_twentieth_is_none() -> None:
    (latency,) = latencies(measured(FakeMachine(rival=(24.0, 1.0)), a=1.0), "a")
    assert latency.blocks[0].wall_over_cpu == pytest.approx(25.0 / 24.0, rel=0.005)
    assert latency.contended_blocks == 0


@pytest.mark.parametrize("reading", [1, 20])
def test_a_rival_that_comes_only_where_the_cpu_clock_is_read_is_seen(reading: int) -> None:
    # Linux does so with runs shorter than a tick: the call of the kernel is where the thread gives way.
    machine = FakeMachine()
    num_readings = 0

    def read_cpu() -> int:
        nonlocal num_readings
        num_readings += 1
        if num_readings % 20 == reading % 20:  # before the first of ten runs of 1 ms, or after the last
            machine.wall += 10 * NS
        return machine.cpu

    clocks = Clocks(machine.clocks.wall_ns, read_cpu)
    (times,) = measure_in_turns([machine.model("a", 1.0)], LONG, clocks, Random(0))
    (latency,) = latencies([[times]], "a")
    assert set(times.wall_ms.tolist()) == {1.0}
    assert latency.blocks[0].wall_over_cpu == pytest.approx(2.0, rel=0.05)
    assert latency.contended_blocks == 1


def test_caps_are_decided_by_the_blocks_without_a_rival() -> None:
    quiet, loud = FakeMachine(), FakeMachine(rival=(1.0, 1.0))
    blocks = [measured(machine, a=1.0)[0] for machine in (quiet, loud, quiet, quiet, quiet, quiet)]
    (latency,) = latencies(blocks, "a")
    assert latency.contended_blocks == 1
    check = check_cap(latency, 1.5)
    assert (check.status, check.bound, check.num_blocks) == ("holds", 1.0, 5)
    (fewer,) = latencies(blocks[:5], "a")
    assert check_cap(fewer, 1.5).status == "undecided"


# ---- clocks and deadlines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wall_cost", "cpu_cost"), [(0, 700), (300, 0), (300, 700)])
def test_what_either_clock_takes_is_not_the_models(wall_cost: int, cpu_cost: int) -> None:
    machine = FakeMachine()

    def read(cost: int) -> None:
        machine.wall += cost
        machine.cpu += cost

    def read_wall() -> int:
        read(wall_cost)
        return machine.wall

    def read_cpu() -> int:
        read(cpu_cost)
        return machine.cpu

    clocks = Clocks(read_wall, read_cpu)
    run = machine.model("a", 0.016)
    raw = time_runs(run, 100, clocks)
    (times,) = measure_in_turns([run], LONG, clocks, Random(0))
    assert max(raw.wall_ms.mean(), raw.cpu_ms.mean()) > 0.0162
    assert times.wall_ms == pytest.approx(0.016, abs=1e-9)
    assert times.cpu_ms == pytest.approx(0.016, abs=1e-9)


def test_a_model_that_becomes_slow_uses_up_its_time_and_no_more() -> None:
    machine = FakeMachine()
    slow = machine.model("slow", lambda n: 5.0 if n < 20 else 25.0)
    plan = Plan(rounds=10, min_runs=100, min_seconds=0.0, max_seconds=1.0)
    times = measure_in_turns([slow, machine.model("fast", 1.0)], plan, machine.clocks, Random(0))
    # Ten runs a turn, as the warm-up promised; four turns of 250 ms are the second that it may take.
    assert [len(part.wall_ms) for part in times] == [40, 100]
    assert machine.num_runs["slow"] == 2 * WARM_UP_GROUP + 4 * (10 + SETTLING_RUNS)


def test_a_model_slower_than_its_time_still_gets_its_median() -> None:
    machine = FakeMachine()
    plan = Plan(rounds=10, min_runs=100, min_seconds=0.0, max_seconds=1.0)
    (times,) = measure_in_turns([machine.model("slow", 2000.0)], plan, machine.clocks, Random(0))
    assert len(times.wall_ms) == MIN_RUNS
    assert (
        machine.num_runs["slow"] == MIN_RUNS + 1
    )  # one to warm up; beside such runs nothing needs to settle
    assert percentiles(times.cpu_ms)["p50"] == 2000.0
