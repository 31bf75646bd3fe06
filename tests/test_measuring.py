"""Tables that are kept, found and brought up to date, and ``measure``: on a device with constructed times."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator

from nasdeploy.cli import main
from nasdeploy.cli.table_texts import measure_text
from nasdeploy.costs.by_hand import ByHandDevice
from nasdeploy.costs.calibration import Calibration
from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.device.timing import Times, statistics
from nasdeploy.costs.latency_table import (
    MAX_CEILING,
    MIN_BRIDGE,
    LatencyTable,
    measure_latency_table,
    plan_latency_table,
)
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.costs.packs import PackResult
from nasdeploy.costs.sessions import Answers, Progress, Request
from nasdeploy.costs.table_store import TableStore, default_folder
from nasdeploy.errors import ConfigError
from nasdeploy.pipeline.context import prepare
from nasdeploy.pipeline.latency_tables import conversion_to, plan_table, table_for, table_store
from nasdeploy.pipeline.measuring import MeasureResult, group_by_runtime, measure, space_to_measure
from nasdeploy.pipeline.tables import profile_costs
from nasdeploy.profiles import Runtime, load_profile
from nasdeploy.progress import Silent
from nasdeploy.runs import RunFolder
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import LayerSpec, SearchSpace, make_space

pytestmark = pytest.mark.usefixtures("one_thread")

MACHINE = {
    "cpu": "A",
    "architecture": "riscv64",
    "logical_cores": 2,
    "system": "Linux",
    "onnxruntime": "1.20.0",
}
CALL_MS = 0.002
LAW = Calibration(constant_ms=0.01, coefficients={"table": 0.9})
IMAGE_SHAPE = (1, 28, 28)


def layer_ms(spec: LayerSpec) -> float:
    """Return a made-up time, different for each layer and far above that of the call."""
    return 0.02 + 1e-5 * spec.in_channels * spec.out_channels + 1e-4 * spec.size * spec.kernel * spec.expand


@dataclass
class MadeUpDevice:
    """Answers at once. speed: factor on all times; wobble: further one, by layer; gap: of the second measurement."""

    space: SearchSpace
    runtime: Runtime = field(default_factory=Runtime)
    seed: int = 0
    speed: float = 1.0
    wobble: Callable[[LayerSpec], float] = lambda spec: 1.0
    gap: float = 0.0
    machine: dict[str, Any] = field(default_factory=lambda: dict(MACHINE))
    name: str = "a made-up device"
    asked: list[set[str]] = field(default_factory=list)

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        if requests:
            self.asked.append(set(requests[0]["models"]))
        results = []
        for done, request in enumerate(requests):
            results.append(self._result(request))
            if progress:
                progress((done + 1) / len(requests))
        return Answers(results=tuple(results), machine=self.machine)

    def _result(self, request: Request) -> dict[str, Any]:
        times = self._times()
        models = {}
        for name, path in request["models"].items():
            assert Path(path).stat().st_size > 0
            runs = np.full(50, self.speed * times[name])
            facts = {"session_ms": 1.0, "first_run_ms": 1.0, "batch_size": 1}
            same = Times(**dict.fromkeys(Times._fields, runs))  # on every clock
            models[name] = {**statistics(same), **facts}
        return {
            "models": models,
            "pinned": True,
            "spinning": True,
            "shared_pool": False,
            "peak_memory_bytes": None,
            "onnxruntime": "1.20.0",
        }

    def _times(self) -> dict[str, float]:
        space = self.space
        planned = plan_table(space, self.runtime, seed=self.seed)
        layers = space.distinct_layers()
        alone = {spec: layer_ms(spec) * self.wobble(spec) for spec in layers}
        times = {f"layer{i}": CALL_MS + alone[spec] for i, spec in enumerate(layers)} | {"call": CALL_MS}
        mask = space.candidate_mask(self.runtime.channel_multiple)
        networks = {"smallest": space.smallest(mask), "largest": space.largest(mask)}
        networks |= {f"calibration{i}": a for i, a in enumerate(planned.calibration)}
        networks |= {f"held-out{i}": a for i, a in enumerate(planned.held_out)}
        times |= {name: LAW.network_ms(space.decode(a), alone) for name, a in networks.items()}
        again = {f"again{i}": times[f"held-out{i}"] * (1.0 + self.gap) for i in range(len(planned.held_out))}
        return times | again


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The default space for small grey images and ten classes."""
    return make_space("mobile", IMAGE_SHAPE, 10)


