"""``bench``: what is compared and how, without a clock; the files that it takes; one real measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper

from nasdeploy.cli import main
from nasdeploy.costs import comparison
from nasdeploy.costs.comparison import BenchProtocol, Comparison, relative
from nasdeploy.costs.device.feeds import SessionError, batch_of, make_feed
from nasdeploy.costs.device.timing import Clocks, Plan, warm_up
from nasdeploy.costs.latency import (
    BlockStats,
    Conditions,
    ModelLatency,
    block_ratios,
    collect,
    noise_floor,
)
from nasdeploy.costs.sessions import HERE, Answers, Progress, Request, block_requests, start_requests
from nasdeploy.costs.startup import summarise_starts
from nasdeploy.errors import ConfigError, UsageError
from nasdeploy.exporters.structure import TensorInfo
from nasdeploy.files import write_whole
from nasdeploy.pipeline.bench_files import distinct_labels
from nasdeploy.pipeline.benching import BenchResult, bench
from nasdeploy.pipeline.input_shapes import Batch, resolve_shapes
from nasdeploy.profiles import Runtime
from nasdeploy.schemas import load_schema

SHORT = BenchProtocol(blocks=2, min_runs=10, min_seconds=0.0, num_starts=1)


def save(
    path: Path,
    inputs: dict[str, tuple[int, list[int | str | None]]],
    *,
    opset: int = 18,
    ir_version: int = 10,
) -> Path:
    """Write a model that gives every input back; inputs: {name: (type, shape)}."""
    given = [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()]
    returned = [helper.make_tensor_value_info(f"{name}.out", *what) for name, what in inputs.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}.out"]) for name in inputs]
    graph = helper.make_graph(nodes, "g", given, returned)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    write_whole(path, model.SerializeToString())
    return path


# ---- labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a.onnx", "x/b.onnx"], ["a.onnx", "b.onnx"]),
        (["x/m.onnx", "y/m.onnx", "y/n.onnx"], ["x/m.onnx", "y/m.onnx", "n.onnx"]),
        (["r/a/m.onnx", "s/a/m.onnx", "s/b/m.onnx"], ["r/a/m.onnx", "s/a/m.onnx", "b/m.onnx"]),
        (["m.onnx", "m.onnx", "./m.onnx"], ["m.onnx", "m.onnx (2)", "m.onnx (3)"]),
        (["/m.onnx", "/m/m.onnx"], ["/m.onnx", "m/m.onnx"]),
    ],
)
def test_labels_are_short_and_distinct(paths: list[str], labels: list[str]) -> None:
    assert distinct_labels([Path(path) for path in paths]) == labels


# ---- shapes of inputs -----------------------------------------------------------------------------------------


def tensor(name: str, *shape: int | str | None) -> TensorInfo:
    return TensorInfo(name=name, dtype="float", shape=shape)


def resolve(
    *inputs: TensorInfo, batch: Batch | None = None, **given: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    return resolve_shapes(inputs, path=Path("m.onnx"), batch=batch or Batch(size=4), given=given)


def test_an_open_first_dimension_is_the_batch() -> None:
    for size in ("N", None, "?", 0, -1):
        assert resolve(tensor("x", size, 3, 8, 8)) == {"x": (4, 3, 8, 8)}


def test_a_fixed_batch_stays_unless_another_was_asked_for() -> None:
    fixed = tensor("x", 1, 3, 8, 8)
    assert resolve(fixed) == {"x": (1, 3, 8, 8)}
    assert resolve(fixed, batch=Batch(size=1, asked_by="--batch-size")) == {"x": (1, 3, 8, 8)}
    with pytest.raises(ConfigError) as caught:
        resolve(fixed, batch=Batch(size=4, asked_by="--batch-size"))
    assert str(caught.value) == (
        "m.onnx: its input 'x' is 1x3x8x8, a fixed batch of 1; expected 4, as --batch-size says"
    )


def test_other_open_dimensions_are_asked_for_with_an_example() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tensor("x", None, 3, "?", "?"))
    assert str(caught.value) == (
        "m.onnx: its input 'x' is 4x3x?x?; expected the sizes that it leaves open, such as --shape x=4x3x224x224"
    )
    with pytest.raises(ConfigError, match=r"'ids' is 4xlength; .* --shape ids=4x128"):
        resolve(tensor("ids", "N", "length"))


def test_dimensions_of_one_name_have_one_size() -> None:
    inputs = (tensor("ids", "N", "length"), tensor("mask", "N", "length"), tensor("pairs", "length", "N"))
    assert resolve(*inputs, ids=(2, 16)) == {"ids": (2, 16), "mask": (2, 16), "pairs": (16, 2)}
    with pytest.raises(ConfigError, match=r"makes the dimension 'length' of m\.onnx both 16 and 17"):
        resolve(*inputs, ids=(2, 16), mask=(2, 17))


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 3, 8), (2, 1, 8, 8)])
def test_a_shape_that_the_file_excludes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"the input of m\.onnx is Nx3x8x8; expected a shape that fits it"):
        resolve(tensor("x", "N", 3, 8, 8), x=shape)


def test_a_stated_shape_goes_before_the_batch_size() -> None:
    asked = Batch(size=4, asked_by="--batch-size")
    assert resolve(tensor("x", "N", 3), batch=asked, x=(7, 3)) == {"x": (7, 3)}


def test_an_input_without_dimensions_takes_any_shape() -> None:
    assert resolve(tensor("x")) == {"x": ()}
    assert resolve(tensor("x"), x=(1, 2)) == {"x": (1, 2)}


# ---- comparison -----------------------------------------------------------------------------------------------

CONDITIONS = Conditions(
    provider="CPUExecutionProvider",
    threads=1,
    batch_size=1,
    pinned=True,
    spinning=True,
    shared_pool=False,
    onnxruntime="1.20.0",
)


def measured(*cpu_ms: float, wall: float = 1.0) -> ModelLatency:
    """Return a model with these medians of its blocks; the wall clock shows ``wall`` times as much."""
    blocks = [
        BlockStats(
            n=40,
            min_ms=0.9 * ms,
            mean_ms=1.1 * ms,
            wall_ms={50: wall * ms, 90: None, 95: None, 99: None},
            cpu_ms={50: ms, 90: None, 95: None, 99: None},
            cpu_p25_ms=ms,
            wall_over_cpu=wall,
            session_ms=3.0,
            first_run_ms=1.0,
            peak_memory_bytes=None,
        )
        for ms in cpu_ms
    ]
    return ModelLatency(conditions=CONDITIONS, blocks=tuple(blocks))


FIRST, AGAIN = measured(1.0, 2.0, 4.0), measured(1.01, 1.98, 4.0)


def test_noise_floor_is_the_gap_of_the_worst_block() -> None:
    assert block_ratios(AGAIN, FIRST) == pytest.approx([1.01, 0.99, 1.0])
    assert noise_floor(FIRST, AGAIN) == pytest.approx(0.01)
    assert noise_floor(FIRST, FIRST) == 0.0


@pytest.mark.parametrize(
    ("cpu_ms", "ratio", "verdict"),
    [
        ((1.5, 3.0, 6.0), 1.5, "slower"),
        ((0.5, 1.0, 2.0), 0.5, "faster"),
        ((1.015, 2.03, 4.06), 1.015, "no difference"),
        ((0.985, 1.97, 3.94), 0.985, "no difference"),
        ((1.03, 2.0, 4.12), 1.03, "slower"),  # the middle one of 1.03, 1.0, 1.03
        ((1.0, 2.0, 4.0), 1.0, "no difference"),
    ],
)
def test_verdict_by_twice_the_noise_floor(cpu_ms: tuple[float, ...], ratio: float, verdict: str) -> None:
    found = relative(measured(*cpu_ms), FIRST, floor=0.01)
    assert (found.ratio, found.verdict) == (pytest.approx(ratio), verdict)


def test_equal_times_are_no_difference_even_without_noise() -> None:
    assert relative(FIRST, FIRST, floor=0.0).verdict == "no difference"
    assert relative(measured(1.001, 2.002, 4.004), FIRST, floor=0.0).verdict == "slower"


def test_ratios_are_taken_block_by_block() -> None:
    found = relative(measured(2.0, 2.0, 2.0), FIRST, floor=0.01)
    assert (found.smallest_ratio, found.ratio, found.largest_ratio) == (0.5, 1.0, 2.0)


def compared(*, reference: ModelLatency) -> Comparison:
    return Comparison(models={"a": FIRST, "b": measured(2.0, 4.0, 8.0)}, again=AGAIN, reference=reference)


def test_models_are_compared_with_the_first_and_judged_by_its_second_measurement() -> None:
    found = compared(reference=measured(1.0, 1.0))
    assert found.noise_floor == pytest.approx(0.01)
    assert (found.relative("b").ratio, found.relative("b").verdict) == (2.0, "slower")
    assert found.relative("a").verdict == "no difference"


def test_a_machine_is_stable_up_to_five_per_cent() -> None:
    calm, restless = compared(reference=measured(1.0, 1.04)), compared(reference=measured(1.0, 1.06))
    assert (calm.stable, calm.instability) == (True, "")
    assert not restless.stable
    assert restless.instability.startswith(
        "unstable machine: the reference model took 6.0 % longer in one block than in another; expected at most 5 %"
    )


def test_statistics_of_a_row() -> None:
    latency = measured(1.0, 3.0, 2.0, wall=2.0)
    assert latency.p50_range_ms == (2.0, 6.0)
    assert (latency.min_ms, latency.mean_ms) == (0.9, 2.2)
    assert latency.contended_blocks == 3


def test_throughput_is_that_of_the_batch_that_a_file_takes() -> None:
    row = {
        "n": 40,
        "min_ms": 1.0,
        "mean_ms": 2.0,
        "wall_ms": {"p50": 2.0},
        "cpu_ms": {"p50": 2.0},
        "cpu_p25_ms": 2.0,
        "wall_over_cpu": 1.0,
        "session_ms": 1.0,
        "first_run_ms": 1.0,
    }
    result = {
        "models": {"one": {**row, "batch_size": 1}, "many": {**row, "batch_size": 16}},
        "peak_memory_bytes": None,
        **{name: getattr(CONDITIONS, name) for name in ("pinned", "spinning", "shared_pool", "onnxruntime")},
    }
    found = collect(Answers(results=(result, result), machine={}), Runtime(batch_size=4))
    assert {name: latency.images_per_second for name, latency in found.items()} == {
        "one": 500.0,
        "many": 8000.0,
    }


def test_cold_start_is_the_median_of_processes_and_of_their_sums() -> None:
    results = [
        {
            "models": {"model": {"session_ms": session, "first_run_ms": first, "batch_size": 1}},
            "peak_memory_bytes": peak,
            "memory_before_bytes": None,
        }
        for session, first, peak in ((10.0, 1.0, 100), (20.0, 9.0, 300), (30.0, 2.0, 200))
    ]
    found = summarise_starts(results)
    assert (found.cold_start_ms, found.session_ms, found.first_run_ms) == (29.0, 20.0, 2.0)
    assert (found.num_processes, found.peak_memory_bytes, found.memory_before_bytes) == (3, 200, None)
    assert found.added_memory_bytes is None


def test_added_memory_is_that_of_the_process_that_grew_most() -> None:
    results = [
        {
            "models": {"model": {"session_ms": 1.0, "first_run_ms": 1.0, "batch_size": 1}},
            "peak_memory_bytes": peak,
            "memory_before_bytes": before,
        }
        for peak, before in ((100, 60), (110, 65), (120, 90))
    ]
    assert summarise_starts(results).added_memory_bytes == 45


# ---- the worker -----------------------------------------------------------------------------------------------


def test_a_slow_model_is_taken_as_warm_after_its_time() -> None:
    now = 0

    def run() -> None:
        nonlocal now
        now += 4_000_000_000

    clocks = Clocks(lambda: now, lambda: now)
    assert warm_up(run, clocks, max_seconds=10.0) == 4000.0
    assert now == 3 * 4_000_000_000


TYPES = {
    "f32": (TensorProto.FLOAT, np.float32),
    "f16": (TensorProto.FLOAT16, np.float16),
    "f64": (TensorProto.DOUBLE, np.float64),
    "u8": (TensorProto.UINT8, np.uint8),
    "i8": (TensorProto.INT8, np.int8),
    "i32": (TensorProto.INT32, np.int32),
    "i64": (TensorProto.INT64, np.int64),
    "yes": (TensorProto.BOOL, np.bool_),
}


class FakeSession:
    """The inputs of a session."""

    class Input:
        def __init__(self, name: str, kind: str, shape: list[int | str]) -> None:
            self.name, self.type, self.shape = name, f"tensor({kind})", shape

    def __init__(self, **inputs: str) -> None:
        self._inputs = [self.Input(name, kind, ["N", 5]) for name, kind in inputs.items()]

    def get_inputs(self) -> list[Input]:
        return self._inputs


def feed(session: FakeSession, **shapes: list[int]) -> dict[str, np.ndarray]:
    return make_feed(session, "m.onnx", 3, np.random.default_rng(0), shapes)


def test_inputs_are_pixels_or_small_indices() -> None:
    made = feed(FakeSession(pixels="uint8", image="float", ids="int64", flag="bool"))
    assert {name: (values.shape, values.dtype.name) for name, values in made.items()} == {
        "pixels": ((3, 5), "uint8"),
        "image": ((3, 5), "float32"),
        "ids": ((3, 5), "int64"),
        "flag": ((3, 5), "bool"),
    }
    assert made["image"].max() > 1.0
    assert set(np.unique(made["ids"])) <= {0, 1}


def test_stated_shapes_are_used() -> None:
    made = feed(FakeSession(a="float", b="float"), b=[2, 7])
    assert (made["a"].shape, made["b"].shape) == ((3, 5), (2, 7))
    assert feed(FakeSession(a="float"), a=[])["a"].shape == ()


def test_what_is_no_tensor_of_numbers_is_refused() -> None:
    with pytest.raises(SessionError, match=r"input 'a' is a tensor\(string\); expected a tensor of"):
        feed(FakeSession(a="string"))


@pytest.mark.parametrize(("shape", "batch"), [((8, 3, 2, 2), 8), ((5, 2), 5), ((7,), 1), ((), 1)])
def test_batch_is_the_first_dimension_of_what_is_no_vector(shape: tuple[int, ...], batch: int) -> None:
    assert batch_of({"x": np.zeros(shape)}, 1) == batch


def test_a_block_of_files_of_every_type_and_batch(tmp_path: Path) -> None:
    everything = {name: (kind, ["N", 2]) for name, (kind, _) in TYPES.items()}
    paths = {
        "types": save(tmp_path / "types.onnx", everything),
        "fixed": save(tmp_path / "fixed.onnx", {"x": (TensorProto.FLOAT, [6, 2])}),
    }
    plan = Plan(rounds=1, min_runs=5, min_seconds=0.0, max_seconds=1.0)
    requests = block_requests(
        paths, Runtime(batch_size=2), plan=plan, blocks=1, seed=0, shapes={"types": {"u8": (3, 2)}}
    )
    (result,) = HERE.carry_out(requests).results
    assert {name: row["batch_size"] for name, row in result["models"].items()} == {"types": 2, "fixed": 6}


def test_a_start_alone_measures_nothing_more(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", {"x": (TensorProto.FLOAT, ["N", "L"])})
    requests = start_requests(path, Runtime(batch_size=2), count=1, seed=0, shapes={"x": (2, 3)})
    (result,) = HERE.carry_out(requests).results
    assert set(result["models"]["model"]) == {"session_ms", "first_run_ms", "batch_size"}
    assert (
        result["peak_memory_bytes"] is None
        or result["peak_memory_bytes"] >= result["memory_before_bytes"] > 0
    )


def test_inputs_beyond_the_memory_are_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", {"x": (TensorProto.FLOAT, ["N", "L"])})
    with pytest.raises(ConfigError, match="its inputs do not fit into memory") as caught:
        HERE.carry_out(start_requests(path, Runtime(), count=1, seed=0, shapes={"x": (2**40, 2**40)}))
    assert "\n" not in str(caught.value)


# ---- the whole ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """Two files of one name, of which one has several inputs and an open length."""
    folder = tmp_path_factory.mktemp("bench")
    first = save(folder / "a" / "m.onnx", {"x": (TensorProto.FLOAT, ["N", 3])})
    second = save(
        folder / "b" / "m.onnx",
        {"ids": (TensorProto.INT64, ["N", "length"]), "mask": (TensorProto.UINT8, ["N", "length"])},
    )
    return bench([first, str(second)], batch_size=2, shapes={"ids": (2, 5)}, protocol=SHORT, seed=3)


def test_result_follows_its_schema(result: BenchResult) -> None:
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [error.message for error in Draft202012Validator(load_schema("bench")).iter_errors(data)] == []


def test_result_tells_what_was_measured_and_how(result: BenchResult) -> None:
    first, second = result.models
    assert [model.file.label for model in result.models] == ["a/m.onnx", "b/m.onnx"]
    assert second.file.to_json()["inputs"] == [
        {"name": "ids", "dtype": "int64", "shape": [2, 5]},
        {"name": "mask", "dtype": "uint8", "shape": [2, 5]},
    ]
    assert first.relative is None
    assert second.relative == result.comparison.relative("b/m.onnx")
    for model in result.models:
        assert len(model.latency.blocks) == SHORT.blocks
        assert model.latency.n >= SHORT.min_runs
        assert model.latency.conditions.batch_size == 2
        assert model.latency.images_per_second == pytest.approx(2e3 / model.latency.p50_ms)
        assert model.start_up.num_processes == 1
    assert len(result.comparison.again.blocks) == len(result.comparison.reference.blocks) == SHORT.blocks
    assert result.exit_code == (0 if result.comparison.stable else 5)
    assert result.to_json()["protocol"]["seed"] == 3


def test_the_reference_model_is_run_in_batches_of_the_runtime(result: BenchResult) -> None:
    assert result.comparison.reference.conditions.batch_size == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads = 0: expected a whole number of 1 or more"),
        ({"batch_size": 0}, "batch_size = 0: expected"),
        ({"profile": "nonsense"}, "not known"),
        ({"shapes": {"y": (1,)}}, "--shape y: no input has this name; expected one of x"),
        ({"batch_size": 3}, "a fixed batch of 1; expected 3, as --batch-size says"),
        (
            {"profile": "server-cpu-batch"},
            "a fixed batch of 1; expected 16, as the profile server-cpu-batch says",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "m.onnx", {"x": (TensorProto.FLOAT, [1, 3])})
    with pytest.raises(UsageError, match=message) as caught:
        bench([path], protocol=SHORT, **arguments)
    assert "\n" not in str(caught.value)


def test_no_model_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least one ONNX file"):
        bench([])


# ---- the command ----------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); expected an ONNX file"),
        (b"", "cut short"),
        (b"hello, I am no model", "not an ONNX"),
    ],
)
def test_a_file_that_is_no_model_is_one_line_and_exit_code_2(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    result = run(path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_cut_off_file_and_an_unknown_operator_are_one_line(tmp_path: Path) -> None:
    whole = save(tmp_path / "m.onnx", {"x": (TensorProto.FLOAT, ["N", 3])})
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole.read_bytes()[:-40])
    model = onnx.load(whole)
    model.graph.node[0].op_type = "Frobnicate"
    unknown = tmp_path / "unknown.onnx"
    write_whole(unknown, model.SerializeToString())
    for path in (cut, unknown):
        result = run("-q", path)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert path.name in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["x", "=1x2", "x=", "x=1x0", "x=1xtwo", "x=1x-2", "x=1.5"])
def test_a_shape_that_cannot_be_read_is_a_usage_error(text: str, tmp_path: Path) -> None:
    result = run(tmp_path / "m.onnx", "--shape", text)
    assert result.exit_code == 2
    assert "such as images=1x3x48x192" in result.stderr


def test_reserved_names_are_no_labels() -> None:
    assert all("\0" in name for name in (comparison.AGAIN, comparison.REFERENCE))  # which no path can hold


def test_files_called_like_what_stands_beside_them_are_measured_too(tmp_path: Path) -> None:
    names = (" again", " reference", "again")
    paths = [save(tmp_path / name, {"x": (TensorProto.FLOAT, ["N", 3])}) for name in names]
    labels = distinct_labels(paths)
    asked: list[Request] = []

    class Device:
        name = "a device"

        def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
            asked.extend(requests)
            raise ConfigError("it only listens")

    with pytest.raises(ConfigError, match="it only listens"):
        comparison.compare(dict(zip(labels, paths, strict=True)), Runtime(), protocol=SHORT, device=Device())
    assert labels == list(names)
    assert [len(request["models"]) for request in asked] == [5] * SHORT.blocks
    assert {request["models"][label] for request in asked for label in labels} == set(map(str, paths))
