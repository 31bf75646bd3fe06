"""Lower bounds on what architectures cost by several metrics at once, and the search that they leave. Pure NumPy.

With loads r_m(c) = R_m(c) / B_m and a goal v(c) = Σ_m w_m r_m(c) + Σ_m p_m max(0, r_m(c) - 1), any λ with
w_m <= λ_m <= w_m + p_m gives v(c) >= Σ_m λ_m r_m(c) - Σ_m (λ_m - w_m). The least of the right side over all
architectures is exact where the costs are tables: one elimination of their weighted sum. [Lagrangian relaxation;
Geoffrion, Mathematical Programming Study 2, 1974]

Elimination also bounds every partial assignment: in the reverse of its order, fixing a decision raises the bound by
what the candidate costs above the best one. Assignments whose bound reaches the best value known are dropped.
[label setting with completion bounds; Dumitrescu and Boland, Networks 42, 2003]

Derived values are chosen here as if they were decisions: one more relaxation, under which all bounds stay bounds. What
is returned are choices of decisions; whoever looks at them derives the values anew.

Notation: D decisions, E derived values, M metrics with caps B_m, L multipliers λ (L, M), N labels: partial assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nasdeploy.costs.derived import Extension, common_extension
from nasdeploy.costs.elimination import Eliminated, Entry, best_positions, eliminate, elimination_order
from nasdeploy.costs.table import CostTable, FloatArray, IntArray, allowed_entries
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.objective import ROUNDING
from nasdeploy.spaces.base import CandidateMask

TOLERANCE = 1e-12
"""Of a bound, for each unit of its multipliers: more than the rounding of its sums."""

NUM_ASCENTS = 24
MIN_MULTIPLIER, MAX_MULTIPLIER = 1e-6, 1e6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Goal:
    """Minimise Σ_m w_m r_m + Σ_m p_m max(0, r_m - 1), among those with r_m <= 1 for every hard m; all (M,)."""

    weights: FloatArray
    penalties: FloatArray
    hard: BoolArray

    def values(self, loads: FloatArray) -> FloatArray:
        """Return the values (n,) of ``loads`` (n, M); inf where a hard cap is broken."""
        over = loads - 1.0
        excess = np.where(over > ROUNDING, over, 0.0)
        values = (self.weights * loads + self.penalties * excess).sum(axis=-1)
        return np.where((self.hard & (excess > 0.0)).any(axis=-1), np.inf, values)

    def bounds(self, least: FloatArray, multipliers: FloatArray) -> FloatArray:
        """Return what no value can be below, for each of ``multipliers`` (L, M): (L, …).

        least: minima of Σ_m λ_m r_m, (L, …). inf where they prove that no architecture keeps the hard caps; -inf for
        multipliers that bound nothing.
        """
        shape = (-1, *(1,) * (least.ndim - 1))
        rounding = TOLERANCE * (1.0 + multipliers.sum(axis=1))
        slack = (multipliers - self.weights).sum(axis=1) + rounding
        values = least - slack.reshape(shape)
        most = np.where(self.hard, np.inf, self.weights + self.penalties)
        is_bound = ((multipliers >= self.weights) & (multipliers <= most)).all(axis=1)
        is_proof = (multipliers[:, ~self.hard] == 0.0).all(axis=1)  # λ·r <= Σλ wherever the hard caps hold
        broken = least - (multipliers.sum(axis=1) + rounding).reshape(shape) > 0.0
        values = np.where(is_bound.reshape(shape), values, -np.inf)
        return np.where(is_proof.reshape(shape) & broken, np.inf, values)

    def sum_of_bounds(self, loads: FloatArray) -> FloatArray:
        """Return what no value can be below where no load can be below ``loads`` (M, …): (…)."""
        shape = (-1, *(1,) * (loads.ndim - 1))
        over = np.maximum(loads - 1.0 - TOLERANCE, 0.0)
        values = self.weights.reshape(shape) * loads + self.penalties.reshape(shape) * over
        bound: FloatArray = values.sum(axis=0) - TOLERANCE * float(self.weights.sum())
        return bound

    def restrict(self, multipliers: FloatArray) -> FloatArray:
        """Return ``multipliers`` (L, M) brought to where they bound best, the ratios of the free ones kept."""
        if self.hard.any():
            free = np.clip(multipliers, MIN_MULTIPLIER, MAX_MULTIPLIER)
            return np.where(self.hard, free, self.weights)
        # without weights the bound grows in proportion with λ, where it is above 0: as far as the range goes
        scaled: FloatArray = multipliers / multipliers.max(axis=1, keepdims=True)
        return scaled


class Watcher(Protocol):
    """Sees every architecture that an ascent comes across."""

    def consider(self, choices: IntArray) -> FloatArray:
        """Return the loads (n, M) of ``choices`` (n, D)."""

    def may_improve(self, bound: float) -> bool:
        """Return whether the ascent is to go on, where no value is below ``bound``."""


class Relaxation:
    """The least weighted sums of M costs that are tables. caps: B_m (M,). mask: the allowed candidates."""

    def __init__(self, tables: Sequence[CostTable], caps: FloatArray, mask: CandidateMask) -> None:
        extension = common_extension([table.extension for table in tables])
        wider = mask if extension is None else extension.mask(mask)
        self._entries = [
            (decisions, values / caps.reshape(-1, *(1,) * len(decisions)))
            for decisions, values in allowed_entries(tables, wider)
        ]
        self._entries += _unused_entries(self._entries, extension, mask, num_costs=len(tables))
        self._constants = np.array([table.constant for table in tables]) / caps
        self._order = elimination_order([decisions for decisions, _ in self._entries])
        self._allowed = [np.flatnonzero(row) for row in mask]
        self._num_columns = len(wider)  # D + E

    def least(self, multipliers: FloatArray) -> tuple[FloatArray, list[Eliminated]]:
        """Return min_c Σ_m λ_m r_m(c) (L,) for ``multipliers`` (L, M), and how it was eliminated."""
        sums = [(decisions, np.tensordot(multipliers, values, axes=1)) for decisions, values in self._entries]
        least, eliminated = eliminate(sums, self._order)
        return multipliers @ self._constants + least, eliminated

    def architectures(self, positions: IntArray) -> IntArray:
        """Return the choices (n, D) at ``positions`` (n, D + E) among the allowed candidates."""
        own = positions[:, : len(self._allowed)]
        columns = [row[column] for row, column in zip(self._allowed, own.T, strict=True)]
        return np.stack(columns, axis=1)

    def ascend(self, goal: Goal, start: FloatArray, watcher: Watcher) -> FloatArray:
        """Return better multipliers for each of ``start`` (L, M), all above 0: (L, M).

        [Subgradient steps on log λ: exponentiated gradient, Kivinen and Warmuth 1997]
        """
        multipliers = goal.restrict(start)
        best, highest = multipliers, np.full(len(start), -np.inf)
        for step in range(NUM_ASCENTS):
            least, eliminated = self.least(multipliers)
            found = goal.bounds(least, multipliers)
            best = np.where((found > highest)[:, None], multipliers, best)
            highest = np.maximum(found, highest)
            points = best_positions(eliminated, num_decisions=self._num_columns)
            loads = watcher.consider(self.architectures(points))
            if self._num_columns > len(self._allowed):
                loads = self._loads(points)
            slopes = loads - 1.0  # d(λ·(r - 1))/dλ
            if not watcher.may_improve(-np.inf):
                break
            steepest = np.abs(slopes).max(axis=1, keepdims=True)
            slopes = slopes / np.where(steepest > 0.0, steepest, 1.0)
            multipliers = goal.restrict(multipliers * np.exp(1.5 / np.sqrt(1.0 + step) * slopes))
        return best

    def _loads(self, positions: IntArray) -> FloatArray:
        """Return the loads (n, M) at ``positions`` (n, D + E), whatever their decisions make of the derived values."""
        loads = np.repeat(self._constants[:, None], len(positions), axis=1)
        for decisions, values in self._entries:
            loads += values[(slice(None), *positions[:, list(decisions)].T)] if decisions else values[:, None]
        return loads.T

    def labels(
        self, goal: Goal, multipliers: FloatArray, *, below: float, limit: int
    ) -> tuple[IntArray, float]:
        """Return architectures (N, D), one of the least value among them if any is below ``below``, and inf.

        multipliers: (L, M), the first M of them the unit vectors. Where more than ``limit`` partial assignments are
        left the most promising ones are followed, and the least bound of the others is returned.
        """
        least, eliminated = self.least(multipliers)
        positions = np.zeros((1, self._num_columns), dtype=np.int64)
        lows = least[:, None]  # min Σ_m λ_m r_m over all completions of each label (L, N)
        dropped = np.inf
        for i in reversed(range(len(eliminated))):
            one = eliminated[i]
            gaps = one.costs - one.least()[..., None]  # (L, *neighbours, C)
            columns = tuple(positions[:, list(one.neighbours)].T)
            seen = gaps[(slice(None), *columns)] if columns else gaps[:, None]  # (L, N, C)
            grown = lows[:, :, None] + seen
            bounds = _combined(goal, grown, multipliers)  # (N, C)
            parents, candidates = np.nonzero(bounds < below)
            positions = positions[parents]
            positions[:, one.decision] = candidates
            lows, bound = grown[:, parents, candidates], bounds[parents, candidates]
            if len(bound) > limit:
                kept = self._apart(positions, lows[: multipliers.shape[1]], eliminated[:i])
                kept = kept[np.argsort(bound[kept], kind="stable")]
                dropped = min([dropped, *bound[kept[limit : limit + 1]].tolist()])
                kept = kept[:limit]
                positions, lows = positions[kept], lows[:, kept]
        return self.architectures(positions), dropped

    def _apart(self, positions: IntArray, loads: FloatArray, ahead: Sequence[Eliminated]) -> IntArray:
        """Return the indices of labels (N,) to go on with: those that what is ``ahead`` cannot tell apart count once.

        With derived values all: what a label comes to then depends on every decision behind them.
        """
        if self._num_columns > len(self._allowed):
            return np.arange(len(positions))
        return _distinct(positions[:, _border(ahead)], loads)


def _unused_entries(
    entries: Sequence[Entry], extension: Extension | None, mask: CandidateMask, *, num_costs: int
) -> list[Entry]:
    """Return tables of zeros for decisions that stand behind a derived value and in no table: they matter too."""
    if extension is None:
        return []
    used = {d for decisions, _ in entries for d in decisions}
    behind = {d for e, one in enumerate(extension.derived) if len(mask) + e in used for d in one.decisions}
    return [((d,), np.zeros((num_costs, sum(mask[d])))) for d in sorted(behind - used)]


def _combined(goal: Goal, lows: FloatArray, multipliers: FloatArray) -> FloatArray:
    """Return the best bound that all of ``multipliers`` (L, M) give; lows: minima of their sums (L, …)."""
    loads = lows[: multipliers.shape[1]]  # the unit vectors come first
    together: FloatArray = np.maximum(goal.bounds(lows, multipliers).max(axis=0), goal.sum_of_bounds(loads))
    return together


def _border(ahead: Sequence[Eliminated]) -> list[int]:
    """Return the decisions that those still ``ahead`` depend on: the assigned ones that matter."""
    own = {one.decision for one in ahead}
    return sorted({d for one in ahead for d in one.neighbours} - own)


def _distinct(border: IntArray, loads: FloatArray) -> IntArray:
    """Return the indices of labels (N,) that differ in ``border`` (N, B) or, beyond rounding, in ``loads`` (M, N)."""
    keys = np.concatenate([border, np.round(loads.T, 11)], axis=1)
    kept: IntArray = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    return kept
