"""What a profile wants: loss plus weighted costs, under hard caps. [search.md, Notation and Hard caps]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nasdeploy.costs.table import Cost, FloatArray, IntArray, TableStack
from nasdeploy.errors import ConfigError
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.utility import dense_ranks

ROUNDING = 1e-13
"""A relative excess below this is rounding of a sum of measured costs; counts below 1e13 stay exact."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """f_k(c) = L(c) + Σ_m coefficient_m R_m(c) / reference_m, under R_m(c) <= B_m for every cap.

    tables: cost R_m by metric, in the metric's unit. caps: B_m. coefficients: weight of R_m / references[m].
    Raises ConfigError for a metric without table, and for a cap, coefficient or reference that is not
    positive.
    """

    tables: Mapping[str, Cost]
    caps: Mapping[str, float] = field(default_factory=dict)
    coefficients: Mapping[str, float] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for metric, value in self.caps.items():
            _check(metric, "max", value, self.tables, valid=value > 0.0)
        for metric, value in self.coefficients.items():
            _check(metric, "coefficient", value, self.tables, valid=value >= 0.0)
            reference = self.references.get(metric, 0.0)
            _check(metric, "reference", reference, self.tables, valid=reference > 0.0)

    def penalty(self, choices: IntArray) -> FloatArray:
        """Return Σ_m coefficient_m R_m / reference_m (n,) of ``choices`` (n, D)."""
        penalty: FloatArray = self._alone.judge(choices).penalty[0]
        return penalty

    def violation(self, choices: IntArray) -> FloatArray:
        """Return Σ_m max(0, R_m/B_m - 1) (n,) of ``choices`` (n, D); 0 exactly where every cap holds."""
        violation: FloatArray = self._alone.judge(choices).violation[0]
        return violation

    def feasible(self, choices: IntArray) -> BoolArray:
        """Return whether every cap holds (n,) for ``choices`` (n, D)."""
        return np.equal(self.violation(choices), 0.0)

    def order(self, losses: FloatArray, choices: IntArray) -> IntArray:
        """Return ranks (n,), best 0: feasible ones by f_k, then all others by violation; equals share one."""
        judged = self._alone.judge(choices)
        return rank(losses + judged.penalty[0], judged.violation[0])

    @cached_property
    def _alone(self) -> Judge:
        return Judge((self,))


def rank(values: FloatArray, violation: FloatArray) -> IntArray:
    """Return dense ranks (..., n): first those without ``violation`` by ``values``, then the others by violation.

    Both are (..., n). Ties are found by equality of the sort key.
    """
    infeasible = violation > 0.0
    return dense_ranks(infeasible, np.where(infeasible, violation, values))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgement:
    """Weighted cost sum and cap violation of n architectures for K objectives: both (K, n)."""

    penalty: FloatArray
    violation: FloatArray


class Judge:
    """K objectives against one batch of architectures: every distinct cost table is looked up once."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        used = [
            (k, metric, table)
            for k, objective in enumerate(objectives)
            for metric, table in objective.tables.items()
            if metric in objective.caps or metric in objective.coefficients
        ]
        columns = {id(table): table for _, _, table in used}
        self._stack = TableStack(tuple(columns.values()))
        position = {key: m for m, key in enumerate(columns)}

        shape = (len(objectives), len(columns), 1)  # (K, M, 1)
        self._weights = np.zeros(shape)  # coefficient_km / reference_km
        self._caps = np.full(shape, np.inf)  # B_km; no cap is an infinite one
        for k, metric, table in used:
            objective, m = objectives[k], position[id(table)]
            if metric in objective.coefficients:
                self._weights[k, m] += objective.coefficients[metric] / objective.references[metric]
            self._caps[k, m] = min(self._caps[k, m, 0], objective.caps.get(metric, np.inf))
        self.has_caps = bool(np.isfinite(self._caps).any())

    def expected_excess(self, theta: FloatArray) -> FloatArray:
        """Return max_m (E[R_m]/B_m - 1) (K,) under independent decisions ``theta`` (K, D, C); -1 without a cap."""
        use = self._stack.expected(theta).T[:, :, None] / self._caps  # E[R_m]/B_m (K, M, 1)
        excess: FloatArray = use.max(axis=(1, 2), initial=0.0) - 1.0
        return excess

    def judge(self, choices: IntArray) -> Judgement:
        """Return penalty and violation (K, n) of ``choices`` (n, D)."""
        costs = self._stack.of(choices)  # (M, n)
        # not a matrix product: BLAS rounds by position in the batch, and ties are found by equality
        penalty = (self._weights * costs).sum(axis=1)  # (K, M, n) -> (K, n)
        excess = costs / self._caps - 1.0  # R_m/B_m - 1 (K, M, n)
        violation = np.where(excess > ROUNDING, excess, 0.0).sum(axis=1)  # Σ_m max(0, R_m/B_m - 1)
        return Judgement(penalty=penalty, violation=violation)


def _check(metric: str, key: str, value: float, tables: Mapping[str, Cost], *, valid: bool) -> None:
    if metric not in tables:
        raise ConfigError(
            f"budget.{metric}.{key}: no cost table for '{metric}'; expected one of {', '.join(tables)}"
        )
    if not valid or not np.isfinite(value):
        expected = "a number from 0" if key == "coefficient" else "a positive number"
        raise ConfigError(f"budget.{metric}.{key} = {value}; expected {expected}")
