"""What a batch of architectures costs, by looking up small tables.

A layer's cost depends on a few decisions, so the cost of a network is a constant plus a sum of *factors*,
each a table over the candidates of those decisions. Whole numbers stay exact: float64 holds them below 2**53.

A cost that is no such sum, because it depends on all decisions at once, is one factor over all of them as long as
that table is small (3**8 entries, say), and otherwise another :class:`Cost`.

Notation: n architectures, D decisions, C candidates, F factors, M tables, P entries of all factors of a table, L sums
of factors that are minimised together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import CandidateMask, LayerSpec, SearchSpace

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Cost(Protocol):
    """What architectures cost by one metric, in its unit: what objectives and budgets need to know of it."""

    def of(self, choices: IntArray) -> FloatArray:
        """Return the costs (n,) of ``choices`` (n, D). Raises ValueError for an index out of range."""
        ...

    def expected(self, theta: FloatArray) -> float:
        """Return E[cost] for independent decisions with probabilities ``theta`` (D, C), padded with zeros."""
        ...

    def minimum(self, mask: CandidateMask) -> float:
        """Return the least cost of an allowed architecture."""
        ...

    def cheapest(self, mask: CandidateMask) -> tuple[int, ...]:
        """Return the choices (D,) of an allowed architecture of that cost."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A table with one axis per decision: ``values[c_a, c_b, …]`` for ``decisions`` (a, b, …)."""

    decisions: tuple[int, ...]
    values: FloatArray

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        values.setflags(write=False)
        object.__setattr__(self, "values", values)
        if values.ndim != len(set(self.decisions)) or len(set(self.decisions)) != len(self.decisions):
            raise ConfigError(
                f"cost table: factor over decisions {list(self.decisions)} has values of shape "
                f"{list(values.shape)}; expected distinct decisions and one axis for each"
            )
        if not np.isfinite(values).all():
            raise ConfigError(
                f"cost table: factor over decisions {list(self.decisions)} holds a value that is not finite"
            )


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


