"""Timing of sessions: the worker's arithmetic under a fake clock, statistics of blocks, and one real run."""

from __future__ import annotations

import ast
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from nasdeploy.costs import device
from nasdeploy.costs.certification import check_cap, check_percent_cap, is_astride, is_unstable
from nasdeploy.costs.device.runner import deadline_seconds
from nasdeploy.costs.device.timing import (
    SETTLING_RUNS,
    Clocks,
    Plan,
    Times,
    clocks_of,
    measure_in_turns,
    percentiles,
    runs_per_turn,
    statistics,
    time_runs,
    warm_up,
)
from nasdeploy.costs.latency import (
    BlockStats,
    Conditions,
    ModelLatency,
    measure_models,
    noise_floor,
    write_reference_model,
)
from nasdeploy.costs.sessions import (
    HERE,
    block_requests,
    check_runtime_available,
    choose_cores,
    start_requests,
)
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime


class FakeMachine:
    """Two clocks that only its runs move; ``log`` holds the names of the runs in order."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0
        self.log: list[str] = []
        self.clocks = Clocks(lambda: self.wall, lambda: self.cpu)

    def run(self, name: str, cpu_ms: Iterable[float], *, stolen_ms: float = 0.0) -> Callable[[], None]:
        """Return a run that takes one of ``cpu_ms`` after the other, and loses ``stolen_ms`` to a rival."""
        durations = iter(cpu_ms)

        def run() -> None:
            cpu = round(next(durations) * 1e6)
            self.cpu += cpu
            self.wall += cpu + round(stolen_ms * 1e6)
            self.log.append(name)

        return run


def test_wall_and_cpu_time_of_each_run() -> None:
    machine = FakeMachine()
    times = time_runs(machine.run("a", [1.0, 2.0, 4.0], stolen_ms=0.5), 3, machine.clocks)
    assert times.cpu_ms.tolist() == [1.0, 2.0, 4.0]
    assert times.wall_ms.tolist() == [1.5, 2.5, 4.5]


def test_time_of_reading_the_clocks_is_not_the_models() -> None:
    machine = FakeMachine()

    def slow_cpu_clock() -> int:
        machine.wall += 200
        machine.cpu += 200
        return machine.cpu

    clocks = Clocks(machine.clocks.wall_ns, slow_cpu_clock)
    plan = Plan(rounds=1, min_runs=5, min_seconds=0.0, max_seconds=1.0)
    (times,) = measure_in_turns([machine.run("a", cycle([1.0]))], plan, clocks, random.Random(0))
    assert times.cpu_ms == pytest.approx(1.0)
    assert times.wall_ms == pytest.approx(1.0)


def test_warm_up_ends_when_the_median_rests() -> None:
    machine = FakeMachine()
    cooling = [8.0] * 10 + [4.0] * 10 + [2.0] * 10 + [1.99] * 10 + [1.0] * 100
    assert warm_up(machine.run("a", cooling), machine.clocks, 10.0) == pytest.approx(1.99)
    assert len(machine.log) == 40


def test_warm_up_of_a_restless_model_ends_after_200_runs_or_its_time() -> None:
    restless = [1.0] * 10 + [2.0] * 10
    machine, hurried = FakeMachine(), FakeMachine()
    warm_up(machine.run("a", cycle(restless)), machine.clocks, 10.0)
    warm_up(hurried.run("a", cycle(restless)), hurried.clocks, 0.025)
    assert len(machine.log) == 200
    assert len(hurried.log) == 20


@pytest.mark.parametrize(
    ("run_ms", "expected"),
    [
        (1.0, 25),  # 0.2 s of 1 ms are 200 runs, in 8 turns
        (10.0, 13),  # 100 runs, rounded up
        (100.0, 7),  # 100 runs would take 10 s: only 5 s are allowed
        (1e6, 1),
    ],
)
def test_runs_of_a_turn(run_ms: float, expected: int) -> None:
    assert runs_per_turn(Plan(rounds=8, min_runs=100, min_seconds=0.2, max_seconds=5.0), run_ms) == expected


def test_models_run_in_turns_of_random_order_and_settling_runs_do_not_count() -> None:
    machine = FakeMachine()
    runs = [machine.run(name, cycle([ms])) for name, ms in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    plan = Plan(rounds=6, min_runs=12, min_seconds=0.0, max_seconds=10.0)
    times = measure_in_turns(runs, plan, machine.clocks, random.Random(0))
    assert [len(t.wall_ms) for t in times] == [12, 12, 12]
    assert [t.cpu_ms.mean() for t in times] == [1.0, 2.0, 3.0]
    turn = 2 + SETTLING_RUNS
    turns = machine.log[60::turn]  # after 20 runs of warm-up for each
    assert len(machine.log) == 60 + 18 * turn
    rounds = ["".join(turns[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_model_that_a_rival_slows_down_sits_out_the_rest() -> None:
    machine = FakeMachine()
    durations = [1.0] * 20 + [50.0] * 1000  # the rival comes after the warm-up
    plan = Plan(rounds=10, min_runs=100, min_seconds=0.0, max_seconds=1.0)
    (times,) = measure_in_turns([machine.run("a", durations)], plan, machine.clocks, random.Random(0))
    assert len(times.wall_ms) == 20


def test_percentiles_that_few_runs_cannot_support_are_missing() -> None:
    assert percentiles(np.arange(4.0)) == {"p50": None, "p90": None, "p95": None, "p99": None}
    assert percentiles(np.arange(30.0)) == {"p50": 14.5, "p90": pytest.approx(26.1), "p95": None, "p99": None}
    assert percentiles(np.arange(301.0))["p99"] == pytest.approx(297.0)


def test_statistics_of_known_times() -> None:
    cpu = np.arange(1.0, 102.0)
    row = statistics(Times(wall_ms=cpu * 1.1, cpu_ms=cpu, whole_ms=cpu * 1.1))
    assert row["n"] == 101
    assert row["cpu_p25_ms"] == 26.0
    assert row["cpu_ms"]["p50"] == 51.0
    assert row["min_ms"] == pytest.approx(1.1)
    assert row["wall_over_cpu"] == pytest.approx(1.1)


CONDITIONS = Conditions(
    provider="CPUExecutionProvider",
    threads=1,
    batch_size=4,
    pinned=True,
    spinning=True,
    shared_pool=False,
    onnxruntime="1.20.0",
)


def block(wall_ms: float, *, cpu_ms: float | None = None, p90_ms: float | None = None) -> BlockStats:
    cpu_ms = wall_ms if cpu_ms is None else cpu_ms
    return BlockStats(
        n=40,
        min_ms=0.9 * wall_ms,
        mean_ms=wall_ms,
        wall_ms={50: wall_ms, 90: p90_ms, 95: None, 99: None},
        cpu_ms={50: cpu_ms, 90: p90_ms, 95: None, 99: None},
        cpu_p25_ms=cpu_ms,
        wall_over_cpu=wall_ms / cpu_ms,
        session_ms=3.0,
        first_run_ms=1.0,
        peak_memory_bytes=1000,
    )


def latency(*blocks: BlockStats) -> ModelLatency:
    return ModelLatency(conditions=CONDITIONS, blocks=blocks)


def quiet(*medians_ms: float) -> ModelLatency:
    return latency(*map(block, medians_ms))


def test_statistics_of_a_model_are_medians_of_its_blocks() -> None:
    measured = latency(block(1.0, p90_ms=1.1), block(1.1, p90_ms=3.0), block(1.05, p90_ms=1.2))
    assert measured.p50_ms == 1.05
    assert measured.percentile_ms(90) == 1.2
    assert measured.percentile_ms(99) is None
    assert measured.spread == pytest.approx(0.1)
    assert measured.n == 120
    assert measured.cold_start_ms == 4.0
    assert measured.images_per_second == pytest.approx(4e3 / 1.05)


def test_latency_survives_json() -> None:
    measured = latency(block(1.0, p90_ms=1.1), block(1.1))
    assert ModelLatency.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_foreign_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="schema None; expected 'nasdeploy/latency/1'"):
        ModelLatency.from_json({})
    with pytest.raises(ConfigError, match="expected what nasdeploy wrote"):
        ModelLatency.from_json({"schema": "nasdeploy/latency/1", "blocks": [{"n": 1}]})


@pytest.mark.parametrize(("cap_ms", "status"), [(1.06, "holds"), (1.0, "violated"), (1.03, "undecided")])
def test_cap_is_decided_by_the_largest_block(cap_ms: float, status: str) -> None:
    check = check_cap(quiet(1.0, 1.01, 1.02, 1.04, 1.05), cap_ms)
    assert check.status == status
    assert (check.estimate, check.bound) == (1.02, 1.05)
    assert bool(check.reason) == (status == "undecided")


def test_only_undisturbed_blocks_on_both_sides_of_a_cap_speak_against_the_network() -> None:
    spread = (1.0, 1.01, 1.02, 1.04, 1.05)
    assert [is_astride(check_cap(quiet(*spread), cap)) for cap in (1.0, 1.03, 1.06)] == [False, True, False]
    contended = latency(*map(block, spread[:4]), block(1.05, cpu_ms=0.9))
    assert not is_astride(check_cap(contended, 1.03))


def test_cap_is_not_certified_from_contended_blocks() -> None:
    check = check_cap(latency(*map(block, [1.0] * 4), block(1.2, cpu_ms=1.0)), 2.0)
    assert check.status == "undecided"
    assert check.reason == "contended: 4 of 5 blocks were undisturbed"
    assert check.bound == 1.0


def test_cap_is_not_certified_on_an_unstable_machine() -> None:
    still, moving = quiet(1.0, 1.0, 1.0, 1.0, 1.04), quiet(1.0, 1.0, 1.0, 1.0, 1.06)
    file = quiet(*[1.0] * 5)
    assert check_cap(file, 2.0, reference=still).status == "holds"
    check = check_cap(file, 2.0, reference=moving)
    assert (check.status, check.disturbed, check.bound) == ("undecided", True, 1.0)
    assert check.reason.startswith("unstable machine: the reference model took 6.0 % longer in one block")
    assert not is_astride(check_cap(quiet(1.0, 1.01, 1.02, 1.04, 1.05), 1.03, reference=moving))


def test_a_rival_that_the_median_does_not_see_does_not_matter_to_it() -> None:
    disturbed = [block(1.0) for _ in range(5)]
    disturbed[0] = BlockStats(
        **{f: getattr(disturbed[0], f) for f in BlockStats.__slots__} | {"wall_over_cpu": 1.3}
    )
    assert disturbed[0].contended
    assert check_cap(latency(*disturbed), 1.1).status == "holds"


def test_percentile_without_enough_runs_is_undecided() -> None:
    check = check_cap(quiet(1.0, 1.0, 1.0, 1.0, 1.0), 2.0, percentile=99)
    assert check.status == "undecided"
    assert check.reason == "too few runs: 0 of 5 blocks support a p99"
    assert check.bound is None


def test_percentage_cap_pairs_blocks_and_ignores_drift_and_rivals() -> None:
    drift = (1.0, 1.3, 0.9, 1.1, 2.0)
    small, middle, large = (latency(*(block(5 * ms * d, cpu_ms=ms * d) for d in drift)) for ms in (1, 2, 5))
    assert check_percent_cap(middle, 0.26, smallest=small, largest=large).status == "holds"
    check = check_percent_cap(middle, 0.24, smallest=small, largest=large)
    assert check.status == "violated"
    assert check.estimate == pytest.approx(0.25)
    assert check.unit == "fraction"


def test_percentage_cap_needs_anchors_that_differ() -> None:
    same = quiet(1.0, 1.0, 1.0, 1.0, 1.0)
    check = check_percent_cap(same, 0.5, smallest=same, largest=same)
    assert check.status == "undecided"
    assert "only 0 of 5 blocks tell" in check.reason


def test_noise_floor_and_stability() -> None:
    assert noise_floor(quiet(1.0, 1.0), quiet(1.02, 1.02)) == pytest.approx(0.02)
    assert is_unstable(quiet(1.0, 1.06))
    assert not is_unstable(quiet(1.0, 1.04))


def test_missing_provider_is_refused_in_one_line() -> None:
    check_runtime_available(Runtime())
    runtime = Runtime(provider="TensorrtExecutionProvider")
    with pytest.raises(ConfigError) as caught:
        check_runtime_available(runtime, available=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert str(caught.value) == (
        "runtime.provider = 'TensorrtExecutionProvider': the ONNX Runtime of this machine does not have it; "
        "expected one of CUDAExecutionProvider, CPUExecutionProvider"
    )
    assert caught.value.exit_code == 2


def test_cores_are_the_last_ones_allowed_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {11, 2, 5}, raising=False)
    assert (choose_cores(1), choose_cores(2), choose_cores(4)) == ([11], [5, 11], None)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert choose_cores(1) is None


def test_deadline_leaves_a_slow_model_the_runs_that_it_gets_whatever_the_plan_allows() -> None:
    plan = Plan(rounds=5, min_runs=50, min_seconds=0.0, max_seconds=0.25)
    models = dict.fromkeys(map(str, range(200)), "m.onnx")
    for ms in (700.0, 1500.0):
        machine = FakeMachine()
        measure_in_turns([machine.run("a", cycle([ms]))], plan, machine.clocks, random.Random(0))
        first_run_s = ms / 1e3
        spent_s = 200 * (machine.wall / 1e9 + first_run_s)
        assert spent_s < deadline_seconds({"models": models, "plan": plan._asdict()})
    assert deadline_seconds({"models": models, "plan": plan._asdict()}) == 60.0 + 200 * 11.0


def test_no_room_for_temporary_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reference_model(tmp_path / "m.onnx")
    requests = start_requests(tmp_path / "m.onnx", Runtime(), count=1, seed=0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError) as caught:
        HERE.carry_out(requests)
    assert str(caught.value) == (
        f"{tmp_path}/none: cannot be written to (No such file or directory); expected room for temporary files there "
        "or in another folder: TMPDIR=FOLDER"
    )


def test_a_real_measurement_in_fresh_processes(tmp_path: Path) -> None:
    paths = {"first": tmp_path / "a.onnx", "again": tmp_path / "b.onnx"}
    for path in paths.values():
        write_reference_model(path)
    assert paths["first"].read_bytes() == paths["again"].read_bytes()
    shares: list[float] = []
    measured = measure_models(
        paths, Runtime(), blocks=2, min_runs=100, min_seconds=0.02, progress=shares.append
    )
    assert shares == [0.5, 1.0]
    assert set(measured) == set(paths)
    for model in measured.values():
        assert len(model.blocks) == 2
        assert model.n >= 100
        assert 0.0 < model.blocks[0].min_ms <= model.p50_ms < model.cold_start_ms
        assert model.conditions.threads == 1
        assert (model.peak_memory_bytes or 1) > 0


def test_what_runs_on_a_device_is_for_old_pythons_and_needs_nothing_of_ours() -> None:
    trees = [
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        for path in Path(device.__file__).parent.glob("*.py")
    ]
    imported = {
        name.split(".")[0]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert len(trees) > 4
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_a_file_that_is_no_model_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    plan = Plan(rounds=1, min_runs=1, min_seconds=0.0, max_seconds=0.1)
    with pytest.raises(ConfigError, match=r"broken\.onnx: onnxruntime cannot load it") as caught:
        HERE.carry_out(block_requests({"broken": path}, Runtime(), plan=plan, blocks=1, seed=0))
    assert "\n" not in str(caught.value)


def test_peak_memory_is_that_of_the_measuring_process_alone(tmp_path: Path) -> None:
    ballast = np.ones(300_000_000 // 8)  # of the parent
    model = tmp_path / "reference.onnx"
    write_reference_model(model)
    measured = measure_models({"reference": model}, Runtime(), blocks=1, min_runs=10, min_seconds=0.0)
    assert 10e6 < (measured["reference"].peak_memory_bytes or 11e6) < 250e6
    assert ballast.sum() > 0.0


def test_a_slow_model_is_run_often_enough_for_a_median() -> None:
    plan = Plan(rounds=5, min_runs=50, min_seconds=0.0, max_seconds=0.25)
    assert runs_per_turn(plan, 1e3) * plan.rounds >= 5


def test_beside_an_accelerator_only_wall_time_counts() -> None:
    clocks = clocks_of("CUDAExecutionProvider")
    assert clocks.cpu_ns is clocks.wall_ns
    assert clocks_of("CPUExecutionProvider").cpu_ns is not clocks.wall_ns
