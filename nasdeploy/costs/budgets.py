"""A profile's budget in absolute numbers, and whether a space can meet it.

A percentage lies between the space's smallest (0 %) and largest (100 %) network on the profile (product.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nasdeploy.costs.table import CostTable, FloatArray, IntArray
from nasdeploy.errors import InfeasibleError
from nasdeploy.profiles import METRICS, HardwareProfile, Percent, Quantity, format_quantity, parse_quantity
from nasdeploy.spaces.base import Architecture, CandidateMask, SearchSpace

NUM_SAMPLES = 4_000
"""Random architectures that stand for the space: its median network, and the search for a feasible one."""

ROUNDING = 1e-13
"""A relative excess below this is rounding of a sum, as in nasdeploy.optim.objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A budget in the units of the metrics.

    caps: hard limits. coefficients, references: objective += coefficient · cost / reference.
    """

    caps: Mapping[str, float]
    coefficients: Mapping[str, float]
    references: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeasibilityRow:
    """One metric of one profile: the range of the space, the cap, and the nearest cap that can be met."""

    metric: str
    smallest: float
    median: float
    largest: float
    cap: float | None
    coefficient: float | None
    satisfiable: bool
    nearest: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Feasibility:
    """Whether a space has an architecture within all caps of a profile; ``message`` is one line."""

    profile: str
    rows: tuple[FeasibilityRow, ...]
    feasible: bool
    message: str


def resolve_limits(profile: HardwareProfile, space: SearchSpace, tables: Mapping[str, CostTable]) -> Limits:
    """Return the budget of ``profile`` in absolute numbers; a metric without a table is left out."""
    mask = space.candidate_mask(profile.runtime.channel_multiple)
    caps, coefficients, references = {}, {}, {}
    for metric, budget in profile.budget.items():
        if metric not in tables:
            continue
        smallest, largest = (_cost(tables[metric], a) for a in (space.smallest(mask), space.largest(mask)))
        if budget.max is not None:
            caps[metric] = _absolute(budget.max, smallest, largest)
        if budget.coefficient:
            coefficients[metric] = budget.coefficient
            references[metric] = _absolute(budget.reference or Percent(1.0), smallest, largest)
    return Limits(caps=caps, coefficients=coefficients, references=references)


def feasibility(profile: HardwareProfile, space: SearchSpace, tables: Mapping[str, CostTable]) -> Feasibility:
    """Return, for each metric in ``tables``, what the space costs on ``profile`` and whether the caps can be met."""
    mask = space.candidate_mask(profile.runtime.channel_multiple)
    limits = resolve_limits(profile, space, tables)
    choices = _representatives(space, mask, [table.cheapest(mask) for table in tables.values()])
    costs = {metric: table.of(choices) for metric, table in tables.items()}
    rows = tuple(
        _row(metric, costs[metric], tables[metric], mask, limits, space) for metric in profile_metrics(tables)
    )
    excess = _excess(limits.caps, costs, len(choices))
    feasible = bool((excess == 0.0).any()) and all(row.satisfiable for row in rows)
    closest = {metric: float(costs[metric][excess.argmin()]) for metric in limits.caps}
    message = _message(profile.name, rows, limits.caps, closest, feasible=feasible)
    return Feasibility(profile=profile.name, rows=rows, feasible=feasible, message=message)


def can_be_met(
    caps: Mapping[str, float], profile: HardwareProfile, space: SearchSpace, tables: Mapping[str, CostTable]
) -> bool:
    """Return whether an architecture within all ``caps`` was found."""
    mask = space.candidate_mask(profile.runtime.channel_multiple)
    choices = _representatives(space, mask, [table.cheapest(mask) for table in tables.values()])
    costs = {metric: tables[metric].of(choices) for metric in caps}
    return bool((_excess(caps, costs, len(choices)) == 0.0).any())


def _excess(caps: Mapping[str, float], costs: Mapping[str, FloatArray], count: int) -> FloatArray:
    """Return by how much each of n architectures breaks the caps, Σ_m max(0, R_m/B_m - 1): (n,)."""
    excess = np.zeros(count)
    for metric, cap in caps.items():
        over = costs[metric] / cap - 1.0
        excess += np.where(over > ROUNDING, over, 0.0)
    return excess


def require_feasible(*found: Feasibility) -> None:
    """Raise InfeasibleError, with the nearest caps that can be met, unless all of ``found`` are feasible."""
    broken = [one.message for one in found if not one.feasible]
    if broken:
        raise InfeasibleError("; ".join(broken))


def profile_metrics(tables: Mapping[str, CostTable]) -> list[str]:
    """Return the metrics in the order in which they are shown."""
    return [metric for metric in METRICS if metric in tables]


def _row(
    metric: str, costs: FloatArray, table: CostTable, mask: CandidateMask, limits: Limits, space: SearchSpace
) -> FeasibilityRow:
    cap = limits.caps.get(metric)
    lowest = table.minimum(mask)
    satisfiable = cap is None or lowest <= cap * (1.0 + ROUNDING)
    return FeasibilityRow(
        metric=metric,
        smallest=_cost(table, space.smallest(mask)),
        median=float(np.median(costs)),
        largest=_cost(table, space.largest(mask)),
        cap=cap,
        coefficient=limits.coefficients.get(metric),
        satisfiable=satisfiable,
        nearest=None if satisfiable else lowest,
    )


def _message(
    profile: str,
    rows: tuple[FeasibilityRow, ...],
    caps: Mapping[str, float],
    closest: Mapping[str, float],
    *,
    feasible: bool,
) -> str:
    if feasible:
        return f"{profile}: every cap can be met"
    broken = [
        f"budget.{row.metric}.max = {format_quantity(row.cap or 0.0, row.metric)} is below the cheapest network of the "
        f"space; the nearest cap that can be met is {_at_least(row.nearest or 0.0, row.metric)}"
        for row in rows
        if not row.satisfiable
    ]
    if broken:
        return f"{profile}: {'; '.join(broken)}"
    nearest = ", ".join(
        f"{metric} {_at_least(value, metric)} (max {format_quantity(caps[metric], metric)})"
        for metric, value in closest.items()
    )
    return f"{profile}: each cap can be met alone, but no network was found that meets all; the nearest has {nearest}"


def _representatives(
    space: SearchSpace, mask: CandidateMask, cheapest: Sequence[tuple[int, ...]]
) -> IntArray:
    """Return random allowed architectures (n, D), behind the smallest, the largest and the ``cheapest`` ones."""
    rng = np.random.default_rng(0)
    columns = [rng.choice(np.flatnonzero(row), size=NUM_SAMPLES) for row in mask]
    ends = np.array([space.smallest(mask).choices, space.largest(mask).choices, *cheapest])
    choices: IntArray = np.concatenate([ends, np.stack(columns, axis=1)])
    return choices


def _at_least(value: float, metric: str) -> str:
    """Return ``value`` in four digits, or in all of them where rounding would fall below it."""
    text = format_quantity(value, metric)
    enough = parse_quantity(text, metric=metric, key=metric) >= value
    return text if enough else format_quantity(value, metric, digits=None)


def _absolute(limit: Quantity | Percent, smallest: float, largest: float) -> float:
    if isinstance(limit, Quantity):
        return limit.value
    return smallest + limit.fraction * (largest - smallest)


def _cost(table: CostTable, architecture: Architecture) -> float:
    return float(table.of(np.array([architecture.choices]))[0])
