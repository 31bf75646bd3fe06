"""From encoded images and arrays to square uint8 arrays: the only import of Pillow.

Notation: an image is uint8 (H, W, C) with C = 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps

from nasdeploy.errors import DataError

Pixels = npt.NDArray[np.uint8]

# What Pillow's decoders raise on damaged files: seen on files of 20 formats with bytes changed or cut off.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
GREY_MODES = ("1", "L")
WIDE_MODES = ("I", "F")  # and their variants such as "I;16": more than 8 bits a channel
DEEP_RAW_MODE = re.compile(r";16[LBN]")  # "RGB;16B", but not "BGR;16": 5, 6 and 5 bits
MAX_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class EncodedImage(NamedTuple):
    """An image file: its path, or its content and a name for messages."""

    name: str
    content: bytes | None = None


class Header(NamedTuple):
    """What the first bytes of an image file say; the EXIF orientation is not applied."""

    width: int
    height: int
    grey: bool


@cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes, with their dot, that this Pillow can open."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each of ``items``, in order, a few ahead of the caller.

    Threads suffice: Pillow's codecs release the lock. Close the iterator if you leave it early: then what has begun
    is awaited and nothing more begins.
    """
    workers = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_header(encoded: EncodedImage) -> Header:
    """Return the header of an image file. Raises DataError if it cannot be read or has over 8 bits a channel."""
    try:
        with _open(encoded) as image:
            _check_depth(image, encoded.name)
            return Header(*image.size, grey=image.mode in GREY_MODES)
    except DECODING_ERRORS as error:
        raise _unreadable(encoded.name, error) from error


def decode(encoded: EncodedImage, *, size: int, grey: bool) -> Pixels:
    """Return an image file as (size, size, C), upright; C = 1 if ``grey`` or stored as grey, else 3.

    Transparency is dropped. Raises DataError for a damaged file or one with more than 8 bits a channel.
    """
    try:
        with _open(encoded) as file:
            _check_depth(file, encoded.name)
            upright = ImageOps.exif_transpose(file)
            image = upright.convert("L") if grey else _plain_colour(upright)
    except DECODING_ERRORS as error:
        raise _unreadable(encoded.name, error) from error
    return to_pixels(resize_square(image, size))


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
    resized = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for n, pixels in enumerate(images):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        resized[n] = to_pixels(resize_square(image, size))
    return resized


def to_pixels(image: Image.Image) -> Pixels:
    """Return an image of mode L or RGB as (H, W, C)."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _open(encoded: EncodedImage) -> ImageFile.ImageFile:
    return Image.open(encoded.name if encoded.content is None else io.BytesIO(encoded.content))


def _check_depth(image: ImageFile.ImageFile, name: str) -> None:
    # Of a grey image Pillow keeps 16 bits, of a coloured one the upper 8: only the raw mode of its tiles shows that.
    deep = any(DEEP_RAW_MODE.search(str(tile[-1])) for tile in image.tile)
    if deep or image.mode.startswith(WIDE_MODES):
        raise DataError(
            f"{name}: mode {image.mode} has over 8 bits a channel; convert it to 8-bit grey or RGB"
        )


def _plain_colour(image: Image.Image) -> Image.Image:
    """Return ``image`` as L if it is stored as grey, else as RGB."""
    if image.mode in GREY_MODES:
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about the palette's transparency
    return image.convert("RGB")


def _unreadable(name: str, error: BaseException) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{name}: not a readable image ({reason}); repair or remove it")
