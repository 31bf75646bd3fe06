"""The kernel of :mod:`nasdeploy.optim.gaussian_process`, and how its parameters are found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasdeploy.costs.table import FloatArray

JITTER = 1e-6
"""Part of the noise, so that a covariance of equal rows can be factored."""
NUM_COMMON = 6
"""s, l, g, b, τ and σ², which stand behind what each decision has."""
FIRST_ITERATIONS, LATER_ITERATIONS = 60, 15
LEARNING_RATE = 0.15
MOMENTUM, SECOND_MOMENTUM = 0.9, 0.99


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """The logarithms of v (D,), r (D,), s, l, g, b, τ and σ² in one array (2D + 6,), in units of the losses' variance.

    Architectures are rows (n, D C + F): one-hot choices, then features φ; times are rows (n, 2) of step and t.
    """

    logs: FloatArray
    num_columns: int

    @classmethod
    def prior_mean(cls, num_decisions: int, num_columns: int) -> Kernel:
        """Return where fitting starts: most of the variance to main effects and interactions, little to noise."""
        ones = np.ones(num_decisions)
        common = [0.5, 0.3, 0.3, 0.05, 0.05, 0.05]
        return cls(
            np.log([*(0.5 / num_decisions * ones), *(2.0 / num_decisions * ones), *common]), num_columns
        )

    @property
    def num_decisions(self) -> int:
        """D."""
        return (len(self.logs) - NUM_COMMON) // 2

    @property
    def main(self) -> FloatArray:
        """v (D,), the variance of each main effect."""
        v: FloatArray = np.exp(self.logs[: self.num_decisions])
        return v

    @property
    def rates(self) -> FloatArray:
        """r (D,), how fast the product part falls where decision d differs."""
        r: FloatArray = np.exp(self.logs[self.num_decisions : -NUM_COMMON])
        return r

    @property
    def scale(self) -> float:
        """s, the variance of the product part."""
        return float(np.exp(self.logs[-6]))

    @property
    def linear(self) -> float:
        """l, the variance of a linear function of the features."""
        return float(np.exp(self.logs[-5]))

    @property
    def smooth(self) -> float:
        """g, the variance of a smooth function of the features."""
        return float(np.exp(self.logs[-4]))

    @property
    def between_steps(self) -> float:
        """b, the variance between the common batches of steps."""
        return float(np.exp(self.logs[-3]))

    @property
    def trend(self) -> float:
        """τ, the variance of the slope over time."""
        return float(np.exp(self.logs[-2]))

    @property
    def noise(self) -> float:
        """σ², the variance of one observation."""
        return float(np.exp(self.logs[-1])) + JITTER

    def main_part(self, one: FloatArray, other: FloatArray) -> FloatArray:
        """Return Σ_d v_d [c_d = c'_d] (n, m)."""
        part: FloatArray = (self._choices(one) * np.repeat(self.main, self.num_columns)) @ self._choices(
            other
        ).T
        return part

    def product_part(self, one: FloatArray, other: FloatArray) -> FloatArray:
        """Return s exp(-Σ_d r_d [c_d ≠ c'_d]) (n, m)."""
        agreeing = (self._choices(one) * np.repeat(self.rates, self.num_columns)) @ self._choices(other).T
        part: FloatArray = self.scale * np.exp(agreeing - self.rates.sum())
        return part

    def of_losses(self, one: FloatArray, other: FloatArray) -> FloatArray:
        """Return the covariance of the losses themselves (n, m)."""
        choices = self.main_part(one, other) + self.product_part(one, other)
        linear, smooth = self.feature_parts(one, other)
        return choices + linear + smooth

    def feature_parts(self, one: FloatArray, other: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return l φ·φ' / F and g exp(-|φ - φ'|² / 2F), both (n, m); zeros where there are no features."""
        here, there = one[:, self._width :], other[:, self._width :]
        count = here.shape[1]
        if count == 0:
            nothing = np.zeros((len(one), len(other)))
            return nothing, nothing
        inner = here @ there.T / count
        squares = (here**2).mean(axis=1)[:, None] + (there**2).mean(axis=1)
        # rounding may leave a tiny negative distance
        distances = np.maximum(squares - 2.0 * inner, 0.0)
        return self.linear * inner, self.smooth * np.exp(-0.5 * distances)

    @property
    def _width(self) -> int:
        return self.num_decisions * self.num_columns

    def _choices(self, rows: FloatArray) -> FloatArray:
        return rows[:, : self._width]

    def of_steps(self, one: FloatArray, other: FloatArray) -> FloatArray:
        """Return b [same step] + τ t t' (n, m) of times ``one`` (n, 2) and ``other`` (m, 2)."""
        same = one[:, :1] == other[:, 0]
        return np.where(same, self.between_steps, 0.0) + self.trend * np.outer(one[:, 1], other[:, 1])


def maximise_posterior(
    start: Kernel, prior: Kernel, rows: FloatArray, times: FloatArray, target: FloatArray, *, again: bool
) -> Kernel:
    """Return the best kernel met on the way from ``start``: of rows (N, D C + F), times (N, 2), target (N,).

    prior: mean of the logs. again: ``start`` was fitted to nearly the same samples, so that few iterations do. By
    Adam (Kingma & Ba 2015), since each step needs one factorisation and the logs have no bounds.
    """
    logs, first, second = start.logs, np.zeros_like(start.logs), np.zeros_like(start.logs)
    best, least = start, np.inf
    for iteration in range(1, (LATER_ITERATIONS if again else FIRST_ITERATIONS) + 1):
        kernel = Kernel(logs, start.num_columns)
        energy, slope = _energy(kernel, prior, rows, times, target)
        if energy < least:
            best, least = kernel, energy
        first = MOMENTUM * first + (1.0 - MOMENTUM) * slope
        second = SECOND_MOMENTUM * second + (1.0 - SECOND_MOMENTUM) * slope**2
        step = first / (1.0 - MOMENTUM**iteration)
        logs = logs - LEARNING_RATE * step / (np.sqrt(second / (1.0 - SECOND_MOMENTUM**iteration)) + 1e-8)
    return best


def _energy(
    kernel: Kernel, prior: Kernel, rows: FloatArray, times: FloatArray, target: FloatArray
) -> tuple[float, FloatArray]:
    """Return -log p(logs | target) up to a constant, and its gradient (2D + 6,). [GPML 5.8, 5.9]"""
    product = kernel.product_part(rows, rows)
    linear, smooth = kernel.feature_parts(rows, rows)
    covariance = kernel.main_part(rows, rows) + product + linear + smooth + kernel.of_steps(times, times)
    covariance[np.diag_indices(len(target))] += kernel.noise
    root = np.linalg.inv(np.linalg.cholesky(covariance))
    inverse = root.T @ root
    alpha = inverse @ target
    outer = inverse - np.outer(alpha, alpha)  # 2 ∂energy/∂K
    weighted = outer * product
    same = times[:, :1] == times[:, 0]
    slope = 0.5 * np.concatenate(
        [
            kernel.main * _over_agreeing(outer, rows, kernel),
            kernel.rates * (_over_agreeing(weighted, rows, kernel) - weighted.sum()),
            [
                weighted.sum(),
                (outer * linear).sum(),
                (outer * smooth).sum(),
                kernel.between_steps * outer[same].sum(),
                kernel.trend * float(times[:, 1] @ outer @ times[:, 1]),
                (kernel.noise - JITTER) * np.trace(outer),
            ],
        ]
    )
    # a factor e in each direction is likely a priori; less is known of steps and noise
    spread = np.concatenate([np.ones(len(slope) - 3), [1.5, 1.5, 1.5]])
    away = (kernel.logs - prior.logs) / spread
    energy = 0.5 * float(target @ alpha) - float(np.log(np.diag(root)).sum()) + 0.5 * float(away @ away)
    return energy, slope + away / spread


def _over_agreeing(matrix: FloatArray, rows: FloatArray, kernel: Kernel) -> FloatArray:
    """Return Σ_ij matrix_ij [c_id = c_jd] (D,)."""
    one_hot = rows[:, : kernel.num_decisions * kernel.num_columns]
    by_column = (one_hot * (matrix @ one_hot)).sum(axis=0)
    total: FloatArray = by_column.reshape(kernel.num_decisions, kernel.num_columns).sum(axis=1)
    return total
