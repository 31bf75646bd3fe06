"""Where the distributions start: the best that an earlier, cheaper search has found for each profile.

Source: the elite of an estimation-of-distribution algorithm (Mühlenbein & Paaß 1996: frequencies among the best),
smoothed, since a candidate that no elite holds is not a bad one. [alternatives.md, A]

Notation: N evaluated architectures, D decisions, C candidates, K profiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.objective import Objective


def elite(
    *, choices: IntArray, losses: FloatArray, objective: Objective, mask: BoolArray, num_elite: int
) -> IntArray:
    """Return the best architectures for one profile, the best first: (m, D), m <= ``num_elite``.

    choices: (N, D) of all that was evaluated, for whichever profile. losses: (N,). mask: (D, C) of the profile. The
    best are those within all caps, by loss plus weighted costs; where none is within them, those of the least
    violation. Empty where the mask allows none.
    """
    allowed = np.flatnonzero(categorical.within(mask, choices))
    feasible = allowed[objective.feasible(choices[allowed])]
    known = feasible if len(feasible) else allowed
    ranks = objective.order(losses[known], choices[known])
    return choices[known[np.argsort(ranks, kind="stable")[:num_elite]]]


def warm_theta(elites: Sequence[IntArray], mask: BoolArray, *, smoothing: float) -> FloatArray:
    """Return θ (K, D, C) from the elites of K profiles, (m_k, D) each: with margin, 0 outside ``mask`` (K, D, C).

    θ_k = (1 - λ) frequencies + λ uniform, then the margin; λ = ``smoothing`` in [0, 1]. An empty elite gives the
    uniform distribution. Raises ValueError for other shapes, another λ or an elite outside its mask.
    """
    if not 0.0 <= smoothing <= 1.0 or len(elites) != len(mask):
        raise ValueError(
            f"smoothing = {smoothing}, {len(elites)} elites for {len(mask)} profiles; "
            "expected a number from 0 to 1 and one elite for each"
        )
    even = categorical.uniform(mask)
    theta = np.stack(
        [
            (1.0 - smoothing) * _frequencies(one, allowed) + smoothing * rest if len(one) else rest
            for one, allowed, rest in zip(elites, mask, even, strict=True)
        ]
    )
    return categorical.with_margin(theta, mask)


def _frequencies(choices: IntArray, mask: BoolArray) -> FloatArray:
    """Return how often each candidate occurs in ``choices`` (m, D), as a share: (D, C)."""
    if choices.shape[1] != len(mask) or not categorical.within(mask, choices).all():
        raise ValueError(
            f"elite of shape {choices.shape}; expected architectures inside a mask of {mask.shape}"
        )
    counts = np.bincount(categorical.flat_index(choices, mask.shape[1]).ravel(), minlength=mask.size)
    return counts.reshape(mask.shape) / len(choices)
