"""Which model of the loss is worth its complexity: a ladder of predictors, climbed only on held-out evidence.

Rungs stand in order of complexity, the simplest first. A higher one is taken where its cross-validated Kendall τ is
better than that of the rung held so far by more than the standard error of the difference, fold by fold. Training τ
never counts: the published stop rule, training τ above 0.95, passes on shuffled labels, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.acquisition import knee_of
from nasdeploy.optim.cross_validation import CrossValidation, cross_validate, standard_error, variance_within
from nasdeploy.optim.gaussian_process import Posterior
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.operation_importance import OperationImportance
from nasdeploy.optim.predictor import Predictor, PredictorFactory, RidgePredictor, diagonal_posterior
from nasdeploy.optim.residuals import OwnResiduals
from nasdeploy.optim.targets import Samples, Targets

CHOICE_GROWTH = 2.0
"""A rung is chosen again once there are so many times the samples of the last choice."""
MAX_RANKED = 1024
"""A rung is chosen by at most so many of the latest samples."""
CHEAP_GROWTH, COSTLY_GROWTH = 17 / 16, 1.5
"""Inside a search, a rung is fitted again once there are so many times the samples of its last fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A predictor to choose. growth: fitted again once there are so many times the samples of its last fit."""

    name: str
    make: PredictorFactory
    growth: float = CHEAP_GROWTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Why a rung was chosen. taus: mean held-out τ and its standard error by rung; empty with too few samples."""

    rung: str
    num_samples: int
    taus: dict[str, tuple[float, float]]


