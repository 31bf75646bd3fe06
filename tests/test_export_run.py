"""``export``: the networks of one small finished run, again and in other formats."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

from nasdeploy.cli import main
from nasdeploy.costs.comparison import BenchProtocol
from nasdeploy.data import load_dataset
from nasdeploy.errors import ConfigError, RunFolderError
from nasdeploy.exporters.metadata import read_metadata
from nasdeploy.exporters.runtime import OnnxClassifier, onnx_accuracy
from nasdeploy.pipeline import build
from nasdeploy.pipeline.exporting import ProfileExport, export_run
from nasdeploy.runs import RunFolder
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings

pytestmark = pytest.mark.usefixtures("one_thread")

PROFILES = ("small", "wide")
SHORT = BenchProtocol(blocks=2, min_runs=10, min_seconds=0.0)
LENIENT = 0.1  # of 90 validation images one is more than a percentage point


def stripes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, 28, 28) of stripes in three directions, with noise, sorted by label, and labels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:28, 0:28]
    directions = np.stack([rows, columns, rows + columns])  # (3, 28, 28)
    labels = np.sort(np.arange(count) % 3)
    clean = np.where((directions[labels] + rng.integers(0, 6, size=(count, 1, 1))) % 6 < 3, 200, 50)
    return np.clip(clean + rng.normal(0, 25, size=clean.shape), 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nobody changes."""
    folder = tmp_path_factory.mktemp("finished")
    images, labels = stripes(600, seed=0)
    np.savez(folder / "stripes.npz", train_images=images, train_labels=labels)
    for name, cap in zip(PROFILES, ("20%", "90%"), strict=True):
        text = f'name = "{name}"\n[budget]\nparams = {{ max = "{cap}" }}\n'
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    settings = BuildSettings(
        data=str(folder / "stripes.npz"),
        profiles=tuple(str(folder / f"{name}.toml") for name in PROFILES),
        device="cpu",
        threads=1,
        search={
            "num_steps": 8,
            "batch_size": 16,
            "loss_batch_size": 32,
            "num_loss_samples": 6,
            "num_finalists": 2,
        },
        retrain={"num_steps": 30, "batch_size": 16, "learning_rate": 0.05},
        measure={"min_runs": 10, "min_seconds": 0.0},
    )
    build(settings, output_dir=folder / "run")
    return RunFolder(folder / "run")


def copy_of(finished: RunFolder, folder: Path) -> RunFolder:
    """Return a copy of the run that may be changed."""
    return RunFolder(Path(shutil.copytree(finished.path, folder / "copy")))


def export_one(finished: RunFolder, target: Path, **options: Any) -> ProfileExport:
    """Export the small profile by a short protocol, and check the JSON file by its schema."""
    options = {"profiles": ["small"], "protocol": SHORT, **options}
    (one,) = export_run(finished.path, output_dir=target, **options).exports
    stored = json.loads(one.record.read_bytes())
    assert [error.message for error in Draft202012Validator(load_schema("export")).iter_errors(stored)] == []
    assert stored == one.to_json()
    return one


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def exports(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProfileExport]:
    """The small profile in every precision."""
    folder = tmp_path_factory.mktemp("exports")
    before = contents(finished.path)
    made = {"fp32": export_one(finished, folder)} | {
        precision: export_one(finished, folder, precision=precision, max_accuracy_drop=LENIENT)
        for precision in ("int8", "fp16")
    }
    assert contents(finished.path) == before
    return made


def source_of(finished: RunFolder) -> str:
    """Return the path of the run's images."""
    data: str = json.loads((finished.path / "run.json").read_text())["settings"]["data"]
    return data


