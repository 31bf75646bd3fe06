"""``bench``: paced runs, further attempts, caps, other devices and the chart; clocks and devices are fakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper, numpy_helper

from nasdeploy.cli import measuring
from nasdeploy.costs.comparison import FULL, QUICK, REFERENCE, BenchProtocol, compare
from nasdeploy.costs.device.timing import (
    SETTLING_RUNS,
    Clocks,
    Plan,
    Times,
    measure_in_turns,
    runs_per_turn,
    statistics,
    time_runs,
)
from nasdeploy.costs.latency import ModelLatency, write_reference_model
from nasdeploy.costs.sessions import Answers, Progress, Request
from nasdeploy.errors import BudgetViolatedError, ConfigError, NoisyMeasurementError
from nasdeploy.pipeline.bench_files import stored_precision
from nasdeploy.pipeline.benching import bench
from nasdeploy.profiles import HardwareProfile, Runtime
from nasdeploy.reporting import bench_chart
from nasdeploy.reporting.bench_chart import Bar, draw_bars
from nasdeploy.schemas import load_schema

MS = 1_000_000


class FakeMachine:
    """Clocks that runs and sleep move; ``begun`` holds when each run began, in ms. overslept_ms: by every sleep."""

    def __init__(self, *, overslept_ms: float = 0.0) -> None:
        self.wall = self.cpu = 0
        self.slept_ms = 0.0
        self.begun: list[float] = []
        self._overslept = round(overslept_ms * MS)
        self.clocks = Clocks(lambda: self.wall, lambda: self.cpu, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.wall += round(seconds * 1e9) + self._overslept
        self.slept_ms += 1e3 * seconds

    def run(self, *cpu_ms: float) -> Callable[[], None]:
        """Return a run that takes these times one after the other, the last one again and again."""
        durations = list(cpu_ms)

        def run() -> None:
            self.begun.append(self.wall / MS)
            ms = durations.pop(0) if len(durations) > 1 else durations[0]
            self.wall += round(ms * MS)
            self.cpu += round(ms * MS)

        return run


# ---- paced runs -----------------------------------------------------------------------------------------------


def test_a_run_begins_every_interval_and_sleep_is_not_measured() -> None:
    machine = FakeMachine()
    times = time_runs(machine.run(2.0, 5.0, 3.0), 3, machine.clocks, 0.010)
    assert machine.begun == [10.0, 20.0, 30.0]
    assert times.wall_ms.tolist() == times.cpu_ms.tolist() == [2.0, 5.0, 3.0]
    assert machine.slept_ms == 10.0 + 8.0 + 5.0


def test_after_a_run_that_is_late_the_next_one_begins_at_once() -> None:
    machine = FakeMachine()
    time_runs(machine.run(14.0, 1.0, 1.0), 3, machine.clocks, 0.010)
    assert machine.begun == [10.0, 24.0, 34.0]


def test_an_alarm_clock_that_rings_late_moves_the_next_run() -> None:
    machine = FakeMachine(overslept_ms=0.5)
    time_runs(machine.run(1.0), 2, machine.clocks, 0.010)
    assert machine.begun == [10.5, 21.0]


def test_without_an_interval_nothing_sleeps() -> None:
    machine = FakeMachine()
    time_runs(machine.run(1.0), 5, machine.clocks)
    assert machine.begun == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert machine.slept_ms == 0.0


@pytest.mark.parametrize(
    ("run_ms", "interval_s", "expected"),
    [
        (1.0, 0.010, 5),  # 0.4 s of 10 ms are 40 runs, in 8 turns
        (20.0, 0.010, 3),  # a slow model: 0.4 s of 20 ms
        (1.0, 0.100, 1),  # 0.5 s at most: 5 runs
        (1.0, 0.0, 50),
    ],
)
def test_the_interval_counts_as_time_of_a_run(run_ms: float, interval_s: float, expected: int) -> None:
    plan = Plan(rounds=8, min_runs=10, min_seconds=0.4, max_seconds=0.5, interval_s=interval_s)
    assert runs_per_turn(plan, run_ms) == expected


def test_warm_up_and_settling_runs_are_not_paced() -> None:
    machine = FakeMachine()
    plan = Plan(rounds=4, min_runs=20, min_seconds=0.0, max_seconds=10.0, interval_s=0.010)
    (times,) = measure_in_turns([machine.run(1.0)], plan, machine.clocks, Random(0))
    assert len(times.wall_ms) == 20
    assert len(machine.begun) == 20 + 4 * (SETTLING_RUNS + 5)
    assert machine.begun[:22] == [
        float(ms) for ms in range(22)
    ]  # two groups of warm-up, then the settling runs
    assert machine.begun[22:27] == [32.0, 42.0, 52.0, 62.0, 72.0]
    assert times.wall_ms.tolist() == [1.0] * 20


def test_sleep_is_time_that_a_model_has_used_up() -> None:
    machine = FakeMachine()
    plan = Plan(rounds=8, min_runs=800, min_seconds=0.0, max_seconds=0.4, interval_s=0.010)
    warm, slow = [1.0] * 20, [80.0]
    (times,) = measure_in_turns([machine.run(*warm, *slow)], plan, machine.clocks, Random(0))
    assert len(times.wall_ms) == 5  # one turn of 5 runs, and 0.4 s are gone


def test_a_model_beside_paced_ones_may_run_without_pauses() -> None:
    machine = FakeMachine()
    plan = Plan(rounds=1, min_runs=10, min_seconds=0.1, max_seconds=1.0, interval_s=0.010)
    runs = [machine.run(1.0), machine.run(1.0)]
    paced, free = measure_in_turns(runs, plan, machine.clocks, Random(0), [0.010, 0.0])
    assert (len(paced.wall_ms), len(free.wall_ms)) == (10, 100)
    assert machine.slept_ms == 10.0 + 9 * 9.0


def test_runs_longer_than_the_interval_are_late() -> None:
    wall = np.array([1.0, 9.0, 11.0, 10.0, 12.0])
    times = Times(wall_ms=wall, cpu_ms=np.ones(5), whole_ms=wall)
    assert statistics(times, 0.010)["late"] == 2
    assert statistics(times)["late"] == 0


def test_an_interval_must_leave_five_runs_in_each_block() -> None:
    assert replace(FULL, interval_ms=33.0).plan() == Plan(
        rounds=8, min_runs=200, min_seconds=2.0, max_seconds=12.0, interval_s=0.033
    )
    with pytest.raises(ConfigError) as caught:
        replace(FULL, interval_ms=2401.0).plan()
    assert str(caught.value) == (
        "interval = 2.401s: expected more than 0 and at most 2.4s: 5 runs in each of 5 blocks of 12 s"
    )


def test_a_rival_with_a_long_slice_is_seen_by_the_sum_and_not_by_the_median() -> None:
    cpu = np.full(2000, 0.05)
    wall = cpu.copy()
    wall[::100] += 4.0  # a slice of 4 ms on every hundredth run of 50 us
    row = statistics(Times(wall_ms=wall, cpu_ms=cpu, whole_ms=wall))
    assert row["wall_ms"]["p50"] == pytest.approx(0.05)
    assert row["wall_over_cpu"] == pytest.approx(1.8)


# ---- a device -------------------------------------------------------------------------------------------------


BOARD = {"cpu": "c", "architecture": "a", "logical_cores": 4, "system": "s", "onnxruntime": "1.20.0"}


class FakeDevice:
    """Answers without measuring. times: {name of a model: ms}; drifts: of the reference model, one per attempt."""

    name = "a board"

    def __init__(
        self,
        times: Mapping[str, float] | None = None,
        *,
        drifts: Sequence[float] = (0.0,),
        rival: float = 1.0,
    ) -> None:
        self.times = dict(times or {})
        self.drifts = list(drifts)
        self.rival = rival
        self.requests: list[list[Request]] = []

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        self.requests.append(list(requests))
        measured = requests[0]["plan"] is not None
        drift = (self.drifts.pop(0) if len(self.drifts) > 1 else self.drifts[0]) if measured else 0.0
        results = tuple(self._answer(request, n, drift) for n, request in enumerate(requests))
        if progress:
            progress(1.0)
        return Answers(results=results, machine=BOARD)

    def _answer(self, request: Request, block: int, drift: float) -> dict[str, Any]:
        models = {name: self._row(name, request, block, drift) for name in request["models"]}
        return {
            "models": models,
            "pinned": True,
            "shared_pool": False,
            "spinning": True,
            "load": [0.5, 0.5, 0.5],
            "memory_before_bytes": 50,
            "peak_memory_bytes": 70 + block,
            "onnxruntime": "1.20.0",
        }

    def _row(self, name: str, request: Request, block: int, drift: float) -> dict[str, Any]:
        facts: dict[str, Any] = {"session_ms": 3.0, "first_run_ms": 1.0, "batch_size": 1}
        if request.get("operators"):
            node = {"name": "conv", "op_type": "Conv", "provider": "CPU", "calls": 1, "median_us": 3.0}
            return facts | {
                "operators": {"runs": request["operators"]["runs"], "run_us": 4.0, "nodes": [node]}
            }
        if request["plan"] is None:
            return facts
        ms = self.times.get(name, 1.0) * (1.0 + (drift if name == REFERENCE and block else 0.0))
        percentiles = {f"p{q}": ms for q in (50, 90, 95, 99)}
        wall = dict.fromkeys(percentiles, ms * self.rival)
        return facts | {
            "n": request["plan"]["min_runs"],
            "late": 1 if request["plan"]["interval_s"] else 0,
            "min_ms": ms,
            "mean_ms": ms,
            "wall_ms": wall,
            "cpu_ms": percentiles,
            "cpu_p25_ms": ms,
            "wall_over_cpu": self.rival,
        }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    write_reference_model(path)
    return path


def attempts_of(device: FakeDevice, path: Path, protocol: BenchProtocol) -> tuple[list[str], Any]:
    said: list[str] = []
    found = compare({"m": path}, Runtime(), protocol=protocol, seed=7, device=device, again=said.append)
    return said, found


def test_what_is_in_doubt_is_measured_again_with_twice_the_runs(model: Path) -> None:
    device = FakeDevice(drifts=[0.2, 0.06, 0.01])
    said, found = attempts_of(device, model, FULL)
    assert [one.effort for one in found.attempts] == [1, 2, 4]
    assert [one.reference_spread for one in found.attempts] == pytest.approx([0.2, 0.06, 0.01])
    assert [bool(one.doubt) for one in found.attempts] == [True, True, False]
    assert said == [one.doubt for one in found.attempts[:2]]
    assert found.stable
    assert found.models["m"].n == 5 * 800
    plans = [requests[0]["plan"] for requests in device.requests]
    assert [(p["min_runs"], p["min_seconds"], p["max_seconds"]) for p in plans] == [
        (200, 2.0, 12.0),
        (400, 4.0, 12.0),
        (800, 8.0, 12.0),
    ]
    seeds = [request["seed"] for requests in device.requests for request in requests]
    assert seeds == list(range(7, 22))


def test_attempts_end_with_the_protocol_and_a_quick_one_has_only_one(model: Path) -> None:
    for protocol, number in ((FULL, 3), (QUICK, 1), (replace(QUICK, attempts=2), 2)):
        _, found = attempts_of(FakeDevice(drifts=[0.2]), model, protocol)
        assert len(found.attempts) == number
        assert not found.stable
        assert found.attempts[-1].doubt.startswith("unstable machine")


def test_a_rival_in_most_blocks_is_a_doubt(model: Path) -> None:
    said, found = attempts_of(FakeDevice(rival=1.9), model, replace(FULL, attempts=2))
    assert found.flagged
    assert found.stable
    assert [one.contended_blocks for one in found.attempts] == [5, 5]
    assert said == [
        "contended: another program took the core from m in 5 of 5 blocks (wall time 1.90 x CPU time): wall times "
        "hold some of its time; stop other programs, or bind them to other cores (taskset), and measure again"
    ]


def test_a_quiet_machine_is_not_flagged(model: Path) -> None:
    _, found = attempts_of(FakeDevice(rival=1.04, drifts=[0.04]), model, FULL)
    assert (found.flagged, found.doubt, len(found.attempts)) == (False, "", 1)


def with_blocks(latency: ModelLatency, *ratios: float) -> ModelLatency:
    return replace(
        latency,
        blocks=tuple(
            replace(block, wall_over_cpu=ratio) for block, ratio in zip(latency.blocks, ratios, strict=True)
        ),
    )


def test_few_contended_blocks_flag_the_run_but_the_median_block_stands(model: Path) -> None:
    _, quiet = attempts_of(FakeDevice(), model, QUICK)
    two = replace(quiet, models={"m": with_blocks(quiet.models["m"], 1.2, 1.3, 1.0, 1.0, 1.0)})
    three = replace(quiet, models={"m": with_blocks(quiet.models["m"], 1.2, 1.3, 1.1, 1.0, 1.0)})
    assert (two.flagged, two.doubt) == (True, "")
    assert three.flagged
    assert "3 of 5 blocks (wall time 1.10 x CPU time)" in three.doubt


# ---- the whole, on a device -----------------------------------------------------------------------------------


def profile(**latency: str | int) -> HardwareProfile:
    return HardwareProfile.from_dict({"name": "edge", "budget": {"latency": latency}})


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[str] = []

    def start(self, phase: str, total: int | None = None) -> None:
        self.phases.append(f"{phase} {total}")

    def advance(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def finish(self, phase: str, values: Mapping[str, Any]) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_everything_is_asked_of_the_device_and_told_of_its_machine(model: Path) -> None:
    device = FakeDevice()
    result = bench([model], protocol=replace(QUICK, interval_ms=33.0), operators=True, device=device)
    starts, blocks, operators = device.requests
    assert (len(starts), len(blocks), len(operators)) == (QUICK.num_starts, QUICK.blocks, 1)
    assert (result.device, result.machine, result.load) == ("a board", BOARD, (None, 0.5))
    (one,) = result.models
    assert one.latency.conditions.interval_ms == result.comparison.again.conditions.interval_ms == 33.0
    assert result.comparison.reference.conditions.interval_ms is None
    assert [request["unpaced"] for request in blocks] == [[REFERENCE]] * QUICK.blocks
    assert one.latency.late_share == 5 / 100
    assert one.operators is not None
    assert (one.operators.runs, one.operators.by_type[0].share) == (50, 1.0)
    assert (one.start_up.peak_memory_bytes, one.start_up.added_memory_bytes) == (71, 22)
    data = result.to_json()
    assert data["protocol"]["interval_ms"] == 33.0
    assert data["models"][0]["latency"]["conditions"]["interval_ms"] == 33.0
    assert data["reference_cpu_p50_ms"] == [1.0] * 5


def test_a_result_with_everything_follows_the_schema(model: Path) -> None:
    result = bench(
        [model, model],
        profile=profile(max="9ms"),
        protocol=replace(QUICK, interval_ms=33.0, attempts=2),
        check_cap=True,
        operators=True,
        device=FakeDevice(rival=1.9),
    )
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [error.message for error in Draft202012Validator(load_schema("bench")).iter_errors(data)] == []
    assert [one["doubt"][:10] for one in data["attempts"]] == ["contended:", "contended:"]
    assert data["models"][1]["cap"]["status"] == "undecided"
    assert data["models"][1]["operators"]["by_type"][0]["op_type"] == "Conv"


def test_a_cap_is_told_and_decides_only_where_it_was_asked(model: Path) -> None:
    for cap, status in (("2ms", "holds"), ("500us", "violated")):
        told = bench([model], profile=profile(max=cap), protocol=QUICK, device=FakeDevice())
        check = told.models[0].cap
        assert check is not None
        assert (check.status, told.exit_code, told.failures) == (status, 0, ())
    asked = bench([model], profile=profile(max=cap), protocol=QUICK, check_cap=True, device=FakeDevice())
    assert asked.exit_code == 3
    (failure,) = asked.failures
    assert isinstance(failure, BudgetViolatedError)
    assert str(failure) == "m.onnx: latency p50 1ms (largest block 1ms) > 500us"


def test_a_cap_that_a_rival_leaves_open_is_measured_again_and_exits_with_5(model: Path) -> None:
    device, observer = FakeDevice(rival=1.9), Notes()
    protocol = replace(QUICK, attempts=2)
    result = bench(
        [model],
        profile=profile(max="9ms"),
        protocol=protocol,
        check_cap=True,
        device=device,
        observer=observer,
    )
    assert result.exit_code == 5
    (failure,) = result.failures
    assert isinstance(failure, NoisyMeasurementError)
    assert (
        str(failure)
        == "m.onnx: latency p50 n/a (largest block n/a) ? 9ms: contended: 0 of 5 blocks were undisturbed"
    )
    again, final = observer.notes
    assert again.startswith("contended: another program took the core from m.onnx in 5 of 5 blocks")
    assert again.endswith("; measuring again with twice the runs")
    assert final == result.comparison.contention
    assert observer.phases == ["bench 6", "bench 5"]


def test_an_unstable_machine_certifies_nothing_and_is_said_once(model: Path) -> None:
    result = bench(
        [model, model],
        profile=profile(max="9ms"),
        protocol=QUICK,
        check_cap=True,
        device=FakeDevice(drifts=[0.3]),
    )
    assert [one.cap.status for one in result.models if one.cap] == ["undecided", "undecided"]
    assert [str(failure)[:17] for failure in result.failures] == ["unstable machine:"]
    assert result.exit_code == 5


def test_the_cap_of_a_high_percentile_gets_the_runs_that_it_needs(model: Path) -> None:
    edge = profile(max="9ms", percentile=99)
    for check_cap, runs in ((False, 20), (True, 329)):
        device = FakeDevice()
        bench([model], profile=edge, protocol=QUICK, check_cap=check_cap, device=device)
        assert device.requests[1][0]["plan"]["min_runs"] == runs


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "no profile was given"),
        (
            {"profile": HardwareProfile.from_dict({"name": "edge", "budget": {"params": {"max": "1M"}}})},
            "has no latency cap",
        ),
        ({"profile": profile(max="40%")}, "is a share of what a search space offers"),
        ({"profile": profile(max="9ms"), "threads": 2}, "is for its own threads and batch size"),
    ],
)
def test_no_cap_to_check_is_one_line_before_anything_runs(
    arguments: dict[str, Any], reason: str, model: Path
) -> None:
    device = FakeDevice()
    with pytest.raises(
        ConfigError, match=f"^--check-cap: .*{reason}; expected a profile with a cap such as"
    ) as caught:
        bench([model], check_cap=True, device=device, **arguments)
    assert "\n" not in str(caught.value)
    assert device.requests == []
    result = bench([model], protocol=QUICK, device=device, **arguments)
    assert result.models[0].cap is None


# ---- precisions and the chart ---------------------------------------------------------------------------------


def weights(**arrays: np.ndarray) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_model(helper.make_graph([node], "g", [value], [out], tensors))


def test_the_precision_is_that_of_most_weights() -> None:
    large = (8, 8)
    assert stored_precision(weights(a=np.ones(large, np.float32), i=np.ones(2, np.int64))) == "fp32"
    assert stored_precision(weights(a=np.ones(large, np.int8), scale=np.ones(8, np.float32))) == "int8"
    assert stored_precision(weights(a=np.ones(large, np.float16))) == "fp16"
    assert stored_precision(weights(i=np.ones(2, np.int64))) is None
    constant = weights()
    constant.graph.node.append(
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(large, np.float16)))
    )
    assert stored_precision(constant) == "fp16"


BARS = (
    Bar(label="m.onnx", precision="fp32", p50_ms=1.0, low_ms=0.9, high_ms=1.2, note=""),
    Bar(label="a_$b$.onnx", precision="int8", p50_ms=0.6, low_ms=0.6, high_ms=0.7, note="x0.6, faster"),
)


def test_the_same_bars_are_the_same_bytes() -> None:
    one, two = (draw_bars(BARS, title="t", conditions="c", file_format="svg") for _ in range(2))
    assert one == two
    text = one.decode()
    for shown in ("m.onnx", "a_$b$.onnx", "1 ms", "0.6 ms  x0.6, faster", "fp32", "int8"):
        assert f">{shown}</text>" in text
    assert draw_bars(BARS, title="t", conditions="c", file_format="png").startswith(b"\x89PNG\r\n")


def test_the_command_knows_the_formats_of_a_chart() -> None:
    assert tuple(f".{one}" for one in bench_chart.FORMATS) == measuring.CHART_SUFFIXES
