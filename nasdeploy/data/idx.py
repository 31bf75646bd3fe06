"""Image sets in IDX files, as MNIST, Fashion-MNIST, KMNIST and EMNIST come.

A folder with ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, and ``t10k-…`` or ``test-…`` for the test
images; each may be gzipped, be written ``.idx3-ubyte``, and have the name of a set in front
(``emnist-letters-train-…``). ``<set>-mapping.txt`` (label and code points, one class a line) names the classes, else
their labels do. Pixels are taken as they are stored: those of EMNIST lie transposed.

Format: http://yann.lecun.com/exdb/mnist/: two zero bytes, 8 for uint8, the number of axes, each size as big-endian
uint32, the data.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from nasdeploy.data.contents import Contents, LabelledImages, Labels, Request
from nasdeploy.data.pixels import labelled_pixels, resized_entry
from nasdeploy.errors import DataError

NAME = re.compile(
    r"(?P<set>.*?)-?(?P<part>train|t10k|test|valid|val)-(?P<kind>images|labels)[.-]idx[13]-ubyte(?:\.gz)?"
)
PART_OF_NAME = {"train": "train", "t10k": "test", "test": "test", "valid": "valid", "val": "valid"}
UINT8 = 8

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    path: Path
    set_name: str
    part: str
    kind: str


def is_idx_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with image files in the IDX format."""
    return path.is_dir() and any(file.kind == "images" for file in _files(path))


def load_idx(request: Request) -> Contents:
    """Return the images in the folder ``request.path``. Raises DataError for missing or damaged files."""
    files = _by_part_and_kind(request.path)
    paths = {part: files[part, "images"] for part in ("train", "valid", "test") if (part, "images") in files}
    entry = resized_entry(request, paths.values())
    parts = {part: _read_part(files, part) for part in paths}
    numbers, positions = np.unique(parts["train"].labels, return_inverse=True)
    train = LabelledImages(images=parts["train"].images, labels=positions.astype(np.int64))
    others = {
        part: LabelledImages(
            images=read.images, labels=_positions(files[part, "labels"], read.labels, numbers)
        )
        for part, read in parts.items()
        if part != "train"
    }
    class_names = _class_names(request.path, numbers)
    sized = labelled_pixels(
        {"train": train, **others},
        where={part: f"{path}: the images" for part, path in paths.items()},
        request=request,
        entry=entry,
    )
    return Contents(class_names=class_names, **sized)


def read_idx(path: Path, *, num_axes: int) -> Bytes:
    """Return the array in an IDX file of uint8 with ``num_axes`` axes, gzipped or not.

    Raises DataError for another header, or where the length is not that of the header.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(path, file, num_axes)  # type: ignore[arg-type]  # GzipFile has all that is used
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


def _parse(path: Path, file: BinaryIO, num_axes: int) -> Bytes:
    header = file.read(4 + 4 * num_axes)
    if header[:4] != bytes([0, 0, UINT8, num_axes]) or len(header) < 4 + 4 * num_axes:
        raise DataError(
            f"{path}: begins with {header[:4].hex(' ') or 'nothing'}; expected 00 00 08 {num_axes:02x}, an IDX file "
            f"of uint8 with {num_axes} axes"
        )
    shape = np.frombuffer(header, ">u4", offset=4).tolist()
    length = math.prod(shape)
    content = file.read()
    if len(content) != length:
        raise DataError(
            f"{path}: {len(content)} bytes of data; expected {length} by its header, {'x'.join(map(str, shape))}; "
            "download it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _files(folder: Path) -> list[_File]:
    found = []
    for path in sorted(folder.iterdir()):
        match = NAME.fullmatch(path.name.lower())
        if match is not None and path.is_file():
            part = PART_OF_NAME[match["part"]]
            found.append(_File(path=path, set_name=match["set"], part=part, kind=match["kind"]))
    return found


def _by_part_and_kind(folder: Path) -> dict[tuple[str, str], Path]:
    files = _files(folder)
    names = sorted({file.set_name for file in files})
    if len(names) > 1:
        raise DataError(
            f"{folder}: holds several sets ({', '.join(name or 'one without a name' for name in names)}); expected "
            "the files of one: move them to a folder of their own"
        )
    # Sorted: where a file lies there gzipped too, the plain one comes first and is taken.
    found: dict[tuple[str, str], Path] = {}
    for file in files:
        found.setdefault((file.part, file.kind), file.path)
    for part in ("train", *(part for part, _ in found)):
        for kind in ("images", "labels"):
            if (part, kind) not in found:
                raise DataError(
                    f"{folder}: no file with the {kind} of {part}; it has "
                    f"{', '.join(path.name for path in found.values())}"
                )
    return found


def _read_part(files: dict[tuple[str, str], Path], part: str) -> LabelledImages:
    images = read_idx(files[part, "images"], num_axes=3)[:, :, :, np.newaxis]
    labels = read_idx(files[part, "labels"], num_axes=1)
    if len(images) != len(labels) or 0 in images.shape:
        raise DataError(
            f"{files[part, 'labels']}: {len(labels)} labels for {len(images)} images of "
            f"{images.shape[1]}x{images.shape[2]} pixels; expected one each, at least one"
        )
    return LabelledImages(images=images, labels=labels.astype(np.int64))


def _positions(path: Path, labels: Labels, numbers: Labels) -> Labels:
    """Return the index of each label among ``numbers``: the labels of EMNIST's letters are 1 to 26, without a 0."""
    stray = ~np.isin(labels, numbers)
    if stray.any():
        raise DataError(f"{path}: label {labels[stray][0]} is not in train; expected a label of train")
    return np.searchsorted(numbers, labels).astype(np.int64)


def _class_names(folder: Path, numbers: Labels) -> tuple[str, ...]:
    mappings = sorted(folder.glob("*-mapping.txt"))
    if not mappings:
        return tuple(map(str, numbers.tolist()))
    try:
        lines = [
            line.split() for line in mappings[0].read_text(encoding="ascii").splitlines() if line.strip()
        ]
        names = {int(line[0]): "".join(chr(int(code)) for code in line[1:]) for line in lines}
        return tuple(names[number] for number in numbers.tolist())
    except (OSError, ValueError, LookupError, OverflowError) as error:
        raise DataError(
            f"{mappings[0]}: not a label and its code points on each line, for the labels {numbers.tolist()} "
            f"({error}); repair or remove it"
        ) from error
