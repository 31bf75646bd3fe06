"""``nasdeploy verify`` on lone ONNX files: real files, real images, real runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from nasdeploy.cli import main
from nasdeploy.files import write_whole


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that takes images of 4x4 pixels; its class is the index of the brightest of them."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 1, 4, 4]), ("y", ["n", 16]))
    ]
    graph = helper.make_graph([helper.make_node("Flatten", ["x"], ["y"])], "g", values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "model.onnx"
    write_whole(path, made.SerializeToString())
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images of 8x8 pixels with a bright block at the place of their label; a quarter of the test labels is wrong."""
    labels = np.arange(40) % 4
    images = np.zeros((40, 8, 8), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:2, 2 * label : 2 * label + 2] = 255
    wrong = np.where(labels == 3, 2, labels)
    wrong[3] = 3  # every class is there
    path = tmp_path / "blocks.npz"
    np.savez(path, train_images=images, train_labels=labels, test_images=images[4:], test_labels=wrong[4:])
    return path


def test_sound_file_passes(model: Path):
    result = run(model)
    assert result.exit_code == 0, result.output
    assert f"{model}: passed" in result.stdout
    assert "runs_alone = runs == runs" in result.stdout


def test_accuracy_is_measured_on_test_images_of_the_size_that_the_model_takes(model: Path, data: Path):
    result = run(model, "--data", data)
    assert result.exit_code == 0, result.output
    assert "accuracy 75.00 % (36 images)" in result.stdout


def test_json_is_that_of_the_verification(model: Path, data: Path):
    made = json.loads(run(model, "--data", data, "--json").stdout)
    assert made["schema"] == "nasdeploy/verify/1"
    assert made["passed"] is True
    assert made["accuracy"] == 0.75


def test_file_that_fails_a_check_exits_with_4(model: Path):
    made = onnx.load(model)
    made.graph.node[0].doc_string = 'File "/home/somebody/train.py", line 3'
    write_whole(model, made.SerializeToString())
    result = run(model, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["passed"] is False
    assert result.stderr.startswith(f"error: {model}: ")
    assert result.stderr.count("\n") == 1


def test_file_that_is_not_onnx_is_one_line(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("not a model")
    result = run(path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("size", ["5", "8"])
def test_image_size_that_does_not_fit_is_one_line(size: str, model: Path, data: Path):
    result = run(model, "--data", data, "--image-size", size)
    assert result.exit_code == 2
    assert f"images are 1x{size}x{size}; the model takes 1x4x4" in result.stderr


@pytest.mark.parametrize("option", ["--image-size", "--seed"])
def test_options_of_data_need_data(option: str, model: Path):
    assert run(model, option, "1").exit_code == 2
