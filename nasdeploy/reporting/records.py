"""Reading what a run folder holds, which may be unfinished, cut off or damaged.

What was never written is None; what was written and cannot be read is a RunFolderError.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from nasdeploy.errors import RunFolderError
from nasdeploy.runs import read_json

__all__ = ["Record", "read_lines", "read_number", "read_optional", "read_record", "read_table"]


class Record(dict[str, Any]):
    """A JSON object that knows its file: a missing key is the fault of the file, not of the program."""

    def __init__(self, data: dict[str, Any], path: Path) -> None:
        super().__init__({key: _wrap(value, path) for key, value in data.items()})
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise RunFolderError(
            f"{self.path}: the key '{key}' is missing; expected a file that nasdeploy wrote; "
            "delete it and build again"
        )


def _wrap(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return Record(value, path)
    return [_wrap(item, path) for item in value] if isinstance(value, list) else value


def read_record(path: Path, schema: str) -> Record:
    """Return the object in ``path``. Raises RunFolderError when it is missing, damaged or of another schema."""
    return Record(read_json(path, schema=schema), path)


def read_optional(path: Path, schema: str) -> Record | None:
    """Return the object in ``path``, None where the file is missing. Raises RunFolderError when it is damaged."""
    return read_record(path, schema) if path.is_file() else None


def read_lines(path: Path) -> list[Record]:
    """Return the objects of a file with one JSON object a line; none where the file is missing.

    A last line without its end was cut off while it was written, and is left out. Raises RunFolderError for
    any other damage.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunFolderError(
                f"{path}: line {number} cannot be read ({error}); delete the file"
            ) from error
        if not isinstance(row, dict):
            raise RunFolderError(f"{path}: line {number} is no JSON object; delete the file")
        rows.append(Record(row, path))
    return rows


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header; none where the file is missing.

    A last line without its end is left out. Raises RunFolderError for a row of another length.
    """
    rows = list(csv.reader(io.StringIO("".join(f"{line}\n" for line in _whole_lines(path)))))
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise RunFolderError(
                f"{path}: line {number} has {len(row)} values; expected {len(rows[0])}; build again"
            )
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def read_number(row: dict[str, str], column: str, path: Path) -> float | None:
    """Return a cell as a number, None where it is empty or not finite. Raises RunFolderError for a text."""
    if column not in row:
        raise RunFolderError(f"{path}: the column '{column}' is missing; build again")
    try:
        value = float(row[column] or "nan")
    except ValueError as error:
        raise RunFolderError(f"{path}: {column} = {row[column]!r}; expected a number; build again") from error
    return value if math.isfinite(value) else None


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); delete it and build again") from error
    *whole, _cut_off = text.replace("\r\n", "\n").split("\n")
    return whole
