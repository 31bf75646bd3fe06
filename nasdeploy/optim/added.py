"""A profile that comes after the search: its distribution from what was recorded, and from a few evaluations more.

The recorded losses are of architectures that other profiles wanted, but a model L̂ of them knows f = L̂ + penalty of
any architecture, at no cost: the distribution follows it. What is evaluated besides is what promises this profile the
largest gain (:mod:`nasdeploy.optim.acquisition`), and corrects the model there. Without any evaluation the answer is
good for a budget between those that were searched for; beyond them the model only extrapolates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.acquisition import KnowledgeGradient, Proposer, UncertainModel, loss_model
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.gaussian_process import MAX_SAMPLES
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.strategy import Strategy
from nasdeploy.optim.surrogate import RidgeSurrogate
from nasdeploy.spaces.base import CandidateMask

NUM_MODEL_STEPS = 300
NUM_MODEL_SAMPLES = 32
NUM_KEPT = 1024
"""Of the recorded losses. Predictions cost the square of it, and the distribution follows hundreds of them."""
GUIDED_SHARE = 1.0
"""The model proposes all evaluations, once it knows enough to: the distribution follows it, not single samples."""


class RecordedModel(UncertainModel, Protocol):
    """A model that learns what was recorded at once, then step by step."""

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D), losses (N,) and steps (N,) alone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guide:
    """The model L̂, without samples, and who proposes by it and passes on to it what was evaluated."""

    model: RecordedModel
    proposer: Proposer


def default_guide(num_candidates: tuple[int, ...], objective: Objective, mask: CandidateMask) -> Guide:
    """Return a Gaussian process, and the knowledge gradient by it."""
    model = loss_model(num_candidates, [objective])
    return Guide(
        model=model,
        proposer=KnowledgeGradient(
            num_candidates=num_candidates, objectives=[objective], masks=[mask], model=model
        ),
    )


class Addition:
    """What a search recorded, for a profile that it was not for.

    searched: the distributions at the end of the search; they stay as they are. mask: what the profile allows.
    num_evaluations: of how many losses will be told besides, so that the model has room for them. guide: another one
    than :func:`default_guide`.

    ``optimizer`` is there to be asked and told, as often as wanted or never; then ``distribution`` has the answer.
    """

    def __init__(
        self,
        searched: Strategy,
        *,
        objective: Objective,
        mask: CandidateMask,
        num_evaluations: int,
        rng: np.random.Generator,
        guide: Guide | None = None,
    ) -> None:
        self._objective, self._mask, self._num_candidates = objective, mask, searched.num_candidates
        archive, num_candidates = searched.archive, searched.num_candidates
        size = max(min(NUM_KEPT, MAX_SAMPLES - num_evaluations), 1)
        kept = relevant(archive, num_candidates=num_candidates, objective=objective, mask=mask, size=size)
        choices, losses, steps = archive.choices[kept], archive.losses[kept], archive.steps[kept]
        guide = guide or default_guide(num_candidates, objective, mask)
        self._model = guide.model
        self._model.fit(choices, losses, steps)
        theta = self._follow(None, rng)
        self.optimizer = PooledOptimizer(
            num_candidates=num_candidates,
            objectives=[objective],
            masks=[mask],
            initial_theta=theta[None],
            proposer=guide.proposer,
            guided_share=GUIDED_SHARE,
        )
        for step in np.unique(steps).tolist():
            self.optimizer.archive.add(step, choices[steps == step], losses[steps == step])
        self.optimizer.num_steps = searched.num_steps  # what is told from now on counts as later

    def distribution(self, rng: np.random.Generator) -> PooledOptimizer:
        """Return the distribution by all that is known now, with that in its archive."""
        theta = self.optimizer.theta[0]
        if self.optimizer.latest is not None:  # the model has learnt since it was followed
            theta = self._follow(theta, rng)
        found = added_optimizer(self._num_candidates, objective=self._objective, mask=self._mask, theta=theta)
        found.continue_archive(self.optimizer)
        return found

    def _follow(self, start: FloatArray | None, rng: np.random.Generator) -> FloatArray:
        """Return where the distribution gets from ``start`` (D, C) by the losses of the model: (D, C)."""
        scout = added_optimizer(self._num_candidates, objective=self._objective, mask=self._mask, theta=start)
        for _ in range(NUM_MODEL_STEPS):
            choices = scout.ask(NUM_MODEL_SAMPLES, rng)
            scout.tell(choices, self._model.predict(choices))
        theta: FloatArray = scout.theta[0]
        return theta


def added_optimizer(
    num_candidates: tuple[int, ...],
    *,
    objective: Objective,
    mask: CandidateMask,
    theta: FloatArray | None = None,
) -> PooledOptimizer:
    """Return the one distribution of an added profile: at ``theta`` (D, C) or uniform; its archive is empty."""
    return PooledOptimizer(
        num_candidates=num_candidates,
        objectives=[objective],
        masks=[mask],
        initial_theta=None if theta is None else theta[None],
    )


def relevant(
    archive: Archive, *, num_candidates: tuple[int, ...], objective: Objective, mask: CandidateMask, size: int
) -> IntArray:
    """Return which samples of ``archive`` a model of at most ``size`` of them should know: ascending indices.

    Half of them are those that suit the profile best, however old: what nobody else wants was seen in the beginning
    alone. A simple model tells which, since the least of many noisy losses are too low. The others are the latest.
    """
    choices = archive.choices
    if len(choices) <= size:
        return np.arange(len(choices))
    model = RidgeSurrogate(num_candidates, half_life=np.inf)
    model.fit(choices, archive.losses, archive.steps)
    outside = ~categorical.within(categorical.mask_array(num_candidates, mask), choices)
    order = np.lexsort((objective.order(model.predict(choices), choices), outside))
    best = order[: size // 2]
    others = np.setdiff1d(np.arange(len(choices)), best)
    return np.sort(np.concatenate([best, others[len(others) - (size - len(best)) :]]))
