"""What the layers of a space add to an ONNX file in float32, in bytes, from what is written of each.

A node names what it reads. A slot that is skipped passes on a name of another length, so that it adds or saves a few
bytes at those who read it. Nodes that compute the same are written once; whether an earlier slot has written one may
depend on any number of decisions: then a slot adds what it does on average over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from nasdeploy.costs.emitters import EMITTERS, GraphBuilder, weight_shapes
from nasdeploy.spaces.base import IMAGES, LayerSlot, LayerSpec, SearchSpace

Key = tuple[int, ...]
NodeKey = tuple[str, ...]
"""What a node computes: nodes of one key are written once. Shared nodes that it reads stand as their own keys."""

ONCE_PER_FILE = ("zero", "six")
"""Constants that all layers share: no part of any of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What is written of a layer. nodes: of those that other layers may share, the bytes of each."""

    total_bytes: int
    nodes: Mapping[NodeKey, int]


@cache
def written(name: str, spec: LayerSpec, inputs: tuple[str, ...] | None = None) -> Written:
    """Return what is written of the layer of a slot: nodes and initialisers, tags and lengths included.

    inputs: the names of the values that it reads; None: they count as that of a usual layer before it in a chain.
    """
    graph, _ = _emitted(name, spec, inputs or (f"{name}.relu6",) * spec.num_inputs)
    nodes = {node.name: _field_bytes(node.ByteSize()) for node in graph.nodes}
    constants = [one.ByteSize() for one in graph.initialisers.values() if one.name not in ONCE_PER_FILE]
    computed: dict[
        str, NodeKey
    ] = {}  # by its own name, which is not the one in the file if another wrote it first
    for key, node in graph.shared.items():
        computed[node] = tuple(repr(computed.get(part, part)) for part in key)
    return Written(
        total_bytes=sum(nodes.values()) + sum(map(_field_bytes, constants)),
        nodes={key: nodes[node] for node, key in computed.items()},
    )


def _emitted(name: str, spec: LayerSpec, inputs: Sequence[str]) -> tuple[GraphBuilder, str]:
    graph = GraphBuilder()
    weights = {key: np.zeros(shape, np.float32) for key, shape in weight_shapes(spec).items()}
    return graph, EMITTERS[spec.kind](graph, inputs, name, spec, weights)


def _field_bytes(size: int) -> int:
    """Return the bytes of a protobuf message of ``size`` inside another: tag, length as a varint, content."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


class SlotBytes:
    """The bytes of every slot of ``space``."""

    def __init__(self, space: SearchSpace) -> None:
        self._sizes = space.num_values()
        self._values = {slot.name: _usual_value(slot) for slot in space.slots}
        self._readers: dict[str, list[LayerSlot]] = {}
        self._writers: dict[NodeKey, list[LayerSlot]] = {}  # in the order of the file
        self._writes: dict[tuple[str, NodeKey], set[Key]] = {}
        self._places = {slot.name: place for place, slot in enumerate(space.slots)}
        for slot in space.slots:
            for source in slot.sources():
                self._readers.setdefault(source, []).append(slot)
            for key in slot.layers:
                for node in () if (found := self._written(slot, key)) is None else found.nodes:
                    self._writes.setdefault((slot.name, node), set()).add(key)
        for name, node in self._writes:
            self._writers.setdefault(node, []).append(space.slots[self._places[name]])

    def of(self, slot: LayerSlot, key: Key) -> float:
        """Return the bytes for what stands in ``slot`` under ``key``."""
        found = self._written(slot, key)
        if found is None:
            return self._passed_on(slot, key)
        saved = (size * self._is_written(node, slot, key) for node, size in found.nodes.items())
        return found.total_bytes - sum(saved)

    def _written(self, slot: LayerSlot, key: Key) -> Written | None:
        layer = slot.layers[key]
        return None if layer is None else written(slot.name, layer, self._read(slot, key))

    def _read(self, slot: LayerSlot, key: Key) -> tuple[str, ...] | None:
        """Return the names of what ``slot`` reads, as if no slot were skipped."""
        if slot.inputs is None:
            return None
        return tuple(self._values.get(name, name) for name in slot.inputs.get(key, ()))

    def _passed_on(self, slot: LayerSlot, key: Key) -> float:
        """Return what the name that a skipped slot passes on adds to those who read it."""
        read = self._read(slot, key)
        if not read:
            return 0.0
        longer = len(read[0]) - len(self._values[slot.name])
        return longer * sum(self._times_read(other, slot, key) for other in self._readers.get(slot.name, ()))

    def _times_read(self, reader: LayerSlot, slot: LayerSlot, key: Key) -> float:
        """Return how often ``reader`` reads ``slot`` under its ``key``, the mean over what else it depends on."""
        inputs = reader.inputs or {}
        fitting = [one for one in self._fitting(reader, slot, key) if reader.layers[one] is not None]
        return float(np.mean([inputs[one].count(slot.name) for one in fitting])) if fitting else 0.0

    def _is_written(self, node: NodeKey, slot: LayerSlot, key: Key) -> float:
        """Return the share of architectures with ``key`` in which a slot before ``slot`` has written ``node``."""
        absent = 1.0
        for other in self._writers[node]:
            if self._places[other.name] >= self._places[slot.name]:
                break
            writes, fitting = self._writes[other.name, node], self._fitting(other, slot, key)
            absent *= 1.0 - sum(one in writes for one in fitting) / len(fitting)
        return 1.0 - absent

    def _fitting(self, other: LayerSlot, slot: LayerSlot, key: Key) -> list[Key]:
        """Return the keys of ``other`` that agree with ``key`` of ``slot``."""
        known = dict(zip(slot.decisions, key, strict=True))
        return list(product(*([known[d]] if d in known else range(self._sizes[d]) for d in other.decisions)))


def _usual_value(slot: LayerSlot) -> str:
    """Return the name of the value of a slot that holds a layer."""
    layer = next((layer for layer in slot.layers.values() if layer is not None), None)
    return slot.name if layer is None else _emitted(slot.name, layer, [IMAGES] * layer.num_inputs)[1]
