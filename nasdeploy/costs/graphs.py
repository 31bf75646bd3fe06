"""Layers and networks as ONNX graphs, written node by node: no torch, no exporter, milliseconds, not seconds.

Batch norm is folded before it comes here. Nodes and values are named after the slots, so that a reader
of a profile of the runtime recognises the layers, and the same network always gives the same bytes.

Shapes: B images, C image channels, i input and o output channels, h hidden channels, k kernel, s pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import LayerSpec

__all__ = [
    "EMITTERS",
    "INPUT_NAME",
    "IR_VERSION",
    "OUTPUT_NAME",
    "GraphBuilder",
    "LayerWeights",
    "NamedLayer",
    "chain_graph",
    "check_image_shape",
    "layer_bytes",
    "network_graph",
    "random_weights",
    "serialise",
    "weight_shapes",
]

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
IR_VERSION = 10  # the newest that onnxruntime 1.20 reads

LayerWeights = Mapping[str, NDArray[np.float32]]
"""Weights of one layer with batch norm folded, by the names of :func:`weight_shapes`."""

NamedLayer = tuple[str, LayerSpec, LayerWeights]
"""Slot name, layer, weights."""

WEIGHT_SHAPES: dict[str, Callable[[LayerSpec], dict[str, tuple[int, ...]]]] = {
    "stem": lambda spec: _conv_shapes("", spec.in_channels, spec.out_channels, spec.kernel),
    "inverted_residual": lambda spec: (
        _conv_shapes("expansion.", spec.in_channels, spec.hidden_channels, 1)
        | _conv_shapes("depthwise.", 1, spec.hidden_channels, spec.kernel)
        | _conv_shapes("projection.", spec.hidden_channels, spec.out_channels, 1)
    ),
    "head": lambda spec: _conv_shapes("", spec.in_channels, spec.out_channels, spec.kernel),
    "classifier": lambda spec: {
        "weight": (spec.out_channels, spec.in_channels),
        "bias": (spec.out_channels,),
    },
}


def _conv_shapes(prefix: str, i: int, o: int, k: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}weight": (o, i, k, k), f"{prefix}bias": (o,)}


def weight_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the folded weights of ``spec``. Raises ConfigError for an unknown kind."""
    if spec.kind not in WEIGHT_SHAPES:
        raise ConfigError(
            f"layer kind '{spec.kind}' has no ONNX graph; expected one of {', '.join(WEIGHT_SHAPES)}"
        )
    return WEIGHT_SHAPES[spec.kind](spec)


def random_weights(spec: LayerSpec, rng: np.random.Generator) -> LayerWeights:
    """Return weights (He normal, fan-in) and small biases drawn from ``rng``.

    Activations stay near 1: denormal numbers would slow the arithmetic down and spoil a measurement.
    """
    weights = {}
    for name, shape in weight_shapes(spec).items():
        std = 0.1 if len(shape) == 1 else (2.0 / prod(shape[1:])) ** 0.5
        weights[name] = (std * rng.standard_normal(shape)).astype(np.float32)
    return weights


