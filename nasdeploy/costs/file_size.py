"""Size of the exported file: exact but for a few bytes of lengths, without writing a file."""

from __future__ import annotations

import numpy as np

from nasdeploy.costs.graphs import layer_bytes, network_graph, random_weights, serialise
from nasdeploy.costs.table import CostTable, tabulate
from nasdeploy.spaces.base import LayerSpec, SearchSpace

__all__ = ["file_size_table"]


def file_size_table(space: SearchSpace, *, opset: int = 18, metadata_bytes: int = 0) -> CostTable:
    """Return the size in bytes of every architecture's float32 ONNX file with folded batch norm.

    metadata_bytes: what the exporter adds to a file besides the network.
    """
    slots = _slot_names(space)
    layers = tabulate(space, lambda spec: layer_bytes(slots[spec], spec))
    return layers.scaled(_frame_bytes(space, opset) + metadata_bytes, 1.0)


def _slot_names(space: SearchSpace) -> dict[LayerSpec, str]:
    """Return the slot that a layer stands in (the last one, for a layer of several)."""
    return {spec: slot.name for slot in space.slots for spec in slot.layers.values() if spec is not None}


def _frame_bytes(space: SearchSpace, opset: int) -> int:
    """Return what a file holds besides its layers: header, normalisation, names of inputs and outputs."""
    rng = np.random.default_rng(0)
    smallest = space.smallest()
    image_shape = space.input_shape(smallest)
    layers = [(name, spec, random_weights(spec, rng)) for name, spec in space.named_layers(smallest)]
    channels = [0.0] * image_shape[0]
    model = network_graph(
        layers, image_shape=image_shape, mean=channels, scale=channels, batch_size=None, opset=opset
    )
    return len(serialise(model)) - sum(layer_bytes(name, spec) for name, spec, _ in layers)
