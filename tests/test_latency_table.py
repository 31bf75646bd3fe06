"""The latency table of a space: calibration, storage, and one small real measurement."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from nasdeploy.costs.calibration import (
    Accuracy,
    Calibration,
    assess,
    fit,
    line_through,
    rank_correlation,
)
from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.device.timing import Plan
from nasdeploy.costs.latency_table import (
    LatencyTable,
    LayerTime,
    NetworkTime,
    measure_latency_table,
)
from nasdeploy.costs.table_models import stratified_architectures
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces import (
    LayerSpec,
    MobileConfig,
    SearchSpace,
    Stage,
    make_space,
    mobile_space,
    with_resolutions,
)

MACHINE = {"cpu": "A", "architecture": "x86_64", "logical_cores": 2}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The default space for small grey images."""
    return make_space("mobile", (1, 28, 28), 10)


def times_alone(space: SearchSpace) -> dict[LayerSpec, float]:
    rng = np.random.default_rng(3)
    return {spec: float(rng.uniform(0.002, 0.02)) for spec in space.distinct_layers()}


def made_up_table(space: SearchSpace) -> LatencyTable:
    return LatencyTable(
        runtime_key=Runtime().key(),
        channel_multiple=8,
        space_name=space.name,
        space_fingerprint=space.fingerprint(),
        machine=MACHINE,
        seed=0,
        measured_at="2026-01-02T03:04:05+00:00",
        seconds=1.5,
        entries=tuple(LayerTime(spec=s, ms=ms, spread=0.01) for s, ms in times_alone(space).items()),
        bridge=None,
        calibration=Calibration(constant_ms=0.01, coefficients={"table": 1.1, "layers": -0.0005}),
        accuracy=Accuracy(
            mape=0.01,
            quantile90=0.02,
            max_error=0.03,
            spearman=0.99,
            flops_mape=0.1,
            flops_spearman=0.9,
            ceiling=0.005,
            ceiling_spearman=0.999,
            num_calibration=40,
            num_held_out=20,
        ),
        held_out=(NetworkTime(choices=space.smallest().choices, predicted_ms=0.02, measured_ms=0.021),),
        smallest_ms=0.02,
        largest_ms=0.2,
    )


def test_calibration_finds_the_law_that_made_the_times(space: SearchSpace, rng: np.random.Generator) -> None:
    alone = times_alone(space)
    law = Calibration(constant_ms=0.02, coefficients={"table": 1.2, "residuals": -0.001})
    networks = [space.decode(a) for a in stratified_architectures(space, 30, rng)]
    fitted = fit(networks, np.array([law.network_ms(layers, alone) for layers in networks]), alone)
    assert fitted.constant_ms == pytest.approx(0.02)
    assert fitted.coefficients == pytest.approx(law.coefficients)


def test_calibration_counts_the_image_where_it_differs_in_size(rng: np.random.Generator) -> None:
    space = make_space("mobile", (3, 160, 160), 10, (96, 128, 160))
    alone = times_alone(space)
    law = Calibration(constant_ms=0.02, coefficients={"table": 1.2, "image": 0.01})
    networks = [space.decode(a) for a in stratified_architectures(space, 30, rng)]
    fitted = fit(networks, np.array([law.network_ms(layers, alone) for layers in networks]), alone)
    assert fitted.constant_ms == pytest.approx(0.02)
    assert fitted.coefficients == pytest.approx(law.coefficients)
    assert law.network_ms(networks[0], alone) > 0.02 + 0.01 * 3 * 96**2 / 1e4


