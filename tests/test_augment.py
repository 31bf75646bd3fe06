"""Augmentation: what it may change, what it must not, and where its randomness comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nasdeploy.data import make_augmentation
from nasdeploy.errors import ConfigError

GREY, RGB = (1, 28, 28), (3, 32, 32)


def random_images(shape: tuple[int, int, int], count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def augment(name: str, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    augmentation = make_augmentation(name, tuple(images.shape[1:]))
    return augmentation(images, torch.Generator().manual_seed(seed))


def test_none_changes_nothing():
    images = random_images(GREY)
    assert augment("none", images) is images


def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="'strong' is not known; expected one of none, light, standard"):
        make_augmentation("strong", GREY)


@pytest.mark.parametrize("name", ["light", "standard"])
@pytest.mark.parametrize("shape", [GREY, RGB])
def test_shape_and_range_stay(name, shape):
    images = random_images(shape)
    augmented = augment(name, images)
    assert (augmented.shape, augmented.dtype) == (images.shape, torch.float32)
    assert float(augmented.min()) >= 0.0
    assert 128.0 < float(augmented.max()) <= 255.001
    assert not torch.equal(augmented, images.float())


@pytest.mark.parametrize("count", [1, 5, 9])
def test_any_number_of_images_will_do(count):
    assert augment("standard", random_images(RGB, count)).shape == (count, *RGB)


def test_float_and_uint8_images_give_the_same():
    images = random_images(RGB)
    assert torch.equal(augment("standard", images), augment("standard", images.float()))


@pytest.mark.parametrize("name", ["light", "standard"])
def test_global_generator_is_untouched_and_unused(name):
    images = random_images(RGB)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = augment(name, images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(augment(name, images), first)


def test_given_generator_decides_and_advances():
    images = random_images(GREY)
    augmentation = make_augmentation("light", GREY)
    generator = torch.Generator().manual_seed(0)
    first, second = augmentation(images, generator), augmentation(images, generator)
    assert not torch.equal(first, second)
    assert torch.equal(augment("light", images), first)


def test_light_is_a_shift_of_at_most_two_pixels_with_edges_continued():
    images = random_images(GREY)
    augmented = augment("light", images)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    shifts = []
    for image, source in zip(augmented.numpy(), padded, strict=True):
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(source[:, y : y + 28, x : x + 28], image)
        ]
        assert len(matches) == 1
        shifts += matches
    eighths = [set(shifts[start : start + 8]) for start in range(0, 64, 8)]
    assert all(len(eighth) == 1 for eighth in eighths)
    assert len(set(shifts)) > 3


def test_standard_flips_some_eighths_and_erases_little():
    # Left half dark, right half bright: a flip shows in the corners, an erased rectangle in zeros.
    images = torch.full((64, *GREY), 50, dtype=torch.uint8)
    images[..., 14:] = 200
    flips, erased = [], []
    for seed in range(10):
        augmented = augment("standard", images, seed)
        flips += [int(image[0, 27, 0] == 200 or image[0, 0, 0] == 200) for image in augmented[::8]]
        erased.append(float((augmented == 0).float().mean()))
    assert 20 <= sum(flips) <= 60
    assert 0.0 < max(erased) < 0.15


def test_standard_changes_brightness_of_rgb_only():
    for shape, changes in ((GREY, False), (RGB, True)):
        augmented = augment("standard", torch.full((64, *shape), 100, dtype=torch.uint8))
        kept = augmented[augmented != 0]
        assert bool((kept != 100).any()) is changes
        assert 75.0 < float(kept.min()) <= float(kept.max()) < 125.0
