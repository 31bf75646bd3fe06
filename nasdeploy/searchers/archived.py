"""The answer of a search that only scored architectures: every profile reads its own from one archive.

Notation: N scored architectures, D decisions, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nasdeploy.costs.joint_caps import JointCaps
from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.selection import widened
from nasdeploy.searchers.evaluator import Evaluator, Scores
from nasdeploy.searchers.seats import Ranked
from nasdeploy.spaces.base import Architecture, CandidateMask, to_architectures


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredArchive:
    """All that was scored, in its order: choices (N, D), top-1 errors ``losses`` (N,), their standard errors (N,)."""

    choices: IntArray
    losses: FloatArray
    errors: FloatArray

    def score(self, choices: IntArray, *, evaluator: Evaluator, seed: int) -> Scores:
        """Return the scores of ``choices`` (n, D): those of the archive, and of the evaluator for what it lacks."""
        places = {row.tobytes(): i for i, row in enumerate(self.choices)}
        found = np.array([places.get(row.tobytes(), -1) for row in choices], dtype=np.int64)
        losses, errors = np.zeros(len(choices)), np.zeros(len(choices))
        known = found >= 0
        losses[known], errors[known] = self.losses[found[known]], self.errors[found[known]]
        if not known.all():
            scores = evaluator.score(to_architectures(choices[~known]), seed=seed)
            losses[~known], errors[~known] = scores.losses, scores.errors
        return Scores(losses=losses, errors=errors)


class ArchiveOutcome:
    """A :class:`nasdeploy.searchers.seats.SearchOutcome` without trained weights.

    masks: what each profile allows, by name. evaluator, seed: that scored the archive, for what it lacks. scaled: the
    decision that is solved for (:func:`nasdeploy.optim.selection.widened`), None where there is none.
    """

    def __init__(
        self,
        archive: ScoredArchive,
        *,
        num_candidates: tuple[int, ...],
        masks: Mapping[str, CandidateMask],
        evaluator: Evaluator,
        seed: int,
        scaled: int | None = None,
    ) -> None:
        self._archive, self._num_candidates, self._masks = archive, num_candidates, masks
        self._evaluator, self._seed, self._scaled = evaluator, seed, scaled

    def candidates(self, profile: str, *, objective: Objective) -> IntArray:
        """Return what of the archive is feasible (m, D), by loss plus weighted costs, the best first.

        Where nothing is: the one architecture nearest to the caps, if it keeps them. Where a decision is solved for,
        each as wide as the caps allow, and each once.
        """
        mask = categorical.mask_array(self._num_candidates, self._masks[profile])
        found = self._feasible(profile, mask, objective)
        if self._scaled is None:
            return found
        solved = widened(found, decision=self._scaled, mask=mask, objective=objective)
        _, first = np.unique(solved, axis=0, return_index=True)
        return solved[np.sort(first)]

    def _feasible(self, profile: str, mask: BoolArray, objective: Objective) -> IntArray:
        """Return what of the archive is feasible (m, D), or what comes nearest to that; mask: (D, C)."""
        archive = self._archive
        inside = np.flatnonzero(categorical.within(mask, archive.choices))
        inside = inside[objective.feasible(archive.choices[inside])]
        found, values = archive.choices[inside], archive.losses[inside]
        if len(found) == 0 and objective.caps:
            nearest = np.array(
                [JointCaps(objective.tables, objective.caps, self._masks[profile]).nearest().choices]
            )
            return nearest[objective.feasible(nearest)]
        return found[order(values, found, objective=objective)]

    def ranked(self, profile: str, found: IntArray, *, objective: Objective, size: int) -> list[Ranked]:
        """Return at most ``size`` of ``found`` (m, D) by error plus weighted costs, the best first."""
        chosen = found[:size]
        losses = self._archive.score(chosen, evaluator=self._evaluator, seed=self._seed).losses
        return [
            Ranked(architecture=Architecture(tuple(row)), loss=loss, accuracy=1.0 - loss)
            for row, loss in (
                (chosen[i].tolist(), float(losses[i])) for i in order(losses, chosen, objective=objective)
            )
        ]

    def trained(self, architecture: Architecture) -> None:
        """Return nothing: no weights were trained."""


def order(losses: FloatArray, choices: IntArray, *, objective: Objective) -> IntArray:
    """Return the order (n,) of ``choices`` (n, D) by loss plus weighted costs; equals by cost, the cheapest first.

    Errors are shares of few images: many are equal, and then what dominates another must come before it.
    """
    costs = np.stack([table.of(choices) for table in objective.tables.values()])  # (M, n)
    share = costs / np.maximum(np.abs(costs).max(axis=1, keepdims=True, initial=0.0), 1e-300)
    return np.lexsort((share.sum(axis=0), losses + objective.penalty(choices)))
