"""The statistics of the benchmark of rank correlations."""

from __future__ import annotations

import importlib
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # the benchmarks are scripts, not a package
ranks = importlib.import_module("statistics_of_ranks")

FLOPS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
TRUTH = np.array([0.2, 0.3, 0.1, 0.5, 0.4, 0.6])


def ranking(truth=TRUTH, num_bins=2, **options):
    return ranks.Ranking(truth, ranks.bins_of(FLOPS, num_bins), **options)


def tau_of_pairs(one, other, pairs):
    """The definition, pair by pair, of items that may be named twice."""
    signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i, j in pairs]
    untied = [sum(bool(sign[side]) for sign in signs) for side in (0, 1)]
    return sum(a * b for a, b in signs) / np.sqrt(untied[0] * untied[1])


def test_tau_and_rho_by_hand():
    found = ranking()
    # discordant: 0.2-0.1, 0.3-0.1, 0.5-0.4; 12 of 15 pairs agree
    assert found.estimate(FLOPS, "tau").value == pytest.approx(9 / 15)
    # squared differences of ranks: 1, 1, 4, 1, 1, 0; 1 - 6 * 8 / (6 * 35)
    assert found.estimate(FLOPS, "rho").value == pytest.approx(1 - 48 / 210)
    assert found.estimate(-FLOPS, "tau").value == pytest.approx(-9 / 15)


def test_ties_follow_tau_b_and_get_mean_ranks():
    scores = np.array([1.0, 1.0, 2.0, 2.0, 2.0, 3.0])
    found = ranking()
    # of 15 pairs 11 are untied in the scores; of these only 0.2-0.1 and 0.3-0.1 are discordant
    assert found.estimate(scores, "tau").value == pytest.approx(7 / np.sqrt(11 * 15))
    score_ranks, true_ranks = np.array([1.5, 1.5, 4, 4, 4, 6]), np.array([2, 3, 1, 5, 4, 6])
    expected = np.corrcoef(score_ranks, true_ranks)[0, 1]
    assert found.estimate(scores, "rho").value == pytest.approx(expected)


def test_tau_within_compares_only_pairs_of_one_bin():
    assert ranks.bins_of(FLOPS, 2).tolist() == [0, 0, 0, 1, 1, 1]
    # in the first bin one of three pairs agrees, in the second two of three
    assert ranking().estimate(FLOPS, "tau within").value == pytest.approx(0.0)
    across = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])  # knows the bin and nothing else
    assert ranking().estimate(across, "tau").value > 0.7
    assert np.isnan(ranking().estimate(across, "tau within").value)


def test_a_resample_equals_the_statistic_of_the_items_drawn():
    rng = np.random.default_rng(1)
    scores, truth = rng.integers(0, 4, 9).astype(float), rng.normal(size=9)
    groups = rng.integers(0, 2, 9)
    drawn = rng.integers(0, 9, 9)
    weights = np.bincount(drawn, minlength=9)[None].astype(float)
    same = groups[:, None] == groups
    pairs = list(combinations(drawn.tolist(), 2))
    expected = tau_of_pairs(scores, truth, pairs)
    assert ranks.weighted_kendall(scores, truth, weights, np.ones((9, 9)))[0] == pytest.approx(expected)
    inside = tau_of_pairs(scores, truth, [pair for pair in pairs if same[pair]])
    assert ranks.weighted_kendall(scores, truth, weights, same)[0] == pytest.approx(inside)
    mean_ranks = [
        np.array([(v[drawn] < x).sum() + ((v[drawn] == x).sum() + 1) / 2 for x in v[drawn]])
        for v in (scores, truth)
    ]
    rho = ranks.weighted_spearman(scores, truth, weights)[0]
    assert rho == pytest.approx(np.corrcoef(*mean_ranks)[0, 1])


def test_intervals_hold_the_truth_and_shrink_with_more_items():
    """Two normal variables of correlation r have tau = 2/π asin r."""
    rng = np.random.default_rng(2)
    widths, held = {20: 0.0, 80: 0.0}, 0
    for count in (20, 80):
        for _ in range(40):
            x, noise = rng.normal(size=(2, count))
            found = ranks.Ranking(0.6 * x + 0.8 * noise, np.zeros(count), num_resamples=200).estimate(
                x, "tau"
            )
            held += found.low <= 2 / np.pi * np.arcsin(0.6) <= found.high
            widths[count] += found.high - found.low
    assert held >= 70
    assert widths[80] < 0.7 * widths[20]


def test_differences_are_paired():
    found = ranking(num_resamples=300)
    assert str(found.difference(FLOPS, 2 * FLOPS, "tau")) == "+0.00 [+0.00, +0.00]"
    better = found.difference(TRUTH, FLOPS, "tau")
    assert better.value == pytest.approx(6 / 15)
    assert better.low >= 0.0


def test_bins_hold_as_many_items_each_whatever_their_order():
    costs = np.array([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0])
    assert ranks.bins_of(costs, 3).tolist() == [1, 0, 2, 0, 1, 0, 2]
