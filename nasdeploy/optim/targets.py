"""What is left of a loss once its step is taken out: the target of models that do not know steps.

    loss(c, t) = L(c) + trend(t) + batch(t) + noise

All of a step are evaluated on the same images, which moves their losses alike: batch(t), a random effect of variance b.
The weights get better from step to step: trend(t), linear in log(1 + t). Both are estimated beside an additive model of
L, since a search that samples better and better architectures would be taken for a trend otherwise. [Searle, Casella &
McCulloch, *Variance Components*, 1992: b from the mean squares between and within steps, batch(t) as its prediction]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.gaussian_process import Scale, compressed

NUM_ROUNDS = 3
"""Additive model and step effects take turns: each is estimated from what the other leaves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """What was evaluated: choices (N, D), losses (N,), steps (N,)."""

    choices: IntArray
    losses: FloatArray
    steps: IntArray

    def __len__(self) -> int:
        """N."""
        return len(self.losses)

    def __getitem__(self, rows: IntArray | BoolArray) -> Samples:
        """Return some of them, by indices or as a mask (N,)."""
        return Samples(choices=self.choices[rows], losses=self.losses[rows], steps=self.steps[rows])


class Targets:
    """How losses become targets, learnt from ``samples``. Raises ValueError without a sample.

    knee: losses more than so many standard deviations above the median are compressed, once their steps are taken out;
    see :func:`nasdeploy.optim.gaussian_process.compressed`. None: they stay as they are.
    """

    def __init__(self, samples: Samples, *, knee: float | None = None) -> None:
        if len(samples) == 0:
            raise ValueError("targets: no samples; expected at least 1")
        design, unit = _design(samples)
        solver = np.linalg.solve(design.T @ design + np.eye(design.shape[1]), design.T)  # (P + 1, N)
        losses = samples.losses - samples.losses.mean()
        self._steps, place = np.unique(samples.steps, return_inverse=True)
        self._effects, slope = np.zeros(len(self._steps)), 0.0
        for _ in range(NUM_ROUNDS):
            found = solver @ (losses - self._effects[place])
            self._effects, slope = step_effects(losses - design @ found, samples.steps), float(found[-1])
        self._slope, self._latest = slope / unit, float(np.log1p(self._steps[-1]))
        self._scale = None if knee is None else Scale.of(self._without_steps(samples), knee)

    def of(self, samples: Samples) -> FloatArray:
        """Return the targets (n,) of ``samples``, at the level of the latest step; steps may be others, too."""
        losses = self._without_steps(samples)
        if self._scale is None:
            return losses
        return compressed(losses, self._scale.median, self._scale.deviation, self._scale.knee)

    def _without_steps(self, samples: Samples) -> FloatArray:
        place = np.searchsorted(self._steps, samples.steps).clip(max=len(self._steps) - 1)
        effects = np.where(self._steps[place] == samples.steps, self._effects[place], 0.0)
        trend = self._slope * (np.log1p(samples.steps) - self._latest)
        losses: FloatArray = samples.losses - trend - effects
        return losses


def _design(samples: Samples) -> tuple[FloatArray, float]:
    """Return one-hot choices and, last, log(1 + step), all centred: (N, P + 1), the last with variance 1 or 0.

    Also what the last column was divided by.
    """
    one_hot = categorical.one_hot(samples.choices, int(samples.choices.max()) + 1).reshape(len(samples), -1)
    times = np.log1p(samples.steps)
    unit = float(times.std()) if np.ptp(times) > 0.0 else 1.0
    design = np.column_stack([one_hot, times / unit])
    return design - design.mean(axis=0), unit


def step_effects(values: FloatArray, steps: IntArray) -> FloatArray:
    """Return what each distinct step adds to ``values`` (N,), ascending, shrunken by how sure that is: (S,)."""
    distinct, group, counts = np.unique(steps, return_inverse=True, return_counts=True)
    num_steps, freedom = len(distinct), len(values) - len(distinct)
    if num_steps < 2 or freedom == 0:
        return np.zeros(num_steps)
    means = np.bincount(group, values) / counts
    within = float(((values - means[group]) ** 2).sum()) / freedom
    around = means - values.mean()
    between = float((counts * around**2).sum()) / (num_steps - 1)
    variance = max(0.0, between - within) / float(counts.mean())  # b
    total = variance + within / counts
    effects: FloatArray = around * variance / np.where(total > 0.0, total, 1.0)
    return effects