@pytest.fixture(scope="module")
def wider() -> SearchSpace:
    """The same with eleven classes: other classifiers, the rest is known."""
    return make_space("mobile", IMAGE_SHAPE, 11)


@pytest.fixture
def notes() -> list[str]:
    """What a store says."""
    return []


@pytest.fixture
def store(tmp_path: Path, notes: list[str]) -> TableStore:
    """An empty store."""
    return TableStore(folder=tmp_path / "tables", note=notes.append)


def measured(space: SearchSpace, device: MadeUpDevice, known: LatencyTable | None = None) -> LatencyTable:
    flops = counting_tables(space)["flops"]
    return measure_latency_table(space, device.runtime, flops=flops, known=known, device=device)


def found(space: SearchSpace, device: MadeUpDevice, store: TableStore | None, **options: Any) -> Any:
    return table_for(space, device.runtime, seed=0, observer=Silent(), store=store, device=device, **options)


@pytest.fixture(scope="module")
def table(space: SearchSpace) -> LatencyTable:
    """The whole table of the space."""
    return measured(space, MadeUpDevice(space))


# --- the whole table


def test_a_whole_table_is_what_the_times_say(space: SearchSpace, table: LatencyTable) -> None:
    assert {e.spec: e.ms for e in table.entries} == pytest.approx(
        {spec: layer_ms(spec) for spec in space.distinct_layers()}
    )
    assert table.calibration.constant_ms == pytest.approx(LAW.constant_ms)
    assert table.calibration.coefficients == pytest.approx(LAW.coefficients)
    assert (table.num_reused, table.bridge, table.machine) == (0, None, MACHINE)
    assert table.accuracy.mape == pytest.approx(0.0, abs=1e-9)
    assert table.accuracy.spearman == pytest.approx(1.0)
    assert (table.accuracy.ceiling, table.weakness) == (0.0, "")


def test_flops_are_judged_on_the_same_networks(space: SearchSpace, table: LatencyTable) -> None:
    planned = plan_table(space, Runtime(), seed=0)
    alone = {spec: layer_ms(spec) for spec in space.distinct_layers()}

    def times(networks: Sequence[Any]) -> np.ndarray:
        return np.array([LAW.network_ms(space.decode(a), alone) for a in networks])

    def flops(networks: Sequence[Any]) -> np.ndarray:
        return counting_tables(space)["flops"].of(np.array([a.choices for a in networks]))

    seen = times(planned.calibration)
    line = np.polyfit(flops(planned.calibration), seen, 1, w=1.0 / seen)  # the same fit, by another route
    errors = np.abs(np.polyval(line, flops(planned.held_out)) / times(planned.held_out) - 1.0)
    assert table.accuracy.flops_mape == pytest.approx(errors.mean())
    assert 0.5 < table.accuracy.flops_spearman < 1.0


# --- incremental


def test_only_new_layers_and_a_bridge_are_measured(
    space: SearchSpace, wider: SearchSpace, table: LatencyTable
) -> None:
    device = MadeUpDevice(wider, speed=1.25)
    updated = measured(wider, device, table)
    layers = wider.distinct_layers()
    new = {f"layer{i}" for i, spec in enumerate(layers) if spec not in set(space.distinct_layers())}
    (asked,) = device.asked
    asked_layers = {name for name in asked if name.startswith("layer")}
    assert new < asked_layers
    assert len(asked_layers - new) == MIN_BRIDGE
    assert {e.spec: e.ms for e in updated.entries} == pytest.approx(
        {spec: 1.25 * layer_ms(spec) for spec in layers}
    )
    assert [e.spec for e in updated.entries] == list(layers)
    assert updated.num_reused == len(layers) - len(asked_layers)
    assert updated.bridge is not None
    assert updated.bridge.num_layers == MIN_BRIDGE
    assert updated.bridge.drift == pytest.approx(1.25)
    assert updated.bridge.spread == pytest.approx(0.0, abs=1e-9)
    assert updated.bridge.measured_at == table.measured_at
    assert updated.accuracy.mape == pytest.approx(0.0, abs=1e-9)
    updated.cost_table(wider)


