"""The weighted rank utility. [search.md, Weighted rank utility]

Arrays are (..., n): one distribution, or K of them at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nasdeploy.costs.table import FloatArray


def truncation_share(ess: npt.ArrayLike) -> FloatArray:
    """Return ρ = clip(⌈ESS/4 - 1e-6⌉ / ESS, 1/4, 1/2): the share of samples that counts as good, and as bad.

    The 1e-6 is there because rounding made ESS = 4 count as more. Without a sample (ESS = 0) it is 1/2.
    """
    size = np.maximum(ess, 1.0)  # any weight at all makes ESS >= 1
    share: FloatArray = np.clip(np.ceil(size / 4 - 1e-6) / size, 0.25, 0.5)
    return share


def rank_utility(keys: npt.NDArray[Any], weights: FloatArray, rho: npt.ArrayLike) -> FloatArray:
    """Return the utilities (..., n) of samples with sort ``keys`` (..., n), smaller first, and weights (..., n) >= 0.

    Sample i owns the slice [Q⁻_i, Q⁺_i] of the self-normalised weights in the order of the keys;
    u_i = ∫ ω over the slice, ω = +1/ρ on [0, ρ] and -1/ρ on [1-ρ, 1], ρ (...). Equal keys share one slice by
    weight. The sum is 0. With equal weights this is ASNG's utility: ±1/⌈n/4⌉ for the best and the worst quarter.
    """
    n = weights.shape[-1]
    group = dense_ranks(keys).reshape(-1, n)  # (K, n) position among the distinct keys
    flat_weights = weights.reshape(-1, n)
    places = group + n * np.arange(len(group))[:, None]
    mass = np.bincount(places.ravel(), flat_weights.ravel(), minlength=weights.size)  # of each distinct key
    mass = mass.reshape(len(group), n)
    edges = np.concatenate([np.zeros((len(group), 1)), np.cumsum(mass, axis=-1)], axis=-1)  # (K, n + 1)
    total = edges[:, -1:]
    edges /= np.where(total > 0.0, total, 1.0)  # Q⁻ of each key, then 1
    gained = np.diff(_omega_integral(edges, np.reshape(rho, (-1, 1))))  # ∫ ω over each slice
    per_weight = np.divide(gained, mass, out=np.zeros_like(mass), where=mass > 0.0)
    utilities: FloatArray = flat_weights * np.take_along_axis(per_weight, group, axis=-1)
    return utilities.reshape(weights.shape)


def dense_ranks(*keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return ranks (..., n), 0 for the smallest, by the first of ``keys`` (..., n), then the next; equals share one."""
    order = np.lexsort(keys[::-1], axis=-1)
    differs = np.zeros(order.shape, dtype=np.int64)
    for key in keys:
        in_order = np.take_along_axis(key, order, axis=-1)
        differs[..., 1:] |= in_order[..., 1:] != in_order[..., :-1]
    ranks = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(ranks, order, np.cumsum(differs, axis=-1), axis=-1)
    return ranks


def _omega_integral(q: FloatArray, rho: FloatArray) -> FloatArray:
    """Return ∫_0^q ω."""
    integral: FloatArray = (np.minimum(q, rho) - np.maximum(q - (1.0 - rho), 0.0)) / rho
    return integral
