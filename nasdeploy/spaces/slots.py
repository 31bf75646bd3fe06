"""What stands in a place of a network, and on which decisions it depends, as plain data.

Notation: n architectures, D decisions, decision d has C_d candidates, C = max C_d; E derived values, derived value e
has E_e values and the number D + e wherever slots and tables name what they depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nasdeploy.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

IMAGES = ""
"""What a layer is said to read that reads the images themselves."""

CLASSIFIERS = ("classifier", "join_classifier")
"""The kinds of layers that give logits (B, o) and not an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A categorical variable; its candidates are ordered from the cheapest to the most expensive.

    ``channels`` gives the channel count that a candidate stands for, or is empty where the candidates are not
    channel counts; a profile's ``channel_multiple`` forbids those that it does not divide.
    """

    name: str
    candidates: tuple[str, ...]
    channels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer as data: enough to build it in torch, to emit it in ONNX, to count and to time it.

    kind: a key of :data:`nasdeploy.networks.operations.LAYER_KINDS`.
    size: height and width of its input in pixels. expand: hidden channels = ``in_channels * expand``.
    num_inputs: how many values it reads, all of ``size`` pixels. A layer that joins them has ``in_channels`` of all
    together, each value an equal part; one of the kind "sum" has the ``in_channels`` of one.
    """

    kind: str
    in_channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    expand: int = 1
    num_inputs: int = 1

    @property
    def value_channels(self) -> int:
        """Channels of each value that it reads."""
        return self.in_channels if self.kind == "sum" else self.in_channels // self.num_inputs

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


