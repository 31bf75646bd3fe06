"""Image sets that come as arrays of pixels: shapes, sizes and the names of classes that are only numbers.

Notation: N images, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nasdeploy.data.cache import CacheEntry, Write, cache_entry, make_images
from nasdeploy.data.contents import (
    SUGGESTED_MAX_SIZE,
    LabelledImages,
    Labels,
    Progress,
    Request,
    part_of_progress,
)
from nasdeploy.data.stored import Images
from nasdeploy.data.types import Split
from nasdeploy.errors import DataError

BATCH = 32
"""Images resized without a break: Ctrl-C waits for a batch."""

Pixels = npt.NDArray[np.uint8]


def resized_entry(request: Request, files: Iterable[Path]) -> CacheEntry | None:
    """Return the place for the resized images of ``files``, None where no size is asked for.

    Ask before reading these: should one change meanwhile, its old pixels are then never taken for its new ones.
    """
    if request.image_size is None:
        return None
    return cache_entry(request.path, [str(file) for file in files], image_size=request.image_size)


def labelled_pixels(
    parts: Mapping[str, LabelledImages],
    *,
    where: Mapping[str, str],
    request: Request,
    entry: CacheEntry | None,
) -> dict[str, LabelledImages | Split]:
    """Return all parts of a set, resized if ``request.image_size`` is given.

    Resized images are in memory up to ``request.memory_limit`` bytes of all parts together, else in files of the
    cache: the same pixels. where: of the images of each part, for the message. entry: see :func:`resized_entry`.
    Raises DataError where images are not square and no size is given.
    """
    size = request.image_size
    if size is None:
        for part, given in parts.items():
            _check_square(given.images, where[part])
    if size is None or all(given.images.shape[1:3] == (size, size) for given in parts.values()):
        return dict(parts)
    num_bytes = sum(len(given.images) * given.images.shape[3] * size**2 for given in parts.values())
    entry = entry if num_bytes > request.memory_limit else None
    total = sum(len(given.images) for given in parts.values())
    begin = 0
    sized: dict[str, LabelledImages | Split] = {}
    for part, given in parts.items():
        end = begin + len(given.images)
        images = _resized(
            given.images,
            size,
            entry=entry and entry.part(part),
            progress=part_of_progress(request.progress, begin / total, end / total),
        )
        sized[part] = Split(images, torch.from_numpy(given.labels))
        begin = end
    return sized


def _check_square(images: Pixels, where: str) -> None:
    height, width = images.shape[1:3]
    if height != width:
        raise DataError(
            f"{where} are {height}x{width} pixels; expected square images; "
            f"--image-size {min(height, width, SUGGESTED_MAX_SIZE)} resizes and crops them"
        )


def _resized(images: Pixels, size: int, *, entry: CacheEntry | None, progress: Progress) -> Images:
    """Return (N, H, W, C) as (N, C, size, size), in memory or in the file of ``entry``."""
    count, channels = len(images), images.shape[3]
    return make_images(
        (count, channels, size, size),
        lambda write: _resize_all(images, size, write=write, progress=progress),
        entry=entry,
    )


def _resize_all(images: Pixels, size: int, *, write: Write, progress: Progress) -> None:
    # Here: Pillow is not needed where nothing is resized.
    from nasdeploy.data.images import in_threads, resize_arrays

    def work(first: int) -> int:
        resized = resize_arrays(images[first : first + BATCH], size)
        write(first, resized.transpose(0, 3, 1, 2))  # (n, H, W, C) -> (n, C, H, W)
        return first + len(resized)

    with closing(in_threads(work, range(0, len(images), BATCH))) as results:
        for done in results:
            progress(done / len(images))


def numbered_classes(labels: Labels, *, where: str) -> tuple[str, ...]:
    """Return "0", "1", … for the training labels (N,), which have no names. Raises DataError for stray ones."""
    if not len(labels):
        raise DataError(f"{where}: no labels; expected at least one image with its label")
    # Before listing as many names as a stray label says.
    wrong = np.flatnonzero((labels < 0) | (labels >= len(labels)))
    if len(wrong):
        raise DataError(
            f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is out of range; without class names "
            "expected 0 to the number of classes - 1, each with images"
        )
    return tuple(map(str, range(int(labels.max()) + 1)))
