"""The Gaussian process in the seats of ``Predictor`` and ``StreamingPredictor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.features import CostFeatures
from nasdeploy.optim.gaussian_process import KNEE, MAX_SAMPLES, GaussianProcess
from nasdeploy.optim.operation_importance import OperationImportance, comparable

NUM_GRADIENTS = 16
"""Importance is updated, each time the kernel was fitted, by the gradients at so many of the latest architectures."""
NUM_DRAWS = 64
"""What a gradient between architectures is a mean over."""


class GaussianPredictor(GaussianProcess):
    """A Gaussian process with gradients and importance; all else is as without them."""

    def __init__(
        self,
        num_candidates: Sequence[int],
        *,
        features: CostFeatures | None = None,
        knee: float = KNEE,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        super().__init__(num_candidates, features=features, knee=knee, max_samples=max_samples)
        self._allowed = categorical.mask_array(num_candidates)
        self._importance = OperationImportance(*self._allowed.shape)
        self._importance_of = 0  # of how many samples the kernel was that the importance has seen

    def gradient(self, theta: FloatArray) -> FloatArray:
        """Return ∂ψ/∂θ (..., D, C) at ``theta`` (..., D, C), of ψ(θ) = E_θ[predict(c)].

        It is E_θ[predict(c) | c_d = j]: exact where ``theta`` is an architecture's one-hot, otherwise a mean over 64
        draws that are always the same.
        """
        flat = theta.reshape(-1, *self._allowed.shape)
        return np.stack([self._gradient(one) for one in flat]).reshape(theta.shape)

    def importance(self) -> FloatArray:
        """Return the OIW (D, C), 0 before anything was observed."""
        if self._importance_of != self.fitted_on:
            latest = categorical.one_hot(self.choices[-NUM_GRADIENTS:], self._allowed.shape[1])
            self._importance.update(comparable(self.gradient(latest), self._allowed, spread=self.spread))
            self._importance_of = self.fitted_on
        return self._importance.values

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next prediction depends on, as plain lists and numbers."""
        importance = {"values": self._importance.state_dict(), "of": self._importance_of}
        return {**super().state_dict(), "importance": importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, bit by bit."""
        super().load_state_dict(state)
        self._importance.load_state_dict(state["importance"]["values"])
        self._importance_of = int(state["importance"]["of"])

    def _gradient(self, theta: FloatArray) -> FloatArray:
        """Return E_θ[predict(c) | c_d = j] (D, C) at ``theta`` (D, C), 0 in the padding."""
        exact = bool(np.equal(theta.max(axis=-1), 1.0).all())
        repeated = np.broadcast_to(theta, (1 if exact else NUM_DRAWS, *theta.shape))
        drawn: IntArray = categorical.sample(repeated, np.random.default_rng(0))
        d, j = np.nonzero(self._allowed)
        changed = np.repeat(drawn, len(d), axis=0)  # (draws * candidates, D)
        changed[np.arange(len(changed)), np.tile(d, len(drawn))] = np.tile(j, len(drawn))
        gradient = np.zeros(self._allowed.shape)
        gradient[d, j] = self.predict(changed).reshape(len(drawn), -1).mean(axis=0)
        return gradient
