"""How well one quantity ranks what another one does, within groups too, with bootstrap intervals over the items.

Notation: n items, B resamples. A resample is a count for each item (n,), so that an item which is drawn twice is a tie
with itself and counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

Statistic = Literal["tau", "rho", "tau within"]
STATISTICS: tuple[Statistic, ...] = ("tau", "rho", "tau within")
"""Kendall's tau-b; Spearman's rho; tau-b over the pairs of one group only."""

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A statistic and its 95 % interval, by percentiles of the bootstrap over items; NaN where nothing is ranked."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


class Ranking:
    """Statistics of scores against ``truth`` (n,), all on the same resamples, so that scores can be compared.

    groups: (n,) of the items; pairs within a group enter "tau within".
    """

    def __init__(
        self, truth: FloatArray, groups: IntArray, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
    ) -> None:
        count = len(truth)
        rng = np.random.default_rng(seed)
        self._truth, self._pairs = truth, groups[:, None] == groups
        drawn = rng.multinomial(count, np.full(count, 1.0 / count), size=num_resamples)
        self._weights = np.concatenate(
            [np.ones((1, count)), drawn]
        )  # (1 + B, n): what was seen, then resamples

    def values(self, scores: FloatArray, statistic: Statistic) -> FloatArray:
        """Return the statistic (1 + B,) of ``scores`` (n,): of all items, then of every resample."""
        if statistic == "rho":
            return weighted_spearman(scores, self._truth, self._weights)
        pairs = self._pairs if statistic == "tau within" else np.ones_like(self._pairs)
        return weighted_kendall(scores, self._truth, self._weights, pairs)

    def estimate(self, scores: FloatArray, statistic: Statistic) -> Estimate:
        """Return the statistic of ``scores`` (n,)."""
        return estimate_of(self.values(scores, statistic))

    def difference(self, scores: FloatArray, others: FloatArray, statistic: Statistic) -> Estimate:
        """Return that of ``scores`` (n,) minus that of ``others`` (n,), resample by resample."""
        return estimate_of(self.values(scores, statistic) - self.values(others, statistic))


def estimate_of(values: FloatArray) -> Estimate:
    """Return the estimate of ``values`` (1 + B,): what was seen, then resamples."""
    if np.isnan(values[0]):
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])  # a resample of one item has no order
    return Estimate(value=float(values[0]), low=float(low), high=float(high))


def weighted_kendall(
    scores: FloatArray, truth: FloatArray, weights: FloatArray, pairs: npt.NDArray[np.bool_]
) -> FloatArray:
    """Return tau-b (B,) of scores (n,) and truth (n,), item i counting weights (B, n)[b, i] times.

    pairs: (n, n), which pairs are compared. tau-b is (concordant - discordant) / sqrt(pairs untied in one · in the
    other) (Kendall 1945); NaN where one side ties every pair.
    """
    one, other = (np.sign(values[:, None] - values) * pairs for values in (scores, truth))
    signed, untied, untied_truth = (
        np.einsum("bi,ij,bj->b", weights, part, weights, optimize=True)
        for part in (one * other, np.abs(one), np.abs(other))
    )
    return _ratio(signed, np.sqrt(untied * untied_truth))


def weighted_spearman(scores: FloatArray, truth: FloatArray, weights: FloatArray) -> FloatArray:
    """Return Spearman's rho (B,), item i counting weights (B, n)[b, i] times; ties get their mean rank."""
    ranks, true_ranks = (weights @ _below(values).T for values in (scores, truth))  # (B, n)
    total = weights.sum(axis=1, keepdims=True)
    ranks, true_ranks = (r - (weights * r).sum(axis=1, keepdims=True) / total for r in (ranks, true_ranks))
    products = (weights * ranks * true_ranks).sum(axis=1)
    squares = (weights * ranks**2).sum(axis=1) * (weights * true_ranks**2).sum(axis=1)
    return _ratio(products, np.sqrt(squares))


def _below(values: FloatArray) -> FloatArray:
    """Return (n, n): 1 where j is below i, half where they tie: summed over j, a rank up to a constant."""
    below: FloatArray = (values < values[:, None]) + 0.5 * (values == values[:, None])
    return below


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    ordered = denominator > 1e-12
    ratio: FloatArray = np.where(ordered, numerator / np.where(ordered, denominator, 1.0), np.nan)
    return ratio


def bins_of(costs: FloatArray, num_bins: int) -> IntArray:
    """Return the bin (n,) of each cost (n,): ``num_bins`` bins of (nearly) as many items each, the cheapest first."""
    bins = np.empty(len(costs), dtype=np.int64)
    bins[np.argsort(costs, kind="stable")] = np.arange(len(costs)) * num_bins // len(costs)
    return bins
