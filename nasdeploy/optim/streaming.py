"""A ladder of predictors that learns step by step: the seat of L̂ inside a search."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.acquisition import UncertainModel
from nasdeploy.optim.gaussian_process import MAX_SAMPLES, Posterior
from nasdeploy.optim.ladder import Ladder


class StreamingPredictor(UncertainModel, Protocol):
    """What an evolution rests on: it knows gradients, and which candidates matter, besides."""

    def gradient(self, theta: FloatArray) -> FloatArray:
        """Return ∂ψ/∂θ (..., D, C) at ``theta`` (..., D, C)."""
        ...

    def importance(self) -> FloatArray:
        """Return the OIW (D, C)."""
        ...


class StreamingLadder:
    """A :class:`StreamingPredictor`: ``ladder``, fitted again once its rung has seen enough more.

    max_samples: once there are more, the oldest half is forgotten, since old losses are of other weights.
    """

    def __init__(self, ladder: Ladder, *, num_decisions: int, max_samples: int = MAX_SAMPLES) -> None:
        self.ladder = ladder
        self.max_samples = max_samples
        self._num_decisions = num_decisions
        self._batches: list[tuple[int, IntArray, FloatArray]] = []
        self._num_samples = 0
        self._num_new = 0  # samples since the last fit

    @property
    def num_samples(self) -> int:
        """How many samples are remembered."""
        return self._num_samples

    @property
    def choices(self) -> IntArray:
        """(N, D) of what is remembered."""
        empty = np.empty((0, self._num_decisions), dtype=np.int64)
        return np.concatenate([empty, *(choices for _, choices, _ in self._batches)])

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D), losses (N,) and steps (N,) alone. Raises ValueError without a sample."""
        self._batches = [
            (step, choices[steps == step], losses[steps == step]) for step in np.unique(steps).tolist()
        ]
        self._num_samples, self._num_new = len(losses), 0
        self.ladder.fit(choices, losses, steps)

    def observe(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        """Take choices (n, D) with losses (n,), all evaluated at ``step``."""
        self._batches.append((step, choices.copy(), losses.copy()))
        self._num_samples += len(losses)
        self._num_new += len(losses)
        if self._num_samples > self.max_samples:
            while len(self._batches) > 1 and self._num_samples > self.max_samples // 2:
                self._num_samples -= len(self._batches.pop(0)[2])

    def predict(self, choices: IntArray) -> FloatArray:
        """Return ψ (n,) of ``choices`` (n, D). Raises ValueError before anything was observed."""
        return self._fitted().predict(choices)

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean (n,) and a diagonal covariance (n, n) of the losses of ``choices`` (n, D)."""
        return self._fitted().posterior(choices)

    def gradient(self, theta: FloatArray) -> FloatArray:
        """Return ∂ψ/∂θ (..., D, C) at ``theta`` (..., D, C)."""
        return self._fitted().gradient(theta)

    def importance(self) -> FloatArray:
        """Return the OIW (D, C)."""
        return self._fitted().importance()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit by bit, as plain lists, numbers and text."""
        return {
            "ladder": self.ladder.state_dict(),
            "num_new": self._num_new,
            "batches": [[step, choices.tolist(), losses.tolist()] for step, choices, losses in self._batches],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self.ladder.load_state_dict(state["ladder"])
        self._num_new = int(state["num_new"])
        self._batches = [
            (
                int(step),
                np.array(choices, dtype=np.int64).reshape(-1, self._num_decisions),
                np.array(losses, dtype=np.float64),
            )
            for step, choices, losses in state["batches"]
        ]
        self._num_samples = sum(len(losses) for _, _, losses in self._batches)

    def _fitted(self) -> Ladder:
        """Return the ladder, fitted again where that is due."""
        num_known = self._num_samples - self._num_new
        if self._num_new > 0 and self._num_samples >= self.ladder.growth * num_known:
            steps = np.repeat([step for step, _, _ in self._batches], [len(b[2]) for b in self._batches])
            self.ladder.fit(self.choices, np.concatenate([b[2] for b in self._batches]), steps)
            self._num_new = 0
        return self.ladder
