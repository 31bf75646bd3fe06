"""INT8 and FP16 files made from an exported one: what is inside, what they compute, and that they are reproducible."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from nasdeploy.costs.graphs import IR_VERSION, network_graph, random_weights
from nasdeploy.exporters.base import ExportedModel
from nasdeploy.exporters.files import save_model
from nasdeploy.exporters.quantization import halve_model, quantize_model
from nasdeploy.exporters.quantization_errors import float_operators, operator_errors
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.exporters.verification import verify_file
from nasdeploy.files import write_whole
from nasdeploy.spaces.base import LayerSpec

LAYERS = (
    LayerSpec(kind="stem", in_channels=3, out_channels=8, size=16, kernel=3, stride=2),
    LayerSpec(kind="inverted_residual", in_channels=8, out_channels=8, size=8, kernel=3, expand=2),
    LayerSpec(kind="classifier", in_channels=8, out_channels=5, size=8),
)
METADATA = {"nasdeploy.precision": '"int8"', "nasdeploy.seed": "0"}


def images(count: int, seed: int = 0) -> np.ndarray:
    """Return smooth images (count, 3, 16, 16), float32, 0..255."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(count, 3, 4, 4))
    return coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)


@pytest.fixture(params=[1, None], ids=["batch 1", "any batch"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An exported file with random weights."""
    rng = np.random.default_rng(0)
    model = network_graph(
        [(f"layer{i}", spec, random_weights(spec, rng)) for i, spec in enumerate(LAYERS)],
        image_shape=(3, 16, 16),
        mean=[120.0, 125.0, 130.0],
        scale=[0.02, 0.015, 0.01],
        batch_size=request.param,
    )
    path = tmp_path / "source.onnx"
    save_model(model, path=path, opset=18, exporter="graph", metadata={})
    return path


def batches(size: int = 1) -> Iterator[np.ndarray]:
    """Yield 32 images."""
    yield from np.split(images(32), 32 // size)


def quantized(source: Path, path: Path) -> ExportedModel:
    return quantize_model(source, path=path, batches=batches(), exporter="graph", metadata=METADATA)


def largest_difference(source: Path, made: Path) -> float:
    """Return the largest difference of a logit, as a fraction of their range."""
    expected, got = (OnnxClassifier(path).logits(images(64, seed=1)) for path in (source, made))
    return float(np.abs(got - expected).max() / (expected.max() - expected.min()))


def test_int8_computes_about_the_same_in_a_smaller_file(source: Path, tmp_path: Path) -> None:
    made = quantized(source, tmp_path / "int8.onnx")
    assert 0.0 < largest_difference(source, made.path) < 0.08
    assert made.file_size == made.path.stat().st_size
    assert OnnxClassifier(made.path).fixed_batch == OnnxClassifier(source).fixed_batch


@pytest.mark.parametrize("make", ["int8", "fp16"])
def test_files_stand_the_checks_of_structure(make: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{make}.onnx"
    made = (
        quantized(source, path)
        if make == "int8"
        else halve_model(source, path=path, exporter="graph", metadata=METADATA)
    )
    assert [check.describe() for check in verify_file(path).failures] == []
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA
    assert not model.graph.value_info
    assert model.ir_version <= IR_VERSION
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert (made.opset, made.exporter) == (18, "graph")


def test_weights_are_int8_per_channel_and_activations_uint8(source: Path, tmp_path: Path) -> None:
    graph = onnx.load(quantized(source, tmp_path / "int8.onnx").path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 4
    for node in convolutions:
        weight, scale = (stored[name] for name in dequantized[node.input[1]][:2])
        assert weight.data_type == TensorProto.INT8
        assert list(scale.dims) == [weight.dims[0]]
        assert stored[dequantized[node.input[0]][2]].data_type == TensorProto.UINT8


def test_normalisation_stays_in_float(source: Path, tmp_path: Path) -> None:
    graph = onnx.load(quantized(source, tmp_path / "int8.onnx").path).graph
    consumers = {name: node.op_type for node in graph.node for name in node.input}
    producers = {name: node for node in graph.node for name in node.output}
    assert consumers["images"] == "Sub"
    (scaling,) = (node for node in graph.node if node.op_type == "Mul")
    assert producers[scaling.input[0]].op_type == "Sub"
    assert consumers[scaling.output[0]] == "QuantizeLinear"


def test_every_batch_is_asked_for_once(source: Path, tmp_path: Path) -> None:
    seen = []

    def watched() -> Iterator[np.ndarray]:
        for batch in batches():
            seen.append(batch)
            yield batch

    quantize_model(source, path=tmp_path / "m.onnx", batches=watched(), exporter="graph", metadata={})
    np.testing.assert_array_equal(np.concatenate(seen), images(32))


def test_ranges_are_those_of_the_batches(source: Path, tmp_path: Path) -> None:
    """With images of half the contrast around the mean the first range is half as wide."""
    scales = []
    for contrast in (1.0, 0.5):
        calibration = (125.0 + contrast * (batch - 125.0) for batch in batches())
        path = tmp_path / f"{contrast}.onnx"
        quantize_model(source, path=path, batches=calibration, exporter="graph", metadata={})
        graph = onnx.load(path).graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        scales.append(float(stored[first.input[1]]))
    assert scales[1] / scales[0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "make", [quantized, lambda s, p: halve_model(s, path=p, exporter="g", metadata=METADATA)]
)
def test_the_same_source_gives_the_same_bytes(make, source: Path, tmp_path: Path) -> None:
    first, second = (make(source, tmp_path / name) for name in ("a.onnx", "b.onnx"))
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256


def test_fp16_holds_half_the_bytes_and_keeps_its_border(source: Path, tmp_path: Path) -> None:
    made = halve_model(source, path=tmp_path / "fp16.onnx", exporter="graph", metadata=METADATA)
    graph = onnx.load(made.path).graph
    assert {tensor.data_type for tensor in graph.initializer} == {TensorProto.FLOAT16}
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert 0.0 < largest_difference(source, made.path) < 0.01


def test_weights_beyond_fp16_are_left_to_the_accuracy_gate(source: Path, tmp_path: Path) -> None:
    model = onnx.load(source)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(1e30 * numpy_helper.to_array(weight), weight.name))
    large = tmp_path / "large.onnx"
    write_whole(large, model.SerializeToString())
    made = halve_model(large, path=tmp_path / "fp16.onnx", exporter="graph", metadata={})
    assert made.path.exists()


def test_logging_of_the_process_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    quantized(source, tmp_path / "int8.onnx")
    halve_model(source, path=tmp_path / "fp16.onnx", exporter="graph", metadata={})
    assert (root.level, list(root.handlers)) == before


def test_the_operator_that_quantisation_hurts_comes_first(tmp_path: Path) -> None:
    """One huge weight for a channel that is always zero leaves no bits for the others of its row."""
    rng = np.random.default_rng(0)
    weights = {f"layer{i}": dict(random_weights(spec, rng)) for i, spec in enumerate(LAYERS)}
    for layer, part in (("layer0", ""), ("layer1", "projection.")):  # both are added up in layer1
        weights[layer][f"{part}weight"][0] = weights[layer][f"{part}bias"][0] = 0.0
    weights["layer2"]["weight"][:, 0] = 1000.0
    model = network_graph(
        [(f"layer{i}", spec, weights[f"layer{i}"]) for i, spec in enumerate(LAYERS)],
        image_shape=(3, 16, 16),
        mean=[120.0, 125.0, 130.0],
        scale=[0.02, 0.015, 0.01],
        batch_size=1,
    )
    path = tmp_path / "source.onnx"
    save_model(model, path=path, opset=18, exporter="graph", metadata={})
    made = quantized(path, tmp_path / "int8.onnx")
    errors = operator_errors(path, made.path, list(batches())[:8])
    assert (errors[0].name, errors[0].operator) == ("layer2.linear", "Gemm")
    assert errors[0].added_noise > 10 * errors[1].added_noise
    assert {error.name for error in errors} >= {
        "layer0",
        "layer1.expansion",
        "layer1.depthwise",
        "layer1.add",
    }


@pytest.mark.parametrize("make", ["int8", "fp16"])
def test_errors_of_operators_are_small_where_the_file_is_good(
    make: str, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "made.onnx"
    made = (
        quantized(source, path)
        if make == "int8"
        else halve_model(source, path=path, exporter="g", metadata={})
    )
    errors = operator_errors(source, made.path, list(batches())[:4])
    assert [error.added_noise for error in errors] == sorted((e.added_noise for e in errors), reverse=True)
    assert {"layer0", "layer2.linear"} <= {error.name for error in errors}
    assert max(error.added_noise for error in errors) < (0.01 if make == "int8" else 1e-4)
    assert min(error.signal_to_noise_db for error in errors) > 15.0


def test_what_stays_in_float_is_counted(source: Path, tmp_path: Path) -> None:
    made = quantized(source, tmp_path / "int8.onnx")
    assert float_operators(made.path) == {"Mul": 1, "Sub": 1}
