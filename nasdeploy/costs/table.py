"""What a batch of architectures costs, by looking up small tables.

A layer's cost depends on a few decisions, so the cost of a network is a constant plus a sum of *factors*,
each a table over the candidates of those decisions. Whole numbers stay exact: float64 holds them below 2**53.

A layer that depends on too many decisions depends on a derived value instead, which has the number D + e among the
decisions of a factor. A cost that is no such sum, because it depends on all decisions at once, is one factor over all
of them as long as that table is small (3**8 entries, say), and otherwise another :class:`Cost`.

Notation: n architectures, D decisions, E derived values, C candidates, F factors, M tables, P entries of all factors of
a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from nasdeploy.costs.derived import Extension, common_extension
from nasdeploy.costs.descent import Moves, descend, starts
from nasdeploy.costs.elimination import Entry, best_positions, eliminate, elimination_order
from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import CandidateMask, FloatArray, IntArray, LayerSlot, LayerSpec, SearchSpace

__all__ = [
    "Cost",
    "CostTable",
    "Factor",
    "FloatArray",
    "IntArray",
    "Least",
    "TableStack",
    "allowed_entries",
    "tabulate",
    "tabulate_slots",
]

NEGLIGIBLE = 1e-12
"""A relative difference that is rounding of a sum in another order."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """The cheapest allowed architecture that was found: its choices (D,), its cost, and what none has less than."""

    choices: tuple[int, ...]
    cost: float
    bound: float

    @property
    def proven(self) -> bool:
        """Whether none is cheaper."""
        return self.cost <= self.bound + NEGLIGIBLE * abs(self.bound)


@dataclass(frozen=True, eq=False)
class CostTable:
    """A cost as ``constant`` plus the sum of ``factors``, in the unit of its metric.

    extension: the derived values that factors depend on beside decisions, None where they depend on decisions only.
    """

    factors: tuple[Factor, ...]
    constant: float = 0.0
    extension: Extension | None = None

    def of(self, choices: IntArray) -> FloatArray:
        """Return the costs (n,) of ``choices`` (n, D). Raises ValueError for an index out of range."""
        costs: FloatArray = self._stack.of(choices)[0]
        return costs

    def expected(self, theta: FloatArray) -> float:
        """Return E[cost] for independent decisions with probabilities ``theta`` (D, C), padded with zeros."""
        return float(self._stack.expected(theta[None])[0, 0])

    def minimum(self, mask: CandidateMask) -> float:
        """Return the least cost of an allowed architecture, as :meth:`least` finds it."""
        return self.least(mask).cost

    def cheapest(self, mask: CandidateMask) -> tuple[int, ...]:
        """Return the choices (D,) of an allowed architecture of that cost; decisions without cost stand first."""
        return self.least(mask).choices

    def least(self, mask: CandidateMask) -> Least:
        """Return the cheapest allowed architecture: exactly, by eliminating one decision at a time.

        The work grows with the widest table met on the way: small wherever a layer sees only its neighbours. Derived
        values are eliminated as if they could be chosen, which bounds the cost from below; where the bound is not met
        by what their decisions make of them, a local search begins there.
        """
        if mask not in self._least:
            self._least[mask] = self._find_least(mask)
        return self._least[mask]

    def _find_least(self, mask: CandidateMask) -> Least:
        wider = mask if self.extension is None else self.extension.mask(mask)
        entries = allowed_entries((self,), wider)
        least, eliminated = eliminate(entries, elimination_order([decisions for decisions, _ in entries]))
        (positions,) = best_positions(eliminated, num_decisions=len(wider))
        allowed = [np.flatnonzero(row) for row in mask]
        choices = np.array([row[c] for row, c in zip(allowed, positions[: len(mask)], strict=True)])
        cost = bound = self.constant + float(least[0])
        if self.extension is not None:
            choices, cost = self._descended(choices, allowed, target=bound + NEGLIGIBLE * abs(bound))
        return Least(choices=tuple(choices.tolist()), cost=cost, bound=bound)

    def _descended(
        self, start: IntArray, allowed: Sequence[IntArray], *, target: float
    ) -> tuple[IntArray, float]:
        """Return the best choices (D,) that local searches find, from ``start`` first, and their cost."""
        moves = Moves(allowed)
        best = descend(self.of, start, moves, target=target)
        for other in starts(self.of, allowed) if best[1] > target else ():
            best = min(best, descend(self.of, other, moves, target=target), key=lambda one: one[1])
        return best

    def scaled(self, intercept: float, slope: float) -> CostTable:
        """Return the table of ``intercept + slope * cost``."""
        factors = tuple(Factor(factor.decisions, slope * factor.values) for factor in self.factors)
        return CostTable(factors, intercept + slope * self.constant, self.extension)

    def plus(self, other: CostTable) -> CostTable:
        """Return the table of the sum of both costs. Raises ValueError for tables with different derived values."""
        extension = common_extension((self.extension, other.extension))
        return CostTable(self.factors + other.factors, self.constant + other.constant, extension)

    def to_json(self) -> dict[str, Any]:
        """Return constant and factors as plain lists and numbers; floats survive a round trip exactly."""
        factors = [{"decisions": list(f.decisions), "values": f.values.tolist()} for f in self.factors]
        return {"constant": float(self.constant), "factors": factors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], extension: Extension | None = None) -> CostTable:
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
        return cls(tuple(Factor(decisions, values) for decisions, values in rows), constant, extension)

    @cached_property
    def _stack(self) -> TableStack:
        return TableStack((self,))

    @cached_property
    def _least(self) -> dict[CandidateMask, Least]:
        return {}


class TableStack:
    """M costs looked up together: where an entry lies is computed once for all that are tables.

    Factors over the same decisions share their place, so tables of one space cost little more than one of
    them. A cost of another kind is asked by itself.
    """

    def __init__(self, costs: Sequence[Cost]) -> None:
        self._others = [(m, cost) for m, cost in enumerate(costs) if not isinstance(cost, CostTable)]
        tables = [cost if isinstance(cost, CostTable) else CostTable(()) for cost in costs]
        self._extension = common_extension([table.extension for table in tables])
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
        choices = np.asarray(choices, dtype=np.int64)
        wider = choices if self._extension is None else self._extension.choices(choices)
        columns = np.ascontiguousarray(wider.T)  # (D + E, n)
        self._check(columns)
        places = np.broadcast_to(self._starts, (self._starts.shape[0], columns.shape[1]))  # (F, n)
        for decisions, strides in zip(self._decisions, self._strides, strict=True):
            places = places + strides * columns[decisions]
        costs: FloatArray = self._values.take(places, axis=1).sum(axis=1)  # (M, F, n) -> (M, n)
        costs = self._constants + costs
        for m, cost in self._others:
            costs[m] = cost.of(choices)
        return costs

    def expected(self, theta: FloatArray) -> FloatArray:
        """Return E[cost] (M, K) for independent decisions: probabilities ``theta`` (K, D, C), padded with zeros."""
        num_profiles, num_tables = len(theta), len(self._values)
        wider = theta if self._extension is None else self._extension.theta(theta)
        total = np.repeat(self._constants, num_profiles, axis=1)  # (M, K)
        for decisions, values in self._factors:
            left = np.broadcast_to(values, (num_profiles, *values.shape))  # (K, M, C_a, C_b, …)
            for decision in reversed(decisions):  # each drops the last axis
                weights = wider[:, decision, : left.shape[-1]]
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
    """Return the cost that adds ``cost_of_layer`` over the layers of an architecture.

    One factor for all slots that depend on the same decisions. Each distinct layer is priced once; a skipped slot
    costs 0.
    """
    prices: dict[LayerSpec | None, float] = {
        layer: float(cost_of_layer(layer)) for layer in space.distinct_layers()
    }
    prices[None] = 0.0
    return tabulate_slots(space, lambda slot, choice: prices[slot.layers[choice]], constant)


def tabulate_slots(
    space: SearchSpace, cost_of: Callable[[LayerSlot, tuple[int, ...]], float], constant: float = 0.0
) -> CostTable:
    """Return the cost that adds ``cost_of`` a slot and the choice of what stands there: a key of its ``layers``."""
    sizes = space.num_values()
    tables: dict[tuple[int, ...], FloatArray] = {}
    for slot in space.slots:
        values = tables.setdefault(slot.decisions, np.zeros([sizes[d] for d in slot.decisions]))
        for choice in slot.layers:
            values[choice] += cost_of(slot, choice)
    factors = tuple(Factor(decisions, values) for decisions, values in tables.items())
    return CostTable(factors, constant, Extension.of_space(space))


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