def test_calibration_leaves_the_image_out_where_all_have_one_size(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    alone = times_alone(space)
    networks = [space.decode(a) for a in stratified_architectures(space, 30, rng)]
    fitted = fit(networks, rng.uniform(0.1, 1.0, 30), alone)
    assert "table" in fitted.coefficients
    assert "image" not in fitted.coefficients


def test_calibration_takes_no_term_that_only_fits_noise(space: SearchSpace, rng: np.random.Generator) -> None:
    alone = times_alone(space)
    law = Calibration(constant_ms=0.02, coefficients={"table": 1.2})
    networks = [space.decode(a) for a in stratified_architectures(space, 40, rng)]
    exact = np.array([law.network_ms(layers, alone) for layers in networks])
    fitted = fit(networks, exact * rng.normal(1.0, 0.01, len(exact)), alone)
    assert fitted.coefficients["table"] == pytest.approx(1.2, rel=0.05)
    assert len(fitted.coefficients) <= 2


def test_accuracy_by_hand() -> None:
    measured = np.array([1.0, 2.0, 4.0, 5.0])
    found = assess(
        measured * [1.1, 0.9, 1.0, 1.2],
        measured,
        again_ms=measured * [1.01, 1.01, 1.3, 1.0],
        by_flops_ms=measured * [1.5, 0.5, 1.0, 1.0],
        num_calibration=7,
    )
    assert found.mape == pytest.approx(0.1)
    assert found.max_error == pytest.approx(0.2)
    assert found.quantile90 == pytest.approx(0.17)
    assert found.ceiling == pytest.approx(0.08)
    assert found.spearman == pytest.approx(1.0)
    assert found.flops_mape == pytest.approx(0.25)
    assert found.flops_spearman == pytest.approx(0.8)  # 1.5, 1.0, 4.0, 5.0: 1 - 6 * 2 / (4 * 15)
    assert found.ceiling_spearman == pytest.approx(0.8)  # 1.01, 2.02, 5.2, 5.0
    assert (found.num_calibration, found.num_held_out) == (7, 4)


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 15])) == pytest.approx(0.5)
    assert rank_correlation(np.array([1.0, 1, 2, 3]), np.array([1.0, 1, 2, 3])) == pytest.approx(1.0)
    assert rank_correlation(np.array([2.0, 2, 2]), np.array([1.0, 2, 3])) == 0.0


def test_line_has_the_least_relative_error() -> None:
    flops = np.array([1e6, 2e6, 5e6])
    assert line_through(flops, 0.01 + 3e-8 * flops) == pytest.approx((0.01, 3e-8))
    # A constant predictor can only give the time t whose relative errors t / 1 - 1 and t / 2 - 1 are least in square.
    constant, slope = line_through(np.array([1.0, 1.0]), np.array([1.0, 2.0]))
    assert constant + slope == pytest.approx(1.2)


def test_stratified_architectures_cover_all_sizes(space: SearchSpace, rng: np.random.Generator) -> None:
    drawn = stratified_architectures(space, 60, rng)
    assert len(set(drawn)) == 60
    shares = [np.mean(np.array(a.choices) / (np.array(space.num_candidates()) - 1)) for a in drawn]
    assert np.mean(shares[:6]) < 0.3
    assert np.mean(shares[-6:]) > 0.7
    again = stratified_architectures(space, 60, np.random.default_rng(0))
    assert again == drawn


def test_cost_table_is_the_calibrated_sum(space: SearchSpace, rng: np.random.Generator) -> None:
    table = made_up_table(space)
    alone = times_alone(space)
    drawn = stratified_architectures(space, 5, rng)
    expected = [table.calibration.network_ms(space.decode(a), alone) for a in drawn]
    assert table.cost_table(space).of(np.array([a.choices for a in drawn])) == pytest.approx(expected)