class Ladder:
    """A :class:`nasdeploy.optim.predictor.Predictor` that is one of its rungs.

    rungs: the simplest first, of different names. num_folds, num_repeats: of the cross-validation. knee: of
    :class:`nasdeploy.optim.targets.Targets`. seed: of the folds. The rung is chosen at the first fit with two samples a
    fold, then again each time the samples have doubled; with fewer it is the first one. A rung sees losses without what
    their steps add; of what it leaves unexplained, an architecture that was evaluated keeps its part. Raises ValueError
    without rungs, and for a name that occurs twice.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        *,
        num_candidates: Sequence[int],
        num_folds: int = 5,
        num_repeats: int = 2,
        knee: float | None = None,
        seed: int = 0,
    ) -> None:
        names = [rung.name for rung in rungs]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"rungs = {names}; expected at least one, each name once")
        self._rungs = {rung.name: rung for rung in rungs}
        self._num_folds, self._num_repeats, self._knee, self._seed = num_folds, num_repeats, knee, seed
        self._importance = OperationImportance(len(num_candidates), max(num_candidates))
        self._choice = Choice(rung=names[0], num_samples=0, taus={})
        self._model: Predictor | None = None
        self._own = OwnResiduals()
        self._variance = 0.0

    @property
    def choice(self) -> Choice:
        """The rung that was chosen last, and why."""
        return self._choice

    @property
    def growth(self) -> float:
        """How many times the samples of the last fit there should be before the next one."""
        return self._rungs[self._choice.rung].growth

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D), losses (N,) and steps (N,) alone, by another rung where that is due.

        Raises ValueError without a sample.
        """
        samples = Samples(choices=choices, losses=losses, steps=steps)
        if len(samples) >= max(2 * self._num_folds, CHOICE_GROWTH * self._choice.num_samples):
            self._choose(samples)
        elif self._choice.num_samples == 0:
            self._variance = variance_within(losses, steps)
        model = self._rungs[self._choice.rung].make()
        targets = Targets(samples, knee=self._knee).of(samples)
        model.fit(choices, targets, steps)
        self._model = model
        self._own.learn(choices, targets - model.predict(choices))
        self._importance.update_with(model.importance())

    def predict(self, choices: IntArray) -> FloatArray:
        """Return ψ (n,) of ``choices`` (n, D). Raises ValueError before a fit."""
        predicted: FloatArray = self._fitted().predict(choices) + self._own.expected(choices)[0]
        return predicted

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean (n,) and a diagonal covariance (n, n): what held-out samples showed when the rung was chosen."""
        own, left = self._own.expected(choices)
        mean = self._fitted().predict(choices) + own
        return diagonal_posterior(mean, self._variance, left=left)

    def gradient(self, theta: FloatArray) -> FloatArray:
        """Return ∂ψ/∂θ (..., D, C) at ``theta`` (..., D, C), of the rung: what is one architecture's own has none."""
        return self._fitted().gradient(theta)

    def importance(self) -> FloatArray:
        """Return the OIW (D, C): the running mean over all fits."""
        return self._importance.values

    def state_dict(self) -> dict[str, Any]:
        """Return all that predictions and the next choice depend on, as plain lists, numbers and text."""
        return {
            "rung": self._choice.rung,
            "num_samples": self._choice.num_samples,
            "taus": {name: list(tau) for name, tau in self._choice.taus.items()},
            "variance": self._variance,
            "importance": self._importance.state_dict(),
            "own": self._own.state_dict(),
            "model": None if self._model is None else self._model.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Raises ValueError when its rung is not one of these."""
        name = str(state["rung"])
        if name not in self._rungs:
            raise ValueError(f"state is of rung {name!r}; expected one of {', '.join(self._rungs)}")
        taus = {rung: (float(mean), float(error)) for rung, (mean, error) in state["taus"].items()}
        self._choice = Choice(rung=name, num_samples=int(state["num_samples"]), taus=taus)
        self._variance = float(state["variance"])
        self._importance.load_state_dict(state["importance"])
        self._own.load_state_dict(state["own"])
        self._model = None
        if state["model"] is not None:
            self._model = self._rungs[name].make()
            self._model.load_state_dict(state["model"])

    def _fitted(self) -> Predictor:
        if self._model is None:
            raise ValueError("predictor: predict before fit")
        return self._model

    def _choose(self, samples: Samples) -> None:
        latest = samples[np.argsort(samples.steps, kind="stable")[-MAX_RANKED:]]
        found = {name: self._validated(rung, latest) for name, rung in self._rungs.items()}
        name, best = next(iter(found.items()))
        for other, result in found.items():
            better = result.taus - best.taus
            if better.mean() > standard_error(better, num_folds=self._num_folds):
                name, best = other, result
        taus = {
            rung: (float(result.taus.mean()), standard_error(result.taus, num_folds=self._num_folds))
            for rung, result in found.items()
        }
        self._choice = Choice(rung=name, num_samples=len(samples), taus=taus)
        self._variance = best.variance

    def _validated(self, rung: Rung, samples: Samples) -> CrossValidation:
        return cross_validate(
            rung.make,
            samples,
            num_folds=self._num_folds,
            num_repeats=self._num_repeats,
            seed=self._seed,
            knee=self._knee,
        )


def proxy_ladder(
    num_candidates: Sequence[int],
    objectives: Sequence[Objective],
    *,
    rungs: Sequence[Rung],
    num_folds: int = 5,
    num_repeats: int = 2,
) -> Ladder:
    """Return the model of proxy validation for profiles with ``objectives``, as each job needs it."""
    return Ladder(
        rungs,
        num_candidates=num_candidates,
        num_folds=num_folds,
        num_repeats=num_repeats,
        knee=knee_of(objectives),
    )


def ridge_rungs(num_candidates: Sequence[int]) -> tuple[Rung, Rung]:
    """Return the two rungs in closed form: "ridge", which is additive, and "pairs", with neighbouring decisions."""
    return (
        Rung(name="ridge", make=lambda: RidgePredictor(num_candidates, num_folds=0)),
        Rung(name="pairs", make=lambda: RidgePredictor(num_candidates, pairs="neighbours", num_folds=0)),
    )
