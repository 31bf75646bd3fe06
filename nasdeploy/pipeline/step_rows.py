"""Rows that belong to the steps of a loop, on disk: none is lost by a kill, and none is there twice.

They are appended to a file of their own before every checkpoint, so that a loop which is continued has them all. A kill
between the two leaves rows of steps that are then done again: of each step, those that were appended last count.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from nasdeploy.progress import Value

STEP = "step"
"""The first column of every row, a whole number; rows are appended in its order."""


Row = Mapping[str, Value]


class StepRows:
    """The rows in ``path``. first: the columns that stand first, :data:`STEP` before all."""

    def __init__(self, path: Path, *, first: Sequence[str]) -> None:
        self._path, self._first = path, first

    def append(self, rows: Sequence[Row]) -> None:
        """Append ``rows`` under a header of their own, so that it is known which were appended together."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write("\n" + csv_text(rows, first=self._first))  # the line break ends what a kill cut off
            file.flush()
            os.fsync(file.fileno())

    def stored(self) -> Iterator[Row]:
        """Return the rows in the order of their steps, those of one step as they were appended."""
        latest = {step: number for number, step, _ in self._lines()}
        return (row for number, step, row in self._lines() if number == latest[step])

    def _lines(self) -> Iterator[tuple[int, int, Row]]:
        """Return the number of the call that appended it, the step and the row of every whole line."""
        names: list[str] = []
        number = 0
        with self._path.open(encoding="utf-8") if self._path.exists() else io.StringIO() as file:
            for line in file:
                cells = next(
                    csv.reader([line]), []
                )  # one by one: a quote that was cut off ends with its line
                if cells and cells[0] == STEP:
                    names, number = cells, number + 1
                elif cells and len(cells) == len(names):
                    yield number, int(cells[0]), dict(zip(names, cells, strict=True))

    def discard(self) -> None:
        """Delete the file: the rows are stored whole."""
        self._path.unlink(missing_ok=True)


def csv_text(rows: Iterable[Row], *, first: Sequence[str]) -> str:
    """Return ``rows`` under the header of the first of them; ``first``: the columns that stand first."""
    text = io.StringIO()
    rows = iter(rows)
    head = list(islice(rows, 1))
    names = [*first, *(key for row in head for key in row if key not in first)]
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(chain(head, rows))
    return text.getvalue()
