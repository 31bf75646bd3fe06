"""Costs that no table can hold: a function of whole architectures, minimised by local search. Pure NumPy.

For spaces in which a cost is neither a sum over layers nor small enough for one table over all decisions, such as
cells whose edges decide which operations remain.

Notation: n architectures, D decisions, C_d candidates of decision d, S single changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.spaces.base import CandidateMask

Values = Callable[[IntArray], FloatArray]
"""Values (n,) of architectures (n, D)."""

MAX_PAIRS = 4096
"""Changes of two decisions that are tried at once; a larger space has more, of which so many are drawn."""

NUM_STARTS = 4
NUM_RANDOM = 256


class Moves:
    """All changes of one decision and of two, among allowed candidates. allowed: D arrays of candidates."""

    def __init__(self, allowed: Sequence[IntArray]) -> None:
        self._decisions = np.repeat(np.arange(len(allowed)), [len(row) for row in allowed])  # (S,)
        self._candidates = np.concatenate([np.empty(0, dtype=np.int64), *allowed]).astype(np.int64)  # (S,)
        self._rng = np.random.default_rng(0)

    def single(self, choices: IntArray) -> IntArray:
        """Return ``choices`` (D,) with one decision changed: (S, D), itself among them."""
        changes = np.arange(len(self._decisions))
        return self._changed(choices, changes[:, None])

    def double(self, choices: IntArray) -> IntArray:
        """Return ``choices`` (D,) with two decisions changed: all of them, or MAX_PAIRS drawn ones."""
        count = len(self._decisions)
        if count * (count - 1) // 2 <= MAX_PAIRS:
            pairs = np.stack(np.triu_indices(count, k=1), axis=1)
        else:
            pairs = self._rng.integers(count, size=(MAX_PAIRS, 2))
        return self._changed(choices, pairs)

    def _changed(self, choices: IntArray, changes: IntArray) -> IntArray:
        """Return ``choices`` after each row of ``changes`` (n, moves), its moves one after the other."""
        changed = np.tile(choices, (len(changes), 1))
        rows = np.arange(len(changes))
        for column in changes.T:
            changed[rows, self._decisions[column]] = self._candidates[column]
        return changed


def descend(
    values: Values, start: IntArray, moves: Moves, *, target: float = -np.inf
) -> tuple[IntArray, float]:
    """Return what no single change and none of the double ones tried improves, from ``start`` (D,), and its value.

    Stops at a value of ``target`` or less.
    """
    best, least = start, float(values(start[None])[0])
    while least > target:
        for changed in (moves.single, moves.double):
            found = changed(best)
            value = values(found)
            if len(found) and value.min() < least:
                best, least = found[value.argmin()], float(value.min())
                break
        else:
            break
    return best, least


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


def starts(values: Values, allowed: Sequence[IntArray]) -> IntArray:
    """Return where local searches begin: the first, the last and the best of random architectures, (n, D)."""
    rng = np.random.default_rng(0)
    ends = np.array([[row[end] for row in allowed] for end in (0, -1)])
    drawn = np.stack([rng.choice(row, size=NUM_RANDOM) for row in allowed], axis=1)
    best = np.argsort(values(drawn), kind="stable")[:NUM_STARTS]
    return np.concatenate([ends, drawn[best]])
