"""Size of the exported file without exporting one: in float32 exact but for a few bytes of lengths.

In a reduced number format a layer's bytes are what it adds to a converted file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx

from nasdeploy.costs.graphs import (
    NamedLayer,
    chain_graph,
    layer_bytes,
    network_graph,
    random_weights,
    serialise,
)
from nasdeploy.costs.table import CostTable, tabulate
from nasdeploy.spaces.base import LayerSpec, SearchSpace

__all__ = ["file_size_table"]

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]
LayerBytes = Callable[[str, LayerSpec], int]


def file_size_table(
    space: SearchSpace, *, opset: int = 18, metadata_bytes: int = 0, convert: Convert | None = None
) -> CostTable:
    """Return the size in bytes of every architecture's ONNX file with folded batch norm.

    metadata_bytes: what the exporter adds to a file besides the network. convert: makes the model of a reduced number
    format from the one in float32; None: float32.
    """
    slots = _slot_names(space)
    bytes_of: LayerBytes = layer_bytes if convert is None else _Converted(convert, opset).layer_bytes
    layers = tabulate(space, lambda spec: bytes_of(slots[spec], spec))
    return layers.scaled(_frame_bytes(space, opset, convert, bytes_of) + metadata_bytes, 1.0)


class _Converted:
    """Sizes of converted layers, each between a layer before it (of which nothing remains) and one behind it.

    What a layer adds is [layer, tail] less [tail]: with the quantisation of its output, which belongs to it, under
    its own name, and without that of its input, which belongs to the layer before.
    """

    def __init__(self, convert: Convert, opset: int) -> None:
        self._convert, self._opset = convert, opset
        self._tails: dict[LayerSpec, int] = {}

    def layer_bytes(self, name: str, spec: LayerSpec) -> int:
        """Return what the layer adds to a file; the last layer of a network is a file of its own."""
        layer = _with_weights(name, spec)
        if spec.kind == "classifier":
            return self._size([layer])
        behind = LayerSpec(
            kind="classifier", in_channels=spec.out_channels, out_channels=1, size=spec.out_size
        )
        tail = _with_weights("tail", behind)
        if behind not in self._tails:
            self._tails[behind] = self._size([tail])
        return self._size([layer, tail]) - self._tails[behind]

    def _size(self, layers: Sequence[NamedLayer]) -> int:
        return len(serialise(self._convert(chain_graph(layers, batch_size=None, opset=self._opset))))


def _with_weights(name: str, spec: LayerSpec) -> NamedLayer:
    return name, spec, random_weights(spec, np.random.default_rng(0))


def _slot_names(space: SearchSpace) -> dict[LayerSpec, str]:
    """Return the slot that a layer stands in (the last one, for a layer of several)."""
    return {spec: slot.name for slot in space.slots for spec in slot.layers.values() if spec is not None}


def _frame_bytes(space: SearchSpace, opset: int, convert: Convert | None, bytes_of: LayerBytes) -> int:
    """Return what a file holds besides its layers: header, normalisation, names of inputs and outputs."""
    smallest = space.smallest()
    image_shape = space.input_shape(smallest)
    layers = [_with_weights(name, spec) for name, spec in space.named_layers(smallest)]
    channels = [0.0] * image_shape[0]
    model = network_graph(
        layers, image_shape=image_shape, mean=channels, scale=channels, batch_size=None, opset=opset
    )
    if convert is not None:
        model = convert(model)
    return len(serialise(model)) - sum(bytes_of(name, spec) for name, spec, _ in layers)
