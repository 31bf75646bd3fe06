"""Networks: shared and stand-alone weights compute the same, seeds decide, and errors name what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.errors import ConfigError
from nasdeploy.networks import Network, Normalise, Supernet, build_network
from nasdeploy.networks.operations import (
    ConvNorm,
    ElasticClassifier,
    ElasticConv,
    ElasticInvertedResidual,
    InvertedResidual,
    build_elastic_layer,
    build_layer,
)
from nasdeploy.spaces import Architecture, LayerSpec, SearchSpace, make_space

pytestmark = pytest.mark.usefixtures("one_thread")

GREY, NUM_CLASSES = (1, 28, 28), 5
BLOCK = LayerSpec(kind="inverted_residual", in_channels=8, out_channels=8, size=6, kernel=3, expand=2)


def make_normalise(channels: int) -> Normalise:
    """Return a normalisation with different figures for every channel."""
    return Normalise((120.0, 90.0, 60.0)[:channels], (50.0, 60.0, 70.0)[:channels])


def make_supernet(shape: tuple[int, int, int] = GREY, seed: int = 0) -> Supernet:
    """Return a supernet whose batch norms scale and shift by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    supernet = Supernet(make_space("mobile", shape, NUM_CLASSES), make_normalise(shape[0]), generator)
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.2, 1.5, generator=generator)
    return supernet


def random_images(shape: tuple[int, int, int], count: int = 4) -> Tensor:
    """Return pixels (count, C, s, s), 0 to 255."""
    return 255.0 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def some_architectures(space: SearchSpace, rng: np.random.Generator, count: int) -> list[Architecture]:
    """Return both ends of the space and random architectures between them."""
    drawn = [Architecture(tuple(map(int, rng.integers(space.num_candidates())))) for _ in range(count)]
    return [space.smallest(), space.largest(), *drawn]


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 28, 28), (1, 64, 64), (3, 64, 64), (3, 95, 95), (3, 96, 96)]
)
@torch.no_grad()
def test_a_copy_of_the_shared_weights_computes_what_the_supernet_computes(
    shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    supernet, images = make_supernet(shape), random_images(shape)
    for architecture in some_architectures(supernet.space, rng, 5):
        alone = supernet.extract(architecture).train()
        expected = supernet(images, architecture)
        torch.testing.assert_close(alone(images), expected, rtol=1e-4, atol=1e-5)
        assert expected.shape == (4, NUM_CLASSES)
        assert float(expected.std(dim=0).min()) > 1e-3  # the images matter


def test_a_copy_does_not_share_memory_with_the_supernet() -> None:
    supernet = make_supernet()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    network = supernet.extract(supernet.space.largest())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_the_supernet_is_as_large_as_its_widest_layers_together() -> None:
    supernet = make_supernet()
    largest = dict(supernet.space.named_layers(supernet.space.largest()))
    sizes = {
        slot.name: sum(parameter.numel() for parameter in layer.parameters())
        for slot, layer in zip(supernet.space.slots, supernet.elastic_layers, strict=True)
    }
    for name, spec in largest.items():
        alone = sum(parameter.numel() for parameter in build_layer(spec).parameters())
        # a block holds 3x3 filters and their batch norm beside the 5x5 ones of the largest network
        extra = spec.hidden_channels * (9 + 2) if spec.kind == "inverted_residual" else 0
        assert sizes[name] == alone + extra


def test_normalisation_is_part_of_the_network() -> None:
    normalise, images = make_normalise(3), random_images((3, 28, 28))
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in ((120, 90, 60), (50, 60, 70)))
    np.testing.assert_allclose(normalise(images).numpy(), (images.numpy() - mean) / std, atol=1e-5)
    network = build_network(make_space("mobile", (3, 28, 28), 2), Architecture((0,) * 13), normalise).eval()
    plain = nn.Sequential(*network.layers.values())
    torch.testing.assert_close(network(images), plain(normalise(images)), rtol=0, atol=0)


@pytest.mark.parametrize(("stride", "out_channels"), [(1, 8), (1, 16), (2, 8)])
def test_the_input_is_added_only_where_the_shapes_allow_it(stride: int, out_channels: int) -> None:
    spec = LayerSpec(
        kind="inverted_residual", in_channels=8, out_channels=out_channels, size=6, kernel=5, stride=stride
    )
    block, x = build_layer(spec), torch.rand(2, 8, 6, 6)
    assert isinstance(block, InvertedResidual)
    nn.init.zeros_(block.projection[1].weight)  # the last batch norm then gives its bias, 0
    y = block(x)
    assert y.shape == (2, out_channels, 6 // stride, 6 // stride)
    expected = x if (stride, out_channels) == (1, 8) else torch.zeros_like(y)
    assert torch.equal(y, expected)


@torch.no_grad()
def test_an_inverted_residual_block_is_three_convolutions() -> None:
    block, x = (
        build_layer(BLOCK).eval(),
        torch.randn(2, 8, 6, 6),
    )  # fresh statistics: batch norm divides by √(1+ε)
    assert isinstance(block, InvertedResidual)
    expand, depthwise, project = (
        part[0].weight for part in (block.expansion, block.depthwise, block.projection)
    )
    shrink = (1.0 + 1e-5) ** -0.5
    y = F.relu6(shrink * F.conv2d(x, expand))
    y = F.relu6(shrink * F.conv2d(y, depthwise, padding=1, groups=16))
    y = x + shrink * F.conv2d(y, project)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [7, 14])