class Derived(Protocol):
    """A value that decisions determine, for a layer that would otherwise depend on too many of them at once.

    Implemented by a frozen dataclass. decisions: what it depends on, ascending. num_values: E_e.
    """

    @property
    def name(self) -> str:
        """Its name, not that of a decision."""
        ...

    @property
    def decisions(self) -> tuple[int, ...]:
        """The decisions that it depends on."""
        ...

    @property
    def num_values(self) -> int:
        """How many values there are: 0 to ``num_values - 1``."""
        ...

    def of(self, choices: IntArray) -> IntArray:
        """Return the values (n,) for ``choices`` (n, D)."""
        ...

    def marginal(self, theta: FloatArray) -> FloatArray:
        """Return the exact probabilities (E_e,) of its values for independent decisions: ``theta`` (D, C)."""
        ...

    def row(self) -> list[Any]:
        """Return what defines it, as plain data."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSlot:
    """A place in the network. ``layers`` maps the values of ``decisions`` to a layer, or to None for 'skip'.

    decisions: numbers of decisions and, from D on, of derived values. inputs: by the same keys, the names of the slots
    whose values the layer reads, in order (:data:`IMAGES` for the images), or None: it reads the value before it, as
    in a chain. A skipped slot passes on the first of its inputs, as in a chain; without inputs it has no value.
    """

    name: str
    decisions: tuple[int, ...]
    layers: Mapping[tuple[int, ...], LayerSpec | None]
    inputs: Mapping[tuple[int, ...], tuple[str, ...]] | None = None

    def sources(self) -> tuple[str, ...]:
        """Return the slots that a layer here may read, each once; none for a slot of a chain."""
        read = (self.inputs[key] for key, layer in self.layers.items() if self.inputs and layer is not None)
        return tuple(dict.fromkeys(name for names in read for name in names))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLayer:
    """A layer of one architecture: the name of its slot, and what it reads.

    inputs: names of placed layers before it, or :data:`IMAGES`; what is skipped on the way is resolved. taken: which
    of the sources of its slot (:meth:`LayerSlot.sources`) these are, so that shared weights of a source stay its own.
    """

    name: str
    spec: LayerSpec
    inputs: tuple[str, ...]
    taken: tuple[int, ...] = ()


def slot_row(slot: LayerSlot) -> list[Any]:
    """Return a slot as plain data; what was added later stands in it only where it is used."""
    layers = sorted((key, _spec_row(layer)) for key, layer in slot.layers.items())
    inputs = [] if slot.inputs is None else [sorted(slot.inputs.items())]
    return [slot.name, slot.decisions, layers, *inputs]


def _spec_row(spec: LayerSpec | None) -> list[str | int]:
    if spec is None:
        return []
    row: list[str | int]
    row = [spec.kind, spec.in_channels, spec.out_channels, spec.size, spec.kernel, spec.stride, spec.expand]
    return row if spec.num_inputs == 1 else [*row, spec.num_inputs]


def check_slots(
    space: str, slots: Sequence[LayerSlot], derived: Sequence[Derived], num_decisions: int
) -> None:
    """Raise ConfigError for a slot that depends twice on a decision, or reads what no slot before it gives.

    A slot must not depend on a derived value together with a decision behind it, or with another that shares one:
    then expected costs are exact for independent decisions.
    """
    behind = {num_decisions + e: set(one.decisions) for e, one in enumerate(derived)}
    for one in derived:
        _check_range(f"space '{space}': derived value '{one.name}'", one.decisions, num_decisions)
    known = {IMAGES}
    for slot in slots:
        _check_range(f"space '{space}': slot '{slot.name}'", slot.decisions, num_decisions + len(derived))
        scopes = [behind.get(d, {d}) for d in slot.decisions]
        if sum(map(len, scopes)) != len(set().union(*scopes)):
            raise ConfigError(
                f"space '{space}': slot '{slot.name}' depends on {list(slot.decisions)}, two of which share a "
                "decision; expected decisions, and derived values of others"
            )
        _check_inputs(space, slot, known)
        known.add(slot.name)


def _check_range(what: str, numbers: Sequence[int], limit: int) -> None:
    if wrong := [d for d in numbers if d not in range(limit)]:
        raise ConfigError(f"{what} depends on number {wrong[0]}; expected numbers from 0 to {limit - 1}")


def _check_inputs(space: str, slot: LayerSlot, known: set[str]) -> None:
    for key, layer in slot.layers.items():
        names = None if slot.inputs is None else slot.inputs.get(key, ())
        count = 1 if names is None else len(names)
        if layer is not None and count != layer.num_inputs:
            raise ConfigError(
                f"space '{space}': slot '{slot.name}' reads {count} values for a layer of the kind '{layer.kind}' "
                f"with num_inputs = {layer.num_inputs}; expected as many"
            )
        if unknown := sorted(set(names or ()) - known):
            raise ConfigError(
                f"space '{space}': slot '{slot.name}' reads '{unknown[0]}'; expected a slot that comes before it"
            )


def make_slot(
    name: str,
    decisions: Sequence[Decision],
    depends_on: Sequence[str],
    layer: Callable[..., LayerSpec | None],
    *,
    inputs: Callable[..., tuple[str, ...]] | None = None,
    derived: Sequence[Derived] = (),
) -> LayerSlot:
    """Tabulate ``layer`` over all combinations of the candidates of the decisions named in ``depends_on``.

    ``layer`` is called with one candidate name per entry of ``depends_on``, in that order, and with a number for the
    name of one of ``derived``. ``inputs`` is called alike and gives the slots that the layer reads; None: a chain.
    """
    names = [*(decision.name for decision in decisions), *(one.name for one in derived)]
    values: list[Sequence[str | int]] = [*(one.candidates for one in decisions)]
    values += [range(one.num_values) for one in derived]
    indices = tuple(names.index(wanted) for wanted in depends_on)
    rows = [values[d] for d in indices]
    called = {
        key: tuple(row[c] for row, c in zip(rows, key, strict=True))
        for key in product(*(range(len(row)) for row in rows))
    }
    return LayerSlot(
        name=name,
        decisions=indices,
        layers={key: layer(*arguments) for key, arguments in called.items()},
        inputs=None if inputs is None else {key: inputs(*arguments) for key, arguments in called.items()},
    )
