"""The memory of a space: the law and its terms, storage, caps, and real processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nasdeploy.costs.certification import check_memory_cap, is_astride
from nasdeploy.costs.memory import (
    MemoryTable,
    MemoryUse,
    measure_memory,
    measure_memory_table,
    plan_memory_table,
    require_telling_share,
)
from nasdeploy.costs.memory_law import (
    MemoryLaw,
    activation_bytes,
    assess_left_out,
    fit_law,
    left_out_predictions,
    term_tables,
    weight_bytes,
    working_set_bytes,
)
from nasdeploy.costs.sessions import Answers, Progress, Request
from nasdeploy.costs.table_models import stratified_architectures
from nasdeploy.errors import ConfigError, NoisyMeasurementError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces import LayerSpec, SearchSpace, make_space

MACHINE = {"cpu": "A", "architecture": "x86_64", "logical_cores": 2}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The default space for small grey images."""
    return make_space("mobile", (1, 28, 28), 10)


class MadeUpDevice:
    """Says what a law makes of the weights in a file, and on top of it ``noise`` bytes in every third process."""

    name = "a made-up device"

    def __init__(self, *, tells: bool = True, noise: int = 0, seconds: float | None = None) -> None:
        self.tells = tells
        self.seconds = seconds
        self.noise = noise
        self.num_starts = 0

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        return Answers(results=tuple(map(self._start, requests)), machine=MACHINE, seconds=self.seconds)

    def _start(self, request: Request) -> dict[str, object]:
        self.num_starts += 1
        (path,) = request["models"].values()
        held = onnx.load(path).graph.initializer
        size = sum(4 * int(np.prod(t.dims)) for t in held if t.name.endswith((".weight", ".bias")))
        added = 10_000_000 + 3 * size + (self.noise if self.num_starts % 3 == 0 else 0)
        before = 45_000_000 + self.num_starts
        return {
            "peak_memory_bytes": before + added if self.tells else None,
            "memory_before_bytes": before if self.tells else None,
        }


STEM = LayerSpec(kind="stem", in_channels=1, out_channels=8, size=28, kernel=3, stride=2)
BLOCK = LayerSpec(kind="inverted_residual", in_channels=8, out_channels=8, size=14, kernel=3, expand=2)
STRIDED = replace(BLOCK, out_channels=16, stride=2)
CLASSIFIER = LayerSpec(kind="classifier", in_channels=64, out_channels=10, size=4)


@pytest.mark.parametrize(
    ("spec", "weights", "activations", "working_set"),
    [
        # 3x3 kernels, a bias a channel; 28x28 values become 8 x 14x14
        (STEM, 8 * 9 + 8, 784 + 1568, 784 + 1568),
        # 8 to 16 channels, depthwise, back to 8; the input waits for the addition
        (BLOCK, (128 + 16) + (144 + 16) + (128 + 8), 2 * 1568 + 2 * 3136, 3136 + 3136 + 1568),
        # without an addition, at half the size behind the depthwise convolution
        (STRIDED, (128 + 16) + (144 + 16) + (256 + 16), 1568 + 3136 + 784 + 784, 1568 + 3136),
        (CLASSIFIER, 640 + 10, 1024 + 10, 1024 + 10),
    ],
)
def test_sizes_of_a_layer(spec: LayerSpec, weights: int, activations: int, working_set: int) -> None:
    assert weight_bytes(spec) == 4 * weights
    assert activation_bytes(spec) == 4 * activations
    assert working_set_bytes(spec) == 4 * working_set


@pytest.mark.parametrize("pixels", [28, 64])
def test_the_terms_are_sums_over_layers_and_the_largest_working_set(
    pixels: int, rng: np.random.Generator
) -> None:
    space = make_space("mobile", (3, pixels, pixels), 10)
    architectures = stratified_architectures(space, 50, rng)
    networks = [space.decode(a) for a in architectures]
    choices = np.array([a.choices for a in architectures])
    found = {term: table.of(choices) for term, table in term_tables(space).items()}
    assert found["weights"] == pytest.approx([sum(map(weight_bytes, layers)) for layers in networks])
    assert found["layers"] == pytest.approx([len(layers) for layers in networks])
    assert found["activations"] == pytest.approx([sum(map(activation_bytes, layers)) for layers in networks])
    assert found["working_set"] == pytest.approx([max(map(working_set_bytes, layers)) for layers in networks])


