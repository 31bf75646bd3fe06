"""Image sets of the Hugging Face hub, as parquet files on disk.

A folder with ``train-*.parquet``, maybe ``validation-*.parquet`` and ``test-*.parquet``, the same in its only folder
with such files (``data/``), or one file. One column has the images: struct of ``bytes`` and ``path``, or binary; one
the labels: integers, or texts, which are then the classes. Names of integer labels, and which column is what, are in
the schema's metadata under ``huggingface``. [https://huggingface.co/docs/datasets/about_dataset_features]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nasdeploy.data.contents import Contents, Labels, Request
from nasdeploy.data.encoded import decode_parts
from nasdeploy.data.images import EncodedImage
from nasdeploy.data.pixels import numbered_classes
from nasdeploy.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

PART_OF_NAME = {
    "train": "train",
    "validation": "valid",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
SHARD = re.compile(
    r"(?P<name>[A-Za-z]+)(?:[-_.](?P<number>\d+))?(?:-of-(?P<count>\d+))?(?:-[0-9a-f]+)?\.parquet"
)
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
ROWS = 32  # read together
MAX_LABEL = np.iinfo(np.int64).max
BUFFER_BYTES = 2**20  # without it, or with pre_buffer, a whole row group is read: perhaps the whole file


def is_parquet(path: Path) -> bool:
    """Whether ``path`` is a parquet file or a folder with some, itself or in its only folder with some."""
    if path.is_dir():
        return bool(_folders_with_files(path))
    return path.is_file() and path.suffix.lower() == ".parquet"


def load_parquet(request: Request) -> Contents:
    """Return the images in the file or folder ``request.path``.

    Raises DataError for missing or damaged files and columns, ConfigError where pyarrow is not installed.
    """
    _check_installed()
    shards = {part: [_Shard(path) for path in paths] for part, paths in _paths(request.path).items()}
    first = shards["train"][0]
    columns = _Columns.of(first)
    read = {
        part: np.concatenate([shard.labels(columns) for shard in found]) for part, found in shards.items()
    }
    class_names = columns.class_names or _names_in(read["train"], first.path)
    source = "in train" if columns.class_names is None else "among the class names of the metadata"
    labels = {
        part: _numbers(values, class_names, where=f"{request.path}: {part}", source=source)
        for part, values in read.items()
    }
    images = _StoredRows([shard for found in shards.values() for shard in found], columns.image)
    return Contents(class_names=class_names, **decode_parts(images, labels, request))


def _check_installed() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "data: parquet files are read by pyarrow, which is not installed; pip install 'nasdeploy[parquet]'"
        ) from error


def _folders_with_files(root: Path) -> list[Path]:
    """Return ``root`` if it holds parquet files, else its folders that do."""
    candidates = [root, *sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")]
    found = [folder for folder in candidates if any(folder.glob("*.parquet"))]
    return [root] if root in found else found


def _paths(path: Path) -> dict[str, list[Path]]:
    """Return the files of each part, in the order of their numbers."""
    if path.is_file():
        return {"train": [path]}
    folders = _folders_with_files(path)
    if len(folders) > 1:
        raise DataError(
            f"{path}: parquet files in {', '.join(folder.name for folder in folders)}; expected one of these folders"
        )
    files = sorted(folders[0].glob("*.parquet"))
    parts: dict[str, list[Path]] = {}
    for file in files:
        match = SHARD.fullmatch(file.name)
        name = match["name"].lower() if match else ""
        if name not in PART_OF_NAME:
            raise DataError(
                f"{file}: not of a known part by its name; expected {', '.join(PART_OF_NAME)}-….parquet"
            )
        parts.setdefault(PART_OF_NAME[name], []).append(file)
    if "train" not in parts:
        raise DataError(f"{folders[0]}: no train-*.parquet beside {', '.join(file.name for file in files)}")
    for found in parts.values():
        _check_complete(found)
    return {part: parts[part] for part in ("train", "valid", "test") if part in parts}


def _check_complete(files: list[Path]) -> None:
    """Raise DataError where a file of "…-00001-of-00004" is missing: half a download looks like a whole set."""
    matches = [match for file in files if (match := SHARD.fullmatch(file.name)) and match["count"]]
    for match in matches:
        count = int(match["count"])
        numbers = {int(other["number"]) for other in matches if other["count"] == match["count"]}
        missing = sorted(set(range(count)) - numbers)
        if missing:
            raise DataError(
                f"{files[0].parent}: part {missing[0]} of {match['name']}-…-of-{match['count']} is missing; "
                "download it"
            )


class _Shard:
    """One file. Raises DataError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.schema = file.schema_arrow
            self.num_rows = int(file.metadata.num_rows)

    def labels(self, columns: _Columns) -> Any:
        """Return the labels (rows,), integers or text."""
        if columns.label not in self.schema.names:
            raise DataError(
                f"{self.path}: no column '{columns.label}'; it has {', '.join(self.schema.names)}"
            )
        kind = self.schema.field(columns.label).type
        if not _holds_labels(kind) or _is_text(kind) != columns.textual:
            expected = "text" if columns.textual else "integers"
            raise DataError(
                f"{self.path}: '{columns.label}' is {kind}; expected {expected}, as in the first file"
            )
        with self._open() as file, _readable(self.path):
            found = file.read(columns=[columns.label]).column(0)
            if found.null_count:
                row = found.is_null().index(True).as_py()
                raise DataError(f"{self.path}: no '{columns.label}' in row {row}; expected one in each")
            values = found.to_pylist()
        return np.array(values, np.str_) if columns.textual else self._integers(values, columns.label)

    def _integers(self, values: list[int], column: str) -> Labels:
        large = next((row for row, value in enumerate(values) if value > MAX_LABEL), None)
        if large is not None:  # of uint64
            raise DataError(
                f"{self.path}: '{column}' is {values[large]} in row {large}; expected 0 to the number of classes - 1"
            )
        return np.array(values, np.int64)

    def images(self, column: str) -> Iterator[EncodedImage]:
        """Yield the encoded images, a few rows in memory at a time."""
        if column not in self.schema.names:
            raise DataError(f"{self.path}: no column '{column}'; it has {', '.join(self.schema.names)}")
        row = 0
        with self._open() as file:
            batches = file.iter_batches(batch_size=ROWS, columns=[column], use_threads=False)
            while True:
                with _readable(self.path):
                    batch = next(batches, None)
                    values = None if batch is None else batch.column(0).to_pylist()
                if values is None:
                    return
                for value in values:
                    yield self._image(value, column, row)
                    row += 1

    def _image(self, value: Any, column: str, row: int) -> EncodedImage:
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise DataError(
                f"{self.path}: '{column}' holds no image in row {row}; expected its bytes, not only a path"
            )
        return EncodedImage(f"{self.path}: row {row}", content)

    def _open(self) -> pyarrow.parquet.ParquetFile:
        import pyarrow.parquet

        with _readable(self.path):
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into one line."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: holds text that is not UTF-8 ({error}); expected UTF-8: write the file again"
        ) from error
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable parquet file ({reason}); download it again") from error


