"""The gates of a file in a smaller number format, on made-up measurements: what passes, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from nasdeploy.costs.latency import BlockStats, Conditions, ModelLatency
from nasdeploy.exporters.quantization_errors import OperatorError
from nasdeploy.exporters.structure import Check
from nasdeploy.pipeline import figures
from nasdeploy.pipeline.certifying import FP32, FP32_AGAIN, CapResult, measured_file
from nasdeploy.pipeline.gates import AccuracyGate, Gates, Reason, SpeedGate, times_by_operator
from nasdeploy.pipeline.reducing import accuracy_limit, with_precision
from nasdeploy.profiles import HardwareProfile
from nasdeploy.runs import ModelFolder
from nasdeploy.schemas import load_schema

CONDITIONS = Conditions(
    provider="CPUExecutionProvider",
    threads=1,
    batch_size=1,
    pinned=True,
    spinning=True,
    shared_pool=False,
    onnxruntime="1.30.0",
)
QUIET = (1.0, 1.002, 0.999, 1.001, 1.0)


def latency(ms: float, blocks: Sequence[float] = QUIET) -> ModelLatency:
    """Return a model that takes ``ms`` times the factor of each block."""
    return ModelLatency(
        conditions=CONDITIONS,
        blocks=tuple(
            BlockStats(
                n=200,
                min_ms=ms * factor,
                mean_ms=ms * factor,
                wall_ms={50: ms * factor, 90: None, 95: None, 99: None},
                cpu_ms={50: ms * factor, 90: None, 95: None, 99: None},
                cpu_p25_ms=ms * factor,
                wall_over_cpu=1.0,
                session_ms=1.0,
                first_run_ms=1.0,
                peak_memory_bytes=None,
            )
            for factor in blocks
        ),
    )


def speed(ms: float, *, fp32_ms: float = 1.0, floor: float = 0.01) -> SpeedGate:
    """Return the gate of a file that takes ``ms``, where one block of the second copy is off by ``floor``."""
    again = latency(fp32_ms, (*QUIET[:4], QUIET[4] * (1.0 + floor)))
    return SpeedGate.of(latency(ms), latency(fp32_ms), again)


def accuracy(drop: float, *, limit: float = 0.01) -> AccuracyGate:
    checks = (Check(name="accuracy_drop", value=drop, relation="<=", limit=limit),)
    return AccuracyGate(checks=checks, before=0.9, accuracy=0.9 - drop, num_images=2000)


@pytest.mark.parametrize(
    ("ms", "verdict", "passed"),
    [
        (0.7, "faster", True),
        (0.979, "faster", True),
        (0.981, "no difference", False),
        (1.0, "no difference", False),
        (1.019, "no difference", False),
        (1.3, "slower", False),
    ],
)
def test_a_file_must_be_faster_by_more_than_twice_the_noise_floor(
    ms: float, verdict: str, passed: bool
) -> None:
    gate = speed(ms, floor=0.01)
    assert gate.noise_floor == pytest.approx(0.01)
    assert (gate.relative.verdict, gate.passed) == (verdict, passed)
    assert gate.relative.ratio == pytest.approx(ms)


def test_a_busy_machine_lets_nothing_pass_that_is_in_its_noise() -> None:
    assert speed(0.7, floor=0.01).passed
    assert not speed(0.7, floor=0.16).passed


def test_drift_that_both_files_share_does_not_matter() -> None:
    drift = (1.0, 1.4, 0.8, 2.0, 1.1)
    gate = SpeedGate.of(latency(0.8, drift), latency(1.0, drift), latency(1.0, drift))
    assert gate.passed
    assert gate.relative.smallest_ratio == pytest.approx(gate.relative.largest_ratio) == pytest.approx(0.8)


def test_both_gates_must_pass() -> None:
    for drop, ms, passed in ((0.0, 0.5, True), (0.02, 0.5, False), (0.0, 1.5, False), (0.02, 1.5, False)):
        gates = Gates(precision="int8", accuracy=accuracy(drop), calibration_images=8, speed=speed(ms))
        assert gates.passed == passed
    assert not Gates(precision="int8", accuracy=accuracy(0.0), calibration_images=8).passed


def test_gates_tell_their_numbers() -> None:
    gates = Gates(precision="int8", accuracy=accuracy(0.005), calibration_images=8, speed=speed(0.7))
    assert gates.describe() == (
        "the int8 file ships: accuracy: 90.00 % of the network, 89.50 % of the file on 2000 validation images: "
        "accuracy_drop = 0.005 <= 0.01; speed: x0.700 of fp32 (blocks x0.700 to x0.700; 700us against 1ms; "
        "noise floor 1.00 %): faster"
    )
    lost = Gates(precision="int8", accuracy=accuracy(0.02), calibration_images=8)
    assert lost.describe().startswith("the int8 file does not ship, fp32 does: accuracy: ")
    assert lost.describe().endswith("accuracy_drop = 0.02; expected <= 0.01")


def test_a_reason_names_the_operators() -> None:
    errors = tuple(
        OperatorError(name=f"layer{i}", operator="Conv", signal_to_noise_db=20.0, added_noise=0.1 / 2**i)
        for i in range(9)
    )
    text = Reason(gate="accuracy", errors=errors).describe()
    assert "layer0 (Conv) 10 %, layer1 (Conv) 5 %" in text
    assert "layer5" not in text
    times = times_by_operator({"Conv": 0.5, "Sigmoid": 0.01}, {"QLinearConv": 0.3, "Sigmoid": 0.4})
    assert [row.operator for row in times] == ["Conv", "Sigmoid", "QLinearConv"]
    text = Reason(gate="speed", times=times, in_float={"Sigmoid": 3}).describe()
    assert text == (
        "time by operator, fp32 -> this file: Conv 500us -> 0, Sigmoid 10us -> 400us, QLinearConv 0 -> 300us; "
        "still in float: 3 Sigmoid"
    )


def test_gates_follow_the_schema_of_the_figures() -> None:
    definitions = load_schema("metrics")["$defs"]
    assert definitions["gates"] == load_schema("report")["$defs"]["gates"]
    validator = Draft202012Validator({"$ref": "#/$defs/gates", "$defs": definitions})
    error = OperatorError(name="head", operator="Conv", signal_to_noise_db=9.0, added_noise=0.1)
    broken = Check(name="runs_alone", value="fails", relation="==", limit="runs", detail="no kernel")
    dead = AccuracyGate(checks=(broken,), before=0.9, accuracy=None, num_images=10)
    made = [
        Gates(precision="int8", accuracy=accuracy(0.0), calibration_images=8, speed=speed(0.7)),
        Gates(precision="fp16", accuracy=dead, calibration_images=0, reason=Reason(gate="accuracy")),
        Gates(
            precision="int8",
            accuracy=accuracy(0.0),
            calibration_images=8,
            speed=speed(1.2),
            reason=Reason(
                gate="speed",
                errors=(error,),
                times=times_by_operator({"Conv": 1.0}, {"Cast": 2.0}),
                in_float={"Conv": 1},
            ),
        ),
    ]
    for gates in made:
        assert [e.message for e in validator.iter_errors(json.loads(json.dumps(gates.to_json())))] == []
    assert "runs_alone = fails" in made[1].describe()


def profile(**runtime: object) -> HardwareProfile:
    budget = {"latency": {"max": "0.75ms"}}
    return HardwareProfile.from_dict({"name": "p", "runtime": runtime, "budget": budget})


@pytest.mark.parametrize(("ms", "shipped_ms", "status"), [(0.6, 0.6, "holds"), (1.5, 1.0, "violated")])
def test_the_cap_is_checked_on_the_file_that_ships(ms: float, shipped_ms: float, status: str) -> None:
    times = {"p": latency(ms), "p" + FP32: latency(1.0), "p" + FP32_AGAIN: latency(1.0)}
    found = measured_file(profile(precision="int8"), times)
    assert found.speed is not None
    assert found.speed.passed == (ms < 1.0)
    assert found.latency.p50_ms == pytest.approx(shipped_ms)
    assert found.check is not None
    assert found.check.status == status
    assert not found.is_open


def test_no_difference_is_measured_again() -> None:
    times = {"p": latency(0.99), "p" + FP32: latency(1.0), "p" + FP32_AGAIN: latency(1.02)}
    assert measured_file(profile(precision="int8"), times).is_open
    assert measured_file(profile(), {"p": latency(0.5)}).speed is None


def test_the_limit_of_the_drop_is_the_profile_s_own_or_that_of_the_precision() -> None:
    own = profile(precision="int8", max_accuracy_drop="3%")
    assert accuracy_limit(own, "int8") == 0.03
    assert accuracy_limit(own, "fp16") == 0.005  # set for int8
    assert accuracy_limit(profile(precision="int8"), "int8") == 0.01
    assert accuracy_limit(own, "fp32") is None
    assert with_precision(own, "fp32").runtime.precision == "fp32"


def test_nothing_is_violated_before_the_device_has_answered() -> None:
    violated = CapResult(
        metric="file_size", cap=1.0, value=2.0, bound=None, status="violated", unit="bytes", text="2 > 1"
    )
    assert figures.status_of("a", [violated], {"passed": True}, "")[0] == "violated"
    assert figures.status_of("a", [violated], {"passed": True}, "waits") == ("noisy", "a: waits")


def test_figures_of_an_earlier_version_are_made_again(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path)
    folder.metrics.write_text(json.dumps({"schema": "nasdeploy/metrics/1", "status": "certified"}))
    assert not figures.is_finished(folder)
