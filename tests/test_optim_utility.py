"""Importance weights and the weighted rank utility. Numbers: search.md, "Tests"."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nasdeploy.optim import categorical as cat
from nasdeploy.optim.importance import effective_sample_size, importance_weights, log_mixture
from nasdeploy.optim.utility import rank_utility, truncation_share


def plain_asng_utility(losses):
    """ASNG's: +1/μ for the best quarter, -1/μ for the worst, tied losses share."""
    n = len(losses)
    mu = -(-n // 4)
    by_place = np.array([1.0 / mu] * mu + [0.0] * (n - 2 * mu) + [-1.0 / mu] * mu)
    sorted_losses = sorted(losses)
    places = [[p for p, value in enumerate(sorted_losses) if value == loss] for loss in losses]
    return np.array([by_place[tied].mean() for tied in places])


def random_thetas(num, sizes, rng):
    mask = cat.mask_array(sizes)
    raw = np.where(mask, rng.random((num, *mask.shape)), 0.0)
    return raw / raw.sum(axis=-1, keepdims=True)


def test_2_importance_weights_are_unbiased_and_bounded(rng):
    sizes = (2, 3, 2)
    everything = np.array(list(product(*map(range, sizes))))
    alpha = np.array([0.5, 0.2, 0.3])
    log_p = cat.log_probability(random_thetas(3, sizes, rng), everything)  # (K, 12)
    log_q = log_mixture(log_p, alpha)
    h = rng.normal(size=len(everything))
    assert np.exp(log_q).sum() == pytest.approx(1.0)
    for k in range(3):
        weights = importance_weights(log_p[k], log_q)
        assert (np.exp(log_q) * weights) @ h == pytest.approx(np.exp(log_p[k]) @ h, abs=1e-14)
        assert 0.0 <= weights.min() <= weights.max() <= 1.0 / alpha[k] + 1e-12


@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_3_equal_distributions_have_weight_one(rng, num):
    theta = np.repeat(random_thetas(1, (4, 3, 2), rng), num, axis=0)
    log_p = cat.log_probability(theta, cat.sample(np.repeat(theta[:1], 16, axis=0), rng))
    weights = importance_weights(log_p[0], log_mixture(log_p, np.full(num, 1 / num)))
    np.testing.assert_allclose(weights, 1.0, atol=1e-15 * num)
    assert effective_sample_size(weights) == pytest.approx(16.0, abs=1e-12)


def test_6_fifty_decisions_at_the_margin_are_finite(rng):
    mask = np.stack([cat.mask_array((5,) * 50)] * 3)
    certain = np.zeros(mask.shape)
    for k in range(3):
        certain[k, :, k] = 1.0
    theta = cat.with_margin(certain, mask)
    choices = np.concatenate([cat.mode(theta), np.full((1, 50), 4)])
    log_p = cat.log_probability(theta, choices)
    log_q = log_mixture(log_p, np.full(3, 1 / 3))
    weights = np.array([importance_weights(row, log_q) for row in log_p])
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights[:, :3], 3 * np.eye(3), atol=1e-12)
    np.testing.assert_allclose(weights[:, 3], 1.0)


def test_impossible_samples_weigh_nothing():
    log_p = np.array([[-np.inf, -np.inf], [-1.0, -np.inf]])
    log_q = log_mixture(log_p, np.array([0.5, 0.5]))
    assert log_q.tolist() == [pytest.approx(np.log(0.5) - 1.0), -np.inf]
    assert importance_weights(log_p[0], log_q).tolist() == [0.0, 0.0]
    assert importance_weights(log_p[1], log_q).tolist() == [pytest.approx(2.0), 0.0]


def test_effective_sample_size_by_hand():
    assert effective_sample_size(np.array([3.0, 1.0, 0.0])) == pytest.approx(1.6)
    assert effective_sample_size(np.full(4, 1e-200)) == 4.0
    assert effective_sample_size(np.zeros(3)) == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_4_utilities_sum_to_zero_and_ignore_an_offset(rng, tied):
    for n in (1, 2, 3, 8, 20):
        losses = rng.integers(3, size=n).astype(float) if tied else rng.normal(size=n)
        weights = rng.exponential(size=n) * (rng.random(n) < 0.8)
        rho = truncation_share(max(effective_sample_size(weights), 1.0))
        utilities = rank_utility(losses, weights, rho)
        assert abs(utilities.sum()) < 1e-14
        np.testing.assert_allclose(rank_utility(losses + 4.0, weights, rho), utilities, atol=1e-15)


def test_equal_losses_have_no_utility(rng):
    np.testing.assert_allclose(rank_utility(np.zeros(6), rng.random(6), 0.3), 0.0, atol=1e-15)


def test_12_weight_two_equals_two_samples_of_weight_one(rng):
    losses = rng.normal(size=9)
    weights = rng.random(9)
    weights[4] = 2.0
    whole = rank_utility(losses, weights, 0.3)
    halves = rank_utility(
        np.append(losses, losses[4]), np.append(np.where(weights == 2.0, 1.0, weights), 1.0), 0.3
    )
    assert halves[4] + halves[9] == pytest.approx(whole[4], abs=1e-12)
    np.testing.assert_allclose(np.delete(halves, [4, 9]), np.delete(whole, 4), atol=1e-12)


def test_12_also_where_the_halves_are_not_tied(rng):
    losses, weights = rng.normal(size=9), rng.random(9)
    weights[4] = 2.0
    split = rank_utility(
        np.append(losses, np.nextafter(losses[4], 9.0)),
        np.append(np.where(weights == 2.0, 1.0, weights), 1.0),
        0.3,
    )
    assert split[4] + split[9] == pytest.approx(rank_utility(losses, weights, 0.3)[4], abs=1e-12)


def test_13_eight_equal_weights_give_asng_exactly(rng):
    for losses in (rng.normal(size=8), np.array([1.0, 0, 1, 1, 2, 2, 2, -1])):
        utilities = rank_utility(losses, np.ones(8), truncation_share(8.0))
        assert utilities.tolist() == plain_asng_utility(losses).tolist()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 12, 17, 33, 64])
def test_equal_weights_give_asng_for_any_size(rng, n):
    losses = rng.integers(n, size=n).astype(float)
    utilities = rank_utility(
        losses, np.full(n, 0.7), truncation_share(effective_sample_size(np.full(n, 0.7)))
    )
    np.testing.assert_allclose(utilities, plain_asng_utility(losses), atol=1e-13)


def test_truncation_share_forgives_rounding_at_four():
    assert truncation_share(4.000000001) == 0.25
    assert truncation_share(5.0) == 0.4
    assert truncation_share(1.0) == 0.5
