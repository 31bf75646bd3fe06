"""L̂ with its uncertainty: a Gaussian process over architectures, from the recorded losses.

The equations are those of Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006 (GPML). The kernel
is a sum of main effects and of a product over all decisions, which holds interactions of any order; and the common
batch of a step moves all its losses alike, while the shared weights improve from step to step:

    k(c, c') = Σ_d v_d [c_d = c'_d]  +  s exp(-Σ_d r_d [c_d ≠ c'_d])          of the loss itself
             + l φ·φ' / F  +  g exp(-|φ - φ'|² / 2F)                          the same: what the costs φ (F,) tell
             + b [same step]  +  τ t t'                                       of when it was observed
             + σ² [same observation]                                          noise

t is log(1 + step), standardised. Predictions are of the first two lines alone, so that they can be compared with each
other. v, r, s, l, g, b, τ and σ² maximise their posterior (GPML 5.9) on at most 256 of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.categorical import flat_index
from nasdeploy.optim.features import CostFeatures
from nasdeploy.optim.kernel import Kernel, maximise_posterior

MAX_SAMPLES = 2048
"""Beyond so many the oldest half is forgotten: a sample more costs N², and old losses are of other weights."""
MAX_FITTED, MAX_FITTED_ONCE = 256, 384
"""How many samples the kernel is fitted on: while samples come in, and where it is done once."""
REFIT_GROWTH = 1.3
"""The kernel is fitted again once there are so many times the samples of the last time."""
KNEE = 3.0
"""Losses more than so many standard deviations above the median are compressed: see :func:`compressed`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scale:
    """How losses become targets of mean 0 and variance 1.

    median, deviation: robust ones, of what is compressed from the ``knee`` on.
    """

    knee: float
    median: float
    deviation: float
    mean: float
    spread: float

    @classmethod
    def of(cls, losses: FloatArray, knee: float = KNEE) -> Scale:
        """Return the scale of ``losses`` (N,)."""
        median = float(np.median(losses))
        deviation = 1.4826 * float(np.median(np.abs(losses - median)))  # of a normal distribution: its σ
        flat = compressed(losses, median, deviation, knee)
        return cls(
            knee=knee,
            median=median,
            deviation=deviation,
            mean=float(flat.mean()),
            spread=_spread(flat),
        )

    def target(self, losses: FloatArray) -> FloatArray:
        """Return ``losses`` (n,) in the units of the kernel."""
        return (compressed(losses, self.median, self.deviation, self.knee) - self.mean) / self.spread


def compressed(losses: FloatArray, median: float, deviation: float, knee: float = KNEE) -> FloatArray:
    """Return ``losses`` (n,), those beyond the knee by the logarithm of how far they lie beyond it.

    Networks that do not learn at all lose ten times what the others differ by. A process that expects such jumps
    everywhere tells nothing about the good ones, which stay as they are.
    """
    if deviation == 0.0:
        return losses
    beyond = np.maximum((losses - median) / deviation - knee, 0.0)
    flat: FloatArray = losses - deviation * (beyond - np.log1p(beyond))
    return flat


class Posterior:
    """What is known of the losses of m architectures, in their units: mean (m,), covariance (m, m), noise σ²."""

    def __init__(self, *, mean: FloatArray, covariance: FloatArray, noise: float) -> None:
        self.mean, self.covariance, self.noise = mean, covariance, noise

    @property
    def variance(self) -> FloatArray:
        """(m,), not below 0."""
        return np.maximum(self.covariance.diagonal(), 0.0)

    def moves(self) -> FloatArray:
        """Return by how much an observation of c moves the mean at j, (m of c, m of j)."""
        moves: FloatArray = self.covariance / np.sqrt(self.variance + self.noise)[:, None]
        return moves

    def condition(self, i: int) -> None:
        """Take architecture ``i`` as observed once more, with the loss that is expected: variances shrink."""
        column = self.covariance[:, i] / np.sqrt(max(self.covariance[i, i], 0.0) + self.noise)
        self.covariance = self.covariance - np.outer(column, column)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    step: int
    choices: IntArray
    losses: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """N samples in the units of the kernel: rows (N, D C + F), times (N, 2), target (N,)."""

    scale: Scale
    clock: tuple[float, float]  # mean and spread of log(1 + step)
    rows: FloatArray
    times: FloatArray
    target: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class _Factored:
    """What predictions need. root: (N, N), inverse of the Cholesky factor of the samples' covariance."""

    samples: _Samples
    root: FloatArray
    weights: FloatArray  # K⁻¹ y (N,)