def features_of(space: SearchSpace, count: int) -> dict[str, np.ndarray]:
    """Return the features of random networks, each (count,)."""
    drawn = stratified_architectures(space, count, np.random.default_rng(5))
    return {t: table.of(np.array([a.choices for a in drawn])) for t, table in term_tables(space).items()}


def test_the_law_that_made_the_sizes_is_found_exactly(space: SearchSpace) -> None:
    features = features_of(space, 16)
    sizes = 1e7 + 3.0 * features["weights"] + 1.5 * features["working_set"]
    law = fit_law(features, sizes)
    assert law.constant_bytes == pytest.approx(1e7)
    assert law.coefficients == pytest.approx({"weights": 3.0, "working_set": 1.5})
    assert left_out_predictions(features, sizes) == pytest.approx(sizes)


def test_a_term_that_predicts_no_better_is_left_out(space: SearchSpace) -> None:
    features = features_of(space, 60)
    noise = np.random.default_rng(0).normal(0.0, 1e5, 60)
    assert list(fit_law(features, 1e7 + 3.0 * features["weights"] + noise).coefficients) == ["weights"]


def test_a_network_is_predicted_without_its_own_size() -> None:
    features = {"weights": np.arange(6.0)}
    sizes = np.array(
        [10.0, 20.0, 30.0, 40.0, 50.0, 160.0]
    )  # the last one is 100 above the line of the others
    predicted = left_out_predictions(features, sizes)
    assert predicted[-1] == pytest.approx(60.0)
    accuracy = assess_left_out(predicted, sizes)
    assert accuracy.max_bytes == pytest.approx(100.0)
    assert accuracy.mean_bytes == pytest.approx(np.abs(predicted - sizes).mean())
    assert accuracy.spearman < 1.0


def test_a_law_as_a_table_says_the_same(space: SearchSpace) -> None:
    law = MemoryLaw(constant_bytes=1e7, coefficients={"weights": 3.0, "layers": -50.0, "working_set": 2.0})
    choices = np.array([a.choices for a in stratified_architectures(space, 20, np.random.default_rng(1))])
    tables = term_tables(space)
    table = law.table(tables)
    assert table.of(choices) == pytest.approx(law.of({t: one.of(choices) for t, one in tables.items()}))
    assert table.minimum(space.full_mask()) == pytest.approx(
        min(table.of(np.array([table.cheapest(space.full_mask())])))
    )


def test_a_table_is_made_of_the_largest_starts(space: SearchSpace) -> None:
    table = measure_memory_table(space, Runtime(), device=MadeUpDevice(noise=50_000))
    # 5 starts of each but the largest, which has 20: every third process needs 50 kB more, so each network has one
    assert table.law.constant_bytes == pytest.approx(10_050_000, abs=1)
    assert table.law.coefficients == pytest.approx({"weights": 3.0})
    assert table.noise_bytes == 50_000
    assert table.accuracy.max_bytes < 1.0
    smallest, largest = table.cost_table(space).of(
        np.array([space.smallest().choices, space.largest().choices])
    )
    assert (table.smallest_bytes, table.largest_bytes) == (pytest.approx(smallest), pytest.approx(largest))
    assert MemoryTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_the_seconds_of_a_table_are_those_of_its_device(space: SearchSpace) -> None:
    carried = measure_memory_table(space, Runtime(), num_networks=6, device=MadeUpDevice(seconds=1234.5))
    assert carried.seconds == 1234.5
    assert 0.0 < measure_memory_table(space, Runtime(), num_networks=6, device=MadeUpDevice()).seconds < 600.0


def test_a_table_belongs_to_its_space_runtime_and_machine(space: SearchSpace) -> None:
    table = measure_memory_table(space, Runtime(), num_networks=8, device=MadeUpDevice())
    table.check_matches(space, Runtime(), machine=MACHINE)
    with pytest.raises(ConfigError, match=r"^memory table: measured for runtime .*--no-resume"):
        table.check_matches(space, Runtime(batch_size=8), machine=MACHINE)
    with pytest.raises(ConfigError, match="another machine"):
        table.check_matches(space, Runtime(), machine={**MACHINE, "cpu": "B"})
    with pytest.raises(ConfigError, match="search space"):
        table.cost_table(make_space("mobile", (3, 28, 28), 10))
    with pytest.raises(ConfigError, match="schema"):
        MemoryTable.from_json({"schema": "nasdeploy/memory-table/0"})


