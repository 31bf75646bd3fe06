"""Augmentation of whole batches with torchvision's transforms, drawn from a given generator.

A torchvision transform draws one set of parameters per call, here for an eighth of the batch: nearly the
variety of one draw per image at a small part of its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nasdeploy.errors import ConfigError

Augmentation = Callable[[Tensor, Generator], Tensor]
"""(images (B, C, H, W) uint8 or float, 0 to 255; CPU generator) -> images of the same shape, 0 to 255."""

NAMES = ("none", "light", "standard")
NUM_CHUNKS = 8
PADDING_SHARE = 12  # of the image's side: 2 pixels of 28, 3 of 32, 5 of 64
JITTER = 0.2
ERASING_PROBABILITY = 0.25
ERASED_AREA = (0.02, 0.15)  # least and greatest share of the image


def make_augmentation(name: str, image_shape: tuple[int, int, int]) -> Augmentation:
    """Return the augmentation called ``name`` for images of ``image_shape`` (C, H, W).

    ``light``: random crops after padding; no flips, which are wrong for digits and signs.
    ``standard``: light, flips left to right, erased rectangles and, for RGB, brightness and contrast.
    Both return float32. Raises ConfigError for an unknown name.
    """
    if name not in NAMES:
        raise ConfigError(f"augmentation: '{name}' is not known; expected one of {', '.join(NAMES)}")
    if name == "none":
        return unchanged
    from torchvision.transforms import v2  # here: it takes long to import, and only training needs it

    channels, height, width = image_shape
    steps: list[Callable[[Tensor], Tensor]] = [v2.RandomCrop((height, width))]
    if name == "standard":
        steps.append(v2.RandomHorizontalFlip())
        if channels == 3:
            steps.append(_InUnitRange(v2.ColorJitter(brightness=JITTER, contrast=JITTER)))
        steps.append(v2.RandomErasing(p=ERASING_PROBABILITY, scale=ERASED_AREA))
    # Edge pixels continue any background. A constant would frame light backgrounds in black, which no test
    # image has, and reflection would double the strokes of a digit that touches the border.
    pad = v2.Pad(max(1, round(min(height, width) / PADDING_SHARE)), padding_mode="edge")
    return _ChunkedAugmentation(pad=pad, steps=tuple(steps))


def unchanged(images: Tensor, generator: Generator) -> Tensor:
    """The augmentation ``none``."""
    return images


@dataclass(frozen=True, slots=True)
class _InUnitRange:
    """Torchvision takes float colours to be 0 to 1, and clamps them to that."""

    transform: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        return self.transform(images / 255.0) * 255.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChunkedAugmentation:
    pad: Callable[[Tensor], Tensor]
    steps: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        padded = self.pad(images.to(torch.float32))
        # torchvision draws from torch's global CPU generator. torch.manual_seed would seed the GPUs too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return torch.cat([self._apply(chunk) for chunk in padded.chunk(NUM_CHUNKS)])

    def _apply(self, chunk: Tensor) -> Tensor:
        for step in self.steps:
            chunk = step(chunk)
        return chunk
