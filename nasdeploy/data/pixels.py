"""Image sets that come as arrays of pixels: shapes, sizes and the names of classes that are only numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nasdeploy.data.contents import LabelledImages, Labels
from nasdeploy.errors import DataError
from nasdeploy.spaces.mobile import MAX_SIZE

Pixels = npt.NDArray[np.uint8]


def labelled_pixels(images: Pixels, labels: Labels, *, image_size: int | None, where: str) -> LabelledImages:
    """Return images (N, H, W, C) with their labels, resized if ``image_size`` is given.

    where: of the images, for the message. Raises DataError where they are not square and no size is given.
    """
    height, width = images.shape[1:3]
    if image_size is None and height != width:
        raise DataError(
            f"{where} are {height}x{width} pixels; expected square images; "
            f"--image-size {min(height, width, MAX_SIZE)} resizes and crops them"
        )
    if image_size is None or (height, width) == (image_size, image_size):
        return LabelledImages(images=images, labels=labels)
    from nasdeploy.data.images import resize_arrays  # here: Pillow is not needed where nothing is resized

    return LabelledImages(images=resize_arrays(images, image_size), labels=labels)


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
