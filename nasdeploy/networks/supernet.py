"""The supernet: one set of weights for every architecture of a space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasdeploy.networks.evaluation import evaluate
from nasdeploy.networks.network import Network, Normalise, build_network
from nasdeploy.networks.operations import ElasticLayer, build_elastic_layer, initialise
from nasdeploy.networks.resizing import resize
from nasdeploy.spaces.base import Architecture, LayerSlot, PlacedLayer, SearchSpace


class Supernet(nn.Module):
    """Shared weights of a space: one elastic layer a slot; the architecture is an argument of ``forward``."""

    def __init__(self, space: SearchSpace, normalise: Normalise, generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        self.normalise = normalise
        self.elastic_layers = nn.ModuleList(map(_elastic_layer, space.slots))
        self._places = {slot.name: place for place, slot in enumerate(space.slots)}
        initialise(self, generator)

    def forward(self, x: Tensor, architecture: Architecture) -> Tensor:
        """Map pixels (B, C, s, s), 0..255, to the logits (B, num_classes) of ``architecture``, by batch statistics.

        Images of the largest size of the space; they are brought to the resolution of ``architecture`` first.
        """
        _, size, _ = self.space.input_shape(architecture)
        x = self.normalise(resize(x, size))  # (B, C, r, r)
        return evaluate(self.space.placed(architecture), x, self._compute)

    def _compute(self, layer: PlacedLayer, values: list[Tensor]) -> Tensor:
        y: Tensor = self._elastic(layer)(*values, spec=layer.spec, taken=layer.taken)
        return y

    def _elastic(self, layer: PlacedLayer) -> ElasticLayer:
        found = self.elastic_layers[self._places[layer.name]]
        assert isinstance(found, ElasticLayer)
        return found

    def extract(self, architecture: Architecture) -> Network:
        """Return the stand-alone network of ``architecture`` with a copy of its weights.

        Its batch norm has no statistics yet: recalibrate before evaluating it.
        """
        device = next(self.parameters()).device
        network = build_network(self.space, architecture, self.normalise).to(device)
        for layer in network.placed:
            self._elastic(layer).copy_to(network.layer(layer.name), layer.taken)
        return network


def _elastic_layer(slot: LayerSlot) -> ElasticLayer:
    specs = [layer for layer in slot.layers.values() if layer is not None]
    return build_elastic_layer(specs, len(slot.sources()) or 1)
