"""Why a file in a smaller number format is not as good as hoped: where error comes in, and what stayed in float.

A tensor's relative noise is ‖x - x'‖² / ‖x‖², of the float file's x and the reduced file's x' on the same images, by
ONNX Runtime's own ``qdq_loss_debug``. An operator adds the noise of its output less that of its inputs.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.qdq_loss_debug import (
    collect_activations,
    compute_signal_to_quantization_noice_ratio,
    create_activation_matching,
    modify_model_output_intermediate_tensors,
)

from nasdeploy.exporters.files import read_model
from nasdeploy.exporters.quantization import silent_libraries

__all__ = ["OperatorError", "float_operators", "operator_errors"]

Activations = Mapping[str, Sequence[NDArray[np.float32]]]

BETWEEN = ("QuantizeLinear", "DequantizeLinear", "Cast")
LOWEST_DB, HIGHEST_DB = -100.0, 200.0  # where float16 overflows nothing is finite
FLOAT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorError:
    """An operator of the float file and what its number format costs.

    signal_to_noise_db: of its output. added_noise: relative noise that it adds; 0.01 is a hundredth of the signal.
    """

    name: str
    operator: str
    signal_to_noise_db: float
    added_noise: float


def operator_errors(
    plain: Path, reduced: Path, batches: Iterable[NDArray[np.float32]]
) -> tuple[OperatorError, ...]:
    """Return the operators of ``plain`` by what they add to the error of ``reduced``, the largest first.

    batches: images (B, C, H, W), float32, as both files take them.
    """
    name = read_model(plain).graph.input[0].name
    feeds = [{name: batch} for batch in batches]
    with silent_libraries():
        before, after = _activations(plain, feeds), _activations(reduced, feeds)
        matched = create_activation_matching(after, before)
    # Of a tensor in QDQ format counts what its readers get; in FP16 there is only one value of it.
    pairs = {name: (match["float"], match["post_qdq"]) for name, match in matched.items() if "float" in match}
    pairs = {name: (before[name], after[name]) for name in before if name in after} | pairs
    decibels = {name: _decibels(*pair) for name, pair in pairs.items()}
    errors = _by_operator(read_model(plain).graph, decibels)
    return tuple(sorted(errors, key=lambda error: error.added_noise, reverse=True))


def float_operators(path: Path) -> dict[str, int]:
    """Return {operator: number of nodes} of what an INT8 file computes in float, quantisation itself aside."""
    graph = read_model(path).graph
    quantized = {name for node in graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    found = Counter(
        node.op_type
        for node in graph.node
        if node.op_type not in BETWEEN
        and not (
            all(name in dequantized or name in stored for name in node.input if name)
            and all(name in quantized for name in node.output)
        )
    )
    return dict(sorted(found.items()))


def _activations(path: Path, feeds: Sequence[Mapping[str, NDArray[np.float32]]]) -> Activations:
    """Return every float tensor of a file, by name, for each of ``feeds``."""
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        augmented = Path(folder, "augmented.onnx")
        modify_model_output_intermediate_tensors(str(path), str(augmented))
        found: Activations = collect_activations(str(augmented), feeds)
    return found


def _decibels(before: Sequence[NDArray[np.float32]], after: Sequence[NDArray[np.float32]]) -> float:
    with np.errstate(all="ignore"):  # float16 may have overflowed
        wide = [part.astype(np.float64) for part in after]
        value = float(compute_signal_to_quantization_noice_ratio(list(before), wide))
    return min(max(value, LOWEST_DB), HIGHEST_DB) if math.isfinite(value) else LOWEST_DB


def _noise(decibels: float) -> float:
    return float(10.0 ** (-decibels / 10.0))


def _by_operator(graph: onnx.GraphProto, decibels: Mapping[str, float]) -> Iterator[OperatorError]:
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        (output, *_) = node.output
        if output in decibels:
            computing, inputs = _behind(node, producers, decibels)
            arriving = max((_noise(decibels[name]) for name in inputs), default=0.0)
            yield OperatorError(
                name=computing.name,
                operator=computing.op_type,
                signal_to_noise_db=decibels[output],
                added_noise=max(0.0, _noise(decibels[output]) - arriving),
            )


def _behind(
    node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], decibels: Mapping[str, float]
) -> tuple[onnx.NodeProto, list[str]]:
    """Return the node that computes, and its compared inputs: a clipping that was fused hides the tensor before it."""
    while True:
        inputs = [name for name in node.input if name in decibels]
        hidden = [producers[name] for name in node.input if name in producers and name not in decibels]
        if inputs or len(hidden) != 1:
            return node, inputs
        (node,) = hidden
