"""L̂: a cheap model of the validation loss, learnt from the past samples of all distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.categorical import flat_index


class Surrogate(Protocol):
    """The seat of L̂. Its predictions are compared with each other, so a common offset does not matter."""

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D) with losses (N,) that were evaluated at ``steps`` (N,)."""
        ...

    def predict(self, choices: IntArray) -> FloatArray:
        """Return L̂ (n,) of ``choices`` (n, D), as of the latest step that was fitted."""
        ...

    def r_squared(self, choices: IntArray, losses: FloatArray) -> float:
        """Return the share of the variance of ``losses`` (n,) explained; below 0 if worse than the mean."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    effects: FloatArray  # (D * C,) in units of the loss
    means: FloatArray  # (D * C,) how often each candidate was seen
    level: float  # of the loss at the latest step


class RidgeSurrogate:
    """Additive ridge regression on one-hot choices and the step.

    The step is a covariate because the supernet improves while it is sampled: without it, candidates that are
    sampled late would look good. covariate: how the loss is taken to fall, with log(1 + step) or linearly.
    half_life: a sample that is so many steps old counts half. ridge: the penalty in units of one sample, on a
    standardised target.
    """

    def __init__(
        self,
        num_candidates: Sequence[int],
        *,
        ridge: float = 1.0,
        half_life: float = 200.0,
        covariate: Literal["log1p", "linear"] = "log1p",
    ) -> None:
        if not ridge > 0.0 or not half_life > 0.0:
            raise ValueError(f"ridge = {ridge}, half_life = {half_life}; expected positive numbers")
        self._num_columns = max(num_candidates)
        self._size = len(num_candidates) * self._num_columns
        self._ridge = ridge
        self._half_life = half_life
        self._covariate = covariate
        self._fit: _Fit | None = None

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D), losses (N,) and steps (N,). Raises ValueError without a sample."""
        if len(losses) == 0:
            raise ValueError("surrogate: no samples to fit; expected at least 1")
        age = steps.max() - steps
        weights = 0.5 ** (age / self._half_life)  # (N,) exponentially forgetting
        share = weights / weights.sum()
        time = np.log1p(steps) if self._covariate == "log1p" else steps.astype(np.float64)

        design = np.column_stack([self._one_hot(choices), _standardised(time, share)])  # (N, D*C + 1)
        means = share @ design
        mean = float(share @ losses)
        target = _standardised(losses, share)
        scale = float(np.sqrt(share @ (losses - mean) ** 2))

        centred = design - means
        gram = centred.T @ (weights[:, None] * centred) + self._ridge * np.eye(design.shape[1])
        slopes = np.linalg.solve(gram, centred.T @ (weights * target))  # (D*C + 1,)
        latest = design[steps.argmax(), -1]
        self._fit = _Fit(
            effects=scale * slopes[:-1],
            means=means[:-1],
            level=mean + scale * float(slopes[-1]) * float(latest - means[-1]),
        )

    def predict(self, choices: IntArray) -> FloatArray:
        """Return L̂ (n,) of ``choices`` (n, D) at the latest fitted step. Raises ValueError before a fit."""
        if self._fit is None:
            raise ValueError("surrogate: predict before fit")
        # plain form: level + (one_hot(choices) - means) @ effects
        fit = self._fit
        effects = fit.effects.take(flat_index(choices, self._num_columns)).sum(axis=-1)  # (n, D) -> (n,)
        predicted: FloatArray = fit.level - float(fit.means @ fit.effects) + effects
        return predicted

    def r_squared(self, choices: IntArray, losses: FloatArray) -> float:
        """Return R² on ``choices`` (n, D), ``losses`` (n,) of one step; 0 where the losses do not vary.

        Both sides are centred, since L̂ serves to compare: R² = 1 - Σ(L - L̂)² / Σ L².
        """
        actual = losses - losses.mean()
        predicted = self.predict(choices)
        total = float((actual**2).sum())
        left = float(((actual - (predicted - predicted.mean())) ** 2).sum())
        return 1.0 - left / total if total > 0.0 else 0.0

    def _one_hot(self, choices: IntArray) -> FloatArray:
        rows = np.zeros((len(choices), self._size))
        np.put_along_axis(rows, flat_index(choices, self._num_columns), 1.0, axis=1)
        return rows


def _standardised(values: FloatArray, share: FloatArray) -> FloatArray:
    """Return ``values`` with weighted mean 0 and variance 1, or zeros where they do not vary."""
    centred = values - share @ values
    scale = float(np.sqrt(share @ centred**2))
    return centred / scale if scale > 1e-12 * float(np.abs(values).max()) else np.zeros(len(values))
