"""Products of categorical distributions: margin, masks, sampling. Numbers: search.md, "Tests"."""

from __future__ import annotations

import numpy as np
import pytest

from nasdeploy.optim import categorical as cat

NARROW = ((True, False, True), (False, True), (True, True, True, True))
SIZES = (3, 2, 4)


class FixedDraw:
    """A generator that only ever draws one number."""

    def __init__(self, value):
        self.value = value

    def random(self, shape=()):
        return np.full(shape, self.value)


def random_theta(mask, rng):
    raw = np.where(mask, rng.random(mask.shape), 0.0)
    return raw / raw.sum(axis=-1, keepdims=True)


def test_uniform_covers_the_mask_only():
    theta = cat.uniform(cat.mask_array(SIZES, NARROW))
    assert theta.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.25] * 4]


def test_margin_counts_allowed_candidates_and_valid_decisions():
    lowest = cat.margin(cat.mask_array(SIZES, NARROW))[:, 0]
    assert lowest.tolist() == [1 / 4, 0, 1 / 8]  # D_valid = 2: min(1/2, 1/4), skipped, min(1/6, 1/8)


@pytest.mark.parametrize("mask", [None, NARROW])
def test_margin_keeps_rows_normalised_and_above(rng, mask):
    mask = cat.mask_array(SIZES, mask)
    for _ in range(50):
        moved = np.where(mask, rng.normal(size=mask.shape), 0.0)
        moved += np.where(
            mask, (1 - moved.sum(axis=-1, keepdims=True)) / mask.sum(axis=-1, keepdims=True), 0.0
        )
        theta = cat.with_margin(moved, mask)
        np.testing.assert_allclose(theta.sum(axis=-1), 1.0, atol=1e-14)
        assert (theta >= np.where(mask, cat.margin(mask), 0.0) - 1e-15).all()
        assert not theta[~mask].any()


def test_removing_the_margin_gives_certainty_back():
    mask = cat.mask_array(SIZES, NARROW)
    certain = np.zeros(mask.shape)
    certain[np.arange(3), [2, 1, 3]] = 1.0
    np.testing.assert_allclose(cat.without_margin(cat.with_margin(certain, mask), mask), certain, atol=1e-15)


def test_log_probability_is_minus_infinity_outside_the_mask(rng):
    theta = random_theta(cat.mask_array(SIZES, NARROW), rng)
    values = cat.log_probability(theta, np.array([[2, 1, 3], [1, 1, 3]]))
    assert values[0] == pytest.approx(np.log(theta[0, 2] * theta[1, 1] * theta[2, 3]))
    assert values[1] == -np.inf


def test_log_probability_of_many_distributions_at_once(rng):
    mask = cat.mask_array(SIZES)
    theta = np.stack([random_theta(mask, rng) for _ in range(3)])
    choices = cat.sample(theta, rng)
    rows = [cat.log_probability(one, choices) for one in theta]
    assert cat.log_probability(theta, choices).tolist() == np.array(rows).tolist()


def test_samples_follow_theta(rng):
    theta = random_theta(cat.mask_array(SIZES, NARROW), rng)
    num_draws = 40_000
    drawn = cat.sample(np.broadcast_to(theta, (num_draws, *theta.shape)), rng)
    shares = np.stack([(drawn == c).mean(axis=0) for c in range(4)], axis=1)
    assert (np.abs(shares - theta) <= 4.5 * np.sqrt(theta * (1 - theta) / num_draws)).all()


def test_samples_of_every_distribution_follow_it(rng):
    mask = cat.mask_array(SIZES, NARROW)
    theta = np.stack([random_theta(mask, rng), random_theta(cat.mask_array(SIZES), rng)])
    num_draws = 40_000
    drawn = cat.sample_each(theta, num_draws, rng)
    assert drawn.shape == (2, num_draws, 3)
    shares = np.stack([(drawn == c).mean(axis=1) for c in range(4)], axis=-1)
    assert (np.abs(shares - theta) <= 4.5 * np.sqrt(theta * (1 - theta) / num_draws)).all()


def test_sample_is_valid_when_the_cumulative_sum_rounds_below_one():
    theta = np.zeros((1, 1, 12))
    theta[..., 1:11] = 0.1
    assert theta.cumsum(axis=-1)[0, 0, -1] <= np.nextafter(1.0, 0.0)
    assert cat.sample(theta, FixedDraw(np.nextafter(1.0, 0.0))).tolist() == [[10]]
    assert cat.sample_each(theta, 1, FixedDraw(np.nextafter(1.0, 0.0))).tolist() == [[[10]]]


def test_within_reports_each_distribution():
    masks = np.stack([cat.mask_array(SIZES, NARROW), cat.mask_array(SIZES)])
    assert cat.within(masks, np.array([[0, 1, 0], [1, 1, 0]])).tolist() == [[True, False], [True, True]]


def test_entropy_of_uniform_is_the_log_of_the_number_of_architectures():
    assert cat.entropy(cat.uniform(cat.mask_array(SIZES))) == pytest.approx(np.log(24))


@pytest.mark.parametrize("rows", [((True,), (True, True)), ((False, False), (True,))])
def test_wrong_masks_are_refused(rows):
    with pytest.raises(ValueError, match=r"expected \[2, 1\]"):
        cat.mask_array((2, 1), rows)


@pytest.mark.parametrize("n", [1, 3, 10, 64])
def test_strata_have_the_size_of_their_share(rng, n):
    shares = np.array([0.1, 0.25, 0.05, 0.6])
    counts = np.array([np.bincount(cat.systematic_owners(shares, n, rng), minlength=4) for _ in range(4000)])
    assert (counts.sum(axis=1) == n).all()
    assert (np.abs(counts - n * shares) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0), n * shares, atol=0.04)


@pytest.mark.parametrize("offset", [0.0, np.nextafter(1.0, 0.0)])
def test_strata_are_complete_when_the_sum_of_shares_rounds_below_one(offset):
    shares = np.full(10, 0.1)
    assert shares.cumsum()[-1] < 1.0
    owners = cat.systematic_owners(shares, 20, FixedDraw(offset))
    assert len(owners) == 20
    assert set(owners) == set(range(10))
