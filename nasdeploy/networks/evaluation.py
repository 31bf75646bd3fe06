"""How a network that is a graph of layers is computed: value by value, each kept until nobody reads it any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nasdeploy.spaces.base import IMAGES, PlacedLayer

__all__ = ["evaluate", "no_longer_read"]


def evaluate(
    placed: Sequence[PlacedLayer], x: Tensor, compute: Callable[[PlacedLayer, list[Tensor]], Tensor]
) -> Tensor:
    """Return the value of the last layer for images x; ``compute`` gives that of a layer from what it reads."""
    values = {IMAGES: x}
    for layer, done in zip(placed, no_longer_read(placed), strict=True):
        values[layer.name] = compute(layer, [values[name] for name in layer.inputs])
        for name in done:
            del values[name]
    return values[placed[-1].name]


def no_longer_read(placed: Sequence[PlacedLayer]) -> list[list[str]]:
    """Return, for each layer, the values that it is the last to read."""
    last = {name: place for place, layer in enumerate(placed) for name in layer.inputs}
    done: list[list[str]] = [[] for _ in placed]
    for name, place in last.items():
        done[place].append(name)
    return done
