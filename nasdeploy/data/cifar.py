"""CIFAR-10 and CIFAR-100 as their authors distribute them, in both layouts; of CIFAR-100 the fine labels.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. Binary: records of one label byte (CIFAR-10) or a coarse and a fine
one (CIFAR-100), then 3 x 32 x 32 bytes, channel after channel. Python: pickled dicts with ``data`` uint8 (N, 3072).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nasdeploy.data.contents import Contents, LabelledImages, Labels, Request
from nasdeploy.data.pixels import Pixels, labelled_pixels, numbered_classes, resized_entry
from nasdeploy.data.unpickling import load_plain_pickle
from nasdeploy.errors import DataError

SIDE, CHANNELS = 32, 3
IMAGE_BYTES = CHANNELS * SIDE * SIDE

Part = tuple[Pixels, Labels]
"""Images (N, 3072), channel after channel, and labels (N,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """The files of one set. train: pattern of their names; read: images and labels of one file."""

    train: str
    test: str
    names: str
    read: Callable[[Path], Part]
    read_names: Callable[[Path], list[str]]


def is_binary_cifar(path: Path) -> bool:
    """Whether ``path`` is a folder with the binary files of CIFAR-10 or CIFAR-100."""
    return _variant(path, BINARY) is not None


def is_python_cifar(path: Path) -> bool:
    """Whether ``path`` is a folder with the pickles of CIFAR-10 or CIFAR-100."""
    return _variant(path, PYTHON) is not None


def load_cifar(request: Request) -> Contents:
    """Return the images in the folder ``request.path``; without a test file there is no test part.

    Raises DataError for missing, damaged or dangerous files.
    """
    folder = request.path
    variant = _variant(folder, (*BINARY, *PYTHON))
    assert variant is not None
    files = {"train": _train_files(folder, variant)}
    if (folder / variant.test).is_file():
        files["test"] = [folder / variant.test]
    entry = resized_entry(request, [path for paths in files.values() for path in paths])
    parts = {part: _read_all(paths, variant) for part, paths in files.items()}
    where = dict.fromkeys(parts, f"{folder}: the images")
    return Contents(
        class_names=_class_names(folder, variant, parts["train"].labels),
        **labelled_pixels(parts, where=where, request=request, entry=entry),
    )


def _variant(folder: Path, variants: tuple[_Variant, ...]) -> _Variant | None:
    if not folder.is_dir():
        return None
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return next((v for v in variants if any(re.fullmatch(v.train, name) for name in names)), None)


def _read_all(paths: list[Path], variant: _Variant) -> LabelledImages:
    read = [variant.read(path) for path in paths]
    flat = np.concatenate([images for images, _ in read]).reshape(-1, CHANNELS, SIDE, SIDE)
    return LabelledImages(
        images=flat.transpose(0, 2, 3, 1),  # (N, C, H, W) -> (N, H, W, C)
        labels=np.concatenate([labels for _, labels in read]),
    )


def _train_files(folder: Path, variant: _Variant) -> list[Path]:
    """Return the training files by number. Raises DataError for a gap: a batch that was not unpacked."""
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(variant.train, path.name)
        if match is not None:
            found[int((*match.groups(), "1")[0])] = path
    for number in range(1, max(found) + 1):
        if number not in found:
            raise DataError(
                f"{folder}: no batch {number} beside {', '.join(path.name for path in found.values())}; "
                "unpack the archive again"
            )
    return [found[number] for number in sorted(found)]


def _class_names(folder: Path, variant: _Variant, labels: Labels) -> tuple[str, ...]:
    path = folder / variant.names
    if not path.is_file():
        return numbered_classes(labels, where=str(folder))
    return tuple(variant.read_names(path))


def _read_binary(path: Path, *, label_bytes: int) -> Part:
    """Return the records of a file; the last of the label bytes counts."""
    record = label_bytes + IMAGE_BYTES
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not len(content) or len(content) % record:
        raise DataError(
            f"{path}: {len(content)} bytes; expected a multiple of {record}, one record of {label_bytes} label and "
            f"{IMAGE_BYTES} image bytes for each image; unpack the archive again"
        )
    records = content.reshape(-1, record)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _read_pickle(path: Path, *, label_key: str) -> Part:
    found = _pickled_dict(path)
    images, labels = found.get("data"), found.get(label_key)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (IMAGE_BYTES,):
        raise DataError(f"{path}: no 'data' of uint8 and shape (N, {IMAGE_BYTES}); unpack the archive again")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(type(n) is int for n in labels):
        raise DataError(f"{path}: no '{label_key}' with {len(images)} integers; unpack the archive again")
    return images, np.array(labels, np.int64)


def _pickled_dict(path: Path) -> dict[str, object]:
    """Return a pickled dict; its keys are text or bytes, as the Python that wrote it had them."""
    found = load_plain_pickle(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}; expected a dict")
    return {_text(key): value for key, value in found.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _read_text_names(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a readable text file ({error}); expected a class name a line"
        ) from error


def _read_pickled_names(path: Path, *, key: str) -> list[str]:
    names = _pickled_dict(path).get(key)
    if not isinstance(names, list):
        raise DataError(f"{path}: no list '{key}'; unpack the archive again")
    return [_text(name) for name in names]


BINARY = (
    _Variant(
        train=r"data_batch_(\d+)\.bin",
        test="test_batch.bin",
        names="batches.meta.txt",
        read=lambda path: _read_binary(path, label_bytes=1),
        read_names=_read_text_names,
    ),
    _Variant(
        train=r"train\.bin",
        test="test.bin",
        names="fine_label_names.txt",
        read=lambda path: _read_binary(path, label_bytes=2),
        read_names=_read_text_names,
    ),
)
PYTHON = (
    _Variant(
        train=r"data_batch_(\d+)",
        test="test_batch",
        names="batches.meta",
        read=lambda path: _read_pickle(path, label_key="labels"),
        read_names=lambda path: _read_pickled_names(path, key="label_names"),
    ),
    _Variant(
        train="train",
        test="test",
        names="meta",
        read=lambda path: _read_pickle(path, label_key="fine_labels"),
        read_names=lambda path: _read_pickled_names(path, key="fine_label_names"),
    ),
)
