"""Which decisions matter: main effects of a model of the loss."""

from __future__ import annotations

import numpy as np
import pytest

from nasdeploy.optim import categorical
from nasdeploy.optim.gaussian_process import GaussianProcess, Posterior
from nasdeploy.optim.main_effects import NUM_ARCHITECTURES, main_effects

SIZES = (3, 2, 4, 1)
MASK = categorical.mask_array(SIZES, None)


class Known:
    """A model that is right: a function of choices (n, D), and what is uncertain of it."""

    def __init__(self, function, covariance=None):
        self.function, self.covariance = function, covariance or (lambda choices: np.eye(len(choices)))

    def predict(self, choices):
        return self.function(choices)

    def posterior(self, choices):
        return Posterior(mean=self.function(choices), covariance=self.covariance(choices), noise=0.1)


def drawn(count, seed=0):
    return np.random.default_rng(seed).integers(0, 100, (count, len(SIZES))) % np.array(SIZES)


def test_effects_of_an_additive_loss_are_its_terms_without_their_means():
    terms = np.random.default_rng(1).normal(size=MASK.shape)
    model = Known(lambda choices: 5.0 + terms[np.arange(len(SIZES)), choices].sum(axis=1))
    found = main_effects(model, drawn(10), MASK)
    expected = np.where(MASK, terms, np.nan)
    expected -= np.nanmean(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found.effects, expected, atol=1e-12)
    assert found.ranges == pytest.approx(np.nanmax(expected, axis=1) - np.nanmin(expected, axis=1))
    assert found.ranges[3] == 0.0
    assert found.num_architectures == 10


def test_interactions_are_averaged_over_the_networks_that_were_evaluated():
    model = Known(lambda choices: 1.0 * (choices[:, 0] == 2) * (choices[:, 1] == 1))
    evaluated = np.array([[0, 1, 0, 0], [1, 1, 3, 0], [2, 0, 0, 0], [0, 1, 2, 0]])  # three of four have 1
    effects = main_effects(model, evaluated, MASK).effects
    assert effects[0, :3] == pytest.approx(np.array([-0.25, -0.25, 0.5]))
    assert effects[1, :2] == pytest.approx(np.array([-0.125, 0.125]))  # one of four has 2


def test_a_candidate_that_nobody_may_take_has_no_effect():
    mask = MASK.copy()
    mask[2, 3] = False
    found = main_effects(Known(lambda choices: choices[:, 2] ** 2.0), drawn(8), mask)
    assert np.isnan(found.effects[2, 3])
    assert found.effects[2, :3] == pytest.approx(np.array([-5 / 3, -2 / 3, 7 / 3]))
    assert found.ranges[2] == pytest.approx(4.0)


def test_the_error_of_a_range_is_that_of_the_difference_of_means():
    per_candidate = Known(  # what is uncertain is the effect of each candidate of decision 2: variance 0.04
        lambda choices: choices[:, 2] * 1.0,
        lambda choices: 0.04 * (choices[:, 2][:, None] == choices[:, 2]),
    )
    errors = main_effects(per_candidate, drawn(40), MASK).errors
    assert errors[2] == pytest.approx(np.sqrt(2 * 0.04))
    assert errors[0] == pytest.approx(0.0, abs=1e-9)  # both means are over the same networks
    assert errors[3] == 0.0


def test_a_diagonal_covariance_tells_no_error():
    errors = main_effects(Known(lambda choices: choices[:, 0] * 1.0), drawn(8), MASK).errors
    assert np.isnan(errors[:3]).all()


def test_many_evaluated_networks_are_thinned_out_and_none_are_refused():
    model = Known(lambda choices: choices[:, 0] * 1.0)
    assert main_effects(model, drawn(500), MASK).num_architectures == NUM_ARCHITECTURES
    with pytest.raises(ValueError, match="no architectures to average over"):
        main_effects(model, drawn(0), MASK)


def test_a_gaussian_process_finds_the_decision_that_matters_and_says_how_sure_it_is():
    rng = np.random.default_rng(3)
    choices = drawn(120, seed=4)
    losses = 0.2 * choices[:, 2] + rng.normal(0.0, 0.02, len(choices))
    process = GaussianProcess(SIZES)
    process.fit(choices, losses, np.arange(len(choices)) // 6)
    found = main_effects(process, choices, MASK)
    assert found.ranges.argmax() == 2
    assert abs(found.ranges[2] - 0.6) < 4 * found.errors[2]
    assert 0.0 < found.errors[2] < 0.03
    assert (found.ranges[:2] < 3 * found.errors[:2]).all()  # nothing there, and it does not claim so