def test_the_bridge_reaches_from_the_fastest_to_the_slowest_layers(
    wider: SearchSpace, table: LatencyTable
) -> None:
    planned = plan_table(wider, Runtime(), seed=0).reusing(table)
    assert planned is not None
    times = sorted(entry.ms for entry in (*planned.reused.values(), *planned.bridge.values()))
    places = [times.index(entry.ms) / len(times) for entry in planned.bridge.values()]
    assert min(places) < 0.1
    assert max(places) > 0.9
    assert not planned.reused.keys() & planned.bridge.keys()


def test_everything_is_measured_where_the_bridge_disagrees(wider: SearchSpace, table: LatencyTable) -> None:
    bridge = plan_table(wider, Runtime(), seed=0).reusing(table).bridge  # type: ignore[union-attr]
    slow = {spec for i, spec in enumerate(bridge) if i % 2}
    device = MadeUpDevice(wider, wobble=lambda spec: 1.2 if spec in slow else 1.0)
    updated = measured(wider, device, table)
    assert len(device.asked) == 2
    assert sum(name.startswith("layer") for name in device.asked[1]) == len(wider.distinct_layers())
    assert (updated.bridge, updated.num_reused) == (None, 0)
    assert {e.spec: e.ms for e in updated.entries} == pytest.approx(
        {spec: layer_ms(spec) * (1.2 if spec in slow else 1.0) for spec in wider.distinct_layers()}
    )


def test_a_few_layers_that_disagree_change_nothing(wider: SearchSpace, table: LatencyTable) -> None:
    odd = next(iter(plan_table(wider, Runtime(), seed=0).reusing(table).bridge))  # type: ignore[union-attr]
    device = MadeUpDevice(wider, wobble=lambda spec: 1.5 if spec == odd else 1.0)
    updated = measured(wider, device, table)
    assert len(device.asked) == 1
    assert updated.bridge is not None
    assert updated.bridge.drift == pytest.approx(1.0)
    assert updated.num_reused > 0


def test_everything_is_measured_where_the_reused_layers_predict_badly(
    wider: SearchSpace, table: LatencyTable
) -> None:
    """The bridge may agree by luck; the networks do not."""
    reused = plan_table(wider, Runtime(), seed=0).reusing(table).reused  # type: ignore[union-attr]
    slow = {spec for i, spec in enumerate(reused) if i % 2}
    device = MadeUpDevice(wider, wobble=lambda spec: 4.0 if spec in slow else 1.0)
    updated = measured(wider, device, table)
    assert len(device.asked) == 2
    assert (updated.bridge, updated.weakness) == (None, "")


def test_what_was_reused_is_not_reused_again(
    space: SearchSpace, wider: SearchSpace, table: LatencyTable
) -> None:
    """An error must not travel from table to table."""
    second = measured(wider, MadeUpDevice(wider), table)
    planned = plan_table(make_space("mobile", IMAGE_SHAPE, 12), Runtime(), seed=0)
    of_first, of_second = planned.reusing(table), planned.reusing(second)
    assert of_first is not None
    assert of_second is None  # all that it has measured itself is the bridge, and its own classifiers
    assert all(not entry.reused for entry in of_first.reused.values())


def test_an_unrelated_table_is_of_no_use(table: LatencyTable) -> None:
    other = make_space("mobile", (3, 40, 40), 10)
    assert plan_table(other, Runtime(), seed=0).reusing(table) is None


# --- the store