@dataclass(frozen=True, slots=True)
class _StoredRows:
    """The images of all files, as :class:`nasdeploy.data.encoded.EncodedImages`."""

    shards: list[_Shard]
    column: str

    @property
    def files(self) -> list[str]:
        return [str(shard.path) for shard in self.shards]

    def __len__(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def __iter__(self) -> Iterator[EncodedImage]:
        for shard in self.shards:
            yield from shard.images(self.column)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The names of the columns. class_names: of integer labels, where the metadata has them."""

    image: str
    label: str
    textual: bool
    class_names: tuple[str, ...] | None

    @classmethod
    def of(cls, shard: _Shard) -> _Columns:
        """Return the columns of a file. Raises DataError where it is not clear which they are."""
        features = _features(shard)
        images = [name for name in shard.schema.names if _holds_images(shard.schema.field(name).type)]
        known = [name for name in images if features.get(name, {}).get("_type") == "Image"]
        image = _only(known or images, shard, what="images", expected="struct of bytes and path, or binary")
        labels = [name for name in shard.schema.names if _holds_labels(shard.schema.field(name).type)]
        classes = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
        preferred = [name for name in LABEL_COLUMNS if name in (classes or labels)][:1]
        label = _only(preferred or classes or labels, shard, what="labels", expected="integers or text")
        names = features.get(label, {}).get("names")
        return cls(
            image=image,
            label=label,
            textual=_is_text(shard.schema.field(label).type),
            class_names=tuple(map(str, names)) if isinstance(names, list) and names else None,
        )


def _features(shard: _Shard) -> dict[str, dict[str, Any]]:
    """Return what the metadata says of the columns, {} where there is none."""
    stored = (shard.schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return {}
    try:
        features = json.loads(stored)["info"]["features"]
        if not isinstance(features, dict | None):
            raise TypeError(f"'features' is a {type(features).__name__}, expected a dict")
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{shard.path}: its 'huggingface' metadata is damaged ({error}); write the file again"
        ) from error
    if features is None:
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _holds_images(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_labels(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind)) or _is_text(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(inner) or types.is_large_string(inner))


def _only(names: list[str], shard: _Shard, *, what: str, expected: str) -> str:
    if len(names) != 1:
        found = f"{len(names)} columns ({', '.join(names)}) that could hold" if names else "no column of"
        raise DataError(
            f"{shard.path}: {found} {what}, of {', '.join(shard.schema.names)}; expected one ({expected})"
        )
    return names[0]


def _names_in(values: Any, path: Path) -> tuple[str, ...]:
    """Return the classes of the training labels: sorted texts, or numbers."""
    if values.dtype.kind == "U":
        return tuple(np.unique(values).tolist())
    return numbered_classes(values, where=str(path))


def _numbers(values: Any, class_names: tuple[str, ...], *, where: str, source: str) -> Labels:
    """Return labels (rows,) as indices of ``class_names``, which are in any order. source: where these are from."""
    if values.dtype.kind != "U":
        return np.asarray(values, np.int64)
    numbers = {name: number for number, name in enumerate(class_names)}
    distinct, positions = np.unique(values, return_inverse=True)
    for name in distinct.tolist():
        if name not in numbers:
            raise DataError(f"{where}: label '{name}' is not {source}; expected one that is")
    return np.array([numbers[name] for name in distinct.tolist()], np.int64)[positions]
