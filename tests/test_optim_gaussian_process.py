"""The Gaussian process over architectures: against dense linear algebra, finite differences and enumeration."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim import gaussian_process
from nasdeploy.optim.features import CostFeatures
from nasdeploy.optim.gaussian_process import GaussianProcess, Scale, compressed
from nasdeploy.optim.kernel import Kernel, _energy, maximise_posterior
from nasdeploy.optim.objective import Objective

SIZES = (3, 4, 2, 3)
ALL = np.array(list(product(*map(range, SIZES))))
EFFECTS = np.random.default_rng(3).normal(size=(4, 4))


def true_loss(choices):
    pairs = 0.5 * (choices[:, 0] == choices[:, 3])
    return EFFECTS[np.arange(4), choices].sum(axis=1) + pairs


def draw(n, rng):
    return np.stack([rng.integers(count, size=n) for count in SIZES], axis=1)


def features():
    """Two costs that vary and one that does not."""
    tables = {
        name: CostTable(
            tuple(Factor((d,), values[:count]) for d, count in enumerate(SIZES)), constant=constant
        )
        for name, values, constant in (
            ("params", np.array([0.0, 1.0, 3.0, 9.0]), 5.0),
            ("flops", np.array([2.0, 1.0, 0.5, 4.0]), 0.0),
            ("latency_ms", np.ones(4), 0.0),
        )
    }
    return CostFeatures(SIZES, [Objective(tables=tables)])


def observed(rng, *, steps=8, noise=0.05, **settings):
    model = GaussianProcess(SIZES, **settings)
    for step in range(steps):
        choices = draw(6, rng)
        model.observe(choices, true_loss(choices) + noise * rng.normal(size=6), step)
    return model


def rows_of(choices):
    """One-hot choices, and what they cost."""
    rows = np.zeros((len(choices), 16))
    for d in range(4):
        rows[np.arange(len(choices)), 4 * d + choices[:, d]] = 1.0
    return np.concatenate([rows, features().of(choices)], axis=1)


def explained(model):
    """Return R² of what the model says of all architectures, up to a constant."""
    error = model.predict(ALL) - true_loss(ALL)
    return 1.0 - error.var() / true_loss(ALL).var()


@pytest.fixture
def kernel(rng):
    prior = Kernel.prior_mean(4, 4)
    return Kernel(prior.logs + rng.normal(0.0, 0.3, len(prior.logs)), 4)


def test_kernel_is_the_written_one(rng, kernel):
    one, other = draw(5, rng), draw(7, rng)
    found = kernel.of_losses(rows_of(one), rows_of(other))
    differs = one[:, None] != other[None]  # (n, m, D)
    choices = (~differs * kernel.main).sum(axis=-1) + kernel.scale * np.exp(-(differs * kernel.rates).sum(-1))
    here, there = features().of(one)[:, None], features().of(other)[None]  # (n, 1, F), (1, m, F)
    linear = kernel.linear * (here * there).mean(axis=-1)
    smooth = kernel.smooth * np.exp(-0.5 * ((here - there) ** 2).mean(axis=-1))
    assert found == pytest.approx(choices + linear + smooth, rel=1e-12)
    without = kernel.of_losses(rows_of(one)[:, :16], rows_of(other)[:, :16])
    assert without == pytest.approx(choices, rel=1e-12)


def test_features_are_standardised_logarithms_of_what_varies(rng):
    choices = draw(4000, rng)
    found = features().of(choices)
    assert found.shape == (4000, len(features())) == (4000, 2)
    assert found.mean(axis=0) == pytest.approx(np.zeros(2), abs=0.15)
    assert found.std(axis=0) == pytest.approx(np.ones(2), abs=0.15)
    params = np.array([0.0, 1.0, 3.0, 9.0])[choices].sum(axis=1)  # a constant of 5 does not matter
    above = np.log(params / params.std() + 0.3)
    assert np.corrcoef(found[:, 0], above)[0, 1] > 0.999
    assert np.array_equal(found, features().of(choices))


def test_a_loss_that_follows_a_cost_is_learnt_from_fewer_samples(rng):
    cost = features().of(ALL)[:, 0]
    seen = rng.permutation(len(ALL))[:8]
    errors = []
    for known in (None, features()):
        model = GaussianProcess(SIZES, features=known)
        model.fit(ALL[seen], -cost[seen], np.zeros(8, dtype=np.int64))
        errors.append((model.predict(ALL) + cost).std())
    assert errors[1] < 0.5 * errors[0]


def test_kernel_of_steps_joins_what_was_observed_together(kernel):
    times = np.array([[1.0, -0.5], [1.0, -0.5], [2.0, 1.5]])
    b, tau = kernel.between_steps, kernel.trend
    same, apart = b + 0.25 * tau, -0.75 * tau
    expected = [[same, same, apart], [same, same, apart], [apart, apart, b + 2.25 * tau]]
    assert kernel.of_steps(times, times) == pytest.approx(np.array(expected))


def test_energy_and_its_slope(rng, kernel):
    choices = draw(30, rng)
    times = np.stack([np.repeat(np.arange(5.0), 6), np.repeat(rng.normal(size=5), 6)], axis=1)
    target = true_loss(choices) + rng.normal(size=30)
    prior, rows = Kernel.prior_mean(4, 4), rows_of(choices)
    _, slope = _energy(kernel, prior, rows, times, target)
    numeric = []
    for i in range(len(slope)):
        step = np.zeros(len(slope))
        step[i] = 1e-5
        up, down = (_energy(Kernel(kernel.logs + s, 4), prior, rows, times, target)[0] for s in (step, -step))
        numeric.append((up - down) / 2e-5)
    assert slope == pytest.approx(np.array(numeric), rel=1e-5, abs=1e-6)


def test_fitting_raises_the_posterior(rng):
    choices = draw(40, rng)
    times = np.zeros((40, 2))
    target, prior = true_loss(choices), Kernel.prior_mean(4, 4)
    fitted = maximise_posterior(prior, prior, rows_of(choices), times, target, again=False)
    before, after = (_energy(k, prior, rows_of(choices), times, target)[0] for k in (prior, fitted))
    assert after < before - 5.0


def test_predictions_are_those_of_dense_algebra(rng):
    """With the factor built in one piece and extended by blocks."""
    model = observed(rng, steps=9, features=features())
    assert 0 < model._num_based < len(model._batches)  # both parts are there
    known, kernel = model._factored, model._kernel
    rows, times, scale = known.samples.rows, known.samples.times, known.samples.scale
    covariance = kernel.of_losses(rows, rows) + kernel.of_steps(times, times)
    covariance += kernel.noise * np.eye(len(covariance))
    across = kernel.of_losses(rows_of(ALL), rows)
    solved = np.linalg.solve(covariance, np.column_stack([known.samples.target, across.T]))
    mean = scale.mean + scale.spread * across @ solved[:, 0]
    spread = kernel.of_losses(rows_of(ALL), rows_of(ALL)) - across @ solved[:, 1:]
    posterior = model.posterior(ALL)
    assert posterior.mean == pytest.approx(mean, abs=1e-9)
    assert model.predict(ALL) == pytest.approx(mean, abs=1e-9)
    assert posterior.covariance == pytest.approx(scale.spread**2 * spread, abs=1e-9)


def test_losses_are_learnt_and_uncertainty_falls(rng):
    few, many = observed(rng, steps=4), observed(rng, steps=40)
    assert explained(many) > 0.97
    assert few.posterior(ALL).variance.mean() > 2.0 * many.posterior(ALL).variance.mean()
    assert few.predict(ALL).std() > 0.1


def test_errors_are_as_large_as_expected(rng):
    """Of 72 architectures, about 95 % within two standard deviations; too few would be overconfidence."""
    model = observed(rng, steps=6)
    posterior = model.posterior(ALL)
    error = posterior.mean - true_loss(ALL)
    error -= error.mean()
    assert (np.abs(error) < 2.0 * np.sqrt(posterior.variance)).mean() > 0.85


def test_common_batches_of_steps_do_not_count(rng):
    """Each step moves all its losses by far more than architectures differ."""
    model = GaussianProcess(SIZES)
    for step in range(40):
        choices = draw(6, rng)
        model.observe(choices, true_loss(choices) + 5.0 * rng.normal(), step)
    assert explained(model) > 0.8


def test_conditioning_is_an_observation_of_the_mean(rng):
    model = observed(rng, steps=4, noise=0.0)
    before = model.posterior(ALL)
    moves = before.moves()
    assert moves[5, 5] == pytest.approx(before.variance[5] / np.sqrt(before.variance[5] + before.noise))
    covariance = before.covariance.copy()
    before.condition(5)
    gain = covariance[:, 5] / (covariance[5, 5] + before.noise)
    assert before.covariance == pytest.approx(covariance - np.outer(gain, covariance[5]), abs=1e-12)


def test_bad_losses_are_compressed_and_good_ones_stay(rng):
    losses = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 1000.0])
    flat = compressed(losses, 3.0, 1.0)
    assert (flat[:5] == losses[:5]).all()
    assert 6.0 < flat[5] < 15.0
    assert (compressed(losses, 3.0, 0.0) == losses).all()
    assert Scale.of(np.full(4, 7.0)).target(np.full(4, 7.0)).tolist() == [0.0] * 4


def test_old_samples_are_forgotten(rng):
    model = observed(rng, steps=30, max_samples=60)
    assert 30 <= model.num_samples <= 60
    assert model._batches[-1].step == 29


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_a_stored_model_continues_bit_by_bit(rng, steps):
    model = observed(rng, steps=steps, features=features())
    other = GaussianProcess(SIZES, features=features())
    other.load_state_dict(json.loads(json.dumps(model.state_dict())))
    for step in range(steps, steps + 6):
        choices = draw(6, rng)
        for one in (model, other):
            one.observe(choices, true_loss(choices), step)
        assert (model.predict(ALL) == other.predict(ALL)).all()


@pytest.mark.parametrize("step", [0, 5, 17])
def test_one_large_step_and_a_small_one(rng, step):
    """All of one step, whose logarithm has no spread but rounding."""
    model = GaussianProcess(SIZES)
    model.observe(draw(24, rng), rng.normal(size=24), step)
    model.observe(draw(5, rng), rng.normal(size=5), step + 1)
    assert np.isfinite(model.posterior(ALL).mean).all()


def test_fitting_at_once_keeps_the_latest(rng):
    model = GaussianProcess(SIZES, max_samples=50)
    model.fit(draw(120, rng), rng.normal(size=120), np.repeat(np.arange(20), 6))
    assert model.num_samples == 50


def test_without_samples_it_says_so():
    model = GaussianProcess(SIZES)
    with pytest.raises(ValueError, match="predict before fit"):
        model.predict(ALL)
    with pytest.raises(ValueError, match="expected at least 1"):
        model.fit(ALL[:0], np.empty(0), np.empty(0, dtype=np.int64))


def test_fit_is_the_same_whatever_was_known_before(rng):
    model, fresh = observed(rng), GaussianProcess(SIZES)
    choices, steps = draw(30, rng), np.repeat(np.arange(5), 6)
    for one in (model, fresh):
        one.fit(choices, true_loss(choices), steps)
    assert (model.predict(ALL) == fresh.predict(ALL)).all()
    assert gaussian_process.MAX_FITTED > 30


def test_a_state_of_another_kernel_is_fitted_again(rng):
    model = observed(rng)
    state = model.state_dict()
    del state["kernel"][-5:-3]  # as before costs were features
    other = GaussianProcess(SIZES)
    other.load_state_dict(state)
    assert other.num_samples == model.num_samples
    assert explained(other) == pytest.approx(explained(model), abs=0.1)
    other.observe(ALL[:6], true_loss(ALL[:6]), 99)
    assert np.isfinite(other.predict(ALL)).all()
