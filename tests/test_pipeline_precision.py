"""Builds in INT8 and FP16: both gates, what ships, and the same files again after an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

from nasdeploy.costs.comparison import BenchProtocol
from nasdeploy.costs.sessions import HERE, Answers, Progress, Request
from nasdeploy.data import load_dataset
from nasdeploy.errors import RunFolderError
from nasdeploy.exporters.metadata import read_metadata
from nasdeploy.exporters.runtime import onnx_accuracy
from nasdeploy.pipeline import BuildResult, build, certifying, check_profile, verify_run
from nasdeploy.pipeline.exporting import export_run
from nasdeploy.profiles import HardwareProfile, Quantity, format_limit, load_profile
from nasdeploy.progress import Silent
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings

pytestmark = pytest.mark.usefixtures("one_thread")

PRECISIONS = {"eight": "int8", "half": "fp16"}
LENIENT = "20%"  # of 45 validation images one is more than two percentage points

# Wide, so that integers gain time on any CPU with integer kernels, and few layers, so that a table takes seconds.
SPACE = """
from nasdeploy.spaces import Decision, LayerSpec, SearchSpace, make_slot

def space(image_shape, num_classes):
    channels, size, _ = image_shape
    half, quarter = -(-size // 2), -(-size // 4)
    decisions = (
        Decision(name="width", candidates=("64", "96"), channels=(64, 96)),
        Decision(name="block1", candidates=("1", "2")),
        Decision(name="block2", candidates=("1", "2", "3")),
    )
    def stem(width):
        return LayerSpec(kind="stem", in_channels=channels, out_channels=int(width), size=size, kernel=3, stride=2)
    def block(size, stride):
        return lambda width, expand: LayerSpec(
            kind="inverted_residual", in_channels=int(width), out_channels=int(width), size=size, kernel=3,
            stride=stride, expand=int(expand),
        )
    def classifier(width):
        return LayerSpec(kind="classifier", in_channels=int(width), out_channels=num_classes, size=quarter)
    slots = (
        make_slot("stem", decisions, ["width"], stem),
        make_slot("block1", decisions, ["width", "block1"], block(half, 2)),
        make_slot("block2", decisions, ["width", "block2"], block(quarter, 1)),
        make_slot("classifier", decisions, ["width"], classifier),
    )
    return SearchSpace(
        name="wide", decisions=decisions, slots=slots, image_shape=image_shape, num_classes=num_classes
    )
"""


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, 28, 28) of bars in two directions, with noise, and labels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:28, 0:28]
    labels = np.arange(count) % 2
    clean = np.where(
        (np.stack([rows, columns])[labels] + rng.integers(0, 6, size=(count, 1, 1))) % 6 < 3, 200, 50
    )
    return np.clip(clean + rng.normal(0, 25, size=clean.shape), 0, 255).astype(np.uint8), labels


class Notes(Silent):
    """An observer that keeps what a person should read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Finished:
    """A small finished build of a profile in each reduced precision, and copies of it."""

    def __init__(self, folder: Path) -> None:
        images, labels = bars(300, seed=0)
        np.savez(folder / "bars.npz", train_images=images, train_labels=labels)
        (folder / "wide.py").write_text(SPACE, encoding="utf-8")
        for name, precision in PRECISIONS.items():
            (folder / f"{name}.toml").write_text(
                f'name = "{name}"\n[runtime]\nprecision = "{precision}"\nmax_accuracy_drop = "{LENIENT}"\n'
                '[budget]\nlatency = { max = "100s" }\nfile_size = { max = "1MB" }\n',
                encoding="utf-8",
            )
        self.settings = BuildSettings(
            data=str(folder / "bars.npz"),
            space=f"{folder / 'wide.py'}:space",
            profiles=tuple(str(folder / f"{name}.toml") for name in PRECISIONS),
            device="cpu",
            threads=1,
            search={"num_steps": 6, "batch_size": 16, "loss_batch_size": 32, "num_finalists": 2},
            retrain={"num_steps": 25, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )
        self.folder, self.observer = RunFolder(folder / "run"), Notes()
        self.result: BuildResult = build(self.settings, output_dir=self.folder.path, observer=self.observer)

    def copy(self, folder: Path) -> RunFolder:
        return RunFolder(Path(shutil.copytree(self.folder.path, folder / "copy")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"))


FACTORS = {"eight": 0.6, "half": 1.3}
"""Time of the reduced file over that of the fp32 file: on another CPU either may be faster."""


class MadeUpSpeed:
    """This machine, but for how the files in two number formats compare."""

    name = "this machine, nearly"

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        answers = HERE.carry_out(requests, progress=progress)
        for result in answers.results:
            for name, factor in FACTORS.items():
                if f"{name} in fp32" in result["models"]:
                    plain = result["models"][f"{name} in fp32"]
                    result["models"][f"{name} in fp32 again"] = scaled(plain, 1.001)
                    result["models"][name] = scaled(plain, factor)
        return answers


def scaled(row: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the times of a model, all of them ``factor`` times as long."""

    def one(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {part: one(f"{part}_ms", number) for part, number in value.items()}
        return value * factor if key.endswith("_ms") and value is not None else value

    return {key: one(key, value) for key, value in row.items()}


@pytest.fixture(scope="module", autouse=True)
def made_up_speed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "device_for", lambda job, profile: MadeUpSpeed())
        yield


def metrics_of(folder: RunFolder, profile: str) -> dict[str, Any]:
    return read_json(folder.model(profile).metrics)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def onnx_files(folder: RunFolder, profile: str) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.model(profile).path.glob("*.onnx")}


@pytest.mark.parametrize("profile", PRECISIONS)
def test_what_passed_both_gates_ships_and_else_fp32_does(finished: Finished, profile: str) -> None:
    metrics, precision = metrics_of(finished.folder, profile), PRECISIONS[profile]
    gates = metrics["gates"]
    assert (gates["precision"], gates["accuracy"]["passed"]) == (precision, True)
    assert gates["passed"] == gates["speed"]["passed"] == (gates["speed"]["verdict"] == "faster")
    reduced = f"model.{precision}.onnx"
    shipped = reduced if gates["passed"] else "model.onnx"
    assert set(onnx_files(finished.folder, profile)) == {"model.onnx", shipped}
    path = finished.folder.model(profile).path / shipped
    assert (metrics["shipped"], metrics["precision"]) == (shipped, precision if gates["passed"] else "fp32")
    assert (metrics["sha256"], metrics["file_size"]) == (sha256(path), path.stat().st_size)
    assert metrics["sha256_fp32"] == sha256(finished.folder.model(profile).model)
    (size,) = (cap for cap in metrics["caps"] if cap["metric"] == "file_size")
    assert size["value"] == path.stat().st_size
    (result,) = (one for one in finished.result.profiles if one.profile == profile)
    assert (result.model, result.shipped, result.precision) == (path, shipped, metrics["precision"])
    assert (result.status, result.exit_code) == ("certified", 0)


def test_the_speed_gate_compares_blocks(finished: Finished) -> None:
    eight, half = (metrics_of(finished.folder, name)["gates"] for name in FACTORS)
    assert (eight["passed"], half["passed"]) == (True, False)
    assert [gates["speed"]["ratio"] for gates in (eight, half)] == pytest.approx([0.6, 1.3])
    assert [gates["speed"]["noise_floor"] for gates in (eight, half)] == pytest.approx([0.001, 0.001])
    operators = {node.op_type for node in onnx.load(finished.folder.model("eight").file("int8")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


@pytest.mark.parametrize("profile", PRECISIONS)
def test_accuracies_are_those_of_the_files(finished: Finished, profile: str) -> None:
    metrics, dataset = metrics_of(finished.folder, profile), load_dataset(finished.settings.data, seed=0)
    path = finished.folder.model(profile).shipped()
    assert (
        metrics["accuracy"]["top1"] == onnx_accuracy(path, dataset.test.images, dataset.test.labels).accuracy
    )
    gate = metrics["gates"]["accuracy"]
    assert gate["num_images"] == len(dataset.valid)
    valid = onnx_accuracy(finished.folder.model(profile).model, dataset.valid.images, dataset.valid.labels)
    assert gate["accuracy_before"] == valid.accuracy
    if metrics["gates"]["passed"]:
        valid = onnx_accuracy(path, dataset.valid.images, dataset.valid.labels)
        assert gate["accuracy"] == valid.accuracy
    (drop,) = (check for check in gate["checks"] if check["name"] == "accuracy_drop")
    assert drop["limit"] == 0.2
    assert drop["value"] == pytest.approx(gate["accuracy_before"] - gate["accuracy"])


@pytest.mark.parametrize("profile", PRECISIONS)
def test_both_gates_tell_their_numbers_whatever_comes_of_them(finished: Finished, profile: str) -> None:
    notes = [note for note in finished.observer.notes if note.startswith(f"{profile}: the ")]
    gates = metrics_of(finished.folder, profile)["gates"]
    assert notes == [f"{profile}: {gates['text']}"]
    for part in ("accuracy: ", "validation images: accuracy_drop = ", "speed: x", "noise floor "):
        assert part in gates["text"]
    texts = (
        finished.folder.report_html,
        finished.folder.report_markdown,
        finished.folder.model(profile).card,
    )
    assert all("noise floor" in path.read_text("utf-8") for path in texts)


def test_a_slower_file_is_explained_by_operators(finished: Finished) -> None:
    gates = metrics_of(finished.folder, "half")["gates"]
    assert metrics_of(finished.folder, "eight")["gates"]["reason"] is None
    reason = gates["reason"]
    assert (reason["gate"], reason["errors"]) == ("speed", [])
    assert sum(row["fp32_ms"] for row in reason["times"]) > 0.0
    assert sum(row["ms"] for row in reason["times"]) > 0.0
    assert gates["text"] in metrics_of(finished.folder, "half")["message"]


def test_every_json_file_follows_its_schema(finished: Finished) -> None:
    folder = finished.folder
    files = {"report": [folder.report_json], "profile-latency": [folder.latency(name) for name in PRECISIONS]}
    for name in ("metrics", "latency", "verify"):
        files[name] = [folder.model(profile).path / f"{name}.json" for profile in PRECISIONS]
    errors = []
    for name, paths in files.items():
        validator = Draft202012Validator(load_schema(name))
        for path in paths:
            found = validator.iter_errors(json.loads(path.read_bytes()))
            errors += [f"{path.name}: {error.json_path}: {error.message}" for error in found]
    event = Draft202012Validator(load_schema("event"))
    errors += [
        line for line in folder.events.read_text().splitlines() if not event.is_valid(json.loads(line))
    ]
    assert errors == []


def test_files_say_in_which_precision_they_are(finished: Finished) -> None:
    for profile, precision in PRECISIONS.items():
        folder = finished.folder.model(profile)
        assert read_metadata(folder.model)["precision"] == "fp32"
        if folder.file(precision).exists():
            assert read_metadata(folder.file(precision))["precision"] == precision


@pytest.mark.parametrize("profile", PRECISIONS)
def test_costs_are_predicted_for_the_reduced_file(finished: Finished, profile: str) -> None:
    folder = finished.folder.model(profile)
    predicted = read_json(folder.architecture)["predicted"]["file_size"]
    if folder.shipped() != folder.model:
        assert predicted == pytest.approx(folder.shipped().stat().st_size, rel=0.02)
    else:
        assert predicted < 0.7 * folder.model.stat().st_size


def test_an_export_makes_the_bytes_of_the_build(finished: Finished, tmp_path: Path) -> None:
    protocol = BenchProtocol(blocks=2, min_runs=10, min_seconds=0.0)
    (one,) = export_run(
        finished.folder.path, profiles=["eight"], precision="int8", output_dir=tmp_path, protocol=protocol
    ).exports
    assert one.model is not None
    assert (one.options.max_accuracy_drop, one.test_accuracy) == (
        0.2,
        metrics_of(finished.folder, "eight")["accuracy"]["top1"],
    )
    assert sha256(one.model.path) == onnx_files(finished.folder, "eight")["model.int8.onnx"]


@pytest.mark.parametrize("lost", ["metrics.json", "model.int8.onnx", "model.onnx"])
def test_an_interrupted_build_makes_the_same_files_again(
    lost: str, finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    before = onnx_files(folder, "eight")
    (folder.model("eight").path / lost).write_bytes(b"") if lost.endswith("onnx") else (
        folder.model("eight").path / lost
    ).unlink()
    assert build(finished.settings, output_dir=folder.path).exit_code == 0
    assert onnx_files(folder, "eight") == before
    assert metrics_of(folder, "eight")["shipped"] == metrics_of(finished.folder, "eight")["shipped"]


def spoil_for_int8(folder: RunFolder, profile: str) -> None:
    """Give a feature that is always zero a huge weight: in eight bits none are left for the other weights."""
    path = folder.model(profile).weights
    weights = load_file(path)
    for name, values in weights.items():
        if name.endswith(("projection.1.weight", "projection.1.bias")):
            values[0] = 0.0
    weights["layers.classifier.linear.weight"][:, 0] = 1e4
    save_file(weights, path)


def test_a_file_that_loses_accuracy_does_not_ship(finished: Finished, tmp_path: Path) -> None:
    folder, observer = finished.copy(tmp_path), Notes()
    spoil_for_int8(folder, "eight")
    folder.model("eight").metrics.unlink()
    result = build(finished.settings, output_dir=folder.path, observer=observer)
    metrics = metrics_of(folder, "eight")
    gates = metrics["gates"]
    assert (gates["passed"], gates["accuracy"]["passed"], gates["speed"]) == (False, False, None)
    assert (metrics["shipped"], metrics["precision"]) == ("model.onnx", "fp32")
    assert set(onnx_files(folder, "eight")) == {"model.onnx"}
    assert gates["reason"]["gate"] == "accuracy"
    worst = gates["reason"]["errors"][0]
    assert (worst["name"], worst["operator"]) == ("classifier.linear", "Gemm")
    assert "classifier.linear (Gemm)" in metrics["message"]
    assert "accuracy_drop = 0." in metrics["message"]
    assert f"eight: {gates['text']}" in observer.notes
    assert (result.exit_code, result.profiles[0].model) == (0, folder.model("eight").model)
    assert "int8 does not ship, fp32 does" in folder.report_html.read_text("utf-8")
    assert 'InferenceSession("model.onnx"' in folder.model("eight").card.read_text("utf-8")
    assert Draft202012Validator(load_schema("metrics")).is_valid(json.loads(json.dumps(metrics)))
    assert Draft202012Validator(load_schema("report")).is_valid(read_json(folder.report_json))


def test_caps_are_checked_on_the_file_that_ships(finished: Finished, tmp_path: Path) -> None:
    """A size that the INT8 file keeps and the fp32 file does not: no network of the space keeps it in fp32."""
    folder = finished.copy(tmp_path)
    spoil_for_int8(folder, "eight")
    stored = json.loads(folder.run.read_text())
    cap = folder.model("eight").file("int8").stat().st_size
    stored["profiles"]["eight"]["budget"]["file_size"]["max"] = format_limit(Quantity(cap), "file_size")
    folder.run.write_text(json.dumps(stored))
    folder.model("eight").metrics.unlink()
    result = build(
        finished.settings.model_copy(update={"profiles": ("eight", "half")}), output_dir=folder.path
    )
    eight = result.profiles[0]
    if eight.exit_code == 0:  # a smaller network was found whose file keeps the cap
        assert eight.file_size <= cap
    else:
        assert (eight.status, eight.exit_code, eight.precision) == ("violated", 3, "fp32")
        assert eight.file_size > cap
        assert "the int8 file does not ship" in eight.message


def test_verify_checks_the_file_that_ships_and_the_one_behind_it(finished: Finished, tmp_path: Path) -> None:
    found = verify_run(finished.folder.path)
    for profile in PRECISIONS:
        one, metrics = found[profile], metrics_of(finished.folder, profile)
        assert one.passed, [check.describe() for check in one.failures]
        assert (one.structure.path.name, one.structure.sha256) == (metrics["shipped"], metrics["sha256"])
        names = {check.name for check in one.checks}
        if metrics["precision"] != "fp32":
            assert {"accuracy_drop", "runs_alone", "fp32 max_difference", "fp32 top1_agreement"} <= names
            assert one.accuracy == metrics["gates"]["accuracy"]["accuracy"]
    folder = finished.copy(tmp_path)
    folder.model("eight").shipped().unlink()
    with pytest.raises(RunFolderError, match=r"model(\.int8)?\.onnx: not found"):
        verify_run(folder.path)


def test_the_builtin_int8_profile_can_be_met() -> None:
    profile: HardwareProfile = load_profile("cpu-int8")
    assert (profile.runtime.precision, profile.runtime.max_accuracy_drop) == ("int8", 0.01)
    assert check_profile(profile).feasible
