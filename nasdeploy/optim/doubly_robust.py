"""The doubly robust gradient: a model of the loss, and importance weights for what it gets wrong.

[search.md, Beyond the paper]  Importance weights share little once distributions part. The model L̂ learns from all
samples of all profiles, and what it knows costs no evaluation: the gradient of the modelled objective comes from free
draws of p_k, and only the residual L - L̂ is weighted. The sum is unbiased for any L̂ that was learnt from earlier
steps; its variance is that of the residual::

    f̃_k(c) = L(c) - L̄ + Σ_m coefficient_km R_m(c) / reference_km + ε_k violation_k(c)
    m_k(c) = t_k (L̂(c) - L̂-bar) + b_k                                the model of L - L̄, from earlier steps
    f̂_k(c) = m_k(c) + Σ_m … + ε_k violation_k(c)
    ∇_k    = E_{p_k}[f̂_k (T - θ_k)] + E_q[w_k (L - L̄ - m_k) (T - θ_k)]        G_k = -∇_k

with L̄ and L̂-bar means over the step's draws. What no profile can afford is not evaluated: its loss counts as m_k.

A single draw corrects nothing, and the distributions follow the model alone: its residual is all noise. Compared with
the proposals of its step, which is unbiased too, it made the search of tests/benchmarks/tabular.py worse.

t_k in [0, 1] keeps a useless L̂ from doing harm. It is the slope of L on L̂ over earlier fresh samples, weighted for k,
which makes the variance of L - t L̂ least. R² does the same for a useless L̂, but also shrinks a right one when the
losses are noisy, which no model can explain: with noise of the size of the differences the regret was a fifth larger.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.asng import natural_gradient
from nasdeploy.optim.categorical import BoolArray, log_probability, sample_each
from nasdeploy.optim.estimators import Estimate, Evaluated, own_shares
from nasdeploy.optim.importance import effective_sample_size, importance_weights
from nasdeploy.optim.objective import Judge
from nasdeploy.optim.surrogate import StreamingSurrogate

NUM_FREE_DRAWS = 256
"""Per distribution and step. They cost no evaluation; their noise should stay below that of the residuals."""
SMOOTHING = 0.9
"""What t, R² and b keep of their memory from one step to the next."""
NUM_SHARED = 10.0
"""t counts all samples, proposals too, like so many of one's own: a profile may draw less than one a step."""
ROUNDING = 1e-12
"""Differences below this share of the values themselves are none."""


def model_gradient(values: FloatArray, choices: IntArray, theta: FloatArray) -> FloatArray:
    """Return an unbiased estimate of E_{p_k}[f̂ (T - θ)]: values (K, F), choices (K, F, D) from theta (K, D, C).

    With their own mean as b, a sum over F terms has F - 1 times that expectation.
    """
    centred = values - values.mean(axis=-1, keepdims=True)
    return natural_gradient(centred / max(values.shape[-1] - 1, 1), choices, theta)


def residual_gradient(
    weights: FloatArray, residuals: FloatArray, choices: IntArray, theta: FloatArray
) -> FloatArray:
    """Return Σ_i w_i r_i (T(c_i) - θ): weights with 1/n inside and residuals (K, n), choices (n, D)."""
    return natural_gradient(weights * residuals, choices, theta)


