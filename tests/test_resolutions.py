"""The resolution as a decision: one space for several image sizes, from its data to the trained network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nasdeploy.data.images import resize_arrays
from nasdeploy.errors import ConfigError
from nasdeploy.networks import Normalise, Supernet, build_network
from nasdeploy.networks.resizing import resize
from nasdeploy.spaces import Architecture, Decision, SearchSpace, make_space, with_resolutions
from nasdeploy.training.recalibration import recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (96, 128, 160)
NORMALISE = Normalise((120.0, 90.0, 60.0), (50.0, 60.0, 70.0))


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The default space with three resolutions."""
    return make_space("mobile", (3, 160, 160), 5, SIZES)


def draw(space: SearchSpace, rng: np.random.Generator, resolution: int) -> Architecture:
    """Return a random architecture of the given resolution, by its index."""
    drawn = (int(rng.integers(count)) for count in space.num_candidates())
    return Architecture((resolution, *list(drawn)[1:]))


def pictures(count: int, size: int) -> np.ndarray:
    """Return images (count, size, size, 3), uint8: smooth shades, and rectangles with sharp edges."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    images = np.empty((count, size, size, 3))
    for image in images:
        for c in range(3):
            a, b, phase = rng.uniform(1, 12, 3)
            image[:, :, c] = 128 + 60 * np.sin(a * x + b * y + phase)
        for _ in range(8):
            top, left = rng.integers(0, size, 2)
            height, width = rng.integers(2, size // 2, 2)
            image[top : top + height, left : left + width] = rng.uniform(0, 255, 3)
    return images.round().astype(np.uint8)


def as_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def test_the_resolution_is_the_first_decision_and_the_largest_is_that_of_the_images(
    space: SearchSpace,
) -> None:
    single = make_space("mobile", (3, 160, 160), 5)
    assert space.decisions == (
        Decision(name="resolution", candidates=("96", "128", "160")),
        *single.decisions,
    )
    assert (space.image_shape, space.num_classes, space.name) == ((3, 160, 160), 5, "mobile")
    assert space.input_shape(space.smallest()) == (3, 96, 96)
    assert space.input_shape(space.largest()) == (3, 160, 160)
    assert space.to_names(space.smallest())["resolution"] == "96"
    assert all(slot.decisions[0] == 0 for slot in space.slots)


def test_every_architecture_is_that_of_the_space_of_its_size(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    singles = [make_space("mobile", (3, size, size), 5) for size in SIZES]
    for r, single in enumerate(singles):
        for _ in range(10):
            architecture = draw(space, rng, r)
            alone = Architecture(architecture.choices[1:])
            assert space.named_layers(architecture) == single.named_layers(alone)
            assert space.input_shape(architecture) == single.image_shape == single.input_shape(alone)
    layers = set().union(*(single.distinct_layers() for single in singles))
    assert set(space.distinct_layers()) == layers


def test_the_order_of_the_sizes_does_not_matter(space: SearchSpace) -> None:
    assert make_space("mobile", (3, 160, 160), 5, (160, 96, 128)).fingerprint() == space.fingerprint()
    assert make_space("mobile", (3, 160, 160), 5, (96, 160)).fingerprint() != space.fingerprint()


@pytest.mark.parametrize("image_sizes", [(), (64,)])
def test_a_single_size_changes_nothing(image_sizes: tuple[int, ...]) -> None:
    space = make_space("mobile", (3, 64, 64), 10, image_sizes)
    assert space.fingerprint() == "a72c07ebada1adea"
    assert space.input_shape(space.largest()) == (3, 64, 64)


def test_a_channel_grid_leaves_every_resolution(space: SearchSpace) -> None:
    mask = space.candidate_mask(16)
    assert mask[0] == (True, True, True)
    assert space.input_shape(space.smallest(mask)) == (3, 96, 96)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (64, 96, 128),
            r"image_size: 64 and 96, 128 do not fit together: the space 'mobile' .* or only 96, 128",
        ),
        ((96, 96), r"image_size = 96, 96: expected different sizes"),
        ((24, 32), r"images are 24x24 pixels; expected square images of 28 to 224 pixels"),
    ],
)
def test_sizes_that_make_no_space_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        make_space("mobile", (3, max(sizes), max(sizes)), 10, sizes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("image_shape", [(3, 96, 96), (3, 160, 160), (3, 128, 160)])
def test_images_of_another_size_than_the_largest_are_refused(image_shape: tuple[int, int, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"image_size = 96, 128: images are .*; --image-size 128 resizes them"
    ):
        make_space("mobile", image_shape, 10, (96, 128))


def test_spaces_that_differ_in_more_than_the_size_are_refused() -> None:
    first, second = (make_space("mobile", (3, size, size), 10) for size in (48, 64))
    for other in (
        replace(second, num_classes=11),
        replace(second, name="other"),
        replace(second, slots=second.slots[:-1]),
        replace(second, image_shape=(1, 64, 64)),
    ):
        with pytest.raises(ConfigError, match="image_size: 48 and 64 do not fit together"):
            with_resolutions([first, other])
    with pytest.raises(ConfigError, match="image_size = none: expected different sizes"):
        with_resolutions([])


def test_a_space_whose_resolution_is_chosen_already_is_refused() -> None:
    spaces = [make_space("mobile", (3, size, size), 10, (48, size)) for size in (56, 64)]
    with pytest.raises(ConfigError, match="image_size: 56 and 64 do not fit together"):
        with_resolutions(spaces)


@pytest.mark.parametrize(
    "candidates", [("low", "64"), ("64", "48"), ("48", "56"), ("0", "64"), ("64", "64"), ()]
)
def test_a_decision_called_resolution_holds_sizes(candidates: tuple[str, ...]) -> None:
    space = make_space("mobile", (3, 64, 64), 10)
    with pytest.raises(ConfigError, match=r"the decision 'resolution' has the candidates .* the last one 64"):
        replace(space, decisions=(Decision(name="resolution", candidates=candidates), *space.decisions))


def test_the_shape_of_an_invalid_architecture_is_refused(space: SearchSpace) -> None:
    with pytest.raises(ConfigError, match="resolution = 3; expected an index from 0 to 2"):
        space.input_shape(Architecture((3, *space.smallest().choices[1:])))
    with pytest.raises(ConfigError, match="has 1 choices"):
        space.input_shape(Architecture((0,)))


@pytest.mark.parametrize(("large", "small"), [(160, 96), (160, 128), (64, 32)])
def test_shrinking_is_that_of_the_data_loader_up_to_its_rounding(large: int, small: int) -> None:
    images = pictures(4, large)
    expected = as_tensor(resize_arrays(images, small))
    shrunk = resize(as_tensor(images), small)
    assert shrunk.shape == (4, 3, small, small)
    assert float((shrunk - expected).abs().max()) <= 1.5  # grey levels of 255: each of two passes rounds
    assert float((shrunk - expected).abs().mean()) < 0.5
    plain = F.interpolate(as_tensor(images), size=(small, small), mode="bilinear")
    assert float((plain - expected).abs().max()) > 10.0  # without a wider support


def test_images_of_the_right_size_are_not_touched() -> None:
    images = as_tensor(pictures(2, 64))
    assert resize(images, 64) is images
    channels_last = as_tensor(pictures(2, 64)).contiguous(memory_format=torch.channels_last)
    assert resize(channels_last, 32).is_contiguous(memory_format=torch.channels_last)


def trained_supernet(space: SearchSpace) -> Supernet:
    """Return a supernet whose batch norms scale and shift by random amounts."""
    generator = torch.Generator().manual_seed(0)
    supernet = Supernet(space, NORMALISE, generator)
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.2, 1.5, generator=generator)
    return supernet


@pytest.mark.parametrize("sizes", [SIZES, (28, 64)])
@torch.no_grad()
def test_the_supernet_computes_what_the_network_computes_on_resized_images(
    sizes: tuple[int, ...], rng: np.random.Generator
) -> None:
    space = make_space("mobile", (3, sizes[-1], sizes[-1]), 5, sizes)
    supernet = trained_supernet(space)
    images = as_tensor(pictures(4, sizes[-1]))
    for r, size in enumerate(sizes):
        for architecture in (draw(space, rng, r), draw(space, rng, r)):
            alone = supernet.extract(architecture).train()
            resized = resize(images, size)
            expected = supernet(images, architecture)
            torch.testing.assert_close(alone(resized), expected, rtol=1e-4, atol=1e-5)
            assert float(expected.std(dim=0).min()) > 1e-3  # the images matter


def test_strides_of_one_slot_may_differ_between_resolutions() -> None:
    space = make_space("mobile", (3, 64, 64), 5, (28, 64))
    small, large = (
        dict(space.named_layers(Architecture((r, *space.smallest().choices[1:]))))["stage1.block1"]
        for r in (0, 1)
    )
    assert (small.stride, small.has_residual, small.out_size) == (1, True, 14)
    assert (large.stride, large.has_residual, large.out_size) == (2, False, 16)


@torch.no_grad()
def test_a_recalibrated_network_of_a_lower_resolution_agrees_with_the_supernet(space: SearchSpace) -> None:
    supernet = trained_supernet(space)
    images = as_tensor(pictures(12, 160))
    architecture = Architecture((0, *space.smallest().choices[1:]))
    network = supernet.extract(architecture)
    resized = resize(images, 96)
    recalibrate(network, resized, batch_size=12)
    # one batch: its statistics are those of the supernet, but for the unbiased variance
    expected = supernet(images, architecture)
    spread = float((expected.max() - expected.min()).abs())
    assert float((network(resized) - expected).abs().max()) < 0.02 * spread


def test_every_resolution_trains_the_same_weights(space: SearchSpace) -> None:
    supernet = trained_supernet(space)
    images, labels = as_tensor(pictures(4, 160)), torch.arange(4)
    gradients = []
    for r in range(3):
        supernet.zero_grad()
        logits = supernet(images, Architecture((r, *space.smallest().choices[1:])))
        F.cross_entropy(logits, labels).backward()
        gradients.append({name for name, p in supernet.named_parameters() if p.grad is not None})
        assert all(torch.isfinite(p.grad).all() for p in supernet.parameters() if p.grad is not None)
    assert gradients[0] == gradients[1] == gradients[2]


def test_a_supernet_of_several_resolutions_is_no_larger(space: SearchSpace) -> None:
    single = Supernet(make_space("mobile", (3, 160, 160), 5), NORMALISE, torch.Generator().manual_seed(0))
    joint = Supernet(space, NORMALISE, torch.Generator().manual_seed(0))
    first, second = single.state_dict(), joint.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_a_stand_alone_network_takes_images_of_its_own_resolution(space: SearchSpace) -> None:
    for r, size in enumerate(SIZES):
        architecture = Architecture((r, *space.smallest().choices[1:]))
        network = build_network(space, architecture, NORMALISE).eval()
        layers = list(network.specs.values())
        x = torch.zeros(2, *space.input_shape(architecture))
        assert network(x).shape == (2, 5)
        assert x.shape[-1] == size
        for spec, layer in zip(layers, network.layers.values(), strict=True):
            assert x.shape[1:] == (spec.in_channels, spec.size, spec.size)
            x = layer(x)
