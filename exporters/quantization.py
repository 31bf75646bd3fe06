"""Smaller number formats of an exported file: INT8 by ONNX Runtime's quantiser, FP16 by its converter."""

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
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from nasdeploy.costs.graphs import IR_VERSION
from nasdeploy.exporters.base import ExportedModel
from nasdeploy.exporters.files import read_model, save_model
from nasdeploy.exporters.structure import model_opset

CALIBRATION_METHOD = "minmax"

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
    with _silent_libraries(), tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
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
    with _silent_libraries():
        model = convert_float_to_float16(read_model(source), keep_io_types=True)
        # The converter appends its casts behind the nodes that use them.
        ONNXModel(model).topological_sort()
    return _save(model, path=path, exporter=exporter, metadata=metadata)


def _save(model: onnx.ModelProto, *, path: Path, exporter: str, metadata: Mapping[str, str]) -> ExportedModel:
    del model.graph.value_info[:]  # shapes inside the graph: whoever needs them infers them again
    model.ir_version = min(model.ir_version, IR_VERSION)
    return save_model(model, path=path, opset=model_opset(model), exporter=exporter, metadata=metadata)


@contextmanager
def _silent_libraries() -> Iterator[None]:
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
