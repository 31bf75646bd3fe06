"""A profile's budget in absolute numbers, and whether a space can meet it.

A percentage lies between the space's smallest (0 %) and largest (100 %) network on the profile (product.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nasdeploy.costs.joint_caps import JointCaps, Nearest
from nasdeploy.costs.table import Cost, CostTable, IntArray
from nasdeploy.errors import InfeasibleError
from nasdeploy.profiles import METRICS, HardwareProfile, Percent, Quantity, format_quantity, parse_quantity
from nasdeploy.spaces.base import Architecture, CandidateMask, SearchSpace

NUM_SAMPLES = 4_000
"""Random architectures that stand for the space where its median network is shown."""

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
    """One metric of one profile: the range of the space, the cap, and the nearest cap that can be met.

    satisfiable: with this cap alone. nearest: where it is not, the least that the space has; where the caps cannot be
    met together, the least that was found while all other caps hold.
    """

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


def resolve_limits(profile: HardwareProfile, space: SearchSpace, tables: Mapping[str, Cost]) -> Limits:
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


def feasibility(profile: HardwareProfile, space: SearchSpace, tables: Mapping[str, Cost]) -> Feasibility:
    """Return, for each metric in ``tables``, what the space costs on ``profile`` and whether the caps can be met."""
    mask = space.candidate_mask(profile.runtime.channel_multiple)
    limits = resolve_limits(profile, space, tables)
    drawn = _random_choices(mask)
    rows = tuple(
        _row(metric, tables[metric], limits, mask=mask, space=space, drawn=drawn)
        for metric in profile_metrics(tables)
    )
    feasible = all(row.satisfiable for row in rows)
    message = _message(profile.name, rows, mask=mask, tables=tables)
    if feasible and len(limits.caps) > 1:
        joint = JointCaps(tables, limits.caps, mask)
        found = joint.nearest()
        feasible = found.feasible
        if not feasible:
            rows = tuple(
                replace(row, nearest=joint.least(row.metric)) if row.cap is not None else row for row in rows
            )
            message = _joint_message(profile.name, rows, found, tables)
    return Feasibility(profile=profile.name, rows=rows, feasible=feasible, message=message)


def can_be_met(
    caps: Mapping[str, float], profile: HardwareProfile, space: SearchSpace, tables: Mapping[str, Cost]
) -> bool:
    """Return whether an architecture within all ``caps`` was found."""
    mask = space.candidate_mask(profile.runtime.channel_multiple)
    return not caps or JointCaps(tables, caps, mask).nearest().feasible


def require_feasible(*found: Feasibility) -> None:
    """Raise InfeasibleError, with the nearest caps that can be met, unless all of ``found`` are feasible."""
    broken = [one.message for one in found if not one.feasible]
    if broken:
        raise InfeasibleError("; ".join(broken))


def profile_metrics(tables: Mapping[str, Cost]) -> list[str]:
    """Return the metrics in the order in which they are shown."""
    return [metric for metric in METRICS if metric in tables]


def _row(
    metric: str,
    cost: Cost,
    limits: Limits,
    *,
    mask: CandidateMask,
    space: SearchSpace,
    drawn: IntArray,
) -> FeasibilityRow:
    cap = limits.caps.get(metric)
    lowest = cost.minimum(mask)
    satisfiable = cap is None or lowest <= cap * (1.0 + ROUNDING)
    return FeasibilityRow(
        metric=metric,
        smallest=_cost(cost, space.smallest(mask)),
        median=float(np.median(cost.of(drawn))),
        largest=_cost(cost, space.largest(mask)),
        cap=cap,
        coefficient=limits.coefficients.get(metric),
        satisfiable=satisfiable,
        nearest=None if satisfiable else lowest,
    )


def _message(
    profile: str, rows: tuple[FeasibilityRow, ...], *, mask: CandidateMask, tables: Mapping[str, Cost]
) -> str:
    """Return what each cap by itself comes to."""
    if all(row.satisfiable for row in rows):
        return f"{profile}: every cap can be met"
    broken = [
        f"budget.{row.metric}.max = {format_quantity(row.cap or 0.0, row.metric)} is below the cheapest network "
        f"{_whose(tables[row.metric], mask)}; the nearest cap that can be met is "
        f"{_at_least(row.nearest or 0.0, row.metric)}"
        for row in rows
        if not row.satisfiable
    ]
    return f"{profile}: {'; '.join(broken)}"


def _joint_message(
    profile: str, rows: tuple[FeasibilityRow, ...], found: Nearest, tables: Mapping[str, Cost]
) -> str:
    """Return what caps that can each be met come to together."""
    choices = np.array([found.choices])
    capped = [row for row in rows if row.cap is not None]
    nearest = ", ".join(
        f"{row.metric} {_at_least(float(tables[row.metric].of(choices)[0]), row.metric)} "
        f"(max {format_quantity(row.cap or 0.0, row.metric)})"
        for row in capped
    )
    none = "it is proven that no network meets all" if found.proven else "no network was found that meets all"
    alone = ", ".join(
        f"{row.metric} {_at_least(row.nearest, row.metric)}" for row in capped if row.nearest is not None
    )
    least = f"; the least of one within all other caps: {alone}" if alone else ""
    return f"{profile}: each cap can be met alone, but {none}; the nearest has {nearest}{least}"


def _whose(cost: Cost, mask: CandidateMask) -> str:
    proven = isinstance(cost, CostTable) and cost.least(mask).proven
    return "of the space" if proven else "that was found"


def _random_choices(mask: CandidateMask) -> IntArray:
    """Return random allowed architectures (n, D)."""
    rng = np.random.default_rng(0)
    choices: IntArray = np.stack([rng.choice(np.flatnonzero(row), size=NUM_SAMPLES) for row in mask], axis=1)
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


def _cost(cost: Cost, architecture: Architecture) -> float:
    return float(cost.of(np.array([architecture.choices]))[0])
