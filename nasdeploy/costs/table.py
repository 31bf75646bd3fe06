"""What a batch of architectures costs, by looking up small tables.

A layer's cost depends on a few decisions, so the cost of a network is a constant plus a sum of *factors*,
each a table over the candidates of those decisions. Whole numbers stay exact: float64 holds them below 2**53.

Notation: n architectures, D decisions, F factors, M tables, P entries of all factors of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import CandidateMask, LayerSpec, SearchSpace

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


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


_Eliminated = tuple[int, tuple[int, ...], npt.NDArray[np.intp]]
"""A decision, those that its best candidate depends on, and that candidate for each combination of them."""


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
        return self.constant + sum(_expectation(factor, theta) for factor in self.factors)

    def minimum(self, mask: CandidateMask) -> float:
        """Return the least cost of any allowed architecture, exactly, by eliminating one decision at a time.

        The work grows with the widest table met on the way: small wherever a layer sees only its neighbours.
        """
        return self._eliminate(mask)[0]

    def cheapest(self, mask: CandidateMask) -> tuple[int, ...]:
        """Return the choices (D,) of an allowed architecture of the least cost; decisions without cost stand first."""
        allowed = [np.flatnonzero(row) for row in mask]
        position = dict.fromkeys(range(len(mask)), 0)  # among the allowed candidates
        for decision, neighbours, best in reversed(self._eliminate(mask)[1]):
            position[decision] = int(best[tuple(position[d] for d in neighbours)])
        return tuple(int(row[position[d]]) for d, row in enumerate(allowed))

    def _eliminate(self, mask: CandidateMask) -> tuple[float, list[_Eliminated]]:
        """Return the least cost and, in order, what was eliminated."""
        tables = [(f.decisions, f.values[np.ix_(*(mask[d] for d in f.decisions))]) for f in self.factors]
        eliminated: list[_Eliminated] = []
        while left := {d for decisions, _ in tables for d in decisions}:
            # the decision with the fewest neighbours first, so that the joint tables stay small
            chosen = min(left, key=lambda d: len(set().union(*(ds for ds, _ in tables if d in ds))))
            joint = _joint([entry for entry in tables if chosen in entry[0]], last=chosen)
            rest = [entry for entry in tables if chosen not in entry[0]]
            eliminated.append((chosen, joint[0][:-1], joint[1].argmin(axis=-1)))
            tables = [*rest, (joint[0][:-1], joint[1].min(axis=-1))]
        return self.constant + float(sum(values for _, values in tables)), eliminated

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
    """M tables looked up together: where an entry lies is computed once for all of them.

    Factors over the same decisions share their place, so tables of one space cost little more than one of
    them.
    """

    def __init__(self, tables: Sequence[CostTable]) -> None:
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
        return self._constants + costs

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


def _expectation(factor: Factor, theta: FloatArray) -> float:
    values = factor.values
    for decision in reversed(factor.decisions):
        values = values @ theta[decision, : values.shape[-1]]  # drops the last axis
    return float(values)


Entry = tuple[tuple[int, ...], FloatArray]


def _joint(entries: Sequence[Entry], *, last: int) -> Entry:
    """Return the sum of ``entries`` as one table over all their decisions, ``last`` as the last axis."""
    others = sorted({d for decisions, _ in entries for d in decisions} - {last})
    joint = (*others, last)
    total: FloatArray = np.zeros(())
    for decisions, values in entries:
        order = sorted(range(len(decisions)), key=lambda axis: joint.index(decisions[axis]))
        missing = tuple(axis for axis, d in enumerate(joint) if d not in decisions)
        total = total + np.expand_dims(values.transpose(order), missing)
    return joint, total


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