class DoublyRobust:
    """The estimator. judge: of the K profiles. surrogate: the seat of L̂. sample: how the free draws are made."""

    own_draws_only = False
    draws_freely = True

    def __init__(
        self,
        *,
        num_profiles: int,
        judge: Judge,
        surrogate: StreamingSurrogate,
        num_free_draws: int = NUM_FREE_DRAWS,
        sample: Callable[[FloatArray, int, np.random.Generator], IntArray] = sample_each,
    ) -> None:
        self._judge = judge
        self._surrogate = surrogate
        self._num_free_draws, self._sample = num_free_draws, sample
        self._num_profiles = num_profiles
        self._learnt = False  # whether L̂ has seen anything
        self._products = np.zeros((3, num_profiles))  # forgotten sums of w L², w L L̂ and w L̂², both centred
        self._shared = np.zeros(4)  # forgotten sums over all samples, unweighted: L², L L̂, L̂², and how many
        self._residuals = np.zeros((2, num_profiles))  # forgotten sums of w (residual) and of w

    @property
    def waiting(self) -> BoolArray:
        """(K,): nobody waits. Unlike ranks, raw values of few samples keep an unbiased direction."""
        return np.zeros(self._num_profiles, dtype=np.bool_)

    @property
    def gate_openings(self) -> IntArray:
        """(K,): there is no gate."""
        return np.zeros(self._num_profiles, dtype=np.int64)

    @property
    def r_squared(self) -> FloatArray:
        """(K,): R² of L̂ on earlier fresh samples, weighted for k, in [0, 1]."""
        total, mixed, modelled = self._products
        left = total - 2.0 * mixed + modelled  # Σ w (L - L̂)²
        explained = 1.0 - left / np.where(total > 0.0, total, 1.0)
        return np.where(total > 0.0, np.clip(explained, 0.0, 1.0), 0.0)

    @property
    def trust(self) -> FloatArray:
        """(K,): t_k, the slope of L on L̂ over earlier fresh samples, weighted for k, in [0, 1]."""
        shared = NUM_SHARED * self._shared[:3] / max(self._shared[3], 1.0)
        _, mixed, modelled = self._products + shared[:, None]
        slope: FloatArray = np.clip(mixed / np.where(modelled > 0.0, modelled, 1.0), 0.0, 1.0)
        return slope

    @property
    def baseline(self) -> FloatArray:
        """(K,): b_k, the mean residual of earlier steps under p_k."""
        weighted, total = self._residuals
        baseline: FloatArray = weighted / np.where(total > 0.0, total, 1.0)
        return baseline

    def estimate(self, told: Evaluated, theta: FloatArray, *, prices: FloatArray, step: int) -> Estimate:
        """Take what was told in ``step`` and return the gradients at ``theta`` (K, D, C); prices: (K,)."""
        draw, trust = told.draw, self.trust
        weights = importance_weights(log_probability(theta, draw.choices), draw.log_q)  # (K, n)
        # outside its mask a profile has no weight
        affordable = ((told.violation == 0.0) & (weights > 0.0)).any(axis=0)  # (n,)
        usable = np.where(affordable, weights, 0.0)  # (K, n)
        predicted = self._predict(draw.choices)  # (n,)
        level = float(predicted[draw.drawn].mean()) if draw.drawn.any() else 0.0  # L̂-bar

        # without the sample itself in the means that it is compared with: n / (n - 1)
        num_drawn = int(draw.drawn.sum())
        alone = num_drawn / (num_drawn - 1) if num_drawn > 1 else 0.0
        unexplained = alone * (told.centred - trust[:, None] * (predicted - level))  # (K, n)

        residuals = np.where(usable > 0.0, unexplained - self.baseline[:, None], 0.0)  # (K, n)
        free = self._sample(theta, self._num_free_draws, np.random.default_rng(draw.seed))  # (K, F, D)
        values = self._free_values(free, trust, level, prices)  # (K, F)
        gradient = model_gradient(values, free, theta)
        num_affordable = int((usable > 0.0).any(axis=0).sum())
        if num_drawn > 1 and num_affordable > 0:
            share = draw.accepted / num_affordable  # E_q = q(A) E over the accepted
            gradient = gradient + residual_gradient(share * usable, residuals, draw.choices, theta)
        estimate = Estimate(
            gradient=-gradient,
            unit=_unit(told, values, residuals),
            ready=np.ones(len(theta), dtype=np.bool_),
            ess=effective_sample_size(weights),
            own_share=own_shares(weights, draw.owners),
            r_squared=self.r_squared,
        )
        self._learn(told, usable, predicted, unexplained)
        self._surrogate.observe(draw.choices, told.losses, step)
        self._learnt = True
        return estimate

    def _predict(self, choices: IntArray) -> FloatArray:
        """Return L̂ (n,) of ``choices`` (n, D), 0 before it has seen anything."""
        return self._surrogate.predict(choices) if self._learnt else np.zeros(len(choices))

    def _free_values(
        self, choices: IntArray, trust: FloatArray, level: float, prices: FloatArray
    ) -> FloatArray:
        """Return f̂_k (K, F) of ``choices`` (K, F, D)."""
        num_profiles, num_draws, num_decisions = choices.shape
        flat = choices.reshape(-1, num_decisions)
        predicted = self._predict(flat).reshape(num_profiles, num_draws)
        model = trust[:, None] * (predicted - level) + self.baseline[:, None]  # m_k
        judged = self._judge.judge(flat)  # (K, K F)
        own = np.arange(num_profiles)
        penalty = judged.penalty.reshape(num_profiles, num_profiles, -1)[own, own]  # (K, F)
        violation = judged.violation.reshape(num_profiles, num_profiles, -1)[own, own]
        return model + penalty + prices[:, None] * violation

    def _learn(
        self, told: Evaluated, weights: FloatArray, predicted: FloatArray, unexplained: FloatArray
    ) -> None:
        """Update t, R² and b, for later steps only."""
        if told.draw.drawn.sum() > 1:
            seen = np.stack([(weights * unexplained).sum(axis=1), weights.sum(axis=1)])
            self._residuals = SMOOTHING * self._residuals + seen
        if self._learnt:
            self._products = SMOOTHING * self._products + _products(told.losses, predicted, weights)
            num_samples = len(predicted)
            everything = _products(told.losses, predicted, np.ones((1, num_samples)))[:, 0]
            self._shared = SMOOTHING * self._shared + np.append(everything, num_samples)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit by bit, as plain lists, numbers and text."""
        return {
            "learnt": self._learnt,
            "products": self._products.tolist(),
            "shared": self._shared.tolist(),
            "residuals": self._residuals.tolist(),
            "surrogate": self._surrogate.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self._learnt = bool(state["learnt"])
        self._products = np.array(state["products"], dtype=np.float64)
        self._shared = np.array(state["shared"], dtype=np.float64)
        self._residuals = np.array(state["residuals"], dtype=np.float64)
        self._surrogate.load_state_dict(state["surrogate"])


def _unit(told: Evaluated, values: FloatArray, residuals: FloatArray) -> FloatArray:
    """Return the largest difference that matters to each profile (K,), inf where there is only rounding.

    ASNG gives every gradient the same length, but takes one of nearly none for rounding, whatever the unit.
    """
    spread = np.maximum(np.ptp(values, axis=1), np.abs(residuals).max(axis=1))
    rounding = ROUNDING * (np.abs(told.losses).max() + np.abs(told.penalty).max())
    return np.where(spread > rounding, spread, np.inf)


def _products(left: FloatArray, right: FloatArray, weights: FloatArray) -> FloatArray:
    """Return Σ_i w_i of l², l r and r² (3, K), both minus their weighted means: left, right (n,), weights (K, n)."""
    total = weights.sum(axis=1, keepdims=True)
    share = weights / np.where(total > 0.0, total, 1.0)
    around_left, around_right = left - (share @ left)[:, None], right - (share @ right)[:, None]  # (K, n)
    pairs = (around_left**2, around_left * around_right, around_right**2)
    return np.stack([(weights * pair).sum(axis=1) for pair in pairs])
