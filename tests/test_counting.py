"""What fvcore counts, layer by layer and as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from nasdeploy.costs.counting import LayerCount, count_layer, count_network, counting_tables
from nasdeploy.costs.latency_table import stratified_architectures
from nasdeploy.errors import ConfigError
from nasdeploy.networks import Normalise, build_network
from nasdeploy.spaces import LayerSpec, SearchSpace, make_space

NORMALISE = Normalise((127.5,), (50.0,))


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The default space for small grey images."""
    return make_space("mobile", (1, 28, 28), 10)


def test_tables_equal_fvcore_on_the_built_network_to_the_last_unit(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    tables = counting_tables(space)
    architectures = [space.smallest(), space.largest(), *stratified_architectures(space, 10, rng)]
    choices = np.array([architecture.choices for architecture in architectures])
    params, flops = tables["params"].of(choices), tables["flops"].of(choices)
    for a, architecture in enumerate(architectures):
        network = build_network(space, architecture, NORMALISE).eval()
        analysis = FlopCountAnalysis(network, torch.zeros(1, *space.image_shape)).unsupported_ops_warnings(
            False
        )
        assert flops[a] == analysis.total()
        assert params[a] == sum(parameter.numel() for parameter in network.parameters())


def test_count_of_a_network_is_the_sum_over_its_layers(space: SearchSpace) -> None:
    counts = [count_layer(spec) for spec in space.decode(space.largest())]
    assert count_network(build_network(space, space.largest(), NORMALISE), space.image_shape) == LayerCount(
        params=sum(count.params for count in counts),
        flops=sum(count.flops for count in counts),
        macs=sum(count.macs for count in counts),
    )


def test_inverted_residual_by_hand() -> None:
    spec = LayerSpec(
        kind="inverted_residual", in_channels=8, out_channels=16, size=6, kernel=3, stride=2, expand=4
    )
    # 8 -> 32 on 6x6, depthwise 3x3 to 3x3, 32 -> 16 on 3x3; batch norm: two FLOPs a value.
    macs = 36 * 8 * 32 + 9 * 9 * 32 + 9 * 32 * 16
    norms = 2 * (36 * 32 + 9 * 32 + 9 * 16)
    params = 8 * 32 + 9 * 32 + 32 * 16 + 2 * (32 + 32 + 16)
    assert count_layer(spec) == LayerCount(params=params, flops=macs + norms, macs=macs)


def test_classifier_by_hand() -> None:
    spec = LayerSpec(kind="classifier", in_channels=64, out_channels=10, size=4)
    assert count_layer(spec) == LayerCount(params=650, flops=16 * 64 + 640, macs=640)


def test_counting_leaves_the_random_generator_and_the_mode_alone(space: SearchSpace) -> None:
    network = build_network(space, space.smallest(), NORMALISE).train()
    before = torch.get_rng_state()
    count_layer.cache_clear()
    count_layer(space.decode(space.smallest())[0])
    count_network(network, space.image_shape)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training


class _Sigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x))


def test_operator_that_fvcore_cannot_count_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot count aten::sigmoid in _Sigmoid"):
        count_network(_Sigmoid(), (1, 4, 4))