class GaussianProcess:
    """A :class:`nasdeploy.optim.surrogate.Surrogate` and ``StreamingSurrogate`` that knows how sure it is.

    features: known of any architecture; none by default.
    knee: losses more than so many standard deviations above the median are compressed.
    max_samples: so many of the latest samples are kept; where more are observed one by one, half as many.
    """

    def __init__(
        self,
        num_candidates: Sequence[int],
        *,
        features: CostFeatures | None = None,
        knee: float = KNEE,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        self._num_columns, self._num_decisions = max(num_candidates), len(num_candidates)
        self.max_samples = max_samples
        self._knee, self._features = knee, features
        self._prior = Kernel.prior_mean(len(num_candidates), self._num_columns)
        self._kernel = self._prior
        self._batches: list[_Batch] = []
        self._num_based = 0  # so many batches were factored at once, the others one by one
        self._fitted_on = 0
        self._factored: _Factored | None = None

    @property
    def num_samples(self) -> int:
        """How many samples are remembered."""
        return sum(len(batch.losses) for batch in self._batches)

    @property
    def choices(self) -> IntArray:
        """(N, D) of what is remembered."""
        empty = np.empty((0, self._num_decisions), dtype=np.int64)
        return np.concatenate([empty, *(batch.choices for batch in self._batches)])

    @property
    def fitted_on(self) -> int:
        """To how many samples the kernel was fitted last; 0 before."""
        return self._fitted_on

    @property
    def spread(self) -> float:
        """The standard deviation of the losses when the kernel was fitted, 1 where all were equal.

        Raises ValueError before anything was observed.
        """
        return self._known().samples.scale.spread

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D), losses (N,) and steps (N,) alone. Raises ValueError without a sample."""
        if len(losses) == 0:
            raise ValueError("surrogate: no samples to fit; expected at least 1")
        self._kernel, self._fitted_on = self._prior, 0
        latest = np.argsort(steps, kind="stable")[-self.max_samples :]
        choices, losses, steps = choices[latest], losses[latest], steps[latest]
        self._batches = [_Batch(int(s), choices[steps == s], losses[steps == s]) for s in np.unique(steps)]
        self._build(max_fitted=MAX_FITTED_ONCE)

    def observe(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        """Take choices (n, D) with losses (n,), all evaluated at ``step``."""
        self._batches.append(_Batch(step, choices.copy(), losses.copy()))
        count = self.num_samples
        if self._factored is None or count >= REFIT_GROWTH * self._fitted_on or count > self.max_samples:
            self._forget()
            self._build()
        else:
            self._extend(self._batches[-1])

    def predict(self, choices: IntArray) -> FloatArray:
        """Return L̂ (n,) of ``choices`` (n, D). Raises ValueError before anything was observed."""
        known = self._known()
        covariance = self._kernel.of_losses(self._rows(choices), known.samples.rows)  # (n, N)
        return known.samples.scale.mean + known.samples.scale.spread * (
            covariance @ known.weights
        )  # GPML 2.25

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean and variance of the losses of ``choices`` (m, D). [GPML 2.25, 2.26]"""
        known = self._known()
        rows, scale = self._rows(choices), known.samples.scale
        whitened = self._kernel.of_losses(rows, known.samples.rows) @ known.root.T  # (m, N)
        covariance = self._kernel.of_losses(rows, rows) - whitened @ whitened.T
        return Posterior(
            mean=scale.mean + scale.spread * (whitened @ (known.root @ known.samples.target)),
            covariance=scale.spread**2 * covariance,
            noise=scale.spread**2 * self._kernel.noise,
        )

    def _known(self) -> _Factored:
        if self._factored is None:
            raise ValueError("surrogate: predict before fit")
        return self._factored

    def _forget(self) -> None:
        """Drop the oldest batches beyond half of the largest number of samples, where that was exceeded."""
        if self.num_samples <= self.max_samples:
            return
        while len(self._batches) > 1 and self.num_samples > self.max_samples // 2:
            self._batches.pop(0)

    def _build(self, *, max_fitted: int = MAX_FITTED) -> None:
        """Fit the kernel and factor the covariance of all that is remembered."""
        samples = self._samples()
        count = len(samples.target)
        rng = np.random.default_rng(count)
        some = rng.permutation(count)[:max_fitted]
        self._kernel = maximise_posterior(
            self._kernel,
            self._prior,
            samples.rows[some],
            samples.times[some],
            samples.target[some],
            again=self._fitted_on > 0,
        )
        self._fitted_on, self._num_based = count, len(self._batches)
        self._factored = self._factor(samples)

    def _samples(self) -> _Samples:
        """Return all that is remembered as the kernel sees it."""
        losses = np.concatenate([batch.losses for batch in self._batches])
        steps = np.concatenate([np.full(len(batch.losses), batch.step) for batch in self._batches])
        scale, clock = Scale.of(losses, self._knee), _clock(steps)
        return _Samples(scale, clock, self._rows(self.choices), _times(steps, clock), scale.target(losses))

    def _factor(self, samples: _Samples) -> _Factored:
        times = samples.times
        covariance = self._kernel.of_losses(samples.rows, samples.rows) + self._kernel.of_steps(times, times)
        covariance[np.diag_indices(len(covariance))] += self._kernel.noise
        root = np.linalg.inv(np.linalg.cholesky(covariance))
        return _Factored(samples, root, root.T @ (root @ samples.target))

    def _extend(self, batch: _Batch) -> None:
        """Append a batch to the factored samples: the factor grows by a block, in N² instead of N³ steps."""
        known = self._known()
        old = known.samples
        rows = self._rows(batch.choices)
        times = _times(np.full(len(batch.losses), batch.step), old.clock)
        across = self._kernel.of_losses(rows, old.rows) + self._kernel.of_steps(times, old.times)
        inside = self._kernel.of_losses(rows, rows) + self._kernel.of_steps(times, times)
        inside[np.diag_indices(len(inside))] += self._kernel.noise
        low = across @ known.root.T  # L21 = K21 L11⁻ᵀ
        corner = np.linalg.inv(np.linalg.cholesky(inside - low @ low.T))  # L22⁻¹
        count, size = len(old.target), len(old.target) + len(batch.losses)
        root = np.zeros((size, size))
        root[:count, :count] = known.root
        root[count:, :count] = -corner @ low @ known.root
        root[count:, count:] = corner
        target = np.concatenate([old.target, old.scale.target(batch.losses)])
        samples = _Samples(
            old.scale,
            old.clock,
            np.concatenate([old.rows, rows]),
            np.concatenate([old.times, times]),
            target,
        )
        self._factored = _Factored(samples, root, root.T @ (root @ target))

    def _rows(self, choices: IntArray) -> FloatArray:
        rows = np.zeros((len(choices), self._num_decisions * self._num_columns))
        np.put_along_axis(rows, flat_index(choices, self._num_columns), 1.0, axis=1)
        return rows if self._features is None else np.concatenate([rows, self._features.of(choices)], axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next prediction depends on, as plain lists and numbers."""
        return {
            "kernel": self._kernel.logs.tolist(),
            "fitted_on": self._fitted_on,
            "num_based": self._num_based,
            "batches": [[b.step, b.choices.tolist(), b.losses.tolist()] for b in self._batches],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, bit by bit: factored at once and then in the same blocks."""
        batches = [
            _Batch(
                int(step),
                np.array(choices, dtype=np.int64).reshape(-1, self._num_decisions),
                np.array(losses),
            )
            for step, choices, losses in state["batches"]
        ]
        self._kernel = Kernel(np.array(state["kernel"], dtype=np.float64), self._num_columns)
        self._fitted_on, self._num_based = int(state["fitted_on"]), int(state["num_based"])
        self._batches, self._factored = batches[: self._num_based], None
        if not batches:
            return
        if len(self._kernel.logs) != len(self._prior.logs):  # of a version whose kernel had other parts
            self._kernel, self._fitted_on, self._batches = self._prior, 0, batches
            self._build()
            return
        self._factored = self._factor(self._samples())
        for batch in batches[self._num_based :]:
            self._batches.append(batch)
            self._extend(batch)


def _clock(steps: IntArray) -> tuple[float, float]:
    """Return mean and spread of log(1 + step)."""
    logs = np.log1p(steps)
    return float(logs.mean()), _spread(logs)


def _spread(values: FloatArray) -> float:
    """Return the standard deviation, 1 where all are equal: rounding must not be taken for a difference."""
    return float(values.std()) if np.ptp(values) > 0.0 else 1.0


def _times(steps: IntArray, clock: tuple[float, float]) -> FloatArray:
    """Return step and t (n, 2)."""
    mean, spread = clock
    return np.stack([steps.astype(np.float64), (np.log1p(steps) - mean) / spread], axis=1)
