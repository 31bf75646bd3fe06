"""Size of the exported file without exporting one: for a chain in float32 exact but for a few bytes of lengths.

Where layers of a network may begin alike, nodes that they share are counted at their average
(:mod:`nasdeploy.costs.slot_bytes`): up to 1.1 % off for cells. In a reduced number format a layer's bytes are what it
adds to a converted file: for cells up to 7 % off. So a chosen network is written and weighed before it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx

from nasdeploy.costs.graphs import (
    NamedLayer,
    chain_graph,
    graph_layers,
    network_graph,
    random_weights,
    serialise,
)
from nasdeploy.costs.slot_bytes import SlotBytes
from nasdeploy.costs.table import CostTable, tabulate, tabulate_slots
from nasdeploy.spaces.base import CLASSIFIERS, LayerSpec, SearchSpace

__all__ = ["file_size_table"]

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]


def file_size_table(
    space: SearchSpace, *, opset: int = 18, metadata_bytes: int = 0, convert: Convert | None = None
) -> CostTable:
    """Return the size in bytes of every architecture's ONNX file with folded batch norm.

    metadata_bytes: what the exporter adds to a file besides the network. convert: makes the model of a reduced number
    format from the one in float32; None: float32.
    """
    if convert is None:
        layers = tabulate_slots(space, SlotBytes(space).of)
    else:
        names, converted = _slot_names(space), _Converted(convert, opset)
        layers = tabulate(space, lambda spec: converted.layer_bytes(names[spec], spec))
    smallest = np.array([space.smallest().choices])
    frame = _smallest_bytes(space, opset, convert) - float(layers.of(smallest)[0])
    return layers.scaled(frame + metadata_bytes, 1.0)


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
        if spec.kind in CLASSIFIERS:
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


def _smallest_bytes(space: SearchSpace, opset: int, convert: Convert | None) -> int:
    """Return the size of the smallest network's file: header, normalisation, names of inputs and outputs included."""
    smallest = space.smallest()
    image_shape = space.input_shape(smallest)
    layers = graph_layers(space.placed(smallest), lambda spec: random_weights(spec, np.random.default_rng(0)))
    channels = [0.0] * image_shape[0]
    model = network_graph(
        layers, image_shape=image_shape, mean=channels, scale=channels, batch_size=None, opset=opset
    )
    return len(serialise(model if convert is None else convert(model)))
