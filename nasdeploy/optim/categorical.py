"""Products of categorical distributions as padded arrays. Shapes: see :mod:`nasdeploy.optim`.

``theta`` and ``mask`` are (..., D, C): one distribution, or K of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.spaces.base import CandidateMask

BoolArray = npt.NDArray[np.bool_]


def mask_array(num_candidates: Sequence[int], mask: CandidateMask | None = None) -> BoolArray:
    """Return ``mask`` as (D, C), padded with False; None allows every candidate.

    Raises ValueError when the mask has other sizes than ``num_candidates`` or leaves a decision without
    candidate.
    """
    rows = mask if mask is not None else tuple((True,) * count for count in num_candidates)
    if [len(row) for row in rows] != list(num_candidates) or not all(map(any, rows)):
        raise ValueError(
            f"mask has rows of {[len(row) for row in rows]} candidates, {[sum(row) for row in rows]} of them "
            f"allowed; expected {list(num_candidates)} with at least one allowed in each"
        )
    padded = np.zeros((len(rows), max(num_candidates)), dtype=np.bool_)
    for d, row in enumerate(rows):
        padded[d, : len(row)] = row
    return padded


def uniform(mask: BoolArray) -> FloatArray:
    """Return the uniform distribution over what ``mask`` (..., D, C) allows."""
    theta: FloatArray = mask / mask.sum(axis=-1, keepdims=True)
    return theta


def margin(mask: BoolArray) -> FloatArray:
    """Return θ_min = min(1/(D_valid (C_d - 1)), 1/(2 C_d)) (..., D, 1); 0 where C_d = 1. [search.md, Margin]

    ``mask`` is (..., D, C); what it forbids does not count in C_d, nor a decision with one candidate in
    D_valid.
    """
    count = mask.sum(axis=-1, keepdims=True)  # C_d (..., D, 1)
    num_valid = (count > 1).sum(axis=-2, keepdims=True)  # D_valid (..., 1, 1)
    lowest = np.minimum(1.0 / np.maximum(num_valid * (count - 1), 1), 1.0 / (2 * count))
    return np.where(count > 1, lowest, 0.0)


def with_margin(theta: FloatArray, mask: BoolArray) -> FloatArray:
    """Return ``theta`` with rows that sum to 1 and are at least the margin inside ``mask``, 0 outside.

    [search.md, Margin]  t = max(θ, θ_min);  θ = θ_min + (t - θ_min)(1 - C θ_min) / Σ(t - θ_min)
    """
    lowest = margin(mask)  # (..., D, 1)
    above = np.where(mask, np.maximum(theta, lowest) - lowest, 0.0)  # t - θ_min
    total = above.sum(axis=-1, keepdims=True)  # > 0 where Σθ = 1, since C θ_min <= 1/2
    left = 1.0 - mask.sum(axis=-1, keepdims=True) * lowest  # 1 - C θ_min
    return np.where(mask, lowest + above * left / total, 0.0)


def without_margin(theta: FloatArray, mask: BoolArray) -> FloatArray:
    """Return the distribution that the margin was added to: (θ - θ_min) / (1 - C θ_min), rows sum to 1."""
    lowest = margin(mask)
    above = np.where(mask, np.maximum(theta - lowest, 0.0), 0.0)
    sharp: FloatArray = above / above.sum(axis=-1, keepdims=True)
    return sharp


def mode(theta: FloatArray) -> IntArray:
    """Return the likeliest architecture (..., D); adding or removing the margin does not change it."""
    choices: IntArray = theta.argmax(axis=-1)
    return choices


def log_probability(theta: FloatArray, choices: IntArray) -> FloatArray:
    """Return log p(c) (..., n) of ``choices`` (n, D); -inf for what ``theta`` (..., D, C) forbids."""
    num_decisions, num_columns = theta.shape[-2:]
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant: forbidden
        table = np.log(theta).reshape(*theta.shape[:-2], num_decisions * num_columns)
    total: FloatArray = table.take(flat_index(choices, num_columns), axis=-1).sum(
        axis=-1
    )  # (..., n, D) -> (..., n)
    return total


def flat_index(choices: IntArray, num_columns: int) -> IntArray:
    """Return where each choice of (..., D) lies in a flattened (D, C) table: (..., D)."""
    return choices + num_columns * np.arange(choices.shape[-1])


def one_hot(choices: IntArray, num_columns: int) -> FloatArray:
    """Return T(c) (..., D, C) of ``choices`` (..., D)."""
    rows: FloatArray = np.equal(choices[..., None], np.arange(num_columns)).astype(np.float64)
    return rows


def sample(theta: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return one architecture per distribution: ``theta`` (n, D, C) -> choices (n, D).

    A candidate of probability 0 is never returned, not even when a cumulative sum rounds below 1.
    """
    return sample_owned(theta, np.arange(len(theta)), rng)