def test_table_survives_json(space: SearchSpace) -> None:
    table = made_up_table(space)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_damaged_table_is_refused(space: SearchSpace) -> None:
    with pytest.raises(ConfigError, match="schema None; expected 'nasdeploy/latency-table/2'"):
        LatencyTable.from_json({})
    data = made_up_table(space).to_json()
    del data["entries"]
    with pytest.raises(
        ConfigError, match="'entries': field required; nasdeploy build --no-resume makes a new one"
    ):
        LatencyTable.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": "1.5"}, "'seconds': input should be a valid number"),
        ({"surplus": 1}, "keys that do not belong there"),
        ({"smallest_ms": 0.0}, "a time that is not above 0"),
        ({"largest_ms": float("nan")}, "Out of range float values"),
        ({"calibration": {"constant_ms": 0.0, "coefficients": {"magic": 1.0}}}, "unknown term 'magic'"),
        ({"held_out": [{"choices": [0]}]}, r"'held_out\.0\.predicted_ms': field required"),
        ({"bridge": {"num_layers": 16}}, r"'bridge\.drift': field required"),
    ],
)
def test_every_value_of_a_stored_table_is_checked(
    space: SearchSpace, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        LatencyTable.from_json(made_up_table(space).to_json() | change)
    assert "\n" not in str(error.value)


def test_table_of_another_space_runtime_or_machine_is_refused(space: SearchSpace) -> None:
    table = made_up_table(space)
    table.check_matches(space, Runtime(), machine=MACHINE)
    other_space = make_space("mobile", (3, 28, 28), 10)
    with pytest.raises(ConfigError, match=r"measured for search space .* --no-resume makes a new one"):
        table.cost_table(other_space)
    with pytest.raises(ConfigError, match=r"measured for runtime onnxruntime-.*-t1-.* expected .*-t2-"):
        table.check_matches(space, Runtime(threads=2), machine=MACHINE)
    with pytest.raises(ConfigError, match=r"runtime\.channel_multiple 8; expected 16"):
        table.check_matches(space, Runtime(channel_multiple=16), machine=MACHINE)
    lacking = replace(table, entries=table.entries[1:])
    with pytest.raises(ConfigError, match=r"lacks 1 layers of the space; nasdeploy"):
        lacking.check_matches(space, Runtime(), machine=MACHINE)
    with pytest.raises(ConfigError, match=r"another machine \(logical_cores: 2 there, 4 here\); nasdeploy"):
        table.check_matches(space, Runtime(), machine={**MACHINE, "logical_cores": 4})


def test_space_with_hardly_any_architectures_is_refused(space: SearchSpace) -> None:
    single = replace(space, decisions=tuple(replace(d, candidates=d.candidates[:1]) for d in space.decisions))
    with pytest.raises(ConfigError, match="only 1 architectures found to measure; expected 9 or more"):
        measure_latency_table(single, Runtime(), flops=counting_tables(space)["flops"])


def test_other_precisions_need_a_conversion(space: SearchSpace) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.precision = 'int8'"):
        measure_latency_table(space, Runtime(precision="int8"), flops=counting_tables(space)["flops"])


def test_a_real_table_of_two_resolutions() -> None:
    stages = (Stage(widths=(8, 24), num_blocks=2, stride=2), Stage(widths=(16, 48), num_blocks=1, stride=2))
    config = MobileConfig(
        stem_widths=(8, 16), stem_stride=2, stages=stages, head_widths=(64,), operations=((3, 2), (5, 4))
    )
    space = with_resolutions([mobile_space((3, size, size), 10, config) for size in (32, 96)])
    table = measure_latency_table(
        space,
        Runtime(),
        flops=counting_tables(space)["flops"],
        blocks=1,
        plan=Plan(rounds=2, min_runs=10, min_seconds=0.0, max_seconds=0.05),
        num_calibration=12,
        num_held_out=6,
    )
    assert {entry.spec for entry in table.entries} == set(space.distinct_layers())
    assert "image" in table.calibration.coefficients
    assert {row.choices[0] for row in table.held_out} == {0, 1}
    costs = table.cost_table(space)
    for choices in (space.smallest().choices[1:], space.largest().choices[1:]):
        small, large = costs.of(np.array([(0, *choices), (1, *choices)]))
        assert small < large  # nine times the pixels
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_real_table_ranks_networks(space: SearchSpace) -> None:
    table = measure_latency_table(
        space,
        Runtime(),
        flops=counting_tables(space)["flops"],
        blocks=1,
        plan=Plan(rounds=2, min_runs=10, min_seconds=0.0, max_seconds=0.05),
        num_calibration=12,
        num_held_out=6,
    )
    assert {entry.spec for entry in table.entries} == set(space.distinct_layers())
    assert table.largest_ms > 2.0 * table.smallest_ms
    assert (table.accuracy.num_calibration, table.accuracy.num_held_out) == (12, 6)
    ends = np.array([space.smallest().choices, space.largest().choices])
    smallest, largest = table.cost_table(space).of(ends)
    # Loose: a busy machine may disturb a single short block.
    assert 0.3 * table.smallest_ms < smallest < largest < 3.0 * table.largest_ms
    assert table.accuracy.spearman > 0.5
