"""How well a model of the loss ranks architectures that it has not seen.

By Kendall's τ-b between held-out losses and predictions, within a fold. Training τ says nothing: a model with a few
hundred parameters orders shuffled labels as well. Leave-one-out does not serve either, since what is left out moves the
mean of the others away from itself. Only losses that were evaluated are ranked, never modelled ones.

Losses are ranked without what their steps add to them, as far as the training part of the fold tells it: otherwise τ
would say how well an architecture tells when it was sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.surrogate import Surrogate
from nasdeploy.optim.targets import Samples, Targets

ROUNDING = 1e-9
"""Predictions that differ by less than so much of their range are equal: sums are rounded by their order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossValidation:
    """taus: (repeats * folds,), τ of each held-out fold. variance: of a held-out loss around its prediction."""

    taus: FloatArray
    variance: float


def kendall_tau(one: FloatArray, other: FloatArray) -> float:
    """Return Kendall's τ-b of two lists of n numbers; 0 where one of them is constant. In n² steps.

    τ-b = (concordant - discordant pairs) / √(pairs without tie in one · pairs without tie in the other)
    """
    n = len(one)
    left, right = np.triu_indices(n, k=1)
    ascends, also = np.sign(one[right] - one[left]), np.sign(other[right] - other[left])
    untied = float(np.abs(ascends).sum()) * float(np.abs(also).sum())
    return float(ascends @ also) / float(np.sqrt(untied)) if untied > 0.0 else 0.0


def held_out_tau(make: Callable[[], Surrogate], samples: Samples, held: BoolArray) -> float:
    """Return τ on the samples that are ``held`` (N,) of a new model that is fitted to all others."""
    predicted, targets = _held_out(make, samples, held, knee=None)
    return kendall_tau(rounded(predicted), targets)


def cross_validate(
    make: Callable[[], Surrogate],
    samples: Samples,
    *,
    num_folds: int,
    num_repeats: int,
    seed: int,
    knee: float | None = None,
) -> CrossValidation:
    """Return how well models of ``make`` do on what they have not seen, by ``num_repeats`` divisions into folds.

    The divisions depend on ``seed`` and on the number of samples N alone: models can be compared fold by fold. knee: of
    :class:`nasdeploy.optim.targets.Targets`. Raises ValueError for less than two samples a fold.
    """
    if num_folds < 2 or num_repeats < 1 or len(samples) < 2 * num_folds:
        raise ValueError(
            f"{len(samples)} samples in {num_folds} folds, {num_repeats} times; expected at least 2 folds of at least "
            "2 samples, once"
        )
    taus, variances = [], []
    for repeat in range(num_repeats):
        rng = np.random.default_rng([seed, repeat])
        fold = rng.permutation(len(samples)) % num_folds  # (N,)
        left = np.empty(len(samples))
        for number in range(num_folds):
            held = fold == number
            predicted, targets = _held_out(make, samples, held, knee=knee)
            taus.append(kendall_tau(rounded(predicted), targets))
            left[held] = targets - predicted
        variances.append(variance_within(left, samples.steps))
    return CrossValidation(taus=np.array(taus), variance=float(np.mean(variances)))


def standard_error(differences: FloatArray, *, num_folds: int) -> float:
    """Return the standard error of the mean of ``differences`` (repeats * folds,) between two models.

    Folds share their training samples, so that s²/J would be too small: (1/J + test/train) s² of Nadeau & Bengio,
    *Inference for the Generalization Error*, Machine Learning 52, 2003.
    """
    overlap = 1.0 / len(differences) + 1.0 / (num_folds - 1)
    return float(np.sqrt(overlap * differences.var(ddof=1)))


def variance_within(values: FloatArray, steps: IntArray) -> float:
    """Return the variance of ``values`` (N,) around the means of their steps; around one mean if each stands alone."""
    _, group, counts = np.unique(steps, return_inverse=True, return_counts=True)
    freedom = len(values) - len(counts)
    if freedom == 0:
        return float(values.var(ddof=1)) if len(values) > 1 else 0.0
    apart = values - (np.bincount(group, values) / counts)[group]
    return float((apart**2).sum()) / freedom


def rounded(values: FloatArray) -> FloatArray:
    """Return ``values`` (n,) so that what differs by rounding only is equal."""
    unit = ROUNDING * float(np.ptp(values))
    return np.round((values - values.min()) / unit) if unit > 0.0 else np.zeros_like(values)


def _held_out(
    make: Callable[[], Surrogate], samples: Samples, held: BoolArray, *, knee: float | None
) -> tuple[FloatArray, FloatArray]:
    """Return predictions and targets (m,) of what is ``held`` (N,) back; nothing is learnt from it, steps included."""
    train, test = samples[~held], samples[held]
    targets = Targets(train, knee=knee)
    model = make()
    model.fit(train.choices, targets.of(train), train.steps)
    return model.predict(test.choices), targets.of(test)
