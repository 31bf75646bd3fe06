"""What fvcore counts: parameters and FLOPs of layers and networks. The only import of fvcore.

fvcore's convention: one multiply-add is one FLOP, batch norm costs two a value, global average pooling one a value,
and element-wise sums, products, activations and pooling over windows nothing. A space is counted layer by layer, each
distinct one once; the sum over a network's layers equals fvcore's count of the whole network to the last unit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from nasdeploy.costs.table import CostTable, tabulate
from nasdeploy.errors import ConfigError
from nasdeploy.networks.operations import build_layer
from nasdeploy.spaces.base import LayerSpec, SearchSpace

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore.nn calls torch.jit.script when it is imported
    from fvcore.nn import FlopCountAnalysis

__all__ = ["LayerCount", "count_layer", "count_network", "counting_tables"]

# Free by fvcore's convention, which still lists them as unsupported so that nobody overlooks them.
FREE_OPERATORS = frozenset(
    {
        "aten::add",
        "aten::add_",
        "aten::avg_pool2d",
        "aten::hardtanh",
        "aten::hardtanh_",
        "aten::max_pool2d",
        "aten::mul",
        "aten::sub",
    }
)
MAC_OPERATORS = ("conv", "linear", "addmm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCount:
    """params: trainable values. flops: fvcore's count for one image. macs: convolutions and linear layers."""

    params: int
    flops: int
    macs: int


@cache
def count_layer(spec: LayerSpec) -> LayerCount:
    """Return what ``spec`` costs for one image, counted on a freshly built layer; a value for each of its inputs.

    Raises ConfigError for an operator that fvcore can neither count nor calls free.
    """
    with torch.random.fork_rng(devices=[]):  # the constructors of torch.nn draw from the global generator
        layer = build_layer(spec)
    return _count(layer, *[(spec.value_channels, spec.size, spec.size)] * spec.num_inputs)


def count_network(network: nn.Module, image_shape: tuple[int, int, int]) -> LayerCount:
    """Return what a built network costs for one image of shape (channels, height, width).

    The network's mode is left as it was. Raises ConfigError for an operator that fvcore cannot count.
    """
    training = network.training
    try:
        return _count(network, image_shape)
    finally:
        network.train(training)


def counting_tables(space: SearchSpace) -> Mapping[str, CostTable]:
    """Return the tables of the metrics "params" and "flops" for ``space``: exact, not estimated."""
    return {
        "params": tabulate(space, lambda spec: count_layer(spec).params),
        "flops": tabulate(space, lambda spec: count_layer(spec).flops),
    }


def _count(module: nn.Module, *input_shapes: tuple[int, int, int]) -> LayerCount:
    parameter = next(module.parameters(), None)  # a layer may have none
    device = None if parameter is None else parameter.device
    inputs = tuple(torch.zeros(1, *shape, device=device) for shape in input_shapes)
    with torch.no_grad():
        analysis = FlopCountAnalysis(module.eval(), inputs)
        analysis.unsupported_ops_warnings(False)  # they raise below, unless they are free
        operators = analysis.by_operator()
    if unknown := sorted(set(analysis.unsupported_ops()) - FREE_OPERATORS):
        raise ConfigError(
            f"FLOPs: fvcore cannot count {', '.join(unknown)} in {type(module).__name__}; expected operators "
            f"that it counts, or one of the free ones {', '.join(sorted(FREE_OPERATORS))}"
        )
    return LayerCount(
        params=sum(parameter.numel() for parameter in module.parameters()),
        flops=int(sum(operators.values())),
        macs=int(sum(operators[name] for name in MAC_OPERATORS)),
    )
