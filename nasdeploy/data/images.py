"""From image files and arrays to square uint8 arrays: the only import of Pillow.

Notation: an image is uint8 (H, W, C) with C = 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from nasdeploy.errors import DataError

Pixels = npt.NDArray[np.uint8]

# What Pillow's decoders raise on damaged files, beside its own classes (subclasses of OSError and Exception).
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
GREY_MODES = ("1", "L")
WIDE_MODES = ("I", "F")  # and their variants such as "I;16": more than 8 bits a channel

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes, with their dot, that this Pillow can open."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return ``[function(item) for item in items]``. Threads suffice: Pillow's codecs release the lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def stored_size(path: Path) -> tuple[int, int]:
    """Return (width, height) from the header of an image file. Raises DataError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size
    except DECODING_ERRORS as error:
        raise _unreadable(path, error) from error


def read_image(path: Path, *, image_size: int | None) -> Pixels:
    """Return the file as (H, W, C), upright, grey where stored as grey, resized if ``image_size`` is given.

    Transparency is dropped. Raises DataError for a damaged file or one with more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(WIDE_MODES):
                raise DataError(
                    f"{path}: mode {image.mode} has over 8 bits a channel; convert it to 8-bit grey or RGB"
                )
            image = _plain_colour(image)
    except DECODING_ERRORS as error:
        raise _unreadable(path, error) from error
    return to_pixels(image if image_size is None else resize_square(image, image_size))


def resize_square(image: Image.Image, size: int) -> Image.Image:
    """Return ``image`` with its shorter side brought to ``size``, then cropped in the centre.

    Rounds as torchvision's ``Resize`` and ``CenterCrop`` do, so that these give the same pixels.
    """
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    if (width, height) != image.size:
        # Pillow's bilinear filter widens its support when it shrinks: it always antialiases.
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def resize_arrays(images: Pixels, size: int) -> Pixels:
    """Return (N, H, W, C) as (N, size, size, C), each image as :func:`resize_square` does it."""
    if images.shape[1:3] == (size, size):
        return images

    def resize(pixels: Pixels) -> Pixels:
        return to_pixels(
            resize_square(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), size)
        )

    return np.stack(in_threads(resize, list(images)))


def to_pixels(image: Image.Image) -> Pixels:
    """Return an image of mode L or RGB as (H, W, C)."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def stack_pixels(images: Sequence[Pixels]) -> Pixels:
    """Return images of one size as (N, H, W, C): C = 1 if all are grey, else 3, grey ones spread over RGB."""
    channels = max(pixels.shape[-1] for pixels in images)
    stacked = np.empty((len(images), *images[0].shape[:2], channels), np.uint8)
    for n, pixels in enumerate(images):
        stacked[n] = pixels
    return stacked


def _plain_colour(image: Image.Image) -> Image.Image:
    """Return ``image`` as L if it is stored as grey, else as RGB."""
    if image.mode in GREY_MODES:
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about the palette's transparency
    return image.convert("RGB")


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: not a readable image ({reason}); repair or remove the file")