def sample_owned(theta: FloatArray, owners: IntArray, rng: np.random.Generator) -> IntArray:
    """Return one architecture of distribution ``owners[i]`` each: theta (K, D, C), owners (n,) -> choices (n, D)."""
    cumulative = theta.cumsum(axis=-1)[owners]  # (n, D, C)
    drawn = (rng.random(cumulative.shape[:-1])[..., None] >= cumulative).sum(axis=-1)  # (n, D)
    choices: IntArray = np.minimum(drawn, last_allowed(theta > 0.0)[owners])
    return choices


def sample_each(theta: FloatArray, num: int, rng: np.random.Generator) -> IntArray:
    """Return ``num`` architectures of every distribution: theta (K, D, C) -> choices (K, num, D)."""
    cumulative = theta.cumsum(axis=-1)[:, None]  # (K, 1, D, C)
    drawn = rng.random((len(theta), num, theta.shape[1]))
    choices = np.zeros(drawn.shape, dtype=np.int64)
    for c in range(theta.shape[-1] - 1):  # one plane at a time: no array of (K, num, D, C)
        choices += drawn >= cumulative[..., c]
    return np.minimum(choices, last_allowed(theta > 0.0)[:, None])


def last_allowed(mask: BoolArray) -> IntArray:
    """Return the index of the last allowed candidate of each decision: (..., D)."""
    last: IntArray = mask.shape[-1] - 1 - mask[..., ::-1].argmax(axis=-1)
    return last


def within(mask: BoolArray, choices: IntArray) -> BoolArray:
    """Return whether ``mask`` (..., D, C) allows each architecture of ``choices`` (n, D): (..., n)."""
    flat = mask.reshape(*mask.shape[:-2], -1)
    allowed = flat.take(flat_index(choices, mask.shape[-1]), axis=-1)  # (..., n, D)
    return np.asarray(np.all(allowed, axis=-1))


def neighbours(choices: IntArray, mask: BoolArray) -> IntArray:
    """Return all allowed architectures that differ from ``choices`` (D,) in one decision: (n_θ, D)."""
    other = mask.copy()
    other[np.arange(len(choices)), choices] = False
    decisions, candidates = np.nonzero(other)
    changed = np.tile(choices, (len(decisions), 1))
    changed[np.arange(len(decisions)), decisions] = candidates
    return changed


def entropy(theta: FloatArray) -> FloatArray:
    """Return the entropy of p in nats: (..., D, C) -> (...)."""
    total: FloatArray = -(theta * np.log(np.where(theta > 0.0, theta, 1.0))).sum(axis=(-2, -1))
    return total


def systematic_owners(shares: FloatArray, n: int, rng: np.random.Generator) -> IntArray:
    """Return which component each of ``n`` draws comes from (n,): systematic sampling, random offset.

    Component k gets floor(n α_k) or ceil(n α_k) draws, n α_k on average, also where n is below the number of
    components: so the draws follow the mixture q. [search.md, One step, 2]
    """
    edges = np.floor(n * np.cumsum(shares) + rng.random())
    edges[-1] = n  # rounding of the last sum must neither lose nor add a draw
    counts = np.diff(np.minimum(edges, n), prepend=0.0).astype(np.int64)
    return np.repeat(np.arange(len(shares)), counts)
