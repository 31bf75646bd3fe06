"""What can be chosen, as plain data: decisions, architectures, layers and the space that ties them.

A network is a graph of *slots*, in the simplest case a chain. What stands in a slot depends on a few decisions (its
own operation, the width before it, the width after it), so that every cost which adds up over layers is a sum of small
tables over those decisions (:class:`nasdeploy.costs.table.CostTable`). Where a layer depends on too many of them, such
as one that joins all values which nobody reads, it depends on a *derived* value instead, a function of decisions.

Notation: n architectures, D decisions, decision d has C_d candidates, C = max C_d; E derived values, derived value e
has E_e values and the number D + e wherever slots and tables name what they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.slots import (
    CLASSIFIERS,
    IMAGES,
    Decision,
    Derived,
    FloatArray,
    IntArray,
    LayerSlot,
    LayerSpec,
    PlacedLayer,
    check_slots,
    make_slot,
    slot_row,
)

if TYPE_CHECKING:
    from nasdeploy.spaces.graph_view import GraphView

__all__ = [
    "CLASSIFIERS",
    "IMAGES",
    "RESOLUTION",
    "Architecture",
    "CandidateMask",
    "Decision",
    "Derived",
    "FloatArray",
    "IntArray",
    "LayerSlot",
    "LayerSpec",
    "PlacedLayer",
    "SearchSpace",
    "make_slot",
    "to_architectures",
]

CandidateMask = tuple[tuple[bool, ...], ...]
"""Per decision, per candidate: may it be chosen?"""

RESOLUTION = "resolution"
"""The name of the decision, where there is one, whose candidates are the sides of the input in pixels."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One candidate index per decision: ``choices`` has shape (D,)."""

    choices: tuple[int, ...]