def test_a_table_is_found_again_by_space_runtime_and_machine(
    space: SearchSpace, wider: SearchSpace, table: LatencyTable, store: TableStore, notes: list[str]
) -> None:
    assert store.find(space, Runtime(), MACHINE) is None
    path = store.put(table)
    assert path == store.path_of(table)
    assert store.find(space, Runtime(), MACHINE) == table
    assert store.find(wider, Runtime(), MACHINE) is None
    assert store.find(space, Runtime(threads=2), MACHINE) is None
    assert store.find(space, Runtime(channel_multiple=4), MACHINE) is None
    assert store.find(space, Runtime(), MACHINE | {"onnxruntime": "1.21.0"}) is None
    assert store.find(space, Runtime(), MACHINE | {"cpu": "B"}) is None
    assert notes == []
    validator = Draft202012Validator(load_schema("latency-table"))
    assert list(validator.iter_errors(json.loads(store.path_of(table).read_text()))) == []


def damaged(text: str, change: dict[str, Any]) -> str:
    return json.dumps(json.loads(text) | change)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:500],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: "\x00\xff",
        lambda text: damaged(text, {"schema": "nasdeploy/latency-table/1"}),
        lambda text: damaged(text, {"entries": [], "extra": 1}),
        lambda text: damaged(text, {"entries": []}),
        lambda text: damaged(text, {"seed": "0"}),
        lambda text: damaged(text, {"smallest_ms": -1.0}),
        lambda text: damaged(text, {"runtime_key": "another"}),
        lambda text: damaged(text, {"machine": MACHINE | {"cpu": "B"}}),
        lambda text: damaged(text, {"space_fingerprint": "0" * 16}),
        lambda text: text.replace('"ms": ', '"ms": NaN, "old": ', 1),
    ],
)
def test_a_damaged_or_foreign_file_is_left_alone_with_a_note(
    space: SearchSpace, table: LatencyTable, store: TableStore, notes: list[str], spoil: Callable[[str], str]
) -> None:
    path = store.put(table)
    assert path is not None
    spoilt = spoil(path.read_text(encoding="utf-8"))
    path.write_text(spoilt, encoding="latin-1")
    assert store.find(space, Runtime(), MACHINE) is None
    (note,) = notes
    assert note.startswith(f"{path}: ")
    assert note.endswith("it is not used, and may be deleted")
    assert "\n" not in note


def test_a_new_table_takes_the_place_of_a_damaged_one(
    space: SearchSpace, table: LatencyTable, store: TableStore, notes: list[str]
) -> None:
    path = store.put(table)
    assert path is not None
    path.write_text("spoilt", encoding="utf-8")
    new = found(space, MadeUpDevice(space), store)
    assert new.origin == "measured"
    assert store.find(space, Runtime(), MACHINE) == new.table
    assert len(notes) == 1


def test_a_folder_in_place_of_a_file_is_no_traceback(
    space: SearchSpace, table: LatencyTable, store: TableStore, notes: list[str]
) -> None:
    store.path_of(table).mkdir(parents=True)
    assert store.find(space, Runtime(), MACHINE) is None
    assert store.put(table) is None
    assert ["cannot be read" in notes[0], "cannot be written" in notes[1]] == [True, True]


def test_a_weak_table_is_not_kept(
    space: SearchSpace, table: LatencyTable, store: TableStore, notes: list[str]
) -> None:
    for change, reason in (
        ({"mape": 0.0501}, "its error is 5.0 %, more than 5 %"),
        ({"ceiling": 0.06}, "two measurements of one network differ by 6.0 %"),
    ):
        weak = replace(table, accuracy=replace(table.accuracy, **change))
        assert store.put(weak) is None
        assert reason in notes.pop()
    assert not store.folder.exists()
    assert store.put(replace(table, accuracy=replace(table.accuracy, mape=0.05, ceiling=0.05))) is not None


