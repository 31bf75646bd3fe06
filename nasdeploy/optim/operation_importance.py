"""Operation importance weights (OIW): which candidates a model of the loss already tells something about.

Li, Dong, Wang, Xu, *NAS in A Proxy Validation Loss Landscape*, ICML 2020: the weights balance randomness and certainty
of sampling. Of a decision d with gradient g_d = ∂ψ/∂θ_d (C,) of the modelled loss, :func:`comparable` with others:

    r = g_d²        n = r / (‖r‖₂ + 1e-6)        OIW = running mean of n

A candidate on which ψ depends strongly, for better or worse, has an OIW near 1: choosing it at random teaches little.
One that ψ is indifferent to has 0, and is explored.

ψ is of standardised losses, so that no unit matters beside the constant. Probabilities sum to 1 within a decision: what
is the same for all its candidates changes nothing, and is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray
from nasdeploy.optim.categorical import BoolArray

LEAST_NORM = 1e-6
"""Added to ‖r‖₂: a decision without any gradient has no important candidate."""


def operation_importance(gradients: FloatArray) -> FloatArray:
    """Return n = r / (‖r‖₂ + 1e-6) of every decision, with r = g²: (..., D, C) -> (..., D, C), in [0, 1)."""
    squares = gradients**2
    importance: FloatArray = squares / (np.linalg.norm(squares, axis=-1, keepdims=True) + LEAST_NORM)
    return importance


def comparable(gradients: FloatArray, mask: BoolArray, *, spread: float) -> FloatArray:
    """Return ``gradients`` (..., D, C) around their mean in each decision, per ``spread``; 0 outside ``mask`` (D, C).

    spread: standard deviation of the losses that ψ was fitted to.
    """
    counts = np.maximum(mask.sum(axis=-1, keepdims=True), 1)
    means = np.where(mask, gradients, 0.0).sum(axis=-1, keepdims=True) / counts
    return np.where(mask, (gradients - means) / spread, 0.0)


def spread_of(losses: FloatArray) -> float:
    """Return the standard deviation of ``losses`` (N,), 1 where all are equal."""
    return float(losses.std()) if np.ptp(losses) > 0.0 else 1.0


class OperationImportance:
    """The running mean of :func:`operation_importance` over all gradients that were seen; 0 before the first."""

    def __init__(self, num_decisions: int, num_columns: int) -> None:
        self._total: FloatArray = np.zeros((num_decisions, num_columns))
        self._count = 0

    @property
    def values(self) -> FloatArray:
        """OIW (D, C)."""
        values: FloatArray = self._total / max(self._count, 1)
        return values

    def update(self, gradients: FloatArray) -> None:
        """Take the gradients (..., D, C) at any number of architectures; each counts once."""
        rows = gradients.reshape(-1, *self._total.shape)
        self._total = self._total + operation_importance(rows).sum(axis=0)
        self._count += len(rows)

    def update_with(self, importance: FloatArray) -> None:
        """Take importances (D, C) that are a mean over gradients already, as one more of them."""
        self._total = self._total + importance
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the sum and how many gradients it is of, as plain lists and numbers."""
        return {"total": self._total.tolist(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Raises ValueError when it is that of another space."""
        total = np.array(state["total"], dtype=np.float64)
        if total.shape != self._total.shape:
            raise ValueError(f"state holds importances of shape {total.shape}; expected {self._total.shape}")
        self._total = total
        self._count = int(state["count"])
