"""The stand-alone network of one architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nasdeploy.networks.evaluation import evaluate
from nasdeploy.networks.operations import build_layer, initialise
from nasdeploy.spaces.base import Architecture, LayerSpec, PlacedLayer, SearchSpace


class Normalise(nn.Module):
    """(x - mean) / std per channel: part of the network, so that nobody who runs the file can forget it.

    mean, std: one value a channel, in the units of the pixels (0 to 255).
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("scale", 1.0 / torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, C, s, s) in 0..255 to zero mean and unit variance."""
        return (x - self.get_buffer("mean")) * self.get_buffer("scale")


class Network(nn.Module):
    """Layers that read one another's values, behind a normalisation of the pixels; the last one gives the logits.

    placed: the layers, each behind those that it reads.
    """

    def __init__(self, placed: Sequence[PlacedLayer], normalise: Normalise) -> None:
        super().__init__()
        self.placed = tuple(placed)
        self.specs: Mapping[str, LayerSpec] = {layer.name: layer.spec for layer in placed}
        self.normalise = normalise
        # Module names may not contain dots.
        self.layers = nn.ModuleDict({_key(layer.name): build_layer(layer.spec) for layer in placed})

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, C, s, s), float, 0..255, to logits (B, num_classes)."""
        return evaluate(self.placed, self.normalise(x), self._compute)

    def _compute(self, layer: PlacedLayer, values: list[Tensor]) -> Tensor:
        y: Tensor = self.layer(layer.name)(*values)
        return y

    def layer(self, slot: str) -> nn.Module:
        """Return the layer that stands in ``slot``."""
        return self.layers[_key(slot)]


def _key(slot: str) -> str:
    return slot.replace(".", "_")


def build_network(
    space: SearchSpace,
    architecture: Architecture,
    normalise: Normalise,
    generator: torch.Generator | None = None,
) -> Network:
    """Return the network of ``architecture``; its weights come from ``generator`` (seed 0 when None).

    The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):  # the constructors of torch.nn draw from the global generator
        network = Network(space.placed(architecture), normalise)
    initialise(network, generator or torch.Generator().manual_seed(0))
    return network