def test_the_table_that_shares_most_is_found(
    space: SearchSpace, wider: SearchSpace, table: LatencyTable, store: TableStore, notes: list[str]
) -> None:
    assert store.find_related(wider, Runtime(), MACHINE) is None
    store.put(table)
    other = make_space("mobile", (3, 28, 28), 10)
    store.put(measured(other, MadeUpDevice(other)))
    assert store.find_related(wider, Runtime(), MACHINE) == table
    assert store.find_related(space, Runtime(channel_multiple=16), MACHINE) == table
    assert store.find_related(wider, Runtime(threads=2), MACHINE) is None
    assert store.find_related(wider, Runtime(), MACHINE | {"cpu": "B"}) is None
    assert store.find_related(make_space("mobile", (3, 40, 40), 5), Runtime(), MACHINE) is None
    assert notes == []


# --- found or measured


def test_a_table_is_measured_once_and_then_found(
    space: SearchSpace, wider: SearchSpace, store: TableStore
) -> None:
    device = MadeUpDevice(space)
    first, second = found(space, device, store), found(space, device, store)
    assert len(device.asked) == 1
    assert (first.origin, second.origin) == ("measured", "cache")
    assert second.table == first.table
    assert first.stored == second.stored == store.path_of(first.table)
    assert found(wider, MadeUpDevice(wider), store).table.num_reused > 0
    assert found(space, device, None).stored is None
    assert len(device.asked) == 2


def test_fresh_measures_all_and_replaces(space: SearchSpace, store: TableStore) -> None:
    found(space, MadeUpDevice(space), store)
    slower = MadeUpDevice(space, speed=2.0)
    fresh = found(space, slower, store, fresh=True)
    assert (fresh.origin, fresh.table.num_reused) == ("measured", 0)
    assert found(space, slower, store).table == fresh.table


def test_another_channel_grid_measures_no_layer_but_the_bridge(space: SearchSpace, store: TableStore) -> None:
    found(space, MadeUpDevice(space), store)
    device = MadeUpDevice(space, runtime=Runtime(channel_multiple=4))
    made = found(space, device, store).table
    assert sum(name.startswith("layer") for name in device.asked[0]) == MIN_BRIDGE
    assert made.channel_multiple == 4


def test_tables_lie_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "latency"
    assert table_store(Silent()).folder == tmp_path / "latency"


def test_only_other_precisions_are_converted() -> None:
    assert conversion_to("fp32") is None
    assert conversion_to("int8") is not None


# --- measure


def test_profiles_that_share_a_runtime_are_measured_once() -> None:
    groups = group_by_runtime(["cpu-tight", load_profile("edge-cpu-1t"), "tiny-flash", "gateway-cpu-2t"])
    assert [group.profiles for group in groups] == [
        ("cpu-tight", "edge-cpu-1t"),
        ("tiny-flash",),  # channels in multiples of 16
        ("gateway-cpu-2t",),
    ]
    with pytest.raises(ConfigError, match="profiles: none; expected at least one"):
        group_by_runtime([])


def test_the_space_is_that_of_the_data_or_of_the_numbers() -> None:
    assert space_to_measure().fingerprint() == make_space("mobile", (1, 28, 28), 10).fingerprint()
    several = space_to_measure(image_shape=(3, 32, 32), num_classes=5, image_sizes=(48, 32, 48))
    assert several.fingerprint() == make_space("mobile", (3, 48, 48), 5, (32, 48)).fingerprint()
    embedded = space_to_measure(data="fashion-mnist", image_sizes=(32,))
    assert embedded.fingerprint() == make_space("mobile", (1, 32, 32), 10).fingerprint()
    with pytest.raises(ConfigError, match="has its own image shape and classes"):
        space_to_measure(data="fashion-mnist", num_classes=3)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


def measure_on(device: MadeUpDevice, **options: Any) -> MeasureResult:
    return measure(["cpu-tight", "cpu-roomy"], image_shape=IMAGE_SHAPE, device=device, **options)


def test_result_follows_its_schema(space: SearchSpace, own_folder: Path) -> None:
    result = measure_on(MadeUpDevice(space))
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(Draft202012Validator(load_schema("measure")).iter_errors(data)) == []
    (one,) = data["runtimes"]
    assert one["profiles"] == ["cpu-tight", "cpu-roomy"]
    assert Path(one["stored"]).parent == own_folder
    assert LatencyTable.from_json(one["table"]) == result.runtimes[0].table
    assert (result.exit_code, result.noise) == (0, "")