def test_padding_keeps_the_size_that_the_space_says(kernel: int, size: int) -> None:
    spec = LayerSpec(
        kind="inverted_residual", in_channels=8, out_channels=16, size=size, kernel=kernel, stride=2
    )
    assert build_layer(spec)(torch.rand(2, 8, size, size)).shape[2:] == (spec.out_size, spec.out_size)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    supernet = make_supernet()
    supernet.extract(supernet.space.smallest())
    build_network(supernet.space, supernet.space.largest(), make_normalise(1))
    build_network(
        supernet.space, supernet.space.largest(), make_normalise(1), torch.Generator().manual_seed(3)
    )
    assert torch.equal(torch.get_rng_state(), before)


def seeded_network(seed: int | None) -> Network:
    """Return the largest network of the space, its weights drawn from ``seed``."""
    space = make_space("mobile", GREY, NUM_CLASSES)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return build_network(space, space.largest(), make_normalise(1), generator)


def test_the_seed_decides_every_weight() -> None:
    torch.manual_seed(1)
    first = seeded_network(7).state_dict()
    torch.manual_seed(2)
    again, other = seeded_network(7).state_dict(), seeded_network(8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name, value in first.items() if name.endswith("weight") and value.dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_the_bias_of_the_classifier_starts_at_zero() -> None:
    bias = seeded_network(7).layers["classifier"].linear.bias
    assert torch.equal(bias, torch.zeros(NUM_CLASSES))


def test_without_a_generator_the_seed_is_zero() -> None:
    left, right = seeded_network(None).state_dict(), seeded_network(0).state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_seed_decides_every_weight_of_the_supernet() -> None:
    first, again, other = (make_supernet(seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    learnt = [name for name in first if not name.startswith("normalise")]
    assert not any(torch.equal(first[name], other[name]) for name in learnt)


def test_weights_start_within_one_over_root_fan_in() -> None:
    for parameter in seeded_network(0).parameters():
        if parameter.dim() > 1:
            bound = parameter[0].numel() ** -0.5
            assert 0.7 * bound < float(parameter.detach().abs().max()) <= bound


def gradients(architecture: Architecture) -> Supernet:
    """Return a supernet with the gradients of one loss of ``architecture``."""
    supernet = make_supernet()
    images = random_images(GREY, 6)
    F.cross_entropy(supernet(images, architecture), torch.arange(6) % NUM_CLASSES).backward()
    return supernet


def test_slots_that_an_architecture_skips_get_no_gradient() -> None:
    space = make_space("mobile", GREY, NUM_CLASSES)
    supernet = gradients(space.smallest())
    for slot, layer in zip(space.slots, supernet.elastic_layers, strict=True):
        skipped = slot.name not in dict(space.named_layers(space.smallest()))
        assert all(parameter.grad is None for parameter in layer.parameters()) == skipped


def test_channels_that_an_architecture_cuts_off_get_a_zero_gradient() -> None:
    supernet = gradients(make_space("mobile", GREY, NUM_CLASSES).smallest())
    stem, classifier = supernet.elastic_layers[0], supernet.elastic_layers[-1]
    assert isinstance(stem, ElasticConv)
    assert isinstance(classifier, ElasticClassifier)
    for parameter in (stem.conv.weights["3"], stem.conv.gammas["3"], stem.conv.betas["3"]):
        assert float(parameter.grad[8:].abs().max()) == 0.0  # 8 of 24 channels are used
        assert float(parameter.grad[:8].abs().min(dim=0).values.max()) > 0.0
    assert float(classifier.weight.grad[:, 64:].abs().max()) == 0.0
    assert float(classifier.weight.grad[:, :64].abs().max()) > 0.0


def test_filters_of_the_other_kernel_get_no_gradient() -> None:
    space = make_space("mobile", GREY, NUM_CLASSES)
    block = gradients(space.smallest()).elastic_layers[1]
    assert isinstance(block, ElasticInvertedResidual)
    assert block.depthwise.weights["5"].grad is None
    assert block.depthwise.weights["3"].grad is not None


@torch.no_grad()
def test_the_supernet_keeps_no_trace_of_an_evaluation() -> None:
    supernet, images = make_supernet(), random_images(GREY)
    first = supernet(images, supernet.space.largest())
    supernet(images, supernet.space.smallest())
    assert torch.equal(supernet(images, supernet.space.largest()), first)
    assert not [name for name, _ in supernet.named_buffers() if not name.startswith("normalise")]


def test_an_unknown_kind_of_layer_is_refused() -> None:
    spec = LayerSpec(kind="attention", in_channels=8, out_channels=8, size=7)
    for build in (build_layer, lambda spec: build_elastic_layer([spec])):
        with pytest.raises(ConfigError, match="layer kind 'attention' is not known; expected one of stem"):
            build(spec)


def test_a_slot_of_mixed_kinds_is_refused() -> None:
    head = LayerSpec(kind="head", in_channels=8, out_channels=8, size=7)
    stem = LayerSpec(kind="stem", in_channels=8, out_channels=8, size=7)
    with pytest.raises(ConfigError, match="mixes layers of the kinds head, stem"):
        build_elastic_layer([head, stem])


def test_layers_are_found_by_the_name_of_their_slot() -> None:
    network = seeded_network(0)
    assert isinstance(network.layer("stage1.block2"), InvertedResidual)
    assert isinstance(network.layer("stem"), ConvNorm)
    assert list(network.specs) == [
        name
        for name, _ in make_space("mobile", GREY, 5).named_layers(
            Architecture((2, 2, 3, 4, 2, 3, 4, 4, 2, 3, 4, 4, 2))
        )
    ]