def test_the_same_plan_writes_the_same_files(space: SearchSpace, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        requests = plan_memory_table(space, Runtime(), num_networks=6).requests(tmp_path / name)
        contents.append([Path(r["models"]["model"]).read_bytes() for r in requests])
    assert contents[0] == contents[1]


def test_a_precision_needs_its_conversion(space: SearchSpace) -> None:
    with pytest.raises(ConfigError, match="'int8'"):
        plan_memory_table(space, Runtime(precision="int8"))


def test_a_system_that_does_not_tell_ends_with_the_code_of_the_undecided(space: SearchSpace) -> None:
    with pytest.raises(
        NoisyMeasurementError, match=r"^budget.peak_memory: the system does not tell"
    ) as caught:
        measure_memory_table(space, Runtime(), num_networks=6, device=MadeUpDevice(tells=False))
    assert caught.value.exit_code == 5
    check = check_memory_cap(MemoryUse(added_bytes=()), 12e6)
    assert (check.status, check.disturbed) == ("undecided", True)
    assert check.reason == "the system does not tell the memory of a process"


USE = MemoryUse(added_bytes=(100, 110, 105, 120, 102))


@pytest.mark.parametrize(("cap", "status"), [(120, "holds"), (119, "undecided"), (104, "violated")])
def test_a_cap_holds_where_the_largest_process_keeps_it(cap: float, status: str) -> None:
    check = check_memory_cap(USE, cap)
    assert (check.status, check.estimate, check.bound) == (status, 105, 120)
    assert is_astride(check) == (status == "undecided")


@pytest.mark.parametrize(("cap", "status"), [(0.4, "holds"), (0.39, "undecided"), (0.24, "violated")])
def test_a_share_lies_between_what_the_ends_need_at_most(cap: float, status: str) -> None:
    ends = MemoryUse(added_bytes=(70, 80)), MemoryUse(added_bytes=(180, 170))
    check = check_memory_cap(USE, cap, ends=ends)  # 80 is 0 %, 180 is 100 %
    assert (check.status, check.unit) == (status, "fraction")
    assert (check.estimate, check.bound) == (pytest.approx(0.25), pytest.approx(0.4))


def test_too_few_processes_decide_nothing() -> None:
    assert check_memory_cap(MemoryUse(added_bytes=(1, 2, 3)), 12e6).status == "undecided"
    flat = MemoryUse(added_bytes=(70,))
    assert "no more than the smallest" in check_memory_cap(USE, 0.5, ends=(flat, flat)).reason


def test_a_share_of_a_range_within_the_noise_is_refused() -> None:
    facts = {"key": "tiny: budget.peak_memory.max", "written": "40%", "cap_bytes": 10.62e6}
    require_telling_share(**facts, range_bytes=200e3, noise_bytes=100e3)
    with pytest.raises(ConfigError) as caught:
        require_telling_share(**facts, range_bytes=199e3, noise_bytes=100e3)
    assert str(caught.value) == (
        'tiny: budget.peak_memory.max = "40%": the smallest and the largest network of the space differ by 199kB, '
        'starts of one file by 100kB; expected a cap in bytes, such as "10.6MB"'
    )


def write_product(path: Path, rows: int) -> Path:
    """Write a model that multiplies a vector by a matrix of ``rows`` x 1000 weights."""
    weights = numpy_helper.from_array(np.ones((rows, 1000), np.float32), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_twenty_megabytes_of_weights_show_in_a_process(tmp_path: Path) -> None:
    models = {
        "small": write_product(tmp_path / "small.onnx", 1),
        "large": write_product(tmp_path / "large.onnx", 5_000),
    }
    uses = measure_memory(models, Runtime(), num_processes=2)
    small, large = (uses[name].median_bytes or 0.0 for name in models)
    assert len(uses["large"].added_bytes) == 2
    assert 0.0 < small < 40e6
    # The weights themselves, and at most the file, the parsed model and a repacked copy beside them.
    assert 20e6 <= large - small < 100e6
