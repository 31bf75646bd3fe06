"""A profile that comes after the search: its distribution from the trained supernet and the recorded losses.

No weight is trained. A few steps evaluate, with the weights as they are now, what a model of the recorded losses
proposes for this profile (:mod:`nasdeploy.optim.added`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nasdeploy.data import TrainingBatches
from nasdeploy.networks import Supernet
from nasdeploy.optim.added import Addition, Guide
from nasdeploy.optim.estimators import Evaluated
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.strategy import Strategy
from nasdeploy.searchers.oneshot import evaluate_and_tell
from nasdeploy.spaces.base import CandidateMask, SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapted:
    """The distribution of an added profile, and what was evaluated for it, step by step.

    optimizer: with the recorded losses that serve the profile and its own in its archive.
    """

    optimizer: PooledOptimizer
    told: tuple[Evaluated, ...]


def uncovered(space: SearchSpace, *, searched: Sequence[CandidateMask], wanted: CandidateMask) -> str | None:
    """Return the first candidate that the weights were never trained for, such as "stem.width = 24", or None.

    A search covers a profile if each candidate that the profile may use was allowed to one of the profiles that were
    searched for: the search trains every architecture that some of them allow, whatever their caps, with a positive
    probability (``ask_for_weights``), and no other.
    """
    for decision, allowed, *trained in zip(space.decisions, wanted, *searched, strict=True):
        for c, candidate in enumerate(decision.candidates):
            if allowed[c] and not any(row[c] for row in trained):
                return f"{decision.name} = {candidate}"
    return None


def adapt(
    searched: Strategy,
    *,
    objective: Objective,
    mask: CandidateMask,
    supernet: Supernet,
    valid: TrainingBatches,
    num_loss_samples: int,
    num_steps: int,
    rng: np.random.Generator,
    class_weights: Tensor | None = None,
    guide: Guide | None = None,
) -> Adapted:
    """Return the distribution of a new profile, after ``num_steps`` steps of ``num_loss_samples`` evaluations.

    searched: the distributions at the end of the search. valid: batches as the search used them. num_steps: 0 answers
    from the recorded losses alone; few cost accuracy where a budget lies beyond those that were searched for. guide: of
    :class:`nasdeploy.optim.added.Addition`. Raises ConfigError for a loss that is not finite.
    """
    addition = Addition(
        searched,
        objective=objective,
        mask=mask,
        num_evaluations=num_steps * num_loss_samples,
        rng=rng,
        guide=guide,
    )
    told = []
    for _ in range(num_steps):
        choices = addition.optimizer.ask(num_loss_samples, rng)
        evaluate_and_tell(supernet, addition.optimizer, choices, next(valid), class_weights=class_weights)
        latest = addition.optimizer.latest
        assert latest is not None
        told.append(latest)
    return Adapted(optimizer=addition.distribution(rng), told=tuple(told))