def test_schemas_of_a_table_are_one() -> None:
    alone = {
        key: value for key, value in load_schema("latency-table").items() if key not in ("$schema", "title")
    }
    assert load_schema("profile-latency")["properties"]["table"] == alone
    runtime = load_schema("measure")["properties"]["runtimes"]["items"]
    assert runtime["properties"]["table"] == alone


def test_text_tells_what_was_measured_and_how_well_it_predicts(
    space: SearchSpace, wider: SearchSpace, own_folder: Path
) -> None:
    first = measure_text(measure_on(MadeUpDevice(space)))
    again = measure_text(measure_on(MadeUpDevice(space)))
    updated = measure_text(measure_on(MadeUpDevice(wider, speed=1.25), num_classes=11))
    count = len(space.distinct_layers())
    assert "space mobile: images of 1x28x28, 10 classes; measured on a made-up device" in first
    assert "cpu-tight, cpu-roomy: measured in " in first
    assert f"layers: {count} measured\n" in first
    assert str(own_folder) in first
    rows = {line.split("  ")[2]: line.split() for line in first.splitlines() if line.startswith("    ")}
    assert rows["this table"][2:] == ["0.0", "%", "0.0", "%", "1.000"]
    assert rows["FLOPs"][-1] < "1.000"
    assert rows["measured twice"][2:] == ["0.0", "%", "-", "1.000"]
    dearest = max(space.distinct_layers(), key=layer_ms)
    row = first.splitlines()[first.splitlines().index("  its 5 dearest layers:") + 2]
    assert f"{dearest.in_channels} to {dearest.out_channels}, " in row
    assert f"{1e3 * layer_ms(dearest):.4g}us" in row
    assert "nothing measured now" in again
    assert "times x1.250 (16 layers in both; spread 0.0 %)" in updated


def invoke(*arguments: str, device: MadeUpDevice) -> Result:
    pipeline = SimpleNamespace(measure=partial(measure, device=device))
    return CliRunner().invoke(main, ["measure", *arguments], obj=pipeline)


def test_verb_prints_and_writes_the_tables(space: SearchSpace, own_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "tables.json"
    device = MadeUpDevice(space)
    options = ("-p", "cpu-tight", "--image-shape", "1x28x28", "-q")
    result = invoke(*options, "-o", str(path), device=device)
    assert result.exit_code == 0, result.output
    assert "measured on a made-up device" in result.stdout
    written = json.loads(path.read_text(encoding="utf-8"))
    printed = json.loads(invoke(*options, "--json", device=device).stdout)
    assert printed["runtimes"][0]["origin"] == "cache"
    assert printed["runtimes"][0]["table"] == written["runtimes"][0]["table"]
    assert len(device.asked) == 1
    assert invoke(*options, "--fresh", device=device).exit_code == 0
    assert len(device.asked) == 2


def test_a_noisy_machine_is_exit_code_5_and_nothing_is_kept(
    space: SearchSpace, own_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tables.json"
    device = MadeUpDevice(space, gap=1.2 * MAX_CEILING)
    result = invoke("-p", "cpu-tight", "--image-shape", "1x28x28", "-o", str(path), device=device)
    assert result.exit_code == 5
    assert "kept: no" in result.stdout
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error == [
        "error: cpu-tight: two measurements of one network differ by 6.0 % on average; expected at most 5 %: "
        "a machine with less other work"
    ]
    assert len(json.loads(path.read_text(encoding="utf-8"))["runtimes"]) == 1
    assert not own_folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-shape", "28x28"), "'28x28': expected channels, height and width, such as 3x224x224"),
        (("--data", "fashion-mnist", "--classes", "3"), "--data has its own image shape and classes"),
        (("-p", "no-such"), "no-such"),
        (("-o", "/dev/null/x.json"), "its folder cannot be made"),
        (("--image-shape", "1x28x29"), "images are 28x29 pixels"),
        (("-v", "-q"), "exclude each other"),
    ],
)
def test_wrong_usage_is_one_line(
    space: SearchSpace, arguments: tuple[str, ...], message: str, own_folder: Path
) -> None:
    device = MadeUpDevice(space)
    result = invoke(*arguments, device=device)
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert message in last
    assert device.asked == []


