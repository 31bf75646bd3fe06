"""Several caps at once: the architecture nearest to them all, and whether it is proven that none keeps them.

Caps that can each be met need not be met together, and those that only rare architectures meet are met by no random
one. Bounds (:mod:`nasdeploy.costs.relaxation`) and local search close in on the least violation from both sides.

Notation: n architectures, D decisions, M caps; loads r_m = R_m / B_m.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nasdeploy.costs.descent import Moves, descend, starts
from nasdeploy.costs.relaxation import Goal, Relaxation
from nasdeploy.costs.table import Cost, CostTable, FloatArray, IntArray, TableStack
from nasdeploy.spaces.base import CandidateMask

NUM_DESCENTS = 3
LABEL_LIMITS = (64, 1024)
"""Partial assignments followed at once: few first, since what they find leaves fewer to the second search."""


NEGLIGIBLE = 1e-9
"""A relative improvement that nothing is searched for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The architecture of the least violation Σ_m max(0, R_m/B_m - 1) that was found.

    bound: what no architecture has less than, proven; equal to the violation where that is the least.
    """

    choices: tuple[int, ...]
    violation: float
    bound: float

    @property
    def feasible(self) -> bool:
        """Whether it keeps all caps."""
        return self.violation == 0.0

    @property
    def proven(self) -> bool:
        """Whether it is proven that no architecture keeps all caps."""
        return self.bound > 0.0


class JointCaps:
    """``caps`` B_m by metric on ``costs``, among the architectures that ``mask`` allows."""

    def __init__(self, costs: Mapping[str, Cost], caps: Mapping[str, float], mask: CandidateMask) -> None:
        self._metrics = tuple(caps)
        found = [costs[metric] for metric in caps]
        self._caps = np.array([caps[metric] for metric in caps])
        self._stack = TableStack(found)
        self._allowed = [np.flatnonzero(row) for row in mask]
        self._moves = Moves(self._allowed)
        tables = [cost for cost in found if isinstance(cost, CostTable)]
        self._relaxation = None
        if len(tables) == len(found):
            self._relaxation = Relaxation(tables, self._caps, mask)
        self._known: list[IntArray] = [np.array([cost.cheapest(mask) for cost in found])]
        self._proofs = np.empty((0, len(self._caps)))  # multipliers that came close to a proof

    def nearest(self) -> Nearest:
        """Return the architecture nearest to all caps."""
        num_caps = len(self._caps)
        goal = Goal(
            weights=np.zeros(num_caps), penalties=np.ones(num_caps), hard=np.zeros(num_caps, dtype=np.bool_)
        )
        found, bound = self._minimise(goal, good_enough=0.0)
        choices = tuple(int(c) for c in found.choices)
        return Nearest(choices=choices, violation=found.value, bound=min(max(bound, 0.0), found.value))

    def least(self, metric: str) -> float | None:
        """Return the least cost by ``metric`` that was found within all other caps; None where nothing was."""
        m = self._metrics.index(metric)
        hard = np.arange(len(self._caps)) != m
        goal = Goal(weights=(~hard).astype(np.float64), penalties=np.zeros(len(hard)), hard=hard)
        found, _ = self._minimise(goal, good_enough=-np.inf)
        return float(self._stack.of(found.choices[None])[m, 0]) if np.isfinite(found.value) else None

    def _minimise(self, goal: Goal, *, good_enough: float) -> tuple[_Best, float]:
        """Return the best architecture found by ``goal``, and what none has less than."""
        best = _Best(goal, self._stack, self._caps, good_enough=good_enough)
        for choices in self._known:
            best.consider(choices)
        bound = self._close(goal, best) if self._relaxation is not None else -np.inf
        if best.may_improve(bound):
            self._descend(goal, best)
        self._known.append(best.choices[None])
        return best, bound

    def _close(self, goal: Goal, best: _Best) -> float:
        """Improve ``best`` until it is the least or the limits are reached; return what none has less than."""
        assert self._relaxation is not None
        if not best.may_improve(-np.inf):
            return -np.inf
        multipliers = self._multipliers(goal, best)
        bound = float(goal.bounds(self._relaxation.least(multipliers)[0], multipliers).max())
        for limit in LABEL_LIMITS:
            if not best.may_improve(bound):
                break
            below = best.value * (1.0 - NEGLIGIBLE)
            found, left = self._relaxation.labels(goal, multipliers, below=below, limit=limit)
            best.consider(found)
            bound = max(bound, min(left, below, best.value))
        return bound

    def _multipliers(self, goal: Goal, best: _Best) -> FloatArray:
        """Return the unit vectors, and multipliers that bound ``goal`` well: (L, M)."""
        assert self._relaxation is not None
        unit = np.eye(len(self._caps))
        start = np.concatenate([np.ones((1, len(unit))), np.maximum(unit, 0.1)])
        found = self._relaxation.ascend(goal, start, best)
        if goal.hard.any():
            return np.concatenate([unit, found, np.where(goal.hard, self._proofs, 0.0)])
        self._proofs = found
        return np.concatenate([unit, found])

    def _descend(self, goal: Goal, best: _Best) -> None:
        """Improve ``best`` by local search, towards the hard caps first."""
        inside = Goal(
            weights=np.zeros_like(goal.weights),
            penalties=goal.hard.astype(np.float64),
            hard=np.zeros_like(goal.hard),
        )
        begin = np.concatenate([best.choices[None], *self._known])[:NUM_DESCENTS]
        if self._relaxation is None:
            towards = inside if goal.hard.any() else goal
            begin = np.concatenate([begin, starts(best.values_by(towards), self._allowed)])
        for start in begin:
            within = start
            if not np.isfinite(goal.values(best.loads(start[None]))[0]):
                within, _ = descend(best.values_by(inside), start, self._moves, target=0.0)
            found, _ = descend(best.values_by(goal), within, self._moves, target=best.good_enough)
            best.consider(found[None])


class _Best:
    """The best architecture considered so far: choices (D,), and its value, inf while none keeps the hard caps."""

    def __init__(self, goal: Goal, stack: TableStack, caps: FloatArray, *, good_enough: float) -> None:
        self._goal, self._stack, self._caps = goal, stack, caps
        self.good_enough = good_enough
        self.value = np.inf
        self.choices: IntArray = np.empty(0, dtype=np.int64)

    def may_improve(self, bound: float) -> bool:
        """Return whether something noticeably better is wanted and possible, above ``bound``."""
        return self.value > self.good_enough and self.value * (1.0 - NEGLIGIBLE) > bound

    def loads(self, choices: IntArray) -> FloatArray:
        """Return R_m/B_m (n, M) of ``choices`` (n, D)."""
        loads: FloatArray = self._stack.of(choices).T / self._caps
        return loads

    def values_by(self, goal: Goal) -> Callable[[IntArray], FloatArray]:
        """Return the function that gives the values (n,) of ``choices`` (n, D) by ``goal``."""
        return lambda choices: goal.values(self.loads(choices))

    def consider(self, choices: IntArray) -> FloatArray:
        """Take the best of ``choices`` (n, D) if it is better; return the loads of all, (n, M)."""
        loads = self.loads(choices)
        values = self._goal.values(loads)
        if len(values) and (values.min() < self.value or not self.choices.size):
            self.value, self.choices = float(values.min()), choices[values.argmin()]
        return loads
