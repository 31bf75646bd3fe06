"""Adaptive stochastic natural gradient, K distributions at once. [search.md, ASNG update; arXiv 1905.08537]

Differences from the authors' public code, all of them repairs: Δ has a floor (β > 2 gave NaN), decisions with
one candidate are skipped, padding and forbidden candidates never enter a sum, and a vanishing gradient
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.categorical import BoolArray, flat_index, last_allowed, with_margin

ALPHA = 1.5
"""The constant of the Δ update: the signal-to-noise ratio that ASNG aims at."""
MIN_SQUARED_NORM = 1e-12
"""|G|²_F below this is rounding, and ASNG would rescale it to a full step."""


def natural_gradient(utilities: FloatArray, choices: IntArray, theta: FloatArray) -> FloatArray:
    """Return G = Σ_i u_i (T(c_i) - θ): utilities (..., n), choices (n, D) or (..., n, D) -> theta's (..., D, C)."""
    num_decisions, num_columns = theta.shape[-2:]
    size = num_decisions * num_columns
    num_distributions = theta.size // size
    # plain form: np.einsum("...i,...idj->...dj", utilities, one_hot(choices) - theta[..., None, :, :])
    rows = utilities.reshape(num_distributions, -1, 1)  # (K, n, 1)
    places = flat_index(choices, num_columns).reshape(-1, rows.shape[1], num_decisions)  # (1 or K, n, D)
    places = places + size * np.arange(num_distributions)[:, None, None]  # (K, n, D)
    summed = np.bincount(
        places.ravel(), weights=np.broadcast_to(rows, places.shape).ravel(), minlength=theta.size
    )
    total = utilities.sum(axis=-1)[..., None, None]
    gradient: FloatArray = summed.reshape(theta.shape) - total * theta
    return gradient


class Asng:
    """θ of K distributions and the state of their steps: ``theta``, ``s`` (K, D, C), ``gamma``, ``Delta`` (K,).

    Or of one alone, without the axis K. ``theta`` is brought to the margin at once. δ_0 = 1 is ASNG's; less keeps
    several distributions overlapping.
    """

    def __init__(self, theta: FloatArray, mask: BoolArray, *, delta_0: float) -> None:
        if not delta_0 > 0.0 or not math.isfinite(delta_0):
            raise ValueError(f"delta_0 = {delta_0}; expected a positive number")
        self.mask = mask
        self.delta_0 = delta_0
        self.theta = with_margin(theta, mask)
        self.s = np.zeros(theta.shape)
        self._last = last_allowed(mask)[..., None]  # (K, D, 1): the candidate that the others determine, t_C
        self._free = mask.copy()  # (K, D, C): t_1 … t_{C-1}
        np.put_along_axis(self._free, self._last, False, axis=-1)
        self.num_parameters = self._free.sum(axis=(-2, -1))  # n_θ (K,)
        self._root_size = np.sqrt(np.maximum(self.num_parameters, 1))  # √n_θ
        self._min_Delta = delta_0 / self._root_size  # Δ ≥ δ_0/√n_θ, so β ≤ 1
        self.gamma: FloatArray = np.zeros(theta.shape[:-2])
        self.Delta: FloatArray = np.maximum(1.0, self._min_Delta)

    def step(self, gradient: FloatArray, *, ready: BoolArray | bool = True) -> BoolArray:
        """Move θ along ``gradient`` (K, D, C), an ascent direction on the utilities; return which moved (K,).

        ready: (K,), which distributions may move. Every line is one of search.md, "ASNG update for θ", with the
        values from before the update on the right.
        """
        theta = np.where(self.mask, self.theta, 1.0)  # 1 outside the mask, where the gradient is 0
        squared_norm = (gradient**2 / theta).sum(axis=(-2, -1))  # |G|²_F = Σ G²_dj / θ_dj
        moves = np.logical_and(ready, (self.num_parameters > 0) & (squared_norm >= MIN_SQUARED_NORM))
        norm = np.sqrt(np.where(moves, squared_norm, 1.0))
        direction = np.where(_spread(moves), gradient / _spread(norm), 0.0)  # G / |G|_F

        delta = self.delta_0 / self.Delta  # δ = δ_0/Δ
        beta = delta / self._root_size  # β = δ/√n_θ
        rate = np.sqrt(beta * (2 - beta))
        moved = self.theta + _spread(delta) * direction  # θ ← θ + δ G/|G|_F
        s = _spread(1 - beta) * self.s + _spread(rate) * self._root_fisher(direction)  # s ← …
        gamma = (1 - beta) ** 2 * self.gamma + beta * (2 - beta)  # γ ← (1-β)² γ + β(2-β)
        excess = gamma - (s**2).sum(axis=(-2, -1)) / ALPHA  # γ - |s|²/α
        grown = self.Delta * np.exp(beta * excess)  # Δ ← Δ·exp(β (γ - |s|²/α))

        self.theta = np.where(_spread(moves), with_margin(moved, self.mask), self.theta)
        self.s = np.where(_spread(moves), s, self.s)
        self.gamma = np.where(moves, gamma, self.gamma)
        self.Delta = np.where(moves, np.maximum(grown, self._min_Delta), self.Delta)
        return np.asarray(moves)

    def _root_fisher(self, g: FloatArray) -> FloatArray:
        """Return F^{1/2} g (K, D, C): g_j/√t_j + √t_j Σ_{i<C} g_i / (t_C + √t_C) for j < C, 0 elsewhere."""
        root = np.sqrt(np.where(self._free, self.theta, 1.0))  # √t_j
        t_last = np.take_along_axis(self.theta, self._last, axis=-1)  # t_C (K, D, 1)
        total = np.where(self._free, g, 0.0).sum(axis=-1, keepdims=True)  # Σ_{i<C} g_i (K, D, 1)
        return np.where(self._free, g / root + root * total / (t_last + np.sqrt(t_last)), 0.0)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state as plain lists and numbers, one entry per distribution."""
        size = self.mask.shape[-2:]
        rows = zip(self.theta.reshape(-1, *size), self.s.reshape(-1, *size), strict=True)
        numbers = zip(self.gamma.ravel().tolist(), self.Delta.ravel().tolist(), strict=True)
        return [
            {"theta": theta.tolist(), "s": s.tolist(), "gamma": gamma, "Delta": delta}
            for (theta, s), (gamma, delta) in zip(rows, numbers, strict=True)
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over a state of :meth:`state_dict`, bit by bit. Raises ValueError when it does not fit."""
        num_expected = self.gamma.size
        if len(state) != num_expected:
            raise ValueError(f"state holds {len(state)} distributions; expected {num_expected}")
        size = self.mask.shape[-2:]
        for row, mask in zip(state, self.mask.reshape(-1, *size), strict=True):
            theta = np.array(row["theta"], dtype=np.float64)
            if theta.shape != size or np.shape(row["s"]) != size or theta[~mask].any():
                raise ValueError(f"state holds theta of shape {theta.shape}; expected {size} inside the mask")
        self.theta = self._stacked([row["theta"] for row in state], self.theta)
        self.s = self._stacked([row["s"] for row in state], self.s)
        self.gamma = self._stacked([row["gamma"] for row in state], self.gamma)
        self.Delta = self._stacked([row["Delta"] for row in state], self.Delta)

    @staticmethod
    def _stacked(rows: Sequence[Any], like: FloatArray) -> FloatArray:
        return np.array(rows, dtype=np.float64).reshape(like.shape)


def _spread(values: FloatArray | BoolArray) -> Any:
    """Return ``values`` (K,) as (K, 1, 1), beside a gradient."""
    return values[..., None, None]