def test_fp32_again_is_the_file_of_the_build(finished: RunFolder, exports: dict[str, ProfileExport]) -> None:
    one = exports["fp32"]
    assert one.model is not None
    assert one.model.path.name == "small.fp32.onnx"
    assert one.model.path.read_bytes() == finished.model("small").model.read_bytes()
    assert (one.exit_code, one.options.max_accuracy_drop, one.calibration_images) == (0, None, 0)
    assert {check.name for check in one.checks} >= {"top1_agreement", "max_difference", "runs_alone"}
    assert one.latency is not None
    assert one.latency.baseline == "models/small/model.onnx"


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_smaller_format_passes_its_gate_and_is_a_model_that_verify_takes(
    precision: str, finished: RunFolder, exports: dict[str, ProfileExport]
) -> None:
    one = exports[precision]
    assert one.exit_code == 0, one.message
    assert one.model is not None
    path, source = one.model.path, finished.model("small").model
    assert path.name == f"small.{precision}.onnx"
    assert one.model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert one.model.file_size == path.stat().st_size < source.stat().st_size
    stored, of_build = read_metadata(path), read_metadata(source)
    assert stored.pop("precision") == precision
    assert of_build.pop("precision") == "fp32"
    assert stored == of_build
    result = CliRunner().invoke(main, ["verify", str(path), "--data", source_of(finished), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["accuracy"] == one.test_accuracy


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_accuracies_are_those_of_network_and_file_on_validation_images(
    precision: str, finished: RunFolder, exports: dict[str, ProfileExport]
) -> None:
    one, dataset = exports[precision], load_dataset(source_of(finished), seed=0)
    assert one.model is not None
    for path, accuracy in (
        (finished.model("small").model, one.validation_before),
        (one.model.path, one.validation_accuracy),
    ):
        assert onnx_accuracy(path, dataset.valid.images, dataset.valid.labels).accuracy == accuracy
    (drop,) = (check for check in one.checks if check.name == "accuracy_drop")
    assert drop.value == pytest.approx(one.validation_before - (one.validation_accuracy or 0.0))
    assert (drop.limit, one.num_validation) == (LENIENT, len(dataset.valid))
    assert one.calibration_images == (len(dataset.train) if precision == "int8" else 0)
    assert one.validation_before > 0.6


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_speed_is_told_beside_the_fp32_file_of_the_same_blocks(
    precision: str, exports: dict[str, ProfileExport]
) -> None:
    latency = exports[precision].latency
    assert latency is not None
    assert latency.relative is not None
    assert latency.baseline == "fp32"
    assert 0.0 < latency.relative.smallest_ratio <= latency.relative.ratio <= latency.relative.largest_ratio
    assert (latency.threads, latency.batch_size, latency.num_runs >= 10) == (1, 1, True)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_same_export_gives_the_same_bytes(
    precision: str, finished: RunFolder, exports: dict[str, ProfileExport], tmp_path: Path
) -> None:
    again = export_one(finished, tmp_path, precision=precision, max_accuracy_drop=LENIENT)
    first = exports[precision].model
    assert first is not None
    assert again.model is not None
    assert again.model.path.read_bytes() == first.path.read_bytes()


def spoil_for_int8(run: RunFolder, profile: str) -> None:
    """Give a feature that is always zero a huge weight: in eight bits none are left for the other weights."""
    path = run.model(profile).weights
    weights = load_file(path)
    weights["layers.head.1.bias"][0] = -1000.0
    weights["layers.classifier.linear.weight"][:, 0] = 1000.0
    save_file(weights, path)


def test_a_file_that_loses_accuracy_is_not_written_nor_left(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    target = tmp_path / "out"
    good = export_one(run, target, precision="int8", max_accuracy_drop=LENIENT)
    assert good.model is not None
    spoil_for_int8(run, "small")
    bad = export_one(run, target, precision="int8")
    assert (bad.exit_code, bad.model, bad.test_accuracy, bad.latency) == (4, None, None, None)
    assert [path.name for path in target.iterdir()] == ["small.int8.json"]
    assert bad.message.startswith("int8: accuracy_drop = 0.")
    assert bad.message.endswith("expected <= 0.01; no file is written")
    assert [check.name for check in bad.checks if not check.passed] == ["accuracy_drop"]
    assert (bad.validation_accuracy or 0.0) < bad.validation_before


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_network_without_a_prediction_fails_the_gate_of_outputs(
    precision: str, finished: RunFolder, tmp_path: Path
) -> None:
    run = copy_of(finished, tmp_path)
    path = run.model("small").weights
    weights = load_file(path)
    weights["layers.classifier.linear.weight"][:] = 0.0
    save_file(weights, path)
    bad = export_one(run, tmp_path / "out", precision=precision)
    assert (bad.exit_code, bad.model, bad.validation_accuracy) == (4, None, None)
    assert bad.message.startswith(f"{precision}: output_variation = 0; expected >= 0.01")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [f"small.{precision}.json"]


def test_the_most_serious_profile_decides_and_good_files_stay(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    spoil_for_int8(run, "small")
    result = export_run(run.path, precision="int8", max_accuracy_drop=LENIENT, protocol=SHORT)
    assert [(one.profile, one.exit_code) for one in result.exports] == [("small", 4), ("wide", 0)]
    assert result.exit_code == 4
    assert sorted(path.name for path in (run.path / "exports").iterdir()) == [
        "small.int8.json",
        "wide.int8.json",
        "wide.int8.onnx",
    ]
    schema = Draft202012Validator(load_schema("export-result"))
    assert [error.message for error in schema.iter_errors(json.loads(json.dumps(result.to_json())))] == []


def test_other_opset_exporter_and_batch(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    fixed = export_one(finished, tmp_path, batch_size=1)
    assert fixed.model is not None
    fixed.model.path.replace(run.model("small").model)
    one = export_one(run, tmp_path, opset=20, exporter="torch", batch_size=3)
    assert one.model is not None
    assert (one.opset, one.exporter, one.batch_size, one.model.opset) == (20, "torch", 3, 20)
    assert {entry.domain: entry.version for entry in onnx.load(one.model.path).opset_import}[""] == 20
    assert OnnxClassifier(one.model.path).fixed_batch == 3
    assert one.latency is not None
    # The file in that run takes one image at a time: nothing to compare with.
    assert (one.latency.baseline, one.latency.relative, one.latency.batch_size) == (None, None, 3)


@pytest.mark.parametrize("exporter", ["graph", "torch"])
def test_int8_of_any_exporter_with_any_batch(exporter: str, finished: RunFolder, tmp_path: Path) -> None:
    one = export_one(
        finished,
        tmp_path,
        precision="int8",
        exporter=exporter,
        dynamic_batch=True,
        max_accuracy_drop=LENIENT,
    )
    assert one.model is not None
    assert OnnxClassifier(one.model.path).fixed_batch is None
    operators = {node.op_type for node in onnx.load(one.model.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"precision": "int4"}, ConfigError, "precision = 'int4': expected one of fp32, fp16, int8"),
        ({"opset": 13}, ConfigError, "opset = 13"),
        ({"exporter": "nonsense"}, ConfigError, "nonsense"),
        ({"batch_size": 2, "dynamic_batch": True}, ConfigError, "not together with a dynamic batch"),
        ({"max_accuracy_drop": 0.1}, ConfigError, "max_accuracy_drop = 0.1: expected 0 to 1, and precision"),
        ({"precision": "int8", "max_accuracy_drop": 1.5}, ConfigError, "max_accuracy_drop = 1.5"),
        (
            {"profiles": ["large"]},
            RunFolderError,
            "--profile large: is not in .*; expected one of small, wide",
        ),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, Any], kind: type[Exception], message: str, finished: RunFolder, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        export_run(finished.path, output_dir=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_untrained_profile_is_left_out_or_refused_by_name(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    run.model("small").training.unlink()
    exports = export_run(run.path, protocol=SHORT).exports
    assert [one.profile for one in exports] == ["wide"]
    with pytest.raises(RunFolderError, match="small: not trained yet; nasdeploy build into the same folder"):
        export_run(run.path, profiles=["small"])


def test_data_that_has_changed_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    stored = json.loads(run.run.read_text())
    stored["dataset"]["fingerprint"] = "0" * 16
    run.run.write_text(json.dumps(stored))
    with pytest.raises(RunFolderError, match="has changed since the build"):
        export_run(run.path)


def test_a_runtime_that_is_not_here_leaves_the_file_unmeasured(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    stored = json.loads(run.run.read_text())
    stored["profiles"]["small"]["runtime"]["provider"] = "NobodysExecutionProvider"
    run.run.write_text(json.dumps(stored))
    one = export_one(run, tmp_path / "out")
    assert one.model is not None
    assert (one.exit_code, one.latency) == (0, None)
    assert one.message.startswith("latency not measured: runtime.provider = 'NobodysExecutionProvider'")


def test_a_device_that_packs_are_carried_to_is_measured_by_bench(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    stored = json.loads(run.run.read_text())
    stored["profiles"]["small"]["device"] = {"by_hand": True}
    run.run.write_text(json.dumps(stored))
    one = export_one(run, tmp_path / "out")
    assert one.model is not None
    assert (one.exit_code, one.latency) == (0, None)
    assert one.message == (
        "latency not measured: small: cannot be measured from here; nasdeploy bench "
        f"{one.model.path} -p small --pack bench.zip measures it"
    )


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
