"""Sets of encoded images, decoded once: into memory where they fit, else into a file.

Notation: N images, C channels, H = W = size pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nasdeploy.data.cache import Shape, Write, cache_entry, make_images
from nasdeploy.data.contents import SUGGESTED_MAX_SIZE, Labels, Progress, Request, part_of_progress
from nasdeploy.data.images import EncodedImage, Header, decode, in_threads, read_header
from nasdeploy.data.stored import Images, StoredImages
from nasdeploy.data.types import Split
from nasdeploy.errors import DataError

BATCH = 8
"""Images decoded without a break: a photograph takes a tenth of a second, and Ctrl-C waits for a batch."""

HEADER_SHARE = 0.1
"""Of the time that reading headers and decoding take together."""


class EncodedImages(Protocol):
    """Image files in a fixed order, read from the first to the last."""

    @property
    def files(self) -> Sequence[str]:
        """The files that hold them: their sizes and times tell whether the images are still the same."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[EncodedImage]: ...


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image files by their paths."""

    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[EncodedImage]:
        return map(EncodedImage, self.files)


def decode_images(encoded: EncodedImages, request: Request) -> Images:
    """Return the images as uint8 (N, C, size, size); C = 1 if all are stored as grey, else 3.

    In memory up to ``request.memory_limit`` bytes, else in a file of the cache: the same pixels. Raises DataError
    naming the image that cannot be read, or two that differ in size where no size is asked for.
    """
    with warnings.catch_warnings():
        # Of damaged metadata and of very large images: one line says what cannot be read, and the rest was read.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return _decode_images(encoded, request)


def _decode_images(encoded: EncodedImages, request: Request) -> Images:
    side = request.image_size or _first_side(encoded)
    entry = None
    if math.prod((len(encoded), 3, side, side)) > request.memory_limit:
        entry = cache_entry(request.path, encoded.files, image_size=request.image_size)
        if (found := entry.find()) is not None:
            stored = StoredImages(found)
            return stored[:] if stored.shape.numel() <= request.memory_limit else stored
    shape = _shape(encoded, request.image_size, part_of_progress(request.progress, 0.0, HEADER_SHARE))
    progress = part_of_progress(request.progress, HEADER_SHARE, 1.0)
    too_large = math.prod(shape) > request.memory_limit
    return make_images(
        shape,
        lambda write: _decode_all(encoded, shape, write, progress),
        entry=entry if too_large else None,
    )


def decode_parts(
    encoded: EncodedImages, labels: Mapping[str, Sequence[int] | Labels], request: Request
) -> dict[str, Split]:
    """Decode all parts together, and return their splits; in ``encoded`` they follow one another.

    Whether the images are grey, and their size, is one fact about the whole set. Raises DataError for a part without
    images, and as :func:`decode_images` does.
    """
    for part, given in labels.items():
        if not len(given):
            raise DataError(f"{request.path}: {part}: no images; expected at least one")
    flat = np.concatenate([np.asarray(given, np.int64) for given in labels.values()])
    whole = Split(decode_images(encoded, request), torch.from_numpy(flat))
    if len(labels) == 1:
        return dict.fromkeys(labels, whole)
    bounds = np.cumsum([0, *map(len, labels.values())])
    return {
        part: whole.part(np.arange(start, stop))
        for part, start, stop in zip(labels, bounds[:-1], bounds[1:], strict=True)
    }


def _first_side(encoded: EncodedImages) -> int:
    header = read_header(next(iter(encoded)))
    return min(header.width, header.height)


class _Batch(NamedTuple):
    first: int
    images: list[EncodedImage]


def _batches(encoded: EncodedImages) -> Iterator[_Batch]:
    batch: list[EncodedImage] = []
    first = 0
    for image in encoded:
        batch.append(image)
        if len(batch) == BATCH:
            yield _Batch(first, batch)
            first += len(batch)
            batch = []
    if batch:
        yield _Batch(first, batch)


def _decode_all(encoded: EncodedImages, shape: Shape, write: Write, progress: Progress) -> None:
    _, channels, size, _ = shape

    def work(batch: _Batch) -> int:
        pixels = np.empty((len(batch.images), channels, size, size), np.uint8)
        for n, image in enumerate(batch.images):
            pixels[n] = decode(image, size=size, grey=channels == 1).transpose(
                2, 0, 1
            )  # (H, W, 1 or C) -> (C, H, W)
        write(batch.first, pixels)
        return batch.first + len(batch.images)

    with closing(in_threads(work, _batches(encoded))) as results:
        for done in results:
            progress(done / len(encoded))


def _shape(encoded: EncodedImages, image_size: int | None, progress: Progress) -> Shape:
    """Return the shape of the decoded images, from their headers: it fails early where sizes differ."""
    sizes = np.empty((len(encoded), 2), np.int32)
    grey = True

    def work(batch: _Batch) -> tuple[int, list[Header]]:
        return batch.first, [read_header(image) for image in batch.images]

    with closing(in_threads(work, _batches(encoded))) as results:
        for first, headers in results:
            done = first + len(headers)
            sizes[first:done] = [(header.width, header.height) for header in headers]
            grey = grey and all(header.grey for header in headers)
            progress(done / len(encoded))
    if image_size is None:
        _check_sizes(encoded, sizes)
    size = image_size or int(sizes[0, 0])
    return len(encoded), 1 if grey else 3, size, size


def _check_sizes(encoded: EncodedImages, sizes: npt.NDArray[np.int32]) -> None:
    """Raise DataError unless all images are squares of one size (N, 2)."""
    suggestion = f"--image-size {min(SUGGESTED_MAX_SIZE, int(sizes.min()))} resizes and crops them"
    width, height = sizes[0]
    different = np.flatnonzero((sizes != sizes[0]).any(axis=1))
    if len(different):
        first, other = _name_of(encoded, 0), _name_of(encoded, int(different[0]))
        raise DataError(
            f"{first} is {width}x{height} pixels but {other} is {'x'.join(map(str, sizes[different[0]]))}; "
            f"expected squares of one size; {suggestion}"
        )
    if width != height:
        raise DataError(
            f"{_name_of(encoded, 0)} is {width}x{height} pixels, as are all; expected squares; {suggestion}"
        )


def _name_of(encoded: EncodedImages, index: int) -> str:
    return next(image.name for n, image in enumerate(encoded) if n == index)
