"""ψ: from architecture to validation loss, learnt from what was evaluated. The seat, and its two closed forms.

Li, Dong, Wang, Xu, *NAS in A Proxy Validation Loss Landscape*, ICML 2020, and *NAS via Proxy Validation*, TPAMI 2023,
doi 10.1109/TPAMI.2022.3217648: a search moves on the modelled losses of what it has evaluated. Costs are exact, so
that one ψ serves all profiles. What the papers leave open is fixed in the docstrings of :class:`Predictor`.

:mod:`nasdeploy.optim.ladder` chooses between predictors; :mod:`nasdeploy.optim.streaming` lets one learn step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.cross_validation import cross_validate, variance_within
from nasdeploy.optim.gaussian_process import Posterior
from nasdeploy.optim.operation_importance import OperationImportance, comparable, spread_of
from nasdeploy.optim.surrogate import Pairs, RidgeSurrogate
from nasdeploy.optim.targets import Samples

NUM_GRADIENTS = 64
"""Importance is a mean over the gradients at so many of the latest architectures."""
LEAST_VARIANCE = 1e-24
"""Of a loss that held-out samples never missed: what is left is rounding, and nothing is divided by 0."""


class Predictor(Protocol):
    """A model of the loss that is fitted to all samples at once; it satisfies ``Surrogate``, too.

    The relaxed ψ(θ) takes probabilities θ (D, C), padded with zeros, where an architecture has a one-hot: ψ(one-hot of
    c) = predict(c). A model that is linear in every single decision has ψ(θ) = E_θ[predict(c)]. All is deterministic:
    the same samples in the same order give the same predictions.
    """

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D) with losses (N,) of ``steps`` (N,) alone. Raises ValueError without a sample.

        Losses drift while weights are trained: the step is a covariate, or what is fitted is without the drift.
        """
        ...

    def predict(self, choices: IntArray) -> FloatArray:
        """Return ψ (n,) of ``choices`` (n, D) in units of the loss, as of the latest step fitted.

        Raises ValueError before a fit.
        """
        ...

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean (n,) and covariance (n, n) of the losses of ``choices`` (n, D).

        The covariance may be diagonal. Its size is calibrated on held-out samples, never on those fitted.
        """
        ...

    def gradient(self, theta: FloatArray) -> FloatArray:
        """Return ∂ψ/∂θ at ``theta`` (..., D, C): (..., D, C), 0 in the padding.

        Within a decision only differences count, since probabilities sum to 1.
        """
        ...

    def importance(self) -> FloatArray:
        """Return the OIW (D, C) of the candidates, of gradients at some of the latest samples fitted."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that predictions depend on, as plain lists, numbers and text."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; predictions are the same to the bit."""
        ...


PredictorFactory = Callable[[], Predictor]
"""Returns a predictor that has seen nothing. All that come from one factory are alike."""


class RidgePredictor:
    """A :class:`Predictor`: ridge regression on one-hot choices and the step, in closed form.

    pairs: "neighbours" adds the products of neighbouring decisions, where layers meet. Those of all decisions would be
    too many: 41 decisions of 6 candidates have 29 520 pairs, 1 440 of them neighbours. ridge, pair_ridge, half_life: as
    of :class:`nasdeploy.optim.surrogate.RidgeSurrogate`, whose predictions do not depend on the scale of the losses.
    num_folds: the variance is that of so many held-out folds; 0: that of the losses, as if nothing were explained.
    """

    def __init__(
        self,
        num_candidates: Sequence[int],
        *,
        pairs: Pairs = "none",
        ridge: float = 1.0,
        pair_ridge: float = 4.0,
        half_life: float = 200.0,
        num_folds: int = 5,
    ) -> None:
        self._num_candidates = tuple(num_candidates)
        self._options: dict[str, Any] = {
            "pairs": pairs,
            "ridge": ridge,
            "pair_ridge": pair_ridge,
            "half_life": half_life,
        }
        self._num_folds = num_folds
        self._width = max(num_candidates)
        self._effects: FloatArray | None = None  # main (D, C)
        self._pairs: FloatArray = np.zeros((len(num_candidates) - 1, self._width, self._width))
        self._intercept, self._variance = 0.0, 0.0
        self._importance = OperationImportance(len(num_candidates), self._width)

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D), losses (N,) and steps (N,) alone. Raises ValueError without a sample."""
        model = RidgeSurrogate(self._num_candidates, **self._options)
        model.fit(choices, losses, steps)
        self._effects, self._pairs, self._intercept = model.effects()
        latest = np.argsort(steps, kind="stable")[-NUM_GRADIENTS:]
        self._importance = OperationImportance(len(self._num_candidates), self._width)
        gradients = self.gradient(categorical.one_hot(choices[latest], self._width))
        mask = categorical.mask_array(self._num_candidates)
        self._importance.update(comparable(gradients, mask, spread=spread_of(losses)))
        self._variance = self._calibrated(Samples(choices=choices, losses=losses, steps=steps))

    def predict(self, choices: IntArray) -> FloatArray:
        """Return ψ (n,) of ``choices`` (n, D). Raises ValueError before a fit."""
        main = self._fitted().ravel().take(categorical.flat_index(choices, self._width)).sum(axis=1)
        place = choices[:, :-1] * self._width + choices[:, 1:]
        pairs = self._pairs.ravel().take(categorical.flat_index(place, self._width**2)).sum(axis=1)
        predicted: FloatArray = self._intercept + main + pairs
        return predicted

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean (n,) and a diagonal covariance (n, n) of the losses of ``choices`` (n, D)."""
        return diagonal_posterior(self.predict(choices), self._variance)

    def gradient(self, theta: FloatArray) -> FloatArray:
        """Return ∂ψ/∂θ (..., D, C) at ``theta`` (..., D, C): effects, and expected ones of the pairs."""
        gradient: FloatArray = np.broadcast_to(self._fitted(), theta.shape).copy()
        gradient[..., :-1, :] += (self._pairs @ theta[..., 1:, :, None])[..., 0]
        gradient[..., 1:, :] += (theta[..., :-1, None, :] @ self._pairs)[..., 0, :]
        return gradient

    def importance(self) -> FloatArray:
        """Return the OIW (D, C), 0 before a fit."""
        return self._importance.values

    def state_dict(self) -> dict[str, Any]:
        """Return all that predictions depend on, as plain lists, numbers and text."""
        return {
            "effects": None if self._effects is None else self._effects.tolist(),
            "pairs": self._pairs.tolist() if self._options["pairs"] != "none" else None,
            "intercept": self._intercept,
            "variance": self._variance,
            "importance": self._importance.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Raises ValueError when it is that of another space."""
        self._importance.load_state_dict(state["importance"])
        self._effects = None if state["effects"] is None else np.array(state["effects"], dtype=np.float64)
        if state["pairs"] is not None:
            self._pairs = np.array(state["pairs"], dtype=np.float64).reshape(self._pairs.shape)
        self._intercept, self._variance = float(state["intercept"]), float(state["variance"])

    def _fitted(self) -> FloatArray:
        if self._effects is None:
            raise ValueError("predictor: predict before fit")
        return self._effects

    def _calibrated(self, samples: Samples) -> float:
        """Return the variance of held-out losses around their predictions."""
        if self._num_folds == 0 or len(samples) < 2 * self._num_folds:
            return variance_within(samples.losses, samples.steps)
        make = lambda: RidgePredictor(self._num_candidates, num_folds=0, **self._options)  # noqa: E731
        return cross_validate(make, samples, num_folds=self._num_folds, num_repeats=1, seed=0).variance


def half_of(variance: float) -> float:
    """Return what of the ``variance`` of held-out losses is an architecture's own, and as much is noise.

    :mod:`nasdeploy.optim.residuals` says why by halves.
    """
    return max(variance / 2.0, LEAST_VARIANCE)


def diagonal_posterior(mean: FloatArray, variance: float, *, left: FloatArray | None = None) -> Posterior:
    """Return the posterior of losses (n,) whose errors are independent: own part and noise make up ``variance``.

    variance: of held-out losses around their predictions. left: the shares (n,) of the own part that are still
    unknown, all by default.
    """
    half = half_of(variance)
    own = np.ones(len(mean)) if left is None else left
    return Posterior(mean=mean, covariance=np.diag(half * own), noise=half)
