"""Networks without training in INT8 and FP16: the operators, the border and the size of the files that would ship."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from nasdeploy.costs.file_size import file_size_table
from nasdeploy.costs.graphs import (
    chain_graph,
    network_graph,
    random_weights,
    serialise,
)
from nasdeploy.errors import ConfigError
from nasdeploy.exporters.files import read_model, save_model
from nasdeploy.exporters.quantization import convert_untrained, halve_model, quantize_model
from nasdeploy.spaces import Architecture, SearchSpace, make_space
from nasdeploy.spaces.base import LayerSpec

REDUCED = ("int8", "fp16")
BLOCK = LayerSpec(kind="inverted_residual", in_channels=8, out_channels=8, size=8, kernel=3, expand=2)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return make_space("mobile", (1, 28, 28), 10)


def network(space: SearchSpace, architecture: Architecture, seed: int = 0) -> onnx.ModelProto:
    """Return a whole network with random weights."""
    rng = np.random.default_rng(seed)
    layers = [(name, spec, random_weights(spec, rng)) for name, spec in space.named_layers(architecture)]
    return network_graph(layers, image_shape=(1, 28, 28), mean=[127.5], scale=[1 / 127.5], batch_size=1)


def layer(spec: LayerSpec) -> onnx.ModelProto:
    """Return one layer alone."""
    return chain_graph([(spec.kind, spec, random_weights(spec, np.random.default_rng(0)))], batch_size=1)


def shipped(model: onnx.ModelProto, precision: str, folder: Path) -> onnx.ModelProto:
    """Return ``model`` as the exporters of trained networks convert it."""
    source, path = folder / "source.onnx", folder / "shipped.onnx"
    save_model(model, path=source, opset=18, exporter="graph", metadata={})
    if precision == "int8":
        rng = np.random.default_rng(0)
        batches = rng.integers(0, 256, size=(8, 1, 1, 28, 28)).astype(np.float32)
        quantize_model(source, path=path, batches=batches, exporter="graph", metadata={})
    else:
        halve_model(source, path=path, exporter="graph", metadata={})
    return read_model(path)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Return what ONNX Runtime makes of ``model`` when it loads it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4  # it warns that such a file belongs to this machine
    onnxruntime.InferenceSession(serialise(model), options, providers=["CPUExecutionProvider"])
    return read_model(folder / "optimised.onnx")


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_a_whole_network_has_the_operators_of_the_file_that_ships(
    precision: str, end: str, space: SearchSpace, tmp_path: Path
) -> None:
    model = network(space, getattr(space, end)())
    made, expected = convert_untrained(model, precision), shipped(model, precision, tmp_path)
    assert operators(made) == operators(expected)
    assert operators(optimised(made, tmp_path)) == operators(optimised(expected, tmp_path))
    onnx.checker.check_model(made, full_check=True)
    assert len(serialise(made)) == pytest.approx(len(serialise(expected)), rel=0.005)


def test_int8_networks_run_in_integers_only_behind_the_normalisation(
    space: SearchSpace, tmp_path: Path
) -> None:
    found = operators(optimised(convert_untrained(network(space, space.largest()), "int8"), tmp_path))
    in_integers = {name for name in found if name.startswith(("QLinear", "QGemm"))}
    assert in_integers == {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}
    assert found["QLinearConv"] == operators(network(space, space.largest()))["Conv"]
    # Pixels to integers once, logits to float once; nothing is converted in between.
    assert (found["QuantizeLinear"], found["DequantizeLinear"], found["Conv"]) == (1, 1, 0)


def border_types(model: onnx.ModelProto) -> tuple[int, int]:
    return tuple(v.type.tensor_type.elem_type for v in (model.graph.input[0], model.graph.output[0]))


@pytest.mark.parametrize("spec", [BLOCK, LayerSpec(kind="head", in_channels=8, out_channels=16, size=4)])
def test_layers_alone_take_and_give_what_they_do_inside_a_network(spec: LayerSpec, tmp_path: Path) -> None:
    made = convert_untrained(layer(spec), "int8")
    assert border_types(made) == (TensorProto.UINT8, TensorProto.UINT8)
    onnx.checker.check_model(made, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(optimised(made, tmp_path)))
    assert border_types(convert_untrained(layer(spec), "fp16")) == (TensorProto.FLOAT16, TensorProto.FLOAT16)


def test_whole_networks_and_logits_keep_their_border(space: SearchSpace) -> None:
    classifier = LayerSpec(kind="classifier", in_channels=8, out_channels=5, size=4)
    float32 = TensorProto.FLOAT
    assert border_types(convert_untrained(layer(classifier), "int8")) == (TensorProto.UINT8, float32)
    for precision in REDUCED:
        made = convert_untrained(network(space, space.smallest()), precision)
        assert border_types(made) == (float32, float32)


def test_every_layer_of_the_space_runs(space: SearchSpace) -> None:
    for spec in space.distinct_layers():
        for precision in REDUCED:
            made = convert_untrained(layer(spec), precision)
            session = onnxruntime.InferenceSession(serialise(made), providers=["CPUExecutionProvider"])
            (value,) = session.get_inputs()
            kind = np.uint8 if precision == "int8" else np.float16
            (output,) = session.run(None, {value.name: np.ones(value.shape, kind)})
            assert output.shape[1] == spec.out_channels


@pytest.mark.parametrize("precision", REDUCED)
def test_the_same_model_gives_the_same_bytes_and_is_left_as_it_is(
    precision: str, space: SearchSpace, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = network(space, space.smallest())
    before = serialise(model)
    first, second = (convert_untrained(model, precision) for _ in range(2))
    assert serialise(first) == serialise(second)
    assert serialise(model) == before
    assert not first.graph.value_info
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_fp32_is_the_model_itself_and_other_formats_are_refused() -> None:
    model = layer(BLOCK)
    assert convert_untrained(model, "fp32") is model
    with pytest.raises(ConfigError, match="precision = 'int4': expected one of fp32, fp16, int8"):
        convert_untrained(model, "int4")


@pytest.mark.parametrize("precision", REDUCED)
def test_the_table_of_file_sizes_is_that_of_the_files(
    precision: str, space: SearchSpace, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Against files that were quantised after a calibration run, of the ends and of random architectures."""
    table = file_size_table(space, convert=partial(convert_untrained, precision=precision))
    drawn = [Architecture(tuple(int(rng.integers(n)) for n in space.num_candidates())) for _ in range(6)]
    found = [space.smallest(), space.largest(), *drawn]
    predicted = table.of(np.array([architecture.choices for architecture in found]))
    sizes = [len(serialise(shipped(network(space, a), precision, tmp_path))) for a in found]
    assert np.abs(predicted / sizes - 1.0).max() < 0.01
    assert sizes[1] < 0.6 * len(serialise(network(space, space.largest())))


def test_the_table_of_file_sizes_is_reproducible() -> None:
    tiny = make_space("mobile", (1, 28, 28), 2)
    convert = partial(convert_untrained, precision="int8")
    first, second = (file_size_table(tiny, convert=convert) for _ in range(2))
    assert first.to_json() == second.to_json()
