"""The supernet: one set of weights for every architecture of a space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasdeploy.networks.network import Network, Normalise, build_network
from nasdeploy.networks.operations import ElasticLayer, build_elastic_layer, initialise
from nasdeploy.networks.resizing import resize
from nasdeploy.spaces.base import Architecture, SearchSpace


class Supernet(nn.Module):
    """Shared weights of a space: one elastic layer a slot; the architecture is an argument of ``forward``."""

    def __init__(self, space: SearchSpace, normalise: Normalise, generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        self.normalise = normalise
        self.elastic_layers = nn.ModuleList(
            build_elastic_layer([layer for layer in slot.layers.values() if layer is not None])
            for slot in space.slots
        )
        initialise(self, generator)

    def forward(self, x: Tensor, architecture: Architecture) -> Tensor:
        """Map pixels (B, C, s, s), 0..255, to the logits (B, num_classes) of ``architecture``, by batch statistics.

        Images of the largest size of the space; they are brought to the resolution of ``architecture`` first.
        """
        _, size, _ = self.space.input_shape(architecture)
        x = self.normalise(resize(x, size))  # (B, C, r, r)
        for slot, layer in zip(self.space.slots, self.elastic_layers, strict=True):
            spec = slot.layer(architecture)
            if spec is not None:
                x = layer(x, spec)
        return x

    def extract(self, architecture: Architecture) -> Network:
        """Return the stand-alone network of ``architecture`` with a copy of its weights.

        Its batch norm has no statistics yet: recalibrate before evaluating it.
        """
        device = next(self.parameters()).device
        network = build_network(self.space, architecture, self.normalise).to(device)
        for slot, layer in zip(self.space.slots, self.elastic_layers, strict=True):
            if slot.layer(architecture) is not None:
                assert isinstance(layer, ElasticLayer)
                layer.copy_to(network.layer(slot.name))
        return network
