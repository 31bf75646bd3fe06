"""The weighted rank utility. [search.md, Weighted rank utility]"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nasdeploy.costs.table import FloatArray


def truncation_share(ess: float) -> float:
    """Return ρ = clip(⌈ESS/4 - 1e-6⌉ / ESS, 1/4, 1/2): the share of samples that counts as good, and as bad.

    The 1e-6 is there because rounding made ESS = 4 count as more.
    """
    return min(max(math.ceil(ess / 4 - 1e-6) / ess, 0.25), 0.5)


def rank_utility(keys: npt.NDArray[Any], weights: FloatArray, rho: float) -> FloatArray:
    """Return the utilities (n,) of samples with sort ``keys`` (n,), smaller first, and ``weights`` (n,) >= 0.

    Sample i owns the slice [Q⁻_i, Q⁺_i] of the self-normalised weights in the order of the keys;
    u_i = ∫ ω over the slice, ω = +1/ρ on [0, ρ] and -1/ρ on [1-ρ, 1]. Equal keys share one slice by weight.
    The sum is 0. With equal weights this is ASNG's utility: ±1/⌈n/4⌉ for the best and the worst quarter.
    """
    if not weights.any():
        return np.zeros(len(weights))
    _, group = np.unique(keys, return_inverse=True)  # (n,) position among the distinct keys
    mass = np.bincount(group, weights)  # weight of each distinct key
    edges = np.concatenate([[0.0], np.cumsum(mass)])
    edges /= edges[-1]  # Q⁻ of each key, then 1
    gained = np.diff(_omega_integral(edges, rho))  # ∫ ω over each slice
    per_weight = np.divide(gained, mass, out=np.zeros_like(mass), where=mass > 0.0)
    return weights * per_weight[group]


def _omega_integral(q: FloatArray, rho: float) -> FloatArray:
    """Return ∫_0^q ω."""
    return (np.minimum(q, rho) - np.maximum(q - (1.0 - rho), 0.0)) / rho