def test_plan_of_a_table_is_the_same_every_time(space: SearchSpace) -> None:
    one, other = (plan_table(space, Runtime(), seed=3) for _ in range(2))
    assert (one.calibration, one.held_out) == (other.calibration, other.held_out)
    flops = counting_tables(space)["flops"]
    assert plan_latency_table(space, Runtime(), flops=flops, seed=4).held_out != one.held_out


# --- a build


def costs_in(folder: Path, **measure_settings: Any) -> dict[str, Any]:
    """Return what a build on the embedded images keeps of its latency tables; nothing is trained."""
    settings = BuildSettings(
        profiles=("cpu-tight", "cpu-roomy"), measure={"cache": True} | measure_settings, device="cpu"
    )
    profile_costs(prepare(settings, folder=RunFolder(folder), observer=Silent()))
    paths = [folder / "latency" / f"{name}.json" for name in settings.profiles]
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    validator = Draft202012Validator(load_schema("profile-latency"))
    assert [error.message for one in stored for error in validator.iter_errors(one)] == []
    return stored[0]


def test_a_build_finds_the_table_that_measure_left(
    space: SearchSpace, tmp_path: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(measured(space, MadeUpDevice(space)), machine=machine_fingerprint())
    table_store(Silent()).put(kept)
    asked: list[LatencyTable | None] = []

    def measuring(*_: Any, known: LatencyTable | None, **__: Any) -> LatencyTable:
        asked.append(known)
        return replace(kept, seconds=7.0)

    monkeypatch.setattr("nasdeploy.pipeline.latency_tables.measure_latency_table", measuring)
    stored = costs_in(tmp_path / "one")
    assert (stored["origin"], asked) == ("cache", [])
    assert stored["table"]["measured_at"] == kept.measured_at
    assert LatencyTable.from_json(stored["table"]) == kept
    stored = costs_in(tmp_path / "two", cache=False)
    assert (stored["origin"], stored["table"]["seconds"]) == ("measured", 7.0)
    assert asked == [None]  # once for both profiles, and without a look at what is kept
    assert table_store(Silent()).find(space, Runtime(), machine_fingerprint()) == kept  # nor was it replaced


def test_the_run_that_is_named_goes_before_the_cache(
    space: SearchSpace, tmp_path: Path, own_folder: Path
) -> None:
    table = replace(measured(space, MadeUpDevice(space)), machine=machine_fingerprint())
    table_store(Silent()).put(table)
    costs_in(tmp_path / "one")
    table_store(Silent()).put(replace(table, seconds=9.0))
    settings = BuildSettings(profiles=("cpu-tight",), device="cpu", latency_from=str(tmp_path / "one"))
    profile_costs(prepare(settings, folder=RunFolder(tmp_path / "two"), observer=Silent()))
    stored = json.loads((tmp_path / "two" / "latency" / "cpu-tight.json").read_text(encoding="utf-8"))
    assert stored["origin"] == "run"
    assert stored["table"]["seconds"] == table.seconds


def test_a_device_by_hand_is_asked_for_whole_tables(
    space: SearchSpace, wider: SearchSpace, store: TableStore
) -> None:
    """Its answers are those to a pack, which is written without a look at what is kept."""
    device = MadeUpDevice(wider, machine=dict(MACHINE))
    found(space, MadeUpDevice(space), store)

    def answers_to(requests: Sequence[Request]) -> Answers | None:
        layers = {name for name in (requests[0]["models"] if requests else ()) if name.startswith("layer")}
        return device.carry_out(requests) if len(layers) in (0, len(wider.distinct_layers())) else None

    result = cast(PackResult, SimpleNamespace(answers_to=answers_to))
    by_hand = ByHandDevice(name="a device", remedy="", results=(result,))
    made = table_for(wider, Runtime(), seed=0, observer=Silent(), store=store, device=by_hand).table
    assert made.num_reused == 0
