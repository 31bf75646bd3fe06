"""Image sets in one .npz file.

Keys: ``train_images`` uint8 (N, H, W) or (N, H, W, C) and ``train_labels`` integers (N,); optional
``valid_*`` and ``test_*`` of the same form, and ``class_names`` (strings; index = label). Other keys are
ignored, unless they look like a misspelt split.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nasdeploy.data.assembly import LabelledImages, assemble_dataset
from nasdeploy.data.images import resize_arrays
from nasdeploy.data.types import Dataset
from nasdeploy.errors import DataError
from nasdeploy.spaces.mobile import MAX_SIZE

PARTS = ("train", "valid", "test")
KNOWN_KEYS = frozenset(f"{part}_{kind}" for part in PARTS for kind in ("images", "labels"))
READING_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

Arrays = dict[str, npt.NDArray[np.generic]]


def load_npz(
    path: Path, *, name: str, source: str, image_size: int | None, seed: int, valid_fraction: float
) -> Dataset:
    """Return the dataset stored at ``path``, its images resized if ``image_size`` is given.

    Raises DataError for a damaged file, missing keys, or arrays of wrong shape, type or range.
    """
    arrays = _read(path)
    parts: dict[str, LabelledImages] = {}
    for part in PARTS:
        if part == "train" or f"{part}_images" in arrays:
            parts[part] = _labelled_images(path, arrays, part, image_size)
    return assemble_dataset(
        name=name,
        source=source,
        class_names=_class_names(path, arrays, parts["train"]),
        train=parts["train"],
        valid=parts.get("valid"),
        test=parts.get("test"),
        seed=seed,
        valid_fraction=valid_fraction,
    )


def _read(path: Path) -> Arrays:
    """Return the arrays under the keys that matter here."""
    try:
        with zipfile.ZipFile(path):
            pass  # numpy takes a file that is no archive for something else, and its message misleads
        with np.load(path, allow_pickle=False) as archive:
            _check_keys(path, archive.files)
            return {key: _member(path, archive, key) for key in archive.files if _is_wanted(key)}
    except READING_ERRORS as error:
        raise DataError(
            f"{path}: not a readable .npz file ({error}); expected one written by numpy.savez"
        ) from error


def _is_wanted(key: str) -> bool:
    return key in KNOWN_KEYS or key == "class_names"


def _check_keys(path: Path, keys: list[str]) -> None:
    present = set(keys) & KNOWN_KEYS
    for part in PARTS:
        pair = {f"{part}_images", f"{part}_labels"}
        missing = pair - present
        if missing and (part == "train" or missing != pair):
            raise DataError(
                f"{path}: no key '{min(missing)}'; it holds {', '.join(sorted(keys)) or 'nothing'}"
            )
    for key in keys:
        # A misspelt split ('val_images') would otherwise be replaced by a random one, unnoticed.
        if key.endswith(("_images", "_labels")) and key not in KNOWN_KEYS:
            raise DataError(f"{path}: unexpected key '{key}'; expected only {', '.join(sorted(KNOWN_KEYS))}")


def _member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> npt.NDArray[np.generic]:
    try:
        array = archive[key]
    except ValueError as error:
        raise DataError(
            f"{path}: '{key}' holds pickled objects or is damaged ({error}); expected a plain array"
        ) from error
    if not isinstance(array, np.ndarray):  # a zip member without the suffix .npy comes as bytes
        raise DataError(f"{path}: '{key}' is not an array; expected a file written by numpy.savez")
    return array


def _labelled_images(path: Path, arrays: Arrays, part: str, image_size: int | None) -> LabelledImages:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if images.ndim == 3:
        images = images[:, :, :, np.newaxis]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"{path}: '{part}_images' is {images.dtype} of shape {images.shape}; "
            "expected uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: '{part}_labels' is {labels.dtype} of shape {labels.shape}; "
            f"expected integers of shape ({len(images)},)"
        )
    height, width = images.shape[1:3]
    if image_size is None and height != width:
        raise DataError(
            f"{path}: '{part}_images' are {height}x{width} pixels; expected square images; "
            f"--image-size {min(height, width, MAX_SIZE)} resizes and crops them"
        )
    pixels = images.astype(np.uint8, copy=False)
    return LabelledImages(
        images=pixels if image_size is None else resize_arrays(pixels, image_size),
        labels=labels.astype(np.int64),
    )


def _class_names(path: Path, arrays: Arrays, train: LabelledImages) -> list[str]:
    if "class_names" not in arrays:
        highest = int(train.labels.max())
        if highest >= len(train.labels):  # before listing as many names as a stray label says
            raise DataError(
                f"{path}: label {highest} of image {train.labels.argmax()} is out of range; "
                "without 'class_names' expected 0 to the number of classes - 1, each with images"
            )
        return [str(label) for label in range(highest + 1)]
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(
            f"{path}: 'class_names' is {names.dtype} of shape {names.shape}; expected strings, one a class"
        )
    try:
        return [str(name) for name in names.astype(np.str_)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: 'class_names' are bytes that are not ASCII; expected strings") from error
