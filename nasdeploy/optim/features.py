"""What architectures cost, as a model of their loss sees it: larger networks lose less, whichever way they grew.

Costs are known for every architecture without an evaluation, and on every benchmark the number of parameters or of
operations ranks networks better than chance (White et al. 2022, "A deeper look at zero-cost proxies"). A model that
knows them needs fewer losses to tell where the good networks are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray, TableStack
from nasdeploy.optim import categorical
from nasdeploy.optim.objective import Objective

NUM_DRAWS = 512
"""Uniform architectures that tell the range of a cost."""
OFFSET = 0.3
"""Above the least cost drawn, in standard deviations: where the logarithm begins."""


class CostFeatures:
    """The logarithms of all distinct costs of ``objectives``, standardised over uniform architectures.

    num_candidates: (C_1, …, C_D). The logarithm is of what exceeds the least cost, so that constants of a network,
    such as its stem, do not matter. A cost that never varies is left out.
    """

    def __init__(self, num_candidates: Sequence[int], objectives: Sequence[Objective]) -> None:
        tables = {id(table): table for objective in objectives for table in objective.tables.values()}
        self._stack = TableStack(tuple(tables.values()))
        uniform = categorical.uniform(categorical.mask_array(num_candidates, None))
        drawn = categorical.sample(
            np.broadcast_to(uniform, (NUM_DRAWS, *uniform.shape)), np.random.default_rng(0)
        )
        costs = self._stack.of(drawn).T  # (n, M)
        self._varies = np.ptp(costs, axis=0) > 0.0
        self._least, self._unit = costs.min(axis=0), np.where(self._varies, costs.std(axis=0), 1.0)
        logs = self._logs(drawn)
        self._mean, self._spread = logs.mean(axis=0), logs.std(axis=0)

    def __len__(self) -> int:
        """How many features an architecture has."""
        return int(self._varies.sum())

    def of(self, choices: IntArray) -> FloatArray:
        """Return the features (n, F) of ``choices`` (n, D)."""
        features: FloatArray = (self._logs(choices) - self._mean) / self._spread
        return features

    def _logs(self, choices: IntArray) -> FloatArray:
        above = np.maximum(self._stack.of(choices).T - self._least, 0.0) / self._unit
        logs: FloatArray = np.log(above + OFFSET)[:, self._varies]
        return logs
