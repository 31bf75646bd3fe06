"""The space ``cell``: two small graphs, a normal and a reduction cell, of which a network is a stack.

The micro search space of ENAS (Pham et al., 2018) in the form of the experiments of ASNG (Akimoto et al., 2019): a cell
has five nodes, a node sums two operations, each on the output of an earlier node or of one of the two cells before.
Operations are the identity, 3x3 pooling, and separable convolutions of 3x3 and 5x5. What no node reads, nodes and
inputs of the cell alike, is a *loose end*; the output of a cell is all of its loose ends, side by side.

A layer that takes the output of a cell reads as many values as there are loose ends. They follow from ten decisions,
so parameters and FLOPs are no sum over decisions. :class:`LooseEnds` sums the ten up in one derived value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import (
    Architecture,
    CandidateMask,
    Decision,
    Derived,
    FloatArray,
    IntArray,
    LayerSlot,
    LayerSpec,
    SearchSpace,
    make_slot,
)
from nasdeploy.spaces.graph_view import cell_view

MIN_SIZE, MAX_SIZE = 16, 224
SIZE_PER_STEM = 64  # pixels; every stem halves the image
CELL_TYPES = ("normal", "reduction")
CELL_INPUTS = ("before", "previous")
SIDES = (1, 2)

OPERATIONS = ("identity", "max3", "avg3", "sep3", "sep5")
SUFFIXES = {"identity": "max", "max3": "max", "avg3": "avg", "sep3": "sep", "sep5": "sep"}
"""The slot that an operation stands in: one for each kind of layer. Subsampling is a 1x1 maximum with a stride of 2."""

KINDS = {"max": "max_pool", "avg": "avg_pool", "sep": "separable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CellConfig:
    """channels: candidates, from the narrowest to the widest, of the first cell; they double at each reduction.

    cells: the types of the cells, the first one behind the stem.
    """

    channels: tuple[int, ...] = (8, 16, 24, 32)
    cells: tuple[str, ...] = ("normal", "reduction", "normal", "reduction", "normal")
    num_nodes: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LooseEnds:
    """Which values of a cell no node reads; a :class:`~nasdeploy.spaces.base.Derived`.

    Bit 0 is "before", bit 1 "previous", bit 2 + i node i; 1 means loose. The last node, which none can read, has no
    bit. reads: for each of ``decisions``, the bits that its candidates read.
    """

    name: str
    decisions: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    num_bits: int

    @property
    def num_values(self) -> int:
        """2 to the number of bits; values at which node 0 reads nothing do not occur."""
        return 1 << self.num_bits

    def of(self, choices: IntArray) -> IntArray:
        """Return the values (n,) for ``choices`` (n, D)."""
        used = np.zeros(len(choices), dtype=np.int64)
        for d, bits in zip(self.decisions, self.reads, strict=True):
            used |= (1 << np.array(bits, dtype=np.int64))[choices[:, d]]
        return self.num_values - 1 - used

    def marginal(self, theta: FloatArray) -> FloatArray:
        """Return the probabilities of the values for independent decisions: one input after the other joins."""
        values = np.arange(self.num_values)
        share: FloatArray = np.eye(1, self.num_values)[0]  # of what is used so far: nothing
        for d, bits in zip(self.decisions, self.reads, strict=True):
            used = values | (1 << np.array(bits, dtype=np.int64))[:, None]  # (C_d, values)
            weights = theta[d, : len(bits), None] * share
            share = np.bincount(used.ravel(), weights.ravel(), self.num_values).astype(np.float64)
        return share[::-1].copy()  # loose = all bits but those used

    def row(self) -> list[Any]:
        """Return what defines it, as plain data."""
        return ["loose ends", self.name, list(self.decisions), [list(bits) for bits in self.reads]]

    def loose(self, value: int, names: Sequence[str]) -> tuple[str, ...]:
        """Return the loose ones of the ``names`` of the bits, and the names behind them, which are always loose."""
        return tuple(name for bit, name in enumerate(names) if bit >= self.num_bits or value >> bit & 1)

    def occurs(self, value: int) -> bool:
        """Whether there is such a cell: node 0 reads one of the two inputs."""
        return value & 3 != 3


@dataclass(frozen=True, kw_only=True)
class CellSpace(SearchSpace):
    """A space of cells. No order of candidates holds both the cheapest and the dearest network at its ends."""

    def largest(self, mask: CandidateMask | None = None) -> Architecture:
        """Return the last allowed candidates, but node 0 reads one input twice: one loose end more."""
        mask = mask or self.full_mask()
        choices = list(super().largest(mask).choices)
        places = {decision.name: d for d, decision in enumerate(self.decisions)}
        for cell_type in CELL_TYPES:
            first, second = (places[f"{cell_type}.node0.input{side}"] for side in SIDES)
            wanted = self.decisions[first].candidates[choices[first]]
            same = self.decisions[second].candidates.index(wanted)
            choices[second] = same if mask[second][same] else choices[second]
        return Architecture(tuple(choices))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """What a cell or the stem gives: the slots of its values, and which derived value tells those that are loose.

    multiple: width of every value, as a multiple of the channels.
    """

    names: tuple[str, ...]
    ends: LooseEnds | None
    multiple: int
    size: int

    def depends_on(self) -> list[str]:
        return ["channels"] if self.ends is None else [self.ends.name, "channels"]

    def loose(self, *values: Any) -> tuple[str, ...]:
        """Return the loose ends for the values of ``depends_on``; none for what does not occur."""
        if self.ends is None:
            return self.names
        return self.ends.loose(values[0], self.names) if self.ends.occurs(values[0]) else ()


def cell_space(
    image_shape: tuple[int, int, int], num_classes: int, config: CellConfig | None = None
) -> SearchSpace:
    """Return the space for images of ``image_shape`` (channels, height, width).

    Raises ConfigError for images that are not square or not 16 to 224 pixels.
    """
    _, height, width = image_shape
    if height != width or not MIN_SIZE <= height <= MAX_SIZE:
        raise ConfigError(
            f"space 'cell': images are {height}x{width} pixels; expected square images of {MIN_SIZE} to {MAX_SIZE} "
            f"pixels; --image-size {min(max(height, MIN_SIZE), MAX_SIZE)} resizes them"
        )
    config = config or CellConfig()
    decisions = _decisions(config)
    ends = {cell_type: _loose_ends(cell_type, decisions, config) for cell_type in CELL_TYPES}
    return CellSpace(
        name="cell",
        decisions=decisions,
        slots=_Builder(decisions, ends, config).slots(image_shape, num_classes),
        image_shape=image_shape,
        num_classes=num_classes,
        derived=tuple(ends.values()),
        scaled_by="channels",
        graph=cell_view(decisions, num_nodes=config.num_nodes),
    )


def _decisions(config: CellConfig) -> tuple[Decision, ...]:
    decisions = []
    for cell_type in CELL_TYPES:
        for i in range(config.num_nodes):
            # The latest first: a chain has the fewest loose ends. Node 0 begins it by reading both inputs.
            latest = (*(f"node{j}" for j in reversed(range(i))), "previous", "before")
            for side in SIDES:
                sources = latest if i or side == 1 else latest[::-1]
                decisions.append(Decision(name=f"{cell_type}.node{i}.input{side}", candidates=sources))
                decisions.append(Decision(name=f"{cell_type}.node{i}.operation{side}", candidates=OPERATIONS))
    widths = tuple(map(str, config.channels))
    return (*decisions, Decision(name="channels", candidates=widths, channels=config.channels))


def _loose_ends(cell_type: str, decisions: Sequence[Decision], config: CellConfig) -> LooseEnds:
    values = (*CELL_INPUTS, *(f"node{i}" for i in range(config.num_nodes - 1)))
    inputs = {
        d: tuple(map(values.index, decision.candidates))
        for d, decision in enumerate(decisions)
        if decision.name.startswith(f"{cell_type}.") and ".input" in decision.name
    }
    return LooseEnds(
        name=f"{cell_type}.ends",
        decisions=tuple(inputs),
        reads=tuple(inputs.values()),
        num_bits=len(values),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One cell of the stack. size: of its inputs, in pixels; its nodes have ``out_size``."""

    name: str
    cell_type: str
    multiple: int
    size: int

    @property
    def stride(self) -> int:
        """Of the operations that read an input of the cell."""
        return 2 if self.cell_type == "reduction" else 1

    @property
    def out_size(self) -> int:
        """Height and width of the nodes."""
        return -(-self.size // self.stride)

    def slot(self, value: str) -> str:
        """Return the slot of an input or a node."""
        return f"{self.name}.{value}"

    def end(self, value: str) -> str:
        """Return the slot of a value as the next cells take it: at the size of the nodes."""
        return f"{self.slot(value)}.end" if self.stride > 1 and value in CELL_INPUTS else self.slot(value)

    def read(self, source: str) -> tuple[int, int]:
        """Return the size of an input or a node, and the stride of an operation that reads it."""
        return (self.size, self.stride) if source in CELL_INPUTS else (self.out_size, 1)


@dataclass(frozen=True, slots=True)
class _Builder:
    """Makes the slots of the stack, each for the decisions that its layer depends on."""

    decisions: tuple[Decision, ...]
    ends: dict[str, LooseEnds]
    config: CellConfig

    def slots(self, image_shape: tuple[int, int, int], num_classes: int) -> tuple[LayerSlot, ...]:
        slots, size = self._stem(image_shape)
        stem = _Output(names=(slots[-1].name,), ends=None, multiple=1, size=size)
        before = previous = stem
        multiple = 1
        for number, cell_type in enumerate(self.config.cells, start=1):
            multiple *= 2 if cell_type == "reduction" else 1
            cell = _Cell(name=f"cell{number}", cell_type=cell_type, multiple=multiple, size=previous.size)
            slots += self._cell(cell, before, previous)
            before, previous = previous, self._output(cell)
        slots.append(self._classifier(previous, num_classes))
        return tuple(slots)

    def _stem(self, image_shape: tuple[int, int, int]) -> tuple[list[LayerSlot], int]:
        """Return as many halvings as leave 8 to 32 pixels, and their output size."""
        channels, size, _ = image_shape
        slots: list[LayerSlot] = []
        while not slots or size > SIZE_PER_STEM // 2:
            name = f"stem{len(slots) + 1}"
            slots.append(self._stem_slot(name, size, None if slots else channels))
            size = -(-size // 2)
        return slots, size

    def _stem_slot(self, name: str, size: int, channels: int | None) -> LayerSlot:
        def layer(width: str) -> LayerSpec:
            given = int(width) if channels is None else channels
            return LayerSpec(
                kind="stem", in_channels=given, out_channels=int(width), size=size, kernel=3, stride=2
            )

        return make_slot(name, self.decisions, ["channels"], layer)

    def _cell(self, cell: _Cell, before: _Output, previous: _Output) -> list[LayerSlot]:
        slots = [self._join(cell, "before", before), self._join(cell, "previous", previous)]
        for i in range(self.config.num_nodes):
            for side in SIDES:
                slots += [self._operation(cell, i, side, suffix) for suffix in KINDS]
            slots.append(self._sum(cell, i))
        if cell.stride > 1:
            slots += [self._subsampled(cell, value, bit) for bit, value in enumerate(CELL_INPUTS)]
        return slots

    def _output(self, cell: _Cell) -> _Output:
        values = (*CELL_INPUTS, *(f"node{i}" for i in range(self.config.num_nodes)))
        names = tuple(map(cell.end, values))
        ends = self.ends[cell.cell_type]
        return _Output(names=names, ends=ends, multiple=cell.multiple, size=cell.out_size)

    def _join(self, cell: _Cell, value: str, source: _Output) -> LayerSlot:
        """Return the preprocessing of an input: all loose ends of an earlier cell to the width of this one."""

        def layer(*values: Any) -> LayerSpec | None:
            width, count = int(values[-1]), len(source.loose(*values))
            return _spec(
                "join",
                count * source.multiple * width,
                cell.multiple * width,
                size=source.size,
                stride=1 if source.size == cell.size else 2,
                num_inputs=count,
            )

        return self._slot(cell.slot(value), source.depends_on(), layer, inputs=source.loose)

    def _operation(self, cell: _Cell, i: int, side: int, suffix: str) -> LayerSlot:
        """Return the slot of one side of a node for one kind of operation; the identity is a skipped layer."""

        def layer(source: str, operation: str, width: str) -> LayerSpec | None:
            (size, stride), channels = cell.read(source), cell.multiple * int(width)
            kernel = 1 if operation == "identity" else int(operation[-1])
            if SUFFIXES[operation] != suffix or (operation == "identity" and stride == 1):
                return None
            return _spec(KINDS[suffix], channels, channels, size=size, kernel=kernel, stride=stride)

        def inputs(source: str, operation: str, width: str) -> tuple[str, ...]:
            return (cell.slot(source),) if SUFFIXES[operation] == suffix else ()

        at = f"{cell.cell_type}.node{i}"
        depends_on = [f"{at}.input{side}", f"{at}.operation{side}", "channels"]
        return self._slot(cell.slot(f"node{i}.{suffix}{side}"), depends_on, layer, inputs=inputs)

    def _sum(self, cell: _Cell, i: int) -> LayerSlot:
        def layer(first: str, second: str, width: str) -> LayerSpec | None:
            channels = cell.multiple * int(width)
            return _spec("sum", channels, channels, size=cell.out_size, num_inputs=2)

        def inputs(first: str, second: str, width: str) -> tuple[str, ...]:
            chosen = zip(SIDES, (first, second), strict=True)
            return tuple(cell.slot(f"node{i}.{SUFFIXES[operation]}{side}") for side, operation in chosen)

        at = f"{cell.cell_type}.node{i}"
        depends_on = [f"{at}.operation1", f"{at}.operation2", "channels"]
        return self._slot(cell.slot(f"node{i}"), depends_on, layer, inputs=inputs)

    def _subsampled(self, cell: _Cell, value: str, bit: int) -> LayerSlot:
        """Return a loose input of a reduction cell at the size of its nodes."""
        ends = self.ends[cell.cell_type]

        def layer(loose: int, width: str) -> LayerSpec | None:
            channels = cell.multiple * int(width)
            taken = ends.occurs(loose) and loose >> bit & 1
            return _spec("max_pool", channels, channels, size=cell.size, stride=2) if taken else None

        def inputs(loose: int, width: str) -> tuple[str, ...]:
            return () if layer(loose, width) is None else (cell.slot(value),)

        return self._slot(cell.end(value), [ends.name, "channels"], layer, inputs=inputs)

    def _classifier(self, source: _Output, num_classes: int) -> LayerSlot:
        def layer(*values: Any) -> LayerSpec | None:
            count = len(source.loose(*values))
            channels = count * source.multiple * int(values[-1])
            return _spec("join_classifier", channels, num_classes, size=source.size, num_inputs=count)

        return self._slot("classifier", source.depends_on(), layer, inputs=source.loose)

    def _slot(self, name: str, depends_on: Sequence[str], layer: Any, *, inputs: Any) -> LayerSlot:
        derived: tuple[Derived, ...] = tuple(self.ends.values())
        return make_slot(name, self.decisions, depends_on, layer, inputs=inputs, derived=derived)


def _spec(
    kind: str,
    in_channels: int,
    out_channels: int,
    *,
    size: int,
    kernel: int = 1,
    stride: int = 1,
    num_inputs: int = 1,
) -> LayerSpec | None:
    """Return a layer, None for one that would read nothing."""
    if num_inputs == 0:
        return None
    return LayerSpec(
        kind=kind,
        in_channels=in_channels,
        out_channels=out_channels,
        size=size,
        kernel=kernel,
        stride=stride,
        num_inputs=num_inputs,
    )
