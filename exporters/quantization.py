"""Smaller number formats of an exported file: INT8 by ONNX Runtime's quantiser, FP16 by its converter.

Networks without training get the same operators (:func:`convert_untrained`): what a format costs in time and bytes
is known before anything is trained.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from nasdeploy.costs.graphs import IR_VERSION
from nasdeploy.errors import ConfigError, GateError, NasdeployError
from nasdeploy.exporters.base import ExportedModel
from nasdeploy.exporters.files import read_model, save_model, strip_model
from nasdeploy.exporters.runtime import first_line
from nasdeploy.exporters.structure import model_opset

CALIBRATION_METHOD = "minmax"
PRECISIONS = ("fp32", "fp16", "int8")

# Of the activations of a network without training, in place of a calibration run: no operator's time depends on it.
UNTRAINED_RANGE = 6.0
CLIPPED_FROM_ZERO = ("Clip", "Relu")

# The pixels' normalisation (Sub, Mul) stays in float, and so does what has no integer kernel on a CPU.
QUANTIZED_OPERATORS = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Clip",
    "Relu",
    "GlobalAveragePool",
    "AveragePool",
    "MaxPool",
    "Flatten",
    "Reshape",
    "Concat",
)


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types: its classes are Any
    """Feeds batches (B, C, H, W), one a call, to the calibration."""

    def __init__(self, input_name: str, batches: Iterable[NDArray[np.float32]]) -> None:
        self._input_name = input_name
        self._batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next feed, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {self._input_name: batch}


def quantize_model(
    source: Path,
    *,
    path: Path,
    batches: Iterable[NDArray[np.float32]],
    exporter: str,
    metadata: Mapping[str, str],
) -> ExportedModel:
    """Write ``source`` in INT8 to ``path``: the same arguments give the same bytes.

    QDQ format, weights int8 per channel, activations uint8: with int8 activations the same networks took 1.5 to 1.8
    times as long on an x86 CPU. The ranges of the activations are the extremes over ``batches``, float32
    (B, C, H, W), pixels 0..255, of training images.
    """
    input_name = read_model(source).graph.input[0].name
    scratch = tempfile.TemporaryDirectory(prefix="nasdeploy-")
    with _converting(source, "int8"), silent_libraries(), scratch as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        # Symbolic shapes would need sympy; the plain ones suffice for a network without control flow.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _Batches(input_name, batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED_OPERATORS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = read_model(quantized)
    return _save(model, path=path, exporter=exporter, metadata=metadata)


def halve_model(source: Path, *, path: Path, exporter: str, metadata: Mapping[str, str]) -> ExportedModel:
    """Write ``source`` in FP16 to ``path``; input and output stay float32. The same arguments give the same bytes."""
    with _converting(source, "fp16"), silent_libraries():
        model = _halved(read_model(source), keep_border=True)
    return _save(model, path=path, exporter=exporter, metadata=metadata)


def convert_untrained(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a network, or some of its layers, in ``precision``: the operators of the file that would ship.

    The ranges of INT8 activations are given, not found by a calibration run; ``model`` itself is left as it is.
    Layers alone get the border that they have inside a network, uint8 or float16 for an image-like input or output:
    converting it is not paid there. The same model gives the same bytes. Raises ConfigError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision = '{precision}': expected one of {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return model
    inside = _begins_inside(model)
    with silent_libraries():
        if precision == "fp16":
            copied = onnx.ModelProto()
            copied.CopyFrom(model)
            converted = _halved(copied, keep_border=not inside)
        else:
            converted = _with_given_ranges(model)
            if inside:
                _open_border(converted.graph)
    _tidy(converted)
    strip_model(converted)
    return converted


def _begins_inside(model: onnx.ModelProto) -> bool:
    """Return whether the input is an activation: pixels go through a normalisation first, which stays in float."""
    name = model.graph.input[0].name
    readers = [node.op_type for node in model.graph.node if name in node.input]
    return all(operator in QUANTIZED_OPERATORS for operator in readers)


def _halved(model: onnx.ModelProto, *, keep_border: bool) -> onnx.ModelProto:
    halved: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=keep_border)
    # The converter appends its casts behind the nodes that use them.
    ONNXModel(halved).topological_sort()
    return halved


def _with_given_ranges(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` with the nodes that ``quantize_static`` would insert."""
    inferred = onnx.shape_inference.infer_shapes(model)  # the quantiser asks for the type of every tensor
    quantizer = QDQQuantizer(
        inferred,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=_given_ranges(inferred.graph),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTIZED_OPERATORS),
        extra_options={},
    )
    quantized: onnx.ModelProto = quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantized


def _given_ranges(graph: onnx.GraphProto) -> TensorsData:
    def between(low: float) -> TensorData:
        return TensorData(lowest=np.array(low, np.float32), highest=np.array(UNTRAINED_RANGE, np.float32))

    ranges = {value.name: between(-UNTRAINED_RANGE) for value in graph.input}
    for node in graph.node:
        low = 0.0 if node.op_type in CLIPPED_FROM_ZERO else -UNTRAINED_RANGE
        ranges |= {name: between(low) for name in node.output}
    return TensorsData(CalibrationMethod.MinMax, ranges)


def _open_border(graph: onnx.GraphProto) -> None:
    """Take an image-like input and output in eight bits: drop the QuantizeLinear and DequantizeLinear beside them."""
    for border, operator in ((graph.input[0], "QuantizeLinear"), (graph.output[0], "DequantizeLinear")):
        tensor = border.type.tensor_type
        found = [n for n in graph.node if n.op_type == operator and border.name in (n.input[0], n.output[0])]
        if len(found) == 1 and len(tensor.shape.dim) == 4:
            (node,) = found
            inner = node.output[0] if node.input[0] == border.name else node.input[0]
            graph.node.remove(node)
            _rename(graph, inner, border.name)
            tensor.elem_type = TensorProto.UINT8


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def _save(model: onnx.ModelProto, *, path: Path, exporter: str, metadata: Mapping[str, str]) -> ExportedModel:
    _tidy(model)
    return save_model(model, path=path, opset=model_opset(model), exporter=exporter, metadata=metadata)


def _tidy(model: onnx.ModelProto) -> None:
    del model.graph.value_info[:]  # shapes inside the graph: whoever needs them infers them again
    model.ir_version = min(model.ir_version, IR_VERSION)


@contextmanager
def _converting(source: Path, precision: str) -> Iterator[None]:
    """Turn whatever a converter raises into a GateError: its exceptions share no class."""
    try:
        yield
    except NasdeployError:
        raise
    except Exception as error:
        raise GateError(
            f"{source.name}: onnxruntime cannot convert it to {precision} ({first_line(error)})"
        ) from error


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Silence what the converters say about their own steps: what they lose is measured, not guessed."""
    root: Any = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"onnxruntime(\.|$)")
        try:
            root.setLevel(logging.ERROR)
            yield
        finally:
            root.setLevel(level)
            # They log by functions of the module logging, which give the root logger a handler for good.
            root.handlers[:] = handlers
