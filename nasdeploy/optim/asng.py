"""Adaptive stochastic natural gradient for one distribution. [search.md, ASNG update; arXiv 1905.08537]

Differences from the authors' public code, all of them repairs: Δ has a floor (β > 2 gave NaN), decisions with
one candidate are skipped, padding and forbidden candidates never enter a sum, and a vanishing gradient
changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.categorical import BoolArray, flat_index, last_allowed, with_margin

ALPHA = 1.5
"""The constant of the Δ update: the signal-to-noise ratio that ASNG aims at."""
MIN_SQUARED_NORM = 1e-12
"""|G|²_F below this is rounding, and ASNG would rescale it to a full step."""


def natural_gradient(utilities: FloatArray, choices: IntArray, theta: FloatArray) -> FloatArray:
    """Return G = Σ_i u_i (T(c_i) - θ): utilities (n,), choices (n, D), theta (D, C) -> (D, C)."""
    num_decisions, num_columns = theta.shape
    # plain form: np.einsum("i,idj->dj", utilities, one_hot(choices) - theta)
    summed = np.bincount(
        flat_index(choices, num_columns).ravel(),
        weights=np.repeat(utilities, num_decisions),
        minlength=theta.size,
    )
    gradient: FloatArray = summed.reshape(theta.shape) - utilities.sum() * theta
    return gradient


class Asng:
    """θ of one distribution and the state of its step: ``theta`` (D, C), ``s`` (D, C), ``gamma``, ``Delta``.

    ``theta`` is brought to the margin at once. δ_0 = 1 is ASNG's; less keeps several distributions
    overlapping.
    """

    def __init__(self, theta: FloatArray, mask: BoolArray, *, delta_0: float) -> None:
        if not delta_0 > 0.0 or not math.isfinite(delta_0):
            raise ValueError(f"delta_0 = {delta_0}; expected a positive number")
        self.mask = mask
        self.delta_0 = delta_0
        self.theta = with_margin(theta, mask)
        self.s = np.zeros(theta.shape)
        self.gamma = 0.0
        self._last = last_allowed(mask)[:, None]  # (D, 1): the candidate that the others determine, t_C
        self._free = mask.copy()  # (D, C): t_1 … t_{C-1}
        np.put_along_axis(self._free, self._last, False, axis=-1)
        self.num_parameters = int(self._free.sum())  # n_θ
        self._min_Delta = delta_0 / math.sqrt(max(self.num_parameters, 1))  # Δ ≥ δ_0/√n_θ, so β ≤ 1
        self.Delta = max(1.0, self._min_Delta)

    def step(self, gradient: FloatArray) -> bool:
        """Move θ along ``gradient`` (D, C), an ascent direction on the utilities; return whether it moved.

        Every line is one of search.md, "ASNG update for θ", with the values from before the update on the
        right.
        """
        if self.num_parameters == 0:
            return False
        theta = np.where(self.mask, self.theta, 1.0)  # 1 outside the mask, where the gradient is 0
        squared_norm = float((gradient**2 / theta).sum())  # |G|²_F = Σ G²_dj / θ_dj
        if squared_norm < MIN_SQUARED_NORM:
            return False
        direction = gradient / math.sqrt(squared_norm)  # G / |G|_F

        delta = self.delta_0 / self.Delta  # δ = δ_0/Δ
        beta = delta / math.sqrt(self.num_parameters)  # β = δ/√n_θ
        moved = self.theta + delta * direction  # θ ← θ + δ G/|G|_F
        self.s = (1 - beta) * self.s + math.sqrt(beta * (2 - beta)) * self._root_fisher(direction)  # s ← …
        self.gamma = (1 - beta) ** 2 * self.gamma + beta * (2 - beta)  # γ ← (1-β)² γ + β(2-β)
        excess = self.gamma - float((self.s**2).sum()) / ALPHA  # γ - |s|²/α
        self.Delta = max(self.Delta * math.exp(beta * excess), self._min_Delta)  # Δ ← Δ·exp(β (γ - |s|²/α))
        self.theta = with_margin(moved, self.mask)
        return True

    def _root_fisher(self, g: FloatArray) -> FloatArray:
        """Return F^{1/2} g (D, C): g_j/√t_j + √t_j Σ_{i<C} g_i / (t_C + √t_C) for j < C, 0 elsewhere."""
        root = np.sqrt(np.where(self._free, self.theta, 1.0))  # √t_j
        t_last = np.take_along_axis(self.theta, self._last, axis=-1)  # t_C (D, 1)
        total = np.where(self._free, g, 0.0).sum(axis=-1, keepdims=True)  # Σ_{i<C} g_i (D, 1)
        return np.where(self._free, g / root + root * total / (t_last + np.sqrt(t_last)), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain lists and numbers."""
        return {"theta": self.theta.tolist(), "s": self.s.tolist(), "gamma": self.gamma, "Delta": self.Delta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, bit by bit. Raises ValueError when it does not fit."""
        theta, s = np.array(state["theta"], dtype=np.float64), np.array(state["s"], dtype=np.float64)
        if theta.shape != self.mask.shape or s.shape != self.mask.shape or theta[~self.mask].any():
            raise ValueError(
                f"state holds theta of shape {theta.shape}; expected {self.mask.shape} inside the mask"
            )
        self.theta, self.s = theta, s
        self.gamma, self.Delta = float(state["gamma"]), float(state["Delta"])
