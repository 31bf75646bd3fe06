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
from nasdeploy.spaces.base import CandidateMask

NUM_DRAWS = 512
"""Uniform architectures that tell the spread of a cost."""
OFFSET = 0.3
"""Above the least cost, in standard deviations: where the logarithm begins."""


class CostFeatures:
    """The logarithms of all distinct costs of ``objectives``, standardised over uniform architectures.

    num_candidates: (C_1, …, C_D). The logarithm is of what exceeds the least cost, so that constants of a network,
    such as its stem, do not matter. A cost that never varies is left out, and not asked again.
    """

    def __init__(self, num_candidates: Sequence[int], objectives: Sequence[Objective]) -> None:
        distinct = {id(cost): cost for objective in objectives for cost in objective.tables.values()}
        costs = tuple(distinct.values())
        uniform = categorical.uniform(categorical.mask_array(num_candidates, None))
        drawn = categorical.sample(
            np.broadcast_to(uniform, (NUM_DRAWS, *uniform.shape)), np.random.default_rng(0)
        )
        values = TableStack(costs).of(drawn).T  # (n, M)
        varying = np.flatnonzero(np.ptp(values, axis=0) > 0.0)
        values = values[:, varying]
        self._stack = TableStack([costs[m] for m in varying])
        everything: CandidateMask = tuple((True,) * count for count in num_candidates)
        least = [costs[m].minimum(everything) for m in varying]
        # a cost that is no table may not have been searched well enough
        self._least = np.minimum(least, values.min(axis=0, initial=np.inf))
        self._unit = values.std(axis=0)
        logs = self._logs(values)
        self._mean, self._spread = logs.mean(axis=0), logs.std(axis=0)

    def __len__(self) -> int:
        """How many features an architecture has."""
        return len(self._least)

    def of(self, choices: IntArray) -> FloatArray:
        """Return the features (n, F) of ``choices`` (n, D)."""
        features: FloatArray = (self._logs(self._stack.of(choices).T) - self._mean) / self._spread
        return features

    def _logs(self, costs: FloatArray) -> FloatArray:
        """Return the logarithms (n, F) of ``costs`` (n, F)."""
        logs: FloatArray = np.log(np.maximum(costs - self._least, 0.0) / self._unit + OFFSET)
        return logs
