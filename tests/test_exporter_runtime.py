"""Running ONNX files of any origin: what fits is run, what does not is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nasdeploy.errors import UsageError
from nasdeploy.exporters.runtime import OnnxClassifier, onnx_accuracy, onnx_predictions
from nasdeploy.files import write_whole


def _node(operator: str, *inputs: str) -> onnx.NodeProto:
    return helper.make_node(operator, inputs or ["x0"], ["y"])


def _save(
    path: Path,
    node: onnx.NodeProto,
    *,
    inputs: int = 1,
    dtype: int = TensorProto.FLOAT,
    batch: int | str = "n",
) -> Path:
    """Write a model of one node that takes images (batch, 1, 2, 2)."""
    values = [helper.make_tensor_value_info(f"x{i}", dtype, [batch, 1, 2, 2]) for i in range(inputs)]
    output = helper.make_tensor_value_info("y", dtype, None)
    graph = helper.make_graph([node], "g", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    write_whole(path, model.SerializeToString())
    return path


def _images(count: int) -> np.ndarray:
    return np.arange(4 * count, dtype=np.uint8).reshape(count, 1, 2, 2)


@pytest.fixture
def brightest(tmp_path: Path) -> Path:
    """A model whose class is the index of the brightest of four pixels."""
    return _save(tmp_path / "m.onnx", _node("Flatten"))


def test_predictions_and_accuracy_are_those_of_the_file(brightest: Path) -> None:
    images = np.eye(4, dtype=np.float32).reshape(4, 1, 2, 2)
    assert onnx_predictions(brightest, images).tolist() == [0, 1, 2, 3]
    result = onnx_accuracy(brightest, images, np.array([0, 1, 2, 0]))
    assert (result.accuracy, result.predictions.tolist()) == (0.75, [0, 1, 2, 3])


@pytest.mark.parametrize("batch", [1, 2, 3, 8, "n"])
def test_any_fixed_batch_takes_any_number_of_images(batch: int | str, tmp_path: Path) -> None:
    path = _save(tmp_path / "m.onnx", _node("Flatten"), batch=batch)
    np.testing.assert_array_equal(OnnxClassifier(path).logits(_images(7), 4), _images(7).reshape(7, 4))


def test_half_precision_and_trailing_dimensions_are_taken(tmp_path: Path) -> None:
    half = _save(tmp_path / "h.onnx", _node("Flatten"), dtype=TensorProto.FLOAT16)
    assert onnx_predictions(half, _images(3)).tolist() == [3, 3, 3]
    pooled = _save(tmp_path / "p.onnx", _node("GlobalMaxPool"))
    assert OnnxClassifier(pooled).logits(_images(3)).tolist() == [[3.0], [7.0], [11.0]]


class InAFile:
    """Images that can only be read by slices; notes how many at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._images, self.read = images, []

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, part: slice) -> np.ndarray:
        self.read.append(len(self._images[part]))
        return self._images[part]


def test_images_in_a_file_are_read_part_by_part(brightest: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (1100, 1, 2, 2), dtype=np.uint8)
    stored = InAFile(whole)
    assert onnx_predictions(brightest, stored).tolist() == onnx_predictions(brightest, whole).tolist()
    assert stored.read == [512, 512, 76]
    labels = onnx_predictions(brightest, whole)
    assert onnx_accuracy(brightest, InAFile(whole), labels).accuracy == 1.0


def test_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    path = _save(tmp_path / "u.onnx", _node("Identity"), dtype=TensorProto.UINT8)
    classifier = OnnxClassifier(path)
    assert classifier.input_type is np.uint8


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 2, 2), np.uint8), r"m\.onnx: images are 3x2x2; the model takes 1x2x2 \(channels"),
        (np.zeros((2, 1, 5, 5), np.float32), "images are 1x5x5; the model takes 1x2x2"),
        (np.zeros((2, 2, 2), np.uint8), r"uint8 of shape \(2, 2, 2\); expected uint8 or float"),
        (np.zeros((2, 1, 2, 2), np.int64), "int64 of shape"),
        (np.zeros((0, 1, 2, 2), np.uint8), r"shape \(0, 1, 2, 2\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: np.ndarray, message: str, brightest: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        onnx_predictions(brightest, images)
    assert "\n" not in str(caught.value)


def test_labels_that_do_not_fit_are_refused(brightest: Path) -> None:
    with pytest.raises(UsageError, match="from 0 to 4; the model has 4 outputs, expected 0 to 3"):
        onnx_accuracy(brightest, _images(5), np.arange(5))
    with pytest.raises(UsageError, match=r"labels: shape \(4,\); expected \(5,\)"):
        onnx_accuracy(brightest, _images(5), np.arange(4))


def test_a_model_that_is_no_classifier_of_images_is_refused(tmp_path: Path) -> None:
    two = _save(tmp_path / "two.onnx", _node("Add", "x0", "x1"), inputs=2)
    with pytest.raises(UsageError, match="expected one input"):
        onnx_predictions(two, _images(2))
    same = _save(tmp_path / "same.onnx", _node("Relu"))
    with pytest.raises(UsageError, match=r"output has the shape \(2, 1, 2, 2\); expected \(2, classes\)"):
        onnx_predictions(same, _images(2))
    whole = _save(tmp_path / "int.onnx", _node("Flatten"), dtype=TensorProto.INT32)
    with pytest.raises(UsageError, match=r"its input is tensor\(int32\)"):
        onnx_predictions(whole, _images(2))


def test_an_operator_that_the_runtime_lacks_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path / "m.onnx", _node("Frobnicate"))
    with pytest.raises(UsageError, match=r"m\.onnx: onnxruntime cannot load it: .*Frobnicate"):
        onnx_predictions(path, _images(1))
