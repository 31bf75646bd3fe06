"""What a layout reads from a path, before it is divided and named.

Notation: N images, C = 1 (grey) or 3 (RGB) channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nasdeploy.data.types import Split

MEMORY_LIMIT = 2**29
"""Bytes of decoded or resized images that are held in memory, 512 MiB: loading takes twice that. Larger sets stay in
a file."""

SUGGESTED_MAX_SIZE = 224
"""Pixels: the largest side that a message proposes, for photographs of any size."""

Labels = npt.NDArray[np.int64]

Progress = Callable[[float], None]
"""Called with the share of the images that has been decoded or resized, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledImages:
    """Images uint8 (N, H, W, C) with labels int64 (N,), in a fixed order."""

    images: npt.NDArray[np.uint8]
    labels: Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to read and how. image_size: side in pixels, None where the images are squares of one size already.

    memory_limit: bytes of decoded or resized images, see :data:`MEMORY_LIMIT`.
    """

    path: Path
    image_size: int | None
    memory_limit: int = MEMORY_LIMIT
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """The labelled images of a path; valid and test are None where the data brings none."""

    class_names: tuple[str, ...]
    train: LabelledImages | Split
    valid: LabelledImages | Split | None = None
    test: LabelledImages | Split | None = None


def part_of_progress(progress: Progress | None, start: float, end: float) -> Progress:
    """Return a function that reports shares of one part of the work, ``start`` to ``end``, as shares of the whole."""

    def report(share: float) -> None:
        if progress is not None:
            progress(start + share * (end - start))

    return report