@dataclass(frozen=True, slots=True)
class GraphBuilder:
    """Nodes and initialisers under construction."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initialisers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, name: str, values: NDArray[np.float32]) -> str:
        self.initialisers[name] = numpy_helper.from_array(np.asarray(values, np.float32, order="C"), name)
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def relu6(self, x: str, name: str) -> str:
        low = self.constant("zero", np.zeros((), np.float32))
        high = self.constant("six", np.full((), 6.0, np.float32))
        return self.node("Clip", [x, low, high], name)

    def conv(
        self, x: str, name: str, weights: LayerWeights, *, prefix: str = "", stride: int = 1, groups: int = 1
    ) -> str:
        """Add a convolution with 'same' padding (k//2 on each side), as the layers of torch have it."""
        weight = weights[f"{prefix}weight"]
        kernel = weight.shape[2]
        inputs = [
            x,
            self.constant(f"{name}.weight", weight),
            self.constant(f"{name}.bias", weights[f"{prefix}bias"]),
        ]
        return self.node(
            "Conv",
            inputs,
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
        )


def _emit_conv_relu6(graph: GraphBuilder, x: str, name: str, spec: LayerSpec, weights: LayerWeights) -> str:
    """Stem and head."""
    return graph.relu6(graph.conv(x, name, weights, stride=spec.stride), f"{name}.relu6")


def _emit_inverted_residual(
    graph: GraphBuilder, x: str, name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    y = graph.conv(x, f"{name}.expansion", weights, prefix="expansion.")
    y = graph.relu6(y, f"{name}.expansion.relu6")
    y = graph.conv(
        y, f"{name}.depthwise", weights, prefix="depthwise.", stride=spec.stride, groups=spec.hidden_channels
    )
    y = graph.relu6(y, f"{name}.depthwise.relu6")
    y = graph.conv(y, f"{name}.projection", weights, prefix="projection.")
    return graph.node("Add", [x, y], f"{name}.add") if spec.has_residual else y


def _emit_classifier(graph: GraphBuilder, x: str, name: str, spec: LayerSpec, weights: LayerWeights) -> str:
    y = graph.node("GlobalAveragePool", [x], f"{name}.pool")
    y = graph.node("Flatten", [y], f"{name}.flatten", axis=1)
    inputs = [
        y,
        graph.constant(f"{name}.weight", weights["weight"]),
        graph.constant(f"{name}.bias", weights["bias"]),
    ]
    return graph.node("Gemm", inputs, f"{name}.linear", transB=1)


Emitter = Callable[[GraphBuilder, str, str, LayerSpec, LayerWeights], str]

EMITTERS: dict[str, Emitter] = {
    "stem": _emit_conv_relu6,
    "inverted_residual": _emit_inverted_residual,
    "head": _emit_conv_relu6,
    "classifier": _emit_classifier,
}


def network_graph(
    layers: Sequence[NamedLayer],
    *,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    scale: Sequence[float],
    batch_size: int | None,
    opset: int = 18,
) -> onnx.ModelProto:
    """Return a whole network: input "images" float32 (B, C, s, s), pixels 0..255; output "logits" (B, o).

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
    _emit_chain(graph, x, layers)
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

    Input "images" float32 (B, i, s, s) of the first layer, output "logits" of the last.
    """
    first = layers[0][1]
    graph = GraphBuilder()
    _emit_chain(graph, INPUT_NAME, layers)
    shape = (first.in_channels, first.size, first.size)
    return _model(graph, image_shape=shape, last=layers[-1][1], batch_size=batch_size, opset=opset)


def serialise(model: onnx.ModelProto) -> bytes:
    """Return the file's bytes: the same model gives the same bytes."""
    return bytes(model.SerializeToString(deterministic=True))


def layer_bytes(name: str, spec: LayerSpec) -> int:
    """Return what the layer adds to the file, in bytes: nodes and initialisers, tags and lengths included."""
    graph = GraphBuilder()
    EMITTERS[spec.kind](graph, f"{name}.relu6", name, spec, _zero_weights(spec))
    shared = ("zero", "six")  # written once per file, not once per layer
    sizes = [node.ByteSize() for node in graph.nodes]
    sizes += [tensor.ByteSize() for tensor in graph.initialisers.values() if tensor.name not in shared]
    return sum(map(_field_bytes, sizes))


def _zero_weights(spec: LayerSpec) -> LayerWeights:
    return {name: np.zeros(shape, np.float32) for name, shape in weight_shapes(spec).items()}


def _field_bytes(size: int) -> int:
    """Return the bytes of a protobuf message of ``size`` inside another: tag, length as a varint, content."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


def _per_channel(values: Sequence[float]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)


def _emit_chain(graph: GraphBuilder, x: str, layers: Sequence[NamedLayer]) -> None:
    """Emit ``layers`` one after the other; the value of the last node becomes the output of the graph."""
    previous: LayerSpec | None = None
    for name, spec, weights in layers:
        arriving = (previous.out_channels, previous.out_size) if previous else (spec.in_channels, spec.size)
        if arriving != (spec.in_channels, spec.size):
            raise ConfigError(
                f"{name}: takes {spec.in_channels} channels of {spec.size} pixels, "
                f"the layer before gives {arriving[0]} of {arriving[1]}"
            )
        _check_weights(name, spec, weights)
        x = EMITTERS[spec.kind](graph, x, name, spec, weights)
        previous = spec
    graph.nodes[-1].output[0] = OUTPUT_NAME


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
    pooled = last.kind == "classifier"
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