@dataclass(frozen=True, eq=False)
class CostTable:
    """A cost as ``constant`` plus the sum of ``factors``, in the unit of its metric."""

    factors: tuple[Factor, ...]
    constant: float = 0.0

    def of(self, choices: IntArray) -> FloatArray:
        """Return the costs (n,) of ``choices`` (n, D). Raises ValueError for an index out of range."""
        costs: FloatArray = self._stack.of(choices)[0]
        return costs

    def expected(self, theta: FloatArray) -> float:
        """Return E[cost] for independent decisions with probabilities ``theta`` (D, C), padded with zeros."""
        return float(self._stack.expected(theta[None])[0, 0])

    def minimum(self, mask: CandidateMask) -> float:
        """Return the least cost of any allowed architecture, exactly, by eliminating one decision at a time.

        The work grows with the widest table met on the way: small wherever a layer sees only its neighbours.
        """
        return self._eliminated(mask)[0]

    def cheapest(self, mask: CandidateMask) -> tuple[int, ...]:
        """Return the choices (D,) of an allowed architecture of the least cost; decisions without cost stand first."""
        (positions,) = best_positions(self._eliminated(mask)[1], num_decisions=len(mask))
        return tuple(int(np.flatnonzero(row)[c]) for row, c in zip(mask, positions, strict=True))

    def _eliminated(self, mask: CandidateMask) -> tuple[float, list[Eliminated]]:
        """Return the least cost and, in order, what was eliminated, in positions among the allowed candidates."""
        entries = allowed_entries((self,), mask)
        least, eliminated = eliminate(entries, elimination_order([decisions for decisions, _ in entries]))
        return self.constant + float(least[0]), eliminated

    def scaled(self, intercept: float, slope: float) -> CostTable:
        """Return the table of ``intercept + slope * cost``."""
        factors = tuple(Factor(factor.decisions, slope * factor.values) for factor in self.factors)
        return CostTable(factors, intercept + slope * self.constant)

    def plus(self, other: CostTable) -> CostTable:
        """Return the table of the sum of both costs."""
        return CostTable(self.factors + other.factors, self.constant + other.constant)

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain lists and numbers; floats survive a round trip exactly."""
        factors = [{"decisions": list(f.decisions), "values": f.values.tolist()} for f in self.factors]
        return {"constant": float(self.constant), "factors": factors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostTable:
        """Return the table that :meth:`to_json` gave. Raises ConfigError when it is not one."""
        try:
            rows = [
                (tuple(map(int, row["decisions"])), np.array(row["values"], float)) for row in data["factors"]
            ]
            constant = float(data["constant"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"cost table: {error!r}; expected 'constant' and 'factors' of 'decisions' and 'values'"
            ) from error
        return cls(tuple(Factor(decisions, values) for decisions, values in rows), constant)

    @cached_property
    def _stack(self) -> TableStack:
        return TableStack((self,))


class TableStack:
    """M costs looked up together: where an entry lies is computed once for all that are tables.

    Factors over the same decisions share their place, so tables of one space cost little more than one of
    them. A cost of another kind is asked by itself.
    """

    def __init__(self, costs: Sequence[Cost]) -> None:
        self._others = [(m, cost) for m, cost in enumerate(costs) if not isinstance(cost, CostTable)]
        tables = [cost if isinstance(cost, CostTable) else CostTable(()) for cost in costs]
        layout = _layout(tables)
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in layout.values()]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        place = dict(zip(layout, starts[:-1], strict=True))

        self._constants = np.array([table.constant for table in tables], dtype=np.float64)[:, None]  # (M, 1)
        self._values = np.zeros((len(tables), starts[-1]))  # (M, P)
        for row, table in zip(self._values, tables, strict=True):
            for factor in table.factors:
                start = place[factor.decisions]
                row[start : start + factor.values.size] += factor.values.ravel()

        self._factors = [  # (M, C_a, C_b, …) each
            (decisions, self._values[:, start : start + size].reshape(len(tables), *shape))
            for (decisions, shape), start, size in zip(layout.items(), starts[:-1], sizes, strict=True)
        ]
        # Every factor gets the same number of axes, A; the added ones have stride 0 over decision 0.
        num_axes = max(map(len, layout), default=0)
        self._starts = starts[:-1, None]  # (F, 1)
        self._decisions = np.zeros((num_axes, len(layout)), dtype=np.int64)  # (A, F)
        self._strides = np.zeros((num_axes, len(layout), 1), dtype=np.int64)  # (A, F, 1)
        for f, (decisions, shape) in enumerate(layout.items()):
            for axis, decision in enumerate(decisions):
                self._decisions[axis, f] = decision
                self._strides[axis, f] = np.prod(shape[axis + 1 :], dtype=np.int64)
        self._limits = _limits(layout)  # (used decisions,)

    def of(self, choices: IntArray) -> FloatArray:
        """Return the costs (M, n) of ``choices`` (n, D). Raises ValueError for an index out of range."""
        columns = np.ascontiguousarray(np.asarray(choices, dtype=np.int64).T)  # (D, n)
        self._check(columns)
        places = np.broadcast_to(self._starts, (self._starts.shape[0], columns.shape[1]))  # (F, n)
        for decisions, strides in zip(self._decisions, self._strides, strict=True):
            places = places + strides * columns[decisions]
        costs: FloatArray = self._values.take(places, axis=1).sum(axis=1)  # (M, F, n) -> (M, n)
        costs = self._constants + costs
        for m, cost in self._others:
            costs[m] = cost.of(columns.T)
        return costs

    def expected(self, theta: FloatArray) -> FloatArray:
        """Return E[cost] (M, K) for independent decisions: probabilities ``theta`` (K, D, C), padded with zeros."""
        num_profiles, num_tables = len(theta), len(self._values)
        total = np.repeat(self._constants, num_profiles, axis=1)  # (M, K)
        for decisions, values in self._factors:
            left = np.broadcast_to(values, (num_profiles, *values.shape))  # (K, M, C_a, C_b, …)
            for decision in reversed(decisions):  # each drops the last axis
                weights = theta[:, decision, : left.shape[-1]]
                left = (left.reshape(num_profiles, -1, left.shape[-1]) @ weights[:, :, None]).reshape(
                    left.shape[:-1]
                )
            total += left.reshape(num_profiles, num_tables).T
        for m, cost in self._others:
            total[m] = [cost.expected(one) for one in theta]
        return total

    def _check(self, columns: IntArray) -> None:
        used = columns[: len(self._limits)]
        if columns.shape[0] < len(self._limits) or (used < 0).any() or (used >= self._limits).any():
            raise ValueError(
                f"choices of shape {columns.shape[::-1]}: expected at least {len(self._limits)} decisions, "
                "with candidate indices inside the axes of the table"
            )


def tabulate(
    space: SearchSpace, cost_of_layer: Callable[[LayerSpec], float], constant: float = 0.0
) -> CostTable:
    """Return the cost that adds ``cost_of_layer`` over the layers of an architecture: one factor per slot.

    Each distinct layer is priced once; a skipped slot costs 0.
    """
    prices = {layer: float(cost_of_layer(layer)) for layer in space.distinct_layers()}
    num_candidates = space.num_candidates()
    factors = []
    for slot in space.slots:
        values = np.zeros([num_candidates[d] for d in slot.decisions])
        for choice, layer in slot.layers.items():
            values[choice] = 0.0 if layer is None else prices[layer]
        factors.append(Factor(slot.decisions, values))
    return CostTable(tuple(factors), constant)


def allowed_entries(tables: Sequence[CostTable], mask: CandidateMask) -> list[Entry]:
    """Return the factors of M tables of one space, (M, …) each, over the allowed candidates only.

    Factors over the same decisions are added; constants are left out.
    """
    entries = []
    for decisions, shape in _layout(tables).items():
        values = np.zeros((len(tables), *shape))
        for m, table in enumerate(tables):
            values[m] += sum(factor.values for factor in table.factors if factor.decisions == decisions)
        allowed = np.ix_(np.arange(len(tables)), *(np.flatnonzero(mask[d]) for d in decisions))
        entries.append((decisions, values[allowed]))
    return entries


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


def _layout(tables: Sequence[CostTable]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return {decisions: shape} of every factor that occurs, in order of first appearance."""
    layout: dict[tuple[int, ...], tuple[int, ...]] = {}
    for table in tables:
        for factor in table.factors:
            known = layout.setdefault(factor.decisions, factor.values.shape)
            if known != factor.values.shape:
                raise ValueError(
                    f"factors over decisions {factor.decisions} have shapes {known} and "
                    f"{factor.values.shape}; expected tables of one search space"
                )
    return layout


def _limits(layout: Mapping[tuple[int, ...], tuple[int, ...]]) -> IntArray:
    """Return (used decisions, 1): one more than the largest index that every factor holds."""
    sizes = [
        (d, size) for decisions, shape in layout.items() for d, size in zip(decisions, shape, strict=True)
    ]
    limits = np.full((1 + max((d for d, _ in sizes), default=-1), 1), np.iinfo(np.int64).max)
    for decision, size in sizes:
        limits[decision] = min(limits[decision, 0], size)
    return limits
