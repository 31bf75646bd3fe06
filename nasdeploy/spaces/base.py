"""What can be chosen, as plain data: decisions, architectures, layers and the space that ties them.

A network is a chain of *slots*. What stands in a slot depends on a few decisions (its own operation, the width
before it, the width after it), so that every cost which adds up over layers is a sum of small tables over those
decisions (:class:`nasdeploy.costs.table.CostTable`).

Notation: D decisions, decision d has C_d candidates, C = max C_d.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from nasdeploy.errors import ConfigError

CandidateMask = tuple[tuple[bool, ...], ...]
"""Per decision, per candidate: may it be chosen?"""

RESOLUTION = "resolution"
"""The name of the decision, where there is one, whose candidates are the sides of the input in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A categorical variable; its candidates are ordered from the cheapest to the most expensive.

    ``channels`` gives the channel count that a candidate stands for, or is empty where the candidates are not
    channel counts; a profile's ``channel_multiple`` forbids those that it does not divide.
    """

    name: str
    candidates: tuple[str, ...]
    channels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Architecture:
    """One candidate index per decision: ``choices`` has shape (D,)."""

    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer as data: enough to build it in torch, to emit it in ONNX, to count and to time it.

    kind: a key of :data:`nasdeploy.networks.operations.LAYER_KINDS`.
    size: height and width of its input in pixels. expand: hidden channels = ``in_channels * expand``.
    """

    kind: str
    in_channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    expand: int = 1

    @property
    def out_size(self) -> int:
        """Height and width of the output, for 'same' padding."""
        return -(-self.size // self.stride)

    @property
    def hidden_channels(self) -> int:
        """Channels between the two 1x1 convolutions of an inverted residual block."""
        return self.in_channels * self.expand

    @property
    def has_residual(self) -> bool:
        """Whether input and output have the same shape, so that the input can be added."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSlot:
    """A place in the chain. ``layers`` maps the candidates of ``decisions`` to a layer, or to None for 'skip'."""

    name: str
    decisions: tuple[int, ...]
    layers: Mapping[tuple[int, ...], LayerSpec | None]

    def layer(self, architecture: Architecture) -> LayerSpec | None:
        """Return what stands here in ``architecture``."""
        return self.layers[tuple(architecture.choices[d] for d in self.decisions)]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """A chain of slots over D decisions for images of one shape, or of several sizes (:data:`RESOLUTION`).

    image_shape: (channels, height, width), height == width; the largest size where there are several. Raises
    ConfigError for a decision called "resolution" whose candidates are not sizes in ascending order up to that one.
    """

    name: str
    decisions: tuple[Decision, ...]
    slots: tuple[LayerSlot, ...]
    image_shape: tuple[int, int, int]
    num_classes: int

    def __post_init__(self) -> None:
        for decision in self.decisions:
            if decision.name == RESOLUTION:
                self._check_resolution(decision.candidates)

    def _check_resolution(self, candidates: tuple[str, ...]) -> None:
        sizes = [int(text) if text.isdecimal() else 0 for text in candidates]
        if sizes != sorted(set(sizes)) or min(sizes, default=0) < 1 or sizes[-1] != self.image_shape[1]:
            raise ConfigError(
                f"space '{self.name}': the decision '{RESOLUTION}' has the candidates {', '.join(candidates)}; "
                "expected sizes in pixels in ascending order, "
                f"the last one {self.image_shape[1]}, the size of the images"
            )

    def decode(self, architecture: Architecture) -> tuple[LayerSpec, ...]:
        """Return the network of ``architecture`` as data, input first."""
        return tuple(layer for _, layer in self.named_layers(architecture))

    def named_layers(self, architecture: Architecture) -> tuple[tuple[str, LayerSpec], ...]:
        """Return (slot name, layer) for every slot that is not skipped, input first."""
        self.validate(architecture)
        placed = ((slot.name, slot.layer(architecture)) for slot in self.slots)
        return tuple((name, layer) for name, layer in placed if layer is not None)

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
        content = [
            self.name,
            self.image_shape,
            self.num_classes,
            [[d.name, d.candidates, d.channels] for d in self.decisions],
            [
                [s.name, s.decisions, sorted((k, _spec_row(v)) for k, v in s.layers.items())]
                for s in self.slots
            ],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _spec_row(spec: LayerSpec | None) -> list[str | int]:
    if spec is None:
        return []
    return [spec.kind, spec.in_channels, spec.out_channels, spec.size, spec.kernel, spec.stride, spec.expand]


def make_slot(
    name: str,
    decisions: Sequence[Decision],
    depends_on: Sequence[str],
    layer: Callable[..., LayerSpec | None],
) -> LayerSlot:
    """Tabulate ``layer`` over all combinations of the candidates of the decisions named in ``depends_on``.

    ``layer`` is called with one candidate name per entry of ``depends_on``, in that order.
    """
    names = [decision.name for decision in decisions]
    indices = tuple(names.index(wanted) for wanted in depends_on)
    candidates = [decisions[d].candidates for d in indices]
    layers = {
        choice: layer(*(row[c] for row, c in zip(candidates, choice, strict=True)))
        for choice in product(*(range(len(row)) for row in candidates))
    }
    return LayerSlot(name=name, decisions=indices, layers=layers)
