"""Image sets in one .npz file.

Pixels: ``train_images`` uint8 (N, H, W) or (N, H, W, C) and ``train_labels`` integers (N,) or (N, 1). Encoded images
(PNG, JPEG, …) instead: ``train_blob`` uint8, all image files one after the other, and ``train_offsets`` (N + 1);
image i is ``train_blob[train_offsets[i]:train_offsets[i + 1]]``. Optional: ``valid_*`` (or ``val_*``) and ``test_*``
of the same form, and ``class_names`` (strings; index = label). Other keys are ignored, unless they look like the
images of a misspelt split.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nasdeploy.data.contents import Contents, LabelledImages, Labels, Request
from nasdeploy.data.pixels import labelled_pixels, numbered_classes, resized_entry
from nasdeploy.errors import DataError

if TYPE_CHECKING:
    from nasdeploy.data.images import EncodedImage

PART_OF_PREFIX = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
PIXEL_KEYS = ("images", "labels")
ENCODED_KEYS = ("blob", "offsets", "labels")
READING_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

Array = npt.NDArray[np.generic]


def is_npz(path: Path) -> bool:
    """Whether ``path`` is an .npz file by its name."""
    return path.is_file() and path.suffix.lower() == ".npz"


def load_npz(request: Request) -> Contents:
    """Return the images stored at ``request.path``.

    Raises DataError for a damaged file, missing keys, or arrays of wrong shape, type or range.
    """
    entry = resized_entry(request, [request.path])
    arrays = _Arrays(request.path)
    labels = {part: arrays.labels(part) for part in arrays.parts}
    class_names = arrays.class_names()
    if arrays.encoded:
        from nasdeploy.data.encoded import (
            decode_parts,
        )  # here: the embedded set is pixels, and needs no Pillow

        blobs = [arrays.blob(part, len(given)) for part, given in labels.items()]
        return Contents(
            class_names=class_names, **decode_parts(_Blobs(str(request.path), blobs), labels, request)
        )
    pixels = {part: arrays.pixels(part, given) for part, given in labels.items()}
    where = {part: arrays.where(part) for part in labels}
    return Contents(
        class_names=class_names, **labelled_pixels(pixels, where=where, request=request, entry=entry)
    )


class _Arrays:
    """The arrays of a file that matter here, by part and kind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path):
                pass  # numpy takes a file that is no archive for something else, and its message misleads
            with np.load(path, allow_pickle=False) as archive:
                keys = _wanted_keys(path, archive.files)
                self._arrays = {key: _member(path, archive, key) for key in keys.values()}
        except READING_ERRORS as error:
            raise DataError(
                f"{path}: not a readable .npz file ({error}); expected one written by numpy.savez"
            ) from error
        self._keys = keys
        self.parts = [part for part in ("train", "valid", "test") if f"{part}_labels" in keys]
        self.encoded = "train_blob" in keys

    def labels(self, part: str) -> Labels:
        """Return the labels (N,)."""
        key, labels = self._get(part, "labels")
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or not len(labels):
            raise self._wrong(key, "integers of shape (N,), N > 0")
        return labels.astype(np.int64)

    def pixels(self, part: str, labels: Labels) -> LabelledImages:
        """Return the images of a file of pixels."""
        key, images = self._get(part, "images")
        if images.ndim == 3:
            images = images[:, :, :, np.newaxis]
        right = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
        if not right or 0 in images.shape:
            raise self._wrong(key, "uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
        self._check_count(part, len(images), labels)
        return LabelledImages(images=images.astype(np.uint8, copy=False), labels=labels)

    def where(self, part: str) -> str:
        """Return where the pixels of a part are, for messages."""
        return f"{self._path}: '{self._keys[f'{part}_images']}'"

    def blob(self, part: str, count: int) -> _Blob:
        """Return the encoded images of a part of ``count`` labels."""
        key, content = self._get(part, "blob")
        if content.dtype != np.uint8 or content.ndim != 1:
            raise self._wrong(key, "uint8 of shape (bytes,)")
        offsets_key, offsets = self._get(part, "offsets")
        if not np.issubdtype(offsets.dtype, np.integer) or offsets.shape != (count + 1,):
            raise self._wrong(
                offsets_key, f"integers of shape ({count + 1},), one more than there are labels"
            )
        bounds = offsets.astype(np.int64)
        if bounds[0] < 0 or bounds[-1] > len(content) or (np.diff(bounds) < 0).any():
            raise DataError(
                f"{self._path}: '{offsets_key}' goes from {bounds[0]} to {bounds[-1]}; expected ascending positions "
                f"in '{key}', 0 to {len(content)}"
            )
        return _Blob(name=f"{self._path}: {part} image", content=content, bounds=bounds)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, or their numbers where the file has none."""
        if "class_names" not in self._keys:
            return numbered_classes(self.labels("train"), where=str(self._path))
        names = self._arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise self._wrong("class_names", "strings, one a class")
        try:
            return tuple(str(name) for name in names.astype(np.str_))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path}: 'class_names' are bytes that are not ASCII; expected strings"
            ) from error

    def _get(self, part: str, kind: str) -> tuple[str, Array]:
        key = self._keys[f"{part}_{kind}"]
        return key, self._arrays[key]

    def _check_count(self, part: str, count: int, labels: Labels) -> None:
        if len(labels) != count:
            raise self._wrong(self._get(part, "labels")[0], f"integers of shape ({count},)")

    def _wrong(self, key: str, expected: str) -> DataError:
        found = self._arrays[key]
        return DataError(
            f"{self._path}: '{key}' is {found.dtype} of shape {found.shape}; expected {expected}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Blob:
    name: str
    content: Array
    bounds: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Blobs:
    """The encoded images of all parts, as :class:`nasdeploy.data.encoded.EncodedImages`."""

    path: str
    blobs: list[_Blob]

    @property
    def files(self) -> list[str]:
        return [self.path]

    def __len__(self) -> int:
        return sum(map(len, self.blobs))

    def __iter__(self) -> Iterator[EncodedImage]:
        from nasdeploy.data.images import EncodedImage

        for blob in self.blobs:
            for i in range(len(blob)):
                content = blob.content[blob.bounds[i] : blob.bounds[i + 1]].tobytes()
                yield EncodedImage(f"{blob.name} {i}", content)


def _wanted_keys(path: Path, keys: list[str]) -> dict[str, str]:
    """Return {part_kind: key of the file}. Raises DataError where one is missing or a split is misspelt."""
    kinds = ENCODED_KEYS if "train_blob" in keys and "train_images" not in keys else PIXEL_KEYS
    wanted = {"class_names": "class_names"} if "class_names" in keys else {}
    for prefix, part in PART_OF_PREFIX.items():
        if prefix != "train" and not any(f"{prefix}_{kind}" in keys for kind in {*PIXEL_KEYS, *ENCODED_KEYS}):
            continue
        if f"{part}_labels" in wanted:
            raise DataError(f"{path}: has both valid_* and val_*; expected one of them")
        for kind in kinds:
            if f"{prefix}_{kind}" not in keys:
                other = " (nor 'train_blob')" if f"{prefix}_{kind}" == "train_images" else ""
                raise DataError(
                    f"{path}: no key '{prefix}_{kind}'{other}; it holds {', '.join(sorted(keys)) or 'nothing'}"
                )
            wanted[f"{part}_{kind}"] = f"{prefix}_{kind}"
    for key in keys:
        # The images of a misspelt split ('tset_images') would otherwise be replaced by random ones, unnoticed.
        prefix, _, kind = key.rpartition("_")
        if kind in ("images", "blob") and prefix not in PART_OF_PREFIX:
            raise DataError(
                f"{path}: unexpected key '{key}'; expected images only of {', '.join(PART_OF_PREFIX)}"
            )
    return wanted


def _member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> Array:
    try:
        array = archive[key]
    except ValueError as error:
        raise DataError(
            f"{path}: '{key}' holds pickled objects or is damaged ({error}); expected a plain array"
        ) from error
    if not isinstance(array, np.ndarray):  # a zip member without the suffix .npy comes as bytes
        raise DataError(f"{path}: '{key}' is not an array; expected a file written by numpy.savez")
    return array
