"""L̂: a cheap model of the validation loss, learnt from the past samples of all distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.moments import Moments

Pairs = Literal["none", "neighbours"]

REFIT_SHARE = 1 / 16
"""A model is fitted again once so much of what it remembers is new: at every step in the beginning, then rarely."""


class Surrogate(Protocol):
    """The seat of L̂. Its predictions are compared with each other, so a common offset does not matter."""

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D) with losses (N,) that were evaluated at ``steps`` (N,)."""
        ...

    def predict(self, choices: IntArray) -> FloatArray:
        """Return L̂ (n,) of ``choices`` (n, D), as of the latest step that was fitted."""
        ...


class StreamingSurrogate(Protocol):
    """The seat of L̂ inside the doubly robust gradient: a model that learns step by step and can be stored."""

    def observe(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        """Take choices (n, D) with losses (n,), all evaluated at ``step``; steps never fall."""
        ...

    def predict(self, choices: IntArray) -> FloatArray:
        """Return L̂ (n,) of ``choices`` (n, D) from what was observed; called only after an ``observe``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit by bit, as plain lists, numbers and text."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    effects: FloatArray  # (P,) in units of the loss, one per candidate and pair
    intercept: float  # L̂ of an architecture without effects, at the latest step


class RidgeSurrogate:
    """Ridge regression on one-hot choices, on pairs of neighbouring choices, and on the step.

    The step is a covariate because the supernet improves while it is sampled: without it, candidates that are
    sampled late would look good. covariate: how the loss is taken to fall, with log(1 + step) or linearly.
    pairs: "neighbours" adds the products of the one-hots of decisions d and d + 1, which is where layers meet;
    "none" leaves an additive model. half_life: a sample that is so many steps old counts half. ridge: the penalty
    in units of one sample. pair_ridge: that of the pairs. It is larger since interactions are smaller than main
    effects as a rule (as a prior: of a quarter of their variance) and each pair is seen C times more rarely; main
    effects, which lie in the span of the pairs, are then explained as such.
    """

    def __init__(
        self,
        num_candidates: Sequence[int],
        *,
        pairs: Pairs = "neighbours",
        ridge: float = 1.0,
        pair_ridge: float = 4.0,
        half_life: float = 200.0,
        covariate: Literal["log1p", "linear"] = "log1p",
    ) -> None:
        if not min(ridge, pair_ridge) > 0.0 or not half_life > 0.0:
            raise ValueError(
                f"ridge = {ridge}, pair_ridge = {pair_ridge}, half_life = {half_life}; expected positive numbers"
            )
        self._features = _Features(num_candidates, pairs=pairs)
        self._covariate = covariate
        sizes = [self._features.num_main, self._features.num_pairs, 1]
        self._penalty = np.repeat([ridge, pair_ridge, ridge], sizes)  # (P + 1,) the last one is of the step
        self._moments = Moments(self._features.size, half_life=half_life)
        self._fit: _Fit | None = None
        self._num_new = 0  # samples since the last fit

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn anew from choices (N, D), losses (N,) and steps (N,). Raises ValueError without a sample."""
        if len(losses) == 0:
            raise ValueError("surrogate: no samples to fit; expected at least 1")
        self._moments.clear()
        order = np.argsort(steps, kind="stable")
        for step, members in _runs(steps[order]):
            self._add(choices[order[members]], losses[order[members]], step)
        self._solve()

    def observe(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        """Take choices (n, D) with losses (n,) of ``step``, which is not before that of the last call."""
        self._add(choices, losses, step)

    def predict(self, choices: IntArray) -> FloatArray:
        """Return L̂ (n,) of ``choices`` (n, D) at the latest step. Raises ValueError before a sample came.

        What came since the last fit enters once it is a sixteenth of all that the model remembers.
        """
        fit = self._fitted()
        predicted: FloatArray = fit.intercept + fit.effects.take(self._features.places(choices)).sum(axis=-1)
        return predicted

    def effects(self) -> tuple[FloatArray, FloatArray, float]:
        """Return main effects (D, C), those of neighbouring pairs (D - 1, C, C), both padded with 0, and the rest.

        L̂ is the sum of all three. Raises ValueError before a sample came.
        """
        fit = self._fitted()
        main, pairs = self._features.unpacked(fit.effects)
        return main, pairs, fit.intercept

    def r_squared(self, choices: IntArray, losses: FloatArray) -> float:
        """Return R² on ``choices`` (n, D), ``losses`` (n,) of one step; 0 where the losses do not vary.

        Both sides are centred, since L̂ serves to compare: R² = 1 - Σ(L - L̂)² / Σ L².
        """
        actual = losses - losses.mean()
        predicted = self.predict(choices)
        total = float((actual**2).sum())
        left = float(((actual - (predicted - predicted.mean())) ** 2).sum())
        return 1.0 - left / total if total > 0.0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit by bit, as plain lists, numbers and text."""
        fit = None
        if self._fit is not None:
            fit = {"effects": self._fit.effects.tolist(), "intercept": self._fit.intercept}
        return {"moments": self._moments.state_dict(), "fit": fit, "num_new": self._num_new}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Raises ValueError when it is that of another space."""
        self._moments.load_state_dict(state["moments"])
        fit = state["fit"]
        self._fit = None
        if fit is not None:
            effects = np.array(fit["effects"], dtype=np.float64)
            self._fit = _Fit(effects=effects, intercept=float(fit["intercept"]))
        self._num_new = int(state["num_new"])

    def _add(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        time = float(np.log1p(step)) if self._covariate == "log1p" else float(step)
        self._moments.add(self._features.places(choices), losses, step=step, time=time)
        self._num_new += len(losses)

    def _fitted(self) -> _Fit:
        """Return the model, fitted again where that is due."""
        if self._fit is None or self._num_new >= REFIT_SHARE * self._moments.weight:
            if self._moments.weight == 0.0:
                raise ValueError("surrogate: predict before fit")
            if self._num_new > 0 or self._fit is None:
                self._solve()
        assert self._fit is not None
        return self._fit

    def _solve(self) -> None:
        """Solve (X'WX + Λ) b = X'Wy, both sides centred and the time standardised; the scale of y does not matter."""
        found = self._moments.centred()
        scaled = np.where(np.arange(len(self._penalty)) < self._features.size, 1.0, found.time_scale)
        gram = found.gram / np.outer(scaled, scaled)
        gram[np.diag_indices_from(gram)] += self._penalty
        slopes = np.linalg.solve(gram, found.cross / scaled)  # (P + 1,) in units of the loss
        effects, slope = slopes[:-1], float(slopes[-1]) / found.time_scale
        means = found.means
        level = found.mean_target + slope * (found.latest_time - float(means[-1]))
        self._fit = _Fit(effects=effects, intercept=level - float(means[:-1] @ effects))
        self._num_new = 0


class _Features:
    """Where the ones of an architecture's features lie: its choices, then its pairs of neighbouring choices."""

    def __init__(self, num_candidates: Sequence[int], *, pairs: Pairs) -> None:
        self._sizes = sizes = np.array(num_candidates, dtype=np.int64)
        self._starts = np.cumsum(sizes) - sizes  # (D,)
        self.num_main = int(sizes.sum())
        pair_sizes = sizes[:-1] * sizes[1:] if pairs == "neighbours" else np.empty(0, dtype=np.int64)
        self.num_pairs = int(pair_sizes.sum())
        self._pair_starts = self.num_main + np.cumsum(pair_sizes) - pair_sizes  # (D - 1,)
        self._pair_strides = sizes[1:]
        self.size = self.num_main + self.num_pairs  # P

    def places(self, choices: IntArray) -> IntArray:
        """Return the features (n, D + D - 1) that are 1 for ``choices`` (n, D); all others are 0."""
        main: IntArray = choices + self._starts
        if self.num_pairs == 0:
            return main
        pairs = self._pair_starts + choices[:, :-1] * self._pair_strides + choices[:, 1:]
        return np.concatenate([main, pairs], axis=1)

    def unpacked(self, effects: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return ``effects`` (P,) as arrays (D, C) and (D - 1, C, C), padded with 0."""
        width = int(self._sizes.max())
        main = np.zeros((len(self._sizes), width))
        pairs = np.zeros((len(self._sizes) - 1, width, width))
        for d, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
            main[d, :size] = effects[start : start + size]
        for d in range(len(pairs) if self.num_pairs else 0):
            here, there, start = self._sizes[d], self._sizes[d + 1], self._pair_starts[d]
            pairs[d, :here, :there] = effects[start : start + here * there].reshape(here, there)
        return main, pairs


def _runs(steps: IntArray) -> list[tuple[int, slice]]:
    """Return each step in ascending ``steps`` (N,) with where its samples lie."""
    values, starts = np.unique(steps, return_index=True)
    ends = [*starts[1:].tolist(), len(steps)]
    return [
        (step, slice(start, end))
        for step, start, end in zip(values.tolist(), starts.tolist(), ends, strict=True)
    ]