def to_architectures(choices: IntArray) -> list[Architecture]:
    """Return the rows of ``choices`` (n, D) as architectures."""
    return [Architecture(tuple(row)) for row in choices.tolist()]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Slots over D decisions for images of one shape, or of several sizes (:data:`RESOLUTION`).

    image_shape: (channels, height, width), height == width; the largest size where there are several. derived: values
    that slots depend on beside decisions. scaled_by: name of the decision that is solved for so that the caps of a
    profile are met, "" for none. graph: how a model of the loss sees architectures; None: as a chain of decisions.
    Raises ConfigError for a decision called "resolution" whose candidates are not sizes in ascending order up to that
    one, and for slots that do not fit together.
    """

    name: str
    decisions: tuple[Decision, ...]
    slots: tuple[LayerSlot, ...]
    image_shape: tuple[int, int, int]
    num_classes: int
    derived: tuple[Derived, ...] = ()
    scaled_by: str = ""
    graph: GraphView | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for decision in self.decisions:
            if decision.name == RESOLUTION:
                self._check_resolution(decision.candidates)
        if self.scaled_by and self.scaled_by not in [decision.name for decision in self.decisions]:
            raise ConfigError(
                f"space '{self.name}': scaled_by = '{self.scaled_by}'; expected the name of a decision"
            )
        check_slots(self.name, self.slots, self.derived, len(self.decisions))

    def _check_resolution(self, candidates: tuple[str, ...]) -> None:
        sizes = [int(text) if text.isdecimal() else 0 for text in candidates]
        if sizes != sorted(set(sizes)) or min(sizes, default=0) < 1 or sizes[-1] != self.image_shape[1]:
            raise ConfigError(
                f"space '{self.name}': the decision '{RESOLUTION}' has the candidates {', '.join(candidates)}; "
                "expected sizes in pixels in ascending order, "
                f"the last one {self.image_shape[1]}, the size of the images"
            )

    def decode(self, architecture: Architecture) -> tuple[LayerSpec, ...]:
        """Return the layers of ``architecture`` as data, input first."""
        return tuple(layer.spec for layer in self.placed(architecture))

    def named_layers(self, architecture: Architecture) -> tuple[tuple[str, LayerSpec], ...]:
        """Return (slot name, layer) for every slot that is not skipped, input first."""
        return tuple((layer.name, layer.spec) for layer in self.placed(architecture))

    def placed(self, architecture: Architecture) -> tuple[PlacedLayer, ...]:
        """Return the network of ``architecture`` as data: every layer with what it reads, input first.

        Raises ConfigError for a layer that reads a slot without a value.
        """
        self.validate(architecture)
        values: Sequence[int] = architecture.choices
        if self.derived:
            values = self.extended(np.array([values]))[0].tolist()
        placed = []
        stands_for = {IMAGES: IMAGES}  # slot: the layer whose value it has
        before = IMAGES
        for slot, places in zip(self.slots, self._places, strict=True):
            key = tuple(values[d] for d in slot.decisions)
            layer = slot.layers[key]
            names = (before,) if slot.inputs is None else slot.inputs.get(key, ())
            if missing := [name for name in names if name not in stands_for]:
                raise ConfigError(
                    f"space '{self.name}': slot '{slot.name}' reads '{missing[0]}', which has no value in "
                    f"{architecture}; expected a slot that holds a layer there"
                )
            if layer is not None:
                inputs, taken = tuple(stands_for[n] for n in names), tuple(places.get(n, 0) for n in names)
                placed.append(PlacedLayer(name=slot.name, spec=layer, inputs=inputs, taken=taken))
            elif not names:
                continue
            before = stands_for[slot.name] = slot.name if layer is not None else stands_for[names[0]]
        return tuple(placed)

    @cached_property
    def _places(self) -> tuple[dict[str, int], ...]:
        """Per slot: {source: its place among the sources}."""
        return tuple({name: i for i, name in enumerate(slot.sources())} for slot in self.slots)

    def extended(self, choices: IntArray) -> IntArray:
        """Return ``choices`` (n, D) with the derived values behind them: (n, D + E).

        Raises ValueError for an index out of range.
        """
        choices = np.asarray(choices, dtype=np.int64)
        counts = self.num_candidates()
        if (
            choices.ndim != 2
            or choices.shape[1] != len(counts)
            or ((choices < 0) | (choices >= counts)).any()
        ):
            raise ValueError(
                f"choices of shape {choices.shape}: expected {len(counts)} decisions, with candidate indices inside "
                f"the space '{self.name}'"
            )
        columns = [derived.of(choices)[:, None] for derived in self.derived]
        return np.concatenate([choices, *columns], axis=1)

    def input_shape(self, architecture: Architecture) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that ``architecture`` takes.

        This is ``image_shape``, or smaller where the resolution is a decision.
        """
        self.validate(architecture)
        for decision, choice in zip(self.decisions, architecture.choices, strict=True):
            if decision.name == RESOLUTION:
                size = int(decision.candidates[choice])
                return self.image_shape[0], size, size
        return self.image_shape

    def validate(self, architecture: Architecture) -> None:
        """Raise ConfigError unless ``architecture`` has one valid candidate per decision."""
        choices = architecture.choices
        if len(choices) != len(self.decisions):
            raise ConfigError(
                f"architecture has {len(choices)} choices; space '{self.name}' has {len(self.decisions)} decisions"
            )
        for decision, choice in zip(self.decisions, choices, strict=True):
            if not 0 <= choice < len(decision.candidates):
                raise ConfigError(
                    f"architecture: {decision.name} = {choice}; "
                    f"expected an index from 0 to {len(decision.candidates) - 1}"
                )

    def num_candidates(self) -> tuple[int, ...]:
        """Return (C_1, …, C_D)."""
        return tuple(len(decision.candidates) for decision in self.decisions)

    def num_values(self) -> tuple[int, ...]:
        """Return (C_1, …, C_D, E_1, …): the sizes of the axes of tables."""
        return (*self.num_candidates(), *(derived.num_values for derived in self.derived))

    def candidate_mask(self, channel_multiple: int) -> CandidateMask:
        """Return which candidates a device with this channel grid may use.

        Raises ConfigError when a decision is left without a candidate.
        """
        mask = []
        for decision in self.decisions:
            channels = decision.channels or (0,) * len(decision.candidates)
            allowed = tuple(count % channel_multiple == 0 for count in channels)
            if not any(allowed):
                raise ConfigError(
                    f"runtime.channel_multiple = {channel_multiple}: no candidate of '{decision.name}' is a multiple "
                    f"of it (candidates: {', '.join(map(str, channels))}); expected a divisor of one of them"
                )
            mask.append(allowed)
        return tuple(mask)

    def smallest(self, mask: CandidateMask | None = None) -> Architecture:
        """Return the architecture of the first allowed candidates: 0 % of a percentage budget."""
        return Architecture(tuple(row.index(True) for row in mask or self.full_mask()))

    def largest(self, mask: CandidateMask | None = None) -> Architecture:
        """Return the architecture of the last allowed candidates: 100 % of a percentage budget."""
        return Architecture(tuple(len(row) - 1 - row[::-1].index(True) for row in mask or self.full_mask()))

    def full_mask(self) -> CandidateMask:
        """Return the mask that allows everything."""
        return tuple((True,) * count for count in self.num_candidates())

    def distinct_layers(self) -> tuple[LayerSpec, ...]:
        """Return every layer that some architecture contains, each once, in order of first appearance."""
        seen = (layer for slot in self.slots for layer in slot.layers.values() if layer is not None)
        return tuple(dict.fromkeys(seen))

    def to_names(self, architecture: Architecture) -> dict[str, str]:
        """Return {decision name: candidate name}: how architectures are stored."""
        self.validate(architecture)
        return {
            decision.name: decision.candidates[choice]
            for decision, choice in zip(self.decisions, architecture.choices, strict=True)
        }

    def from_names(self, names: Mapping[str, str]) -> Architecture:
        """Return the architecture stored as ``names``. Raises ConfigError for a wrong decision or candidate."""
        known = {decision.name for decision in self.decisions}
        if unknown := sorted(set(names) - known):
            raise ConfigError(f"architecture: unknown decision '{unknown[0]}' for space '{self.name}'")
        choices = []
        for decision in self.decisions:
            candidate = names.get(decision.name)
            if candidate not in decision.candidates:
                raise ConfigError(
                    f"architecture: {decision.name} = {candidate!r}; expected one of {', '.join(decision.candidates)}"
                )
            choices.append(decision.candidates.index(candidate))
        return Architecture(tuple(choices))

    def fingerprint(self) -> str:
        """Return a short hash of all that defines the space: what a stored table or search belongs to."""
        content: list[Any] = [
            self.name,
            self.image_shape,
            self.num_classes,
            [[d.name, d.candidates, d.channels] for d in self.decisions],
            [slot_row(slot) for slot in self.slots],
        ]
        if self.derived or self.scaled_by:
            content.append([[derived.row() for derived in self.derived], self.scaled_by])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
