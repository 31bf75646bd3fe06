"""What a profile wants of an architecture, from its costs and its caps."""

from __future__ import annotations

from collections.abc import Mapping

from nasdeploy.optim.objective import Objective
from nasdeploy.pipeline.tables import ProfileCosts


def make_objective(costs: ProfileCosts, *, tightened: Mapping[str, float] | None = None) -> Objective:
    """Return the objective of a profile.

    Its caps on what is measured keep the margins that the tables need. tightened: factors on caps, after a measurement
    broke one.
    """
    caps = dict(costs.limits.caps)
    if "latency" in caps:
        caps["latency"] *= costs.latency_margin
    if "peak_memory" in caps:
        caps["peak_memory"] *= costs.memory_margin
    for metric, factor in (tightened or {}).items():
        caps[metric] *= factor
    return Objective(
        tables=costs.tables,
        caps=caps,
        coefficients=costs.limits.coefficients,
        references=costs.limits.references,
    )
