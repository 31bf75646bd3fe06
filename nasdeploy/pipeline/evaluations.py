"""Every architecture that was evaluated, with its loss and where it came from: for ``evaluations.csv``.

The optimiser remembers the latest samples only; all of them are on disk, by the names of their candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import draws
from nasdeploy.optim.estimators import Evaluated
from nasdeploy.optim.strategy import Strategy
from nasdeploy.pipeline.step_rows import Row, StepRows, csv_text
from nasdeploy.spaces.base import SearchSpace, to_architectures

HEADER = ("step", "origin", "loss")
GUIDED = "(guided)"
"""The origin of what a model proposed; all else was drawn from the distribution of a profile, named by it; no
profile's name has parentheses."""


class Evaluations:
    """The evaluations of a search; those since the last checkpoint in memory.

    path: where they are kept until the search ends. names: of the profiles, in the order of the distributions.
    """

    def __init__(self, path: Path, *, names: Sequence[str], space: SearchSpace, optimizer: Strategy) -> None:
        self._part = StepRows(path, first=HEADER)
        self._names, self._space, self._optimizer = names, space, optimizer
        self._taken: Evaluated | None = None
        self._pending: list[Row] = []

    def add(self, step: int) -> None:
        """Take what the optimiser was told in the search's step ``step``, if it was told anything."""
        latest = self._optimizer.latest
        if latest is not None and latest is not self._taken:
            self._taken = latest
            owners = latest.draw.owners.tolist()
            self._pending += evaluation_rows(
                self._space,
                latest.draw.choices,
                latest.losses,
                steps=[step] * len(owners),
                origins=[GUIDED if k == draws.GUIDED else self._names[k] for k in owners],
            )

    def flush(self) -> None:
        """Append the evaluations since the last call."""
        if self._pending:
            self._part.append(self._pending)
            self._pending = []

    def to_csv(self) -> str:
        """Return all evaluations as they are stored in the end."""
        self.flush()
        return evaluations_csv(self._part.stored())

    def discard(self) -> None:
        """Delete the file: the evaluations are stored whole."""
        self._part.discard()


def evaluation_rows(
    space: SearchSpace,
    choices: IntArray,
    losses: FloatArray,
    *,
    steps: Sequence[int],
    origins: Sequence[str],
) -> list[Row]:
    """Return a row for each of ``choices`` (n, D); losses (n,) keep all their digits."""
    found = zip(steps, origins, losses.tolist(), to_architectures(choices), strict=True)
    return [
        {
            "step": step,
            "origin": origin,
            "loss": repr(loss),
            **{_column(name): candidate for name, candidate in space.to_names(architecture).items()},
        }
        for step, origin, loss, architecture in found
    ]


def evaluations_csv(rows: Iterable[Row]) -> str:
    """Return ``rows`` under their header."""
    return csv_text(rows, first=HEADER)


def _column(decision: str) -> str:
    return f"decision {decision}" if decision in HEADER else decision
