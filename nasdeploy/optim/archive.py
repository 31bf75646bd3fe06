"""Everything that was evaluated lately: what surrogates learn from and what selection may return."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray


class Archive:
    """The samples of the latest steps, whole steps at a time: at least ``size`` samples, if so many came."""

    def __init__(self, num_decisions: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"archive_size = {size}; expected at least 1")
        self._num_decisions = num_decisions
        self._size = size
        self._steps: deque[tuple[int, IntArray, FloatArray]] = deque()
        self._count = 0

    def add(self, step: int, choices: IntArray, losses: FloatArray) -> None:
        """Append the samples of ``step``: choices (n, D), losses (n,); forget the oldest beyond the size."""
        self._steps.append((step, choices, losses))
        self._count += len(losses)
        while self._count - len(self._steps[0][2]) >= self._size:
            self._count -= len(self._steps.popleft()[2])

    @property
    def choices(self) -> IntArray:
        """(N, D), oldest first."""
        empty = np.empty((0, self._num_decisions), dtype=np.int64)
        return np.concatenate([empty, *(choices for _, choices, _ in self._steps)])

    @property
    def losses(self) -> FloatArray:
        """(N,) as they were told, not centred."""
        return np.concatenate([np.empty(0), *(losses for _, _, losses in self._steps)])

    @property
    def steps(self) -> IntArray:
        """(N,): the step of each sample."""
        return np.repeat(
            np.array([step for step, _, _ in self._steps], dtype=np.int64),
            [len(losses) for _, _, losses in self._steps],
        )

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the samples as plain lists, one entry per step."""
        return [{"step": step, "choices": c.tolist(), "losses": v.tolist()} for step, c, v in self._steps]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over the samples of :meth:`state_dict`."""
        self._steps.clear()
        self._count = 0
        for row in state:
            choices = np.array(row["choices"], dtype=np.int64).reshape(-1, self._num_decisions)
            self.add(int(row["step"]), choices, np.array(row["losses"], dtype=np.float64))
