"""Costs that no table can hold: a function of whole architectures, minimised by local search. Pure NumPy.

For spaces in which a cost is neither a sum over layers nor small enough for one table over all decisions.

Notation: n architectures, D decisions, C_d candidates of decision d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nasdeploy.costs.descent import Moves, Values, descend, starts
from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.spaces.base import CandidateMask


@dataclass(frozen=True, eq=False)
class SampledCost:
    """A cost that is asked architecture by architecture; a :class:`nasdeploy.costs.table.Cost`.

    function: choices (n, D) to costs (n,), the same every time, finite. num_candidates: (C_1, …, C_D).
    num_samples: draws for an expectation, from one generator of fixed seed, so that it is a function of theta.
    ``minimum`` and ``cheapest`` are what a local search finds: the least cost may be lower.
    """

    function: Values
    num_candidates: tuple[int, ...]
    num_samples: int = 1024

    def of(self, choices: IntArray) -> FloatArray:
        """Return the costs (n,) of ``choices`` (n, D).

        Raises ValueError for an index out of range, and where the function gives something else than a finite
        cost for each.
        """
        choices = np.asarray(choices, dtype=np.int64)
        if (
            choices.ndim != 2
            or choices.shape[1] != len(self.num_candidates)
            or (choices < 0).any()
            or (choices >= np.array(self.num_candidates)).any()
        ):
            raise ValueError(
                f"choices of shape {choices.shape}: expected {len(self.num_candidates)} decisions, "
                "with candidate indices inside the space"
            )
        costs = np.asarray(self.function(choices), dtype=np.float64)
        if costs.shape != (len(choices),) or not np.isfinite(costs).all():
            raise ValueError(
                f"cost function: gave an array of shape {costs.shape} for {len(choices)} architectures; "
                "expected one finite cost for each"
            )
        return costs

    def expected(self, theta: FloatArray) -> float:
        """Return the mean cost of ``num_samples`` draws from ``theta`` (D, C), padded with zeros."""
        drawn = np.broadcast_to(theta, (self.num_samples, *theta.shape))
        return float(self.of(categorical.sample(drawn, np.random.default_rng(0))).mean())

    def minimum(self, mask: CandidateMask) -> float:
        """Return the least cost of an allowed architecture that was found."""
        return float(self.of(np.array([self.cheapest(mask)]))[0])

    def cheapest(self, mask: CandidateMask) -> tuple[int, ...]:
        """Return the choices (D,) of the cheapest allowed architecture that was found."""
        if mask not in self._cheapest:
            allowed = [np.flatnonzero(row) for row in mask]
            moves = Moves(allowed)
            found = [descend(self.of, start, moves) for start in starts(self.of, allowed)]
            self._cheapest[mask] = tuple(min(found, key=lambda one: one[1])[0].tolist())
        return self._cheapest[mask]

    @cached_property
    def _cheapest(self) -> dict[CandidateMask, tuple[int, ...]]:
        return {}
