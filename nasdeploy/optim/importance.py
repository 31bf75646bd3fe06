"""Importance weights of one distribution against the mixture. [search.md, One step, 3]"""

from __future__ import annotations

import numpy as np

from nasdeploy.costs.table import FloatArray

MIN_ESS = 1.9
"""Below this many effective samples a distribution does not step: :mod:`nasdeploy.optim.pooled` says why."""


def log_mixture(log_p: FloatArray, alpha: FloatArray) -> FloatArray:
    """Return log q(c) = log Σ_k α_k p_k(c) (n,) from ``log_p`` (K, n) and shares (K,).

    It is logsumexp_k(log α_k + log p_k), with the largest log p_k taken out: with equal distributions the
    rest is log Σ α = 0, so that the weights are exactly 1. -inf where every p_k is 0.
    """
    largest = log_p.max(axis=0)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant
        log_q: FloatArray = largest + np.log((alpha[:, None] * np.exp(log_p - largest)).sum(axis=0))
    return log_q


def importance_weights(log_p: FloatArray, log_q: FloatArray) -> FloatArray:
    """Return w = exp(log p - log q), in [0, 1/α_k] and never clipped, 0 where p = 0: (..., n), log_q (n,)."""
    possible = np.isfinite(log_p)
    difference = np.subtract(log_p, log_q, out=np.full(log_p.shape, -np.inf), where=possible)
    weights: FloatArray = np.exp(difference)
    return weights


def effective_sample_size(weights: FloatArray) -> FloatArray:
    """Return ESS = (Σw)² / Σw² (...) of weights (..., n); 0 when every weight is 0."""
    largest = weights.max(axis=-1, initial=0.0, keepdims=True)
    # divided by the largest, so that tiny weights do not underflow when squared
    scaled = weights / np.where(largest > 0.0, largest, 1.0)
    squares = (scaled * scaled).sum(axis=-1)
    ess: FloatArray = scaled.sum(axis=-1) ** 2 / np.where(squares > 0.0, squares, 1.0)
    return ess
