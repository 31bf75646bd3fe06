"""What a model leaves unexplained of an architecture that was evaluated: half of it, or more, is expected again.

A held-out loss differs from its prediction by what the model cannot express of that architecture and by the noise of an
evaluation. Both are taken to have the same variance v, since a search hardly ever evaluates twice; then the expectation
of what is the architecture's own, after n losses with residuals r, is Σ r / (n + 1), and its variance is v / (n + 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray


class OwnResiduals:
    """Sums of residuals by architecture; none of an architecture that was not evaluated."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[float, int]] = {}

    def learn(self, choices: IntArray, residuals: FloatArray) -> None:
        """Take the residuals (N,) of choices (N, D) in place of all that was known."""
        distinct, group, counts = np.unique(choices, axis=0, return_inverse=True, return_counts=True)
        sums = np.bincount(group, residuals)
        known = zip(distinct.astype(np.int64), sums.tolist(), counts.tolist(), strict=True)
        self._known = {row.tobytes(): (total, count) for row, total, count in known}

    def expected(self, choices: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return Σ r / (n + 1) and the share of the variance that is left, 1 / (n + 1), both (m,), of (m, D)."""
        rows = np.ascontiguousarray(choices, dtype=np.int64)
        found = np.array([self._known.get(row.tobytes(), (0.0, 0)) for row in rows]).reshape(-1, 2)
        return found[:, 0] / (found[:, 1] + 1.0), 1.0 / (found[:, 1] + 1.0)

    def state_dict(self) -> list[list[Any]]:
        """Return choices, sum and number of each architecture, as plain lists and numbers."""
        return [[np.frombuffer(key, np.int64).tolist(), *known] for key, known in self._known.items()]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self._known = {
            np.array(choices, dtype=np.int64).tobytes(): (float(total), int(count))
            for choices, total, count in state
        }
