"""The least value of a sum of tables, by eliminating one decision at a time. [Bertelè and Brioschi 1972]

Notation: D decisions, C candidates, L sums that are minimised together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nasdeploy.spaces.base import FloatArray, IntArray

Entry = tuple[tuple[int, ...], FloatArray]
"""Decisions, and L tables over them in one array: (L, C_a, C_b, …)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eliminated:
    """A decision that was minimised over, while ``neighbours`` were left.

    costs: what depends on the decision, and on those that were eliminated before it: (L, *neighbours, C).
    """

    decision: int
    neighbours: tuple[int, ...]
    costs: FloatArray

    def least(self) -> FloatArray:
        """Return the least costs for every choice of the neighbours: (L, *neighbours)."""
        least: FloatArray = self.costs.min(axis=-1)
        return least


def elimination_order(scopes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return an order in which the tables over ``scopes`` stay small: the decision with the fewest neighbours first."""
    left = [set(scope) for scope in scopes if scope]
    order = []
    while left:
        met = {d: set().union(*(scope for scope in left if d in scope)) for d in sorted(set().union(*left))}
        chosen = min(met, key=lambda d: len(met[d]))
        order.append(chosen)
        joined = met[chosen] - {chosen}
        left = [scope for scope in left if chosen not in scope] + [joined] * bool(joined)
    return order


def eliminate(entries: Sequence[Entry], order: Sequence[int]) -> tuple[FloatArray, list[Eliminated]]:
    """Return the least values (L,) of the sums of ``entries`` and, in ``order``, what was eliminated.

    order: every decision of the entries once. The work grows with the widest table met on the way.
    """
    tables = list(entries)
    eliminated = []
    for chosen in order:
        scope, costs = _joint([entry for entry in tables if chosen in entry[0]], last=chosen)
        found = Eliminated(decision=chosen, neighbours=scope[:-1], costs=costs)
        eliminated.append(found)
        tables = [entry for entry in tables if chosen not in entry[0]]
        tables.append((found.neighbours, found.least()))
    return np.asarray(sum((values for _, values in tables), np.zeros(1))), eliminated


def best_positions(eliminated: Sequence[Eliminated], *, num_decisions: int) -> IntArray:
    """Return the choices (L, D) of the least values, as positions among the candidates that were left."""
    num_sums = len(eliminated[0].costs) if eliminated else 1
    positions = np.zeros((num_sums, num_decisions), dtype=np.int64)
    for one in reversed(eliminated):
        seen = one.costs[(np.arange(num_sums), *positions[:, list(one.neighbours)].T)]  # (L, C)
        positions[:, one.decision] = seen.argmin(axis=-1)
    return positions


def _joint(entries: Sequence[Entry], *, last: int) -> Entry:
    """Return the sum of ``entries`` as one table over all their decisions, ``last`` as the last axis."""
    others = sorted({d for decisions, _ in entries for d in decisions} - {last})
    scope = (*others, last)
    total: FloatArray = np.zeros(())
    for decisions, values in entries:
        order = sorted(range(len(decisions)), key=lambda axis: scope.index(decisions[axis]))
        missing = tuple(1 + axis for axis, d in enumerate(scope) if d not in decisions)
        total = total + np.expand_dims(values.transpose(0, *(1 + axis for axis in order)), missing)
    return scope, total
