"""Derived values beside the decisions: what tables over them need of architectures, distributions and masks.

A table over D + E columns is looked up with the derived values as further choices. Under independent decisions their
marginals are exact, and no factor holds a derived value together with what it depends on
(:func:`nasdeploy.spaces.slots.check_slots`); so an expectation stays exact although derived values are not
independent of decisions, since it is a sum over factors.

Notation: n architectures, K distributions, D decisions, E derived values, C candidates or values at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nasdeploy.spaces.base import CandidateMask, Derived, FloatArray, IntArray, SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """The derived values of a space. num_candidates: (C_1, …, C_D)."""

    num_candidates: tuple[int, ...]
    derived: tuple[Derived, ...]

    @classmethod
    def of_space(cls, space: SearchSpace) -> Extension | None:
        """Return the extension of ``space``, None where it has no derived values."""
        if not space.derived:
            return None
        return cls(num_candidates=space.num_candidates(), derived=space.derived)

    def choices(self, choices: IntArray) -> IntArray:
        """Return ``choices`` (n, D) with the derived values behind them: (n, D + E).

        Raises ValueError for another number of decisions and for an index out of range.
        """
        if (
            choices.shape[1] != len(self.num_candidates)
            or (choices < 0).any()
            or (choices >= np.array(self.num_candidates)).any()
        ):
            raise ValueError(
                f"choices of shape {choices.shape}: expected {len(self.num_candidates)} decisions, "
                "with candidate indices inside the space"
            )
        return np.concatenate([choices, *(one.of(choices)[:, None] for one in self.derived)], axis=1)

    def theta(self, theta: FloatArray) -> FloatArray:
        """Return ``theta`` (K, D, C) with the marginals of the derived values: (K, D + E, C'), padded with zeros."""
        num_profiles, num_decisions, num_columns = theta.shape
        widest = max(num_columns, *(one.num_values for one in self.derived))
        wider = np.zeros((num_profiles, num_decisions + len(self.derived), widest))
        wider[:, :num_decisions, :num_columns] = theta
        for e, one in enumerate(self.derived):
            rows = theta[:, list(one.decisions)].reshape(num_profiles, -1)
            # many rows of a gradient differ in other decisions alone: each marginal is computed once
            _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
            marginals = np.stack([one.marginal(theta[k]) for k in first])
            wider[:, num_decisions + e, : one.num_values] = marginals[inverse.ravel()]
        return wider

    def mask(self, mask: CandidateMask) -> CandidateMask:
        """Return ``mask`` with rows for the derived values: those that some allowed architecture has."""
        uniform = np.zeros((len(mask), max(map(len, mask))))
        for row, allowed in zip(uniform, mask, strict=True):
            row[: len(allowed)] = np.array(allowed) / sum(allowed)
        reached = (one.marginal(uniform) > 0.0 for one in self.derived)
        return (*mask, *(tuple(row.tolist()) for row in reached))


def common_extension(found: Sequence[Extension | None]) -> Extension | None:
    """Return the one extension that tables of a space have. Raises ValueError for two different ones."""
    distinct = {id(one): one for one in found if one is not None}
    first, *others = distinct.values() or [None]
    if any(other != first for other in others):
        raise ValueError("tables have different derived values; expected tables of one search space")
    return first
