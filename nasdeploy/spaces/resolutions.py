"""The resolution of the input as a decision: one space out of the same space built for several image sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import (
    RESOLUTION,
    Decision,
    Derived,
    FloatArray,
    IntArray,
    LayerSlot,
    SearchSpace,
)


@dataclass(frozen=True, slots=True)
class Shifted:
    """A derived value of a space that got one decision more in front of the others."""

    inner: Derived

    @property
    def name(self) -> str:
        """Its name, as before."""
        return self.inner.name

    @property
    def decisions(self) -> tuple[int, ...]:
        """The decisions that it depends on, by their new numbers."""
        return tuple(d + 1 for d in self.inner.decisions)

    @property
    def num_values(self) -> int:
        """How many values there are, as before."""
        return self.inner.num_values

    def of(self, choices: IntArray) -> IntArray:
        """Return the values (n,) for ``choices`` (n, D)."""
        return self.inner.of(choices[:, 1:])

    def marginal(self, theta: FloatArray) -> FloatArray:
        """Return the probabilities of the values for ``theta`` (D, C)."""
        return self.inner.marginal(theta[1:])

    def row(self) -> list[Any]:
        """Return what defines it, as plain data."""
        return ["shifted", *self.inner.row()]


def with_resolutions(spaces: Sequence[SearchSpace]) -> SearchSpace:
    """Return ``spaces``, one and the same space for images of several sizes, as one in which the size is chosen.

    The decision "resolution" comes first, its candidates in ascending order; every slot depends on it too.
    ``image_shape`` is the largest one. A single space is returned as it is. Raises ConfigError where a size comes
    twice, and where the spaces differ in more than the sizes and strides of their layers.
    """
    spaces = sorted(spaces, key=lambda space: space.image_shape[1])
    sizes = [space.image_shape[1] for space in spaces]
    check_sizes(sizes)
    _check_alike(spaces)
    if len(spaces) == 1:
        return spaces[0]
    resolution = Decision(name=RESOLUTION, candidates=tuple(map(str, sizes)))
    return replace(
        spaces[-1],
        decisions=(resolution, *spaces[-1].decisions),
        slots=tuple(map(_joined, zip(*(space.slots for space in spaces), strict=True))),
        derived=tuple(map(Shifted, spaces[-1].derived)),
        graph=None,  # it would not show the resolution
    )


def check_sizes(image_sizes: Sequence[int], image_shape: tuple[int, int, int] | None = None) -> None:
    """Raise ConfigError unless the sizes differ and the largest is that of ``image_shape`` (channels, s, s)."""
    shown = ", ".join(map(str, image_sizes))
    if not image_sizes or len(set(image_sizes)) < len(image_sizes):
        raise ConfigError(f"image_size = {shown or 'none'}: expected different sizes, such as 96, 128, 160")
    largest = max(image_sizes)
    if image_shape is not None and image_shape[1:] != (largest, largest):
        height, width = image_shape[1:]
        raise ConfigError(
            f"image_size = {shown}: images are {height}x{width} pixels; expected images of the largest size; "
            f"--image-size {largest} resizes them"
        )


def _check_alike(spaces: Sequence[SearchSpace]) -> None:
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for space in spaces:
        groups[_structure(space)].append(str(space.image_shape[1]))
    if len(groups) > 1:
        texts = [", ".join(group) for group in groups.values()]
        raise ConfigError(
            f"image_size: {' and '.join(texts)} do not fit together: the space '{spaces[0].name}' is not the same for "
            f"them; expected only {' or only '.join(texts)}"
        )


def _structure(space: SearchSpace) -> Hashable:
    """Return all that has to be the same at every size."""
    slots = tuple((s.name, s.decisions, frozenset(s.layers), _inputs(s)) for s in space.slots)
    decisions = (space.decisions, space.derived, space.scaled_by)
    return space.name, space.image_shape[0], space.num_classes, decisions, slots


def _inputs(slot: LayerSlot) -> Hashable:
    return None if slot.inputs is None else frozenset(slot.inputs.items())


def _joined(slots: Sequence[LayerSlot]) -> LayerSlot:
    """Return one slot out of the same slot at every resolution, in their order."""
    first, numbered = slots[0], list(enumerate(slots))
    inputs = {(r, *key): names for r, slot in numbered for key, names in (slot.inputs or {}).items()}
    return LayerSlot(
        name=first.name,
        decisions=(0, *(d + 1 for d in first.decisions)),  # derived values are numbered behind the decisions
        layers={(r, *key): layer for r, slot in numbered for key, layer in slot.layers.items()},
        inputs=None if first.inputs is None else inputs,
    )
