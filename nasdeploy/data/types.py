"""Image sets: splits, what was done to the pixels, and their statistics.

Notation: N images, C channels, H = W pixels. Pixels are uint8, 0 to 255, everywhere before a batch is made.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nasdeploy.data.stored import Images, StoredImages, image_chunks
from nasdeploy.errors import DataError

STD_FLOOR = 0.1
"""Least standard deviation, in grey levels: for constant channels; images of values 0 and 1 lie above it."""

Colour = Literal["grey", "rgb"]


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation per channel, in units of 0..255; the network computes (x - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How an image file becomes the network's input: whoever runs the model has to do the same.

    image_size: height and width in pixels. The file's EXIF orientation is applied first.
    """

    image_size: int
    channels: int
    colour: Colour
    resize: str = "shorter side, bilinear, antialias"
    crop: str = "centre"

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields for a model's metadata."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Labelled images on one device: ``images`` uint8 (N, C, H, W), in memory or in a file; ``labels`` int64 (N,).

    Raises DataError for other shapes or types.
    """

    images: Images
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images: {_describe(self.images)}; expected torch.uint8 of shape (N, C, H, W)")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels: {_describe(self.labels)}; expected torch.int64 of shape ({len(self.images)},)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def part(self, indices: npt.NDArray[np.intp]) -> Split:
        """Return the images at ``indices`` of a split on the CPU; those in a file are not read for it."""
        images: Images
        if isinstance(self.images, StoredImages):
            images = self.images.select(indices)
        else:
            images = torch.from_numpy(self.images.numpy()[indices])
        return Split(images, torch.from_numpy(self.labels.numpy()[indices]))


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: what is cached needs a place
class Dataset:
    """Three disjoint splits of one image set. ``test`` is for the final figures only.

    name: for people. source: what was asked for (a name or a path). class_names: index = label.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    class_names: tuple[str, ...]
    source: str
    preprocessing: Preprocessing

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not every split holds all of them."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """Return a short hash of all pixels, labels and class names: what a stored search belongs to."""
        return self._fingerprint

    def normalisation(self) -> Normalisation:
        """Return the statistics of the train split, exact, ``std`` not below :data:`STD_FLOOR`."""
        return self._normalisation

    # Both read every image, which takes long where they lie in a file; splits never change.
    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for split in (self.train, self.valid, self.test):
            digest.update(json.dumps(list(split.images.shape)).encode())
            for chunk in image_chunks(split.images):
                digest.update(chunk.cpu().contiguous().numpy().data)
            digest.update(split.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @cached_property
    def _normalisation(self) -> Normalisation:
        statistics = [_mean_and_std(counts) for counts in _histogram(self.train.images)]
        return Normalisation(
            mean=tuple(mean for mean, _ in statistics),
            std=tuple(max(std, STD_FLOOR) for _, std in statistics),
        )


def _histogram(images: Images) -> Tensor:
    """Return how often each grey level occurs in each channel, int64 (C, 256): exact, with no float copy."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in image_chunks(images):
        pixels = chunk.cpu()
        counts += torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]
        )
    return counts


def _mean_and_std(counts: Tensor) -> tuple[float, float]:
    """Return the mean and the population standard deviation of a histogram (256,)."""
    levels = torch.arange(256, dtype=torch.float64)
    shares = counts.to(torch.float64)
    mean = (shares @ levels) / shares.sum()
    variance = (shares @ (levels - mean) ** 2) / shares.sum()
    return float(mean), float(variance.sqrt())


def _describe(values: Images) -> str:
    return f"{values.dtype} of shape {tuple(values.shape)}"
