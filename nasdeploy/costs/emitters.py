"""Each kind of layer as ONNX nodes, and the shapes of its weights with batch norm folded.

Shapes: B images, i input and o output channels, c channels of one value, h hidden channels, k kernel, s pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import LayerSpec

__all__ = ["EMITTERS", "Emitter", "GraphBuilder", "LayerWeights", "random_weights", "weight_shapes"]

LayerWeights = Mapping[str, NDArray[np.float32]]
"""Weights of one layer with batch norm folded, by the names of :func:`weight_shapes`."""

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
    "separable": lambda spec: (
        {"depthwise.weight": (spec.in_channels, 1, spec.kernel, spec.kernel)}
        | _conv_shapes("pointwise.", spec.in_channels, spec.out_channels, 1)
    ),
    "max_pool": lambda spec: {},
    "avg_pool": lambda spec: {},
    "sum": lambda spec: {},
    "join": lambda spec: _conv_shapes("", spec.in_channels, spec.out_channels, 1),
    "join_classifier": lambda spec: {
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
    shared: dict[tuple[str, ...], str] = field(default_factory=dict)

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
        """Add a convolution, with a bias where ``weights`` have one."""
        weight = weights[f"{prefix}weight"]
        inputs = [x, self.constant(f"{name}.weight", weight)]
        if f"{prefix}bias" in weights:
            inputs.append(self.constant(f"{name}.bias", weights[f"{prefix}bias"]))
        return self.node("Conv", inputs, name, **self.window(weight.shape[2], stride), group=groups)

    @staticmethod
    def window(kernel: int, stride: int) -> dict[str, list[int]]:
        """Return the attributes of 'same' padding (k//2 on each side), as the layers of torch have it."""
        return {
            "kernel_shape": [kernel, kernel],
            "strides": [stride, stride],
            "pads": [kernel // 2] * 4,
        }

    def joined(self, inputs: Sequence[str], name: str) -> str:
        """Add a concatenation of the channels, where there is more than one input, and ReLU."""
        x = self.once("Concat", inputs, f"{name}.concat", axis=1) if len(inputs) > 1 else inputs[0]
        return self.once("Relu", [x], f"{name}.relu")

    def once(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node, or return the value of the one that computes the same: several layers may begin alike."""
        key = (operator, *inputs, repr(attributes))
        if key not in self.shared:
            self.shared[key] = self.node(operator, inputs, name, **attributes)
        return self.shared[key]


def _emit_conv_relu6(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    """Stem and head."""
    (x,) = inputs
    return graph.relu6(graph.conv(x, name, weights, stride=spec.stride), f"{name}.relu6")


def _emit_inverted_residual(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    (x,) = inputs
    y = graph.conv(x, f"{name}.expansion", weights, prefix="expansion.")
    y = graph.relu6(y, f"{name}.expansion.relu6")
    y = graph.conv(
        y, f"{name}.depthwise", weights, prefix="depthwise.", stride=spec.stride, groups=spec.hidden_channels
    )
    y = graph.relu6(y, f"{name}.depthwise.relu6")
    y = graph.conv(y, f"{name}.projection", weights, prefix="projection.")
    return graph.node("Add", [x, y], f"{name}.add") if spec.has_residual else y


def _emit_classifier(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    (x,) = inputs
    y = graph.node("GlobalAveragePool", [x], f"{name}.pool")
    y = graph.node("Flatten", [y], f"{name}.flatten", axis=1)
    factors = [
        y,
        graph.constant(f"{name}.weight", weights["weight"]),
        graph.constant(f"{name}.bias", weights["bias"]),
    ]
    return graph.node("Gemm", factors, f"{name}.linear", transB=1)


def _emit_separable(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    y = graph.joined(inputs, name)
    y = graph.conv(
        y, f"{name}.depthwise", weights, prefix="depthwise.", stride=spec.stride, groups=spec.in_channels
    )
    return graph.conv(y, name, weights, prefix="pointwise.")


def _emit_pool(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    """The largest or the mean value; by ONNX's default, too, the mean leaves out what is padded."""
    operator = "MaxPool" if spec.kind == "max_pool" else "AveragePool"
    return graph.once(operator, inputs, name, **graph.window(spec.kernel, spec.stride))


def _emit_sum(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    total = inputs[0]
    for place, x in enumerate(inputs[1:], start=2):
        total = graph.node("Add", [total, x], name if place == len(inputs) else f"{name}.{place}")
    return total


def _emit_join(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    return graph.conv(graph.joined(inputs, name), name, weights, stride=spec.stride)


def _emit_join_classifier(
    graph: GraphBuilder, inputs: Sequence[str], name: str, spec: LayerSpec, weights: LayerWeights
) -> str:
    return _emit_classifier(graph, [graph.joined(inputs, name)], name, spec, weights)


Emitter = Callable[[GraphBuilder, Sequence[str], str, LayerSpec, LayerWeights], str]
"""Adds the nodes of a layer: graph, names of what it reads, name of its slot, layer, weights; returns its value."""

EMITTERS: dict[str, Emitter] = {
    "stem": _emit_conv_relu6,
    "inverted_residual": _emit_inverted_residual,
    "head": _emit_conv_relu6,
    "classifier": _emit_classifier,
    "separable": _emit_separable,
    "max_pool": _emit_pool,
    "avg_pool": _emit_pool,
    "sum": _emit_sum,
    "join": _emit_join,
    "join_classifier": _emit_join_classifier,
}
