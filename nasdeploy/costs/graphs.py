"""Layers and networks as ONNX graphs, written node by node: no torch, no exporter, milliseconds, not seconds.

Batch norm is folded before it comes here. Nodes and values are named after the slots, so that a reader
of a profile of the runtime recognises the layers, and the same network always gives the same bytes.

Shapes: B images, C image channels, i input and o output channels, s pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from nasdeploy.costs.emitters import (
    EMITTERS,
    GraphBuilder,
    LayerWeights,
    random_weights,
    weight_shapes,
)
from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import CLASSIFIERS, IMAGES, LayerSpec, PlacedLayer

__all__ = [
    "EMITTERS",
    "INPUT_NAME",
    "IR_VERSION",
    "OUTPUT_NAME",
    "GraphBuilder",
    "GraphLayer",
    "LayerWeights",
    "NamedLayer",
    "chain_graph",
    "check_image_shape",
    "graph_layers",
    "network_graph",
    "random_weights",
    "serialise",
    "weight_shapes",
]

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
IR_VERSION = 10  # the newest that onnxruntime 1.20 reads

NamedLayer = tuple[str, LayerSpec, LayerWeights]
"""Slot name, layer, weights: of a chain, in which a layer reads the one before it."""


class GraphLayer(NamedTuple):
    """A layer of a network that is a graph, behind those that it reads: ``inputs`` are their names."""

    name: str
    spec: LayerSpec
    weights: LayerWeights
    inputs: tuple[str, ...]


def graph_layers(
    placed: Sequence[PlacedLayer], weights_of: Callable[[LayerSpec], LayerWeights]
) -> list[GraphLayer]:
    """Return the network of an architecture with the weights that ``weights_of`` gives, for :func:`network_graph`."""
    return [GraphLayer(one.name, one.spec, weights_of(one.spec), one.inputs) for one in placed]


def network_graph(
    layers: Sequence[NamedLayer | GraphLayer],
    *,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    scale: Sequence[float],
    batch_size: int | None,
    opset: int = 18,
) -> onnx.ModelProto:
    """Return a network, chain or graph: input "images" float32 (B, C, s, s), pixels 0..255; output "logits" (B, o).

    The pixels become (x - mean) * scale, one value a channel. ``batch_size`` None: any batch size, a
    dimension called "batch". Raises ConfigError for layers that do not fit the images, one another or their weights.
    """
    check_image_shape(image_shape, layers[0][1])
    channels = image_shape[0]
    if len(mean) != channels or len(scale) != channels:
        raise ConfigError(
            f"normalisation: {len(mean)} means and {len(scale)} scales for {channels} image channels"
        )
    graph = GraphBuilder()
    x = graph.node("Sub", [INPUT_NAME, graph.constant("mean", _per_channel(mean))], "normalise.sub")
    x = graph.node("Mul", [x, graph.constant("scale", _per_channel(scale))], "normalise.mul")
    _emit_layers(graph, _Value(x, channels, image_shape[1]), layers)
    return _model(graph, image_shape=image_shape, last=layers[-1][1], batch_size=batch_size, opset=opset)


def check_image_shape(image_shape: tuple[int, int, int], first: LayerSpec) -> None:
    """Raise ConfigError unless ``first``, the first layer of a network, takes such images (channels, height, width)."""
    expected = (first.in_channels, first.size, first.size)
    if tuple(image_shape) != expected:
        raise ConfigError(
            f"image_shape = {image_shape}: the network takes {expected} (channels, height, width)"
        )


def chain_graph(layers: Sequence[NamedLayer], *, batch_size: int | None, opset: int = 18) -> onnx.ModelProto:
    """Return layers alone, without a normalisation: what the runtime needs to time them.

    Input "images" float32 (B, c, s, s) of the first layer, output "logits" of the last. A layer that reads several
    values reads the one before it several times.
    """
    first = layers[0][1]
    graph = GraphBuilder()
    shape = (first.value_channels, first.size, first.size)
    _emit_layers(graph, _Value(INPUT_NAME, *shape[:2]), layers)
    return _model(graph, image_shape=shape, last=layers[-1][1], batch_size=batch_size, opset=opset)


def serialise(model: onnx.ModelProto) -> bytes:
    """Return the file's bytes: the same model gives the same bytes."""
    return bytes(model.SerializeToString(deterministic=True))


def _per_channel(values: Sequence[float]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)


class _Value(NamedTuple):
    """A value of the graph: its name, channels and size in pixels."""

    name: str
    channels: int
    size: int


def _emit_layers(graph: GraphBuilder, images: _Value, layers: Sequence[NamedLayer | GraphLayer]) -> None:
    """Emit ``layers``, each behind those that it reads; the value of the last node becomes the output of the graph."""
    values = {IMAGES: images}
    before = IMAGES
    for layer in layers:
        name, spec, weights = layer[:3]
        inputs = layer.inputs if isinstance(layer, GraphLayer) else (before,) * spec.num_inputs
        read = [_checked_value(name, spec, values, source) for source in inputs]
        _check_weights(name, spec, weights)
        x = EMITTERS[spec.kind](graph, [value.name for value in read], name, spec, weights)
        values[name] = _Value(x, spec.out_channels, spec.out_size)
        before = name
    graph.nodes[-1].output[0] = OUTPUT_NAME


def _checked_value(name: str, spec: LayerSpec, values: dict[str, _Value], source: str) -> _Value:
    """Return the value of ``source``. Raises ConfigError for one that is not there or does not fit."""
    if source not in values:
        raise ConfigError(f"{name}: reads '{source}'; expected a layer that comes before it")
    value = values[source]
    if value[1:] != (spec.value_channels, spec.size):
        raise ConfigError(
            f"{name}: takes {spec.value_channels} channels of {spec.size} pixels, "
            f"the layer before gives {value.channels} of {value.size}"
        )
    return value


def _check_weights(name: str, spec: LayerSpec, weights: LayerWeights) -> None:
    expected = weight_shapes(spec)
    got = {key: tuple(value.shape) for key, value in weights.items()}
    if got != expected:
        raise ConfigError(f"{name}: weights of the shapes {got}; expected {expected}")


def _model(
    graph: GraphBuilder,
    *,
    image_shape: tuple[int, int, int],
    last: LayerSpec,
    batch_size: int | None,
    opset: int,
) -> onnx.ModelProto:
    batch = "batch" if batch_size is None else batch_size
    pooled = last.kind in CLASSIFIERS
    out_shape = [last.out_channels] if pooled else [last.out_channels, last.out_size, last.out_size]
    proto = helper.make_graph(
        graph.nodes,
        "nasdeploy",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, [batch, *image_shape])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, [batch, *out_shape])],
        list(graph.initialisers.values()),
    )
    model: onnx.ModelProto = helper.make_model(
        proto,
        producer_name="nasdeploy",
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSION,
    )
    return model
