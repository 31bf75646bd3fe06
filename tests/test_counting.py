"""What fvcore counts, layer by layer and as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from nasdeploy.costs.counting import LayerCount, count_layer, count_network, counting_tables
from nasdeploy.costs.table_models import stratified_architectures
from nasdeploy.errors import ConfigError
from nasdeploy.networks import Normalise, build_network
from nasdeploy.spaces import LayerSpec, SearchSpace, make_space

pytestmark = pytest.mark.usefixtures("one_thread")

NORMALISE = Normalise((127.5,), (50.0,))
SIZES: list[tuple[int, ...]] = [(28,), (64,), (95,), (96,), (160,), (224,), (32, 64), (96, 128, 160)]


def space_of_sizes(sizes: tuple[int, ...]) -> SearchSpace:
    """Return the default space for grey images, the resolution a decision where there are several sizes."""
    return make_space("mobile", (1, sizes[-1], sizes[-1]), 10, sizes)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The default space for small grey images."""
    return make_space("mobile", (1, 28, 28), 10)


@pytest.mark.parametrize("sizes", SIZES)
def test_tables_equal_fvcore_on_the_built_network_to_the_last_unit(
    sizes: tuple[int, ...], rng: np.random.Generator
) -> None:
    space = space_of_sizes(sizes)
    tables = counting_tables(space)
    architectures = [space.smallest(), space.largest(), *stratified_architectures(space, 6, rng)]
    choices = np.array([architecture.choices for architecture in architectures])
    params, flops = tables["params"].of(choices), tables["flops"].of(choices)
    for a, architecture in enumerate(architectures):
        network = build_network(space, architecture, NORMALISE).eval()
        images = torch.zeros(1, *space.input_shape(architecture))
        assert flops[a] == FlopCountAnalysis(network, images).unsupported_ops_warnings(False).total()
        assert params[a] == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("sizes", SIZES)
def test_the_ends_of_the_space_are_its_cheapest_and_its_dearest_network(sizes: tuple[int, ...]) -> None:
    space = space_of_sizes(sizes)
    mask = space.full_mask()
    ends = np.array([space.smallest().choices, space.largest().choices])
    for table in counting_tables(space).values():
        assert table.of(ends).tolist() == [table.minimum(mask), -table.scaled(0.0, -1.0).minimum(mask)]


def test_networks_for_large_images_stay_affordable() -> None:
    flops = {}
    for size in (96, 224):
        space = make_space("mobile", (3, size, size), 1000)
        ends = np.array([space.smallest().choices, space.largest().choices])
        flops[size] = counting_tables(space)["flops"].of(ends)
    assert 1e6 < flops[96][0] < 5e6
    assert 200e6 < flops[224][1] < 300e6


def test_the_resolution_changes_flops_and_leaves_the_parameters_alone(rng: np.random.Generator) -> None:
    sizes = (96, 128, 160)
    joint = counting_tables(space_of_sizes(sizes))
    for r, size in enumerate(sizes):
        single = counting_tables(space_of_sizes((size,)))
        space = space_of_sizes((size,))
        choices = np.array([a.choices for a in stratified_architectures(space, 20, rng)])
        with_size = np.insert(choices, 0, r, axis=1)
        assert joint["flops"].of(with_size).tolist() == single["flops"].of(choices).tolist()
        for other in range(len(sizes)):
            with_size[:, 0] = other
            assert joint["params"].of(with_size).tolist() == single["params"].of(choices).tolist()


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
