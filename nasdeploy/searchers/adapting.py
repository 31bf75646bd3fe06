"""A profile that comes after the search: its distribution from the trained supernet and the recorded losses.

No weight is trained. First the distribution follows a model of all losses that the search recorded, which costs
nothing; then a few steps evaluate what it samples with the weights as they are now, which corrects the model where
this profile samples and the others did not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nasdeploy.data import TrainingBatches
from nasdeploy.networks import Supernet
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.searchers.oneshot import evaluate_and_tell
from nasdeploy.searchers.selecting import fit_surrogate
from nasdeploy.spaces.base import CandidateMask, SearchSpace

NUM_MODEL_STEPS = 300
NUM_MODEL_SAMPLES = 32
NUM_LOSS_STEPS = 10


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
    searched: PooledOptimizer,
    *,
    objective: Objective,
    mask: CandidateMask,
    supernet: Supernet,
    valid: TrainingBatches,
    num_loss_samples: int,
    rng: np.random.Generator,
    class_weights: Tensor | None = None,
) -> PooledOptimizer:
    """Return the distribution of a new profile, with the losses of ``searched`` and its own in its archive.

    searched: the distributions at the end of the search. valid: batches as the search used them. num_loss_samples:
    architectures evaluated a step.
    """
    model = fit_surrogate(searched)
    scout = PooledOptimizer(num_candidates=searched.num_candidates, objectives=[objective], masks=[mask])
    for _ in range(NUM_MODEL_STEPS):
        choices = scout.ask(NUM_MODEL_SAMPLES, rng)
        scout.tell(choices, model.predict(choices))
    found = PooledOptimizer(
        num_candidates=searched.num_candidates,
        objectives=[objective],
        masks=[mask],
        initial_theta=scout.theta,
    )
    found.continue_archive(searched)
    for _ in range(NUM_LOSS_STEPS):
        choices = found.ask(num_loss_samples, rng)
        evaluate_and_tell(supernet, found, choices, next(valid), class_weights=class_weights)
    return found
