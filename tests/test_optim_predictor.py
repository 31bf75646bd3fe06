"""Models of the loss: the closed forms, how held-out evidence chooses between them, and learning step by step."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim import categorical
from nasdeploy.optim.cross_validation import cross_validate, held_out_tau, kendall_tau, standard_error
from nasdeploy.optim.gaussian_predictor import GaussianPredictor
from nasdeploy.optim.ladder import CHEAP_GROWTH, COSTLY_GROWTH, Ladder, Rung, ridge_rungs
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.predictor import RidgePredictor
from nasdeploy.optim.residuals import OwnResiduals
from nasdeploy.optim.streaming import StreamingLadder
from nasdeploy.optim.targets import Samples, Targets, step_effects

SIZES = (3, 4, 2, 4, 3)
ALL = np.array(list(product(*map(range, SIZES))))
EFFECTS = np.random.default_rng(5).normal(size=(5, 4))
PAIRS = np.random.default_rng(6).normal(size=(4, 4, 4))
NUMPY_MODELS = {
    "ridge": lambda: RidgePredictor(SIZES, num_folds=0),
    "pairs": lambda: RidgePredictor(SIZES, pairs="neighbours", num_folds=0),
    "ladder": lambda: Ladder(ridge_rungs(SIZES), num_candidates=SIZES, num_repeats=1),
}


def additive(choices):
    return EFFECTS[np.arange(5), choices].sum(axis=1)


def paired(choices):
    return additive(choices) + PAIRS[np.arange(4), choices[:, :-1], choices[:, 1:]].sum(axis=1)


def drawn(n, rng, loss=additive, noise=0.0):
    """n architectures, eight a step."""
    choices = np.stack([rng.integers(count, size=n) for count in SIZES], axis=1)
    return Samples(
        choices=choices, losses=loss(choices) + noise * rng.normal(size=n), steps=np.arange(n) // 8
    )


def fitted(model, samples):
    model.fit(samples.choices, samples.losses, samples.steps)
    return model


def ladder(**options):
    return Ladder(ridge_rungs(SIZES), num_candidates=SIZES, **options)


# ── closed forms ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("pairs", "truth"), [("none", additive), ("neighbours", paired)])
def test_ridge_recovers_what_it_can_express_and_its_optimum(rng, pairs, truth):
    found = fitted(
        RidgePredictor(SIZES, pairs=pairs, ridge=1e-9, pair_ridge=1e-9, num_folds=0), drawn(400, rng, truth)
    ).predict(ALL)
    assert found == pytest.approx(truth(ALL), abs=1e-6)
    assert found.argmin() == truth(ALL).argmin()


@pytest.mark.parametrize("name", NUMPY_MODELS)
def test_the_step_keeps_the_optimum_while_losses_drift(rng, name):
    """By 0.4 (1 - t/T), and a bad candidate is sampled ever more often, when all losses are low."""
    num_steps, effects = 100, 0.05 * EFFECTS
    samples = drawn(8 * num_steps, rng)
    choices, progress = samples.choices, samples.steps / num_steps
    choices[:, 1] = np.where(rng.random(len(choices)) < progress, 1, choices[:, 1])
    losses = effects[np.arange(5), choices].sum(axis=1) + 0.4 * (1.0 - progress)
    best = effects[np.arange(5), ALL].sum(axis=1).argmin()
    found = {
        told: fitted(NUMPY_MODELS[name](), Samples(choices=choices, losses=losses, steps=steps)).predict(ALL)
        for told, steps in (("step", samples.steps), ("nothing", np.zeros_like(samples.steps)))
    }
    assert found["step"].argmin() == best
    assert found["nothing"].argmin() != best


@pytest.mark.parametrize("pairs", ["none", "neighbours"])
def test_gradients_are_finite_differences_of_the_expected_prediction(rng, pairs):
    model = fitted(RidgePredictor(SIZES, pairs=pairs, num_folds=0), drawn(200, rng, paired, noise=0.1))
    mask = categorical.mask_array(SIZES)
    theta = np.where(mask, rng.random((3, 5, 4)), 0.0)
    theta[0] = categorical.one_hot(ALL[17], 4)
    predicted = model.predict(ALL)

    def relaxed(one):
        """Σ_c Π_d θ_d[c_d] ψ(c), also where θ does not sum to 1: compared within a decision only."""
        weights = np.prod(one[np.arange(5), ALL], axis=1)
        return weights @ predicted

    theta[1:] /= theta[1:].sum(axis=2, keepdims=True)
    found = model.gradient(theta)
    assert found.shape == theta.shape
    assert (found[:, ~mask] == 0.0).all()
    for one, gradient in zip(theta, found, strict=True):
        for d, count in enumerate(SIZES):
            moved = np.zeros(count)
            for j in range(count):
                step = np.zeros((5, 4))
                step[d, j], step[d, (j + 1) % count] = 1e-4, -1e-4  # along the simplex
                moved[j] = (relaxed(one + step) - relaxed(one - step)) / 2e-4
            expected = gradient[d, :count] - np.roll(gradient[d, :count], -1)
            assert moved == pytest.approx(expected, abs=1e-8)


def test_wide_spaces_have_neighbouring_pairs_only(rng):
    sizes = (6,) * 41
    choices = rng.integers(6, size=(20, 41))
    model = RidgePredictor(sizes, pairs="neighbours", num_folds=0)
    model.fit(choices, rng.normal(size=20), np.arange(20))
    assert np.array(model.state_dict()["pairs"]).shape == (40, 6, 6)
    assert model.gradient(categorical.one_hot(choices, 6)).shape == (20, 41, 6)


def test_importance_is_of_the_gradients_at_the_samples(rng):
    effects = np.zeros((5, 4))
    effects[1] = [3.0, -3.0, 0.0, 0.0]
    model = RidgePredictor(SIZES, num_folds=0)
    samples = drawn(200, rng, lambda choices: effects[np.arange(5), choices].sum(axis=1))
    assert (model.importance() == 0.0).all()
    found = fitted(model, samples).importance()
    assert found[1] == pytest.approx([0.5**0.5, 0.5**0.5, 0.0, 0.0], abs=0.02)
    assert (found[~categorical.mask_array(SIZES)] == 0.0).all()


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_the_posterior_is_as_wide_as_held_out_losses_are_off(rng, noise):
    samples = drawn(320, rng, noise=noise)
    unseen = ALL[~(ALL[:, None] == samples.choices).all(axis=2).any(axis=1)][:3]
    for model in (RidgePredictor(SIZES), ladder()):
        posterior = fitted(model, samples).posterior(unseen)
        assert posterior.mean == pytest.approx(model.predict(unseen))
        assert np.sqrt(posterior.variance + posterior.noise) == pytest.approx(noise, rel=0.15)
        assert posterior.variance == pytest.approx([posterior.noise] * 3)
        assert posterior.covariance[~np.eye(3, dtype=bool)] == pytest.approx(np.zeros(6))
    uncalibrated = fitted(RidgePredictor(SIZES, num_folds=0), samples)
    seen = model.posterior(samples.choices[:1])
    assert seen.noise == posterior.noise
    assert seen.variance[0] <= 0.5 * posterior.variance[0], "what is its own shows"
    posterior = uncalibrated.posterior(ALL[:3])
    assert (posterior.variance + posterior.noise > 2.0).all(), "the variance of the losses themselves"


@pytest.mark.parametrize("count", [1, 40])
def test_losses_that_never_vary_leave_a_posterior_that_can_be_conditioned(rng, count):
    samples = drawn(count, rng, lambda choices: np.full(len(choices), 2.0))
    for model in (RidgePredictor(SIZES), ladder()):
        posterior = fitted(model, samples).posterior(ALL[:3])
        assert np.isfinite(posterior.moves()).all()
        posterior.condition(0)
        assert posterior.mean == pytest.approx([2.0] * 3)
        assert posterior.variance.max() < 1e-20


@pytest.mark.parametrize(
    "make",
    [NUMPY_MODELS["ridge"], NUMPY_MODELS["pairs"], lambda: GaussianPredictor(SIZES)],
    ids=["ridge", "pairs", "gp"],
)
def test_importance_does_not_depend_on_the_unit_of_the_losses(rng, make):
    samples = drawn(60, rng, paired)
    other = Samples(choices=samples.choices, losses=0.001 * samples.losses + 7.0, steps=samples.steps)
    found, scaled = (fitted(make(), one).importance() for one in (samples, other))
    assert found.max() > 0.3
    assert scaled == pytest.approx(found, rel=1e-3, abs=1e-5)


# ── held-out evidence ────────────────────────────────────────────────────────────────────────────


def slow_tau(one, other):
    concordant, untied_one, untied_other = 0, 0, 0
    for i in range(len(one)):
        for j in range(i):
            a, b = np.sign(one[i] - one[j]), np.sign(other[i] - other[j])
            concordant += a * b
            untied_one += a != 0
            untied_other += b != 0
    return concordant / np.sqrt(untied_one * untied_other)


def test_tau_counts_pairs_and_ties(rng):
    for high in (3, 1000):
        one, other = rng.integers(high, size=(2, 30)).astype(float)
        assert kendall_tau(one, other) == pytest.approx(slow_tau(one, other))
    assert kendall_tau(np.arange(5.0), np.arange(5.0) ** 3) == 1.0
    assert kendall_tau(np.arange(5.0), -np.arange(5.0)) == -1.0
    assert kendall_tau(np.zeros(5), np.arange(5.0)) == 0.0


@pytest.mark.parametrize("name", NUMPY_MODELS)
def test_shuffled_labels_are_not_ranked(rng, name):
    samples = drawn(150, rng, paired)
    taus = []
    for _ in range(50):
        shuffled = Samples(
            choices=samples.choices, losses=rng.permutation(samples.losses), steps=samples.steps
        )
        held = rng.permutation(150) < 30
        taus.append(held_out_tau(NUMPY_MODELS[name], shuffled, held))
    assert abs(np.mean(taus)) < 0.05
    assert held_out_tau(NUMPY_MODELS[name], samples, held) > 0.5


def test_what_a_common_batch_adds_does_not_hide_the_ranking(rng):
    """Losses of a step are all lower or higher by several times what architectures differ by."""
    samples = drawn(320, rng)
    shifted = samples.losses + 8.0 * rng.normal(size=40)[samples.steps]
    told = Samples(choices=samples.choices, losses=shifted, steps=samples.steps)
    result = cross_validate(NUMPY_MODELS["ridge"], told, num_folds=5, num_repeats=1, seed=0)
    assert result.taus.mean() > 0.85
    assert kendall_tau(fitted(ladder(), told).predict(ALL), additive(ALL)) > 0.95


def test_step_effects_are_the_means_shrunken_by_their_reliability():
    """Two steps of two values around ±3, each value 1 away from its step's mean."""
    effects = step_effects(np.array([4.0, 2.0, -2.0, -4.0]), np.array([7, 7, 9, 9]))
    # within 2, between 2 · 18 = 36, b = (36 - 2) / 2 = 17, of the mean's variance 17 + 2 / 2
    assert effects == pytest.approx(3.0 * np.array([1.0, -1.0]) * 17.0 / 18.0)
    assert (step_effects(np.array([1.0, -1.0, 1.0, -1.0]), np.array([0, 0, 1, 1])) == 0.0).all()
    assert (step_effects(np.arange(4.0), np.arange(4)) == 0.0).all(), "one value a step tells nothing"


def test_the_trend_is_taken_out_to_the_level_of_the_latest_step(rng):
    samples = drawn(200, rng)
    steps = np.arange(200)
    drifting = Samples(
        choices=samples.choices, losses=samples.losses + 5.0 - 3.0 * np.log1p(steps), steps=steps
    )
    left = Targets(drifting).of(drifting) - (samples.losses + 5.0 - 3.0 * np.log1p(199))
    assert np.abs(left).max() < 0.2


def test_outliers_are_compressed_beyond_the_knee(rng):
    samples = drawn(100, rng)
    samples.losses[3] = 1000.0
    plain, flat = (Targets(samples, knee=knee).of(samples) for knee in (None, 3.0))
    kept = plain < np.median(plain)
    assert plain[3] > 900.0
    assert flat[3] < 100.0
    assert (plain[kept] == flat[kept]).all()


@pytest.mark.parametrize(("truth", "rung"), [(additive, "ridge"), (paired, "pairs")])
def test_the_ladder_climbs_only_where_it_helps(rng, truth, rung):
    model = fitted(ladder(), drawn(300, rng, truth, noise=0.3))
    taus = model.choice.taus
    assert model.choice.rung == rung
    assert (taus["pairs"][0] > taus["ridge"][0] + taus["pairs"][1]) == (rung == "pairs")


def test_a_better_rung_within_its_standard_error_is_not_taken(rng):
    """Here the second rung is the first one but for a grain of its penalty."""
    rungs = [
        Rung(name=name, make=lambda ridge=ridge: RidgePredictor(SIZES, ridge=ridge, num_folds=0))
        for name, ridge in (("first", 1.0), ("second", 0.9))
    ]
    for _ in range(5):
        model = Ladder(rungs, num_candidates=SIZES)
        assert fitted(model, drawn(60, rng, noise=2.0)).choice.rung == "first"


def test_folds_that_share_samples_make_a_larger_error():
    assert standard_error(np.array([1.0, -1.0] * 5), num_folds=5) == pytest.approx(
        np.sqrt((0.1 + 0.25) * 10.0 / 9.0)
    )


def test_a_rung_is_chosen_again_when_samples_have_doubled(rng):
    model, samples = ladder(num_repeats=1), drawn(200, rng)
    chosen = []
    for count in (6, 20, 30, 39, 40, 60, 79, 80):
        fitted(model, samples[np.arange(count)])
        chosen.append(model.choice.num_samples)
    assert chosen == [0, 20, 20, 20, 40, 40, 40, 80]


def test_what_is_an_architectures_own_is_expected_in_part():
    own = OwnResiduals()
    own.learn(np.array([[0, 1], [1, 1], [0, 1]]), np.array([3.0, -1.0, 1.0]))
    expected, left = own.expected(np.array([[1, 1], [0, 0], [0, 1]]))
    assert expected == pytest.approx([-0.5, 0.0, 4.0 / 3.0])
    assert left == pytest.approx([0.5, 1.0, 1.0 / 3.0])
    other = OwnResiduals()
    other.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert (other.expected(np.array([[0, 1]]))[0] == expected[2:]).all()


# ── the Gaussian process in the same seat ────────────────────────────────────────────────────────


def test_the_gaussian_process_has_gradients_and_importance(rng):
    model = fitted(GaussianPredictor(SIZES), drawn(80, rng, paired))
    start = ALL[100]
    at_start = model.gradient(categorical.one_hot(start, 4))
    for choices in categorical.neighbours(start, categorical.mask_array(SIZES)):
        d = (choices != start).argmax()
        found = at_start[d, choices[d]] - at_start[d, start[d]]
        assert found == pytest.approx(model.predict(np.array([choices, start])) @ [1.0, -1.0])
    uniform = categorical.uniform(categorical.mask_array(SIZES))
    between = model.gradient(uniform)[1, :4]
    exact = np.array([model.predict(ALL[ALL[:, 1] == j]).mean() for j in range(4)])
    assert between == pytest.approx(exact, abs=0.5)
    assert ((model.importance() > 0.0) == categorical.mask_array(SIZES)).all()
    other = GaussianPredictor(SIZES)
    other.load_state_dict(json.loads(json.dumps(model.state_dict())))
    assert (other.importance() == model.importance()).all()
    assert (other.predict(ALL) == model.predict(ALL)).all()


# ── step by step ─────────────────────────────────────────────────────────────────────────────────


def streaming(growth=CHEAP_GROWTH, max_samples=2048):
    rungs = [Rung(name=rung.name, make=rung.make, growth=growth) for rung in ridge_rungs(SIZES)]
    model = Ladder(rungs, num_candidates=SIZES, num_repeats=1)
    return StreamingLadder(model, num_decisions=5, max_samples=max_samples)


def told(model, samples, steps):
    """Observe steps and predict after each; return the predictions."""
    found = []
    for step in steps:
        rows = samples.steps == step
        model.observe(samples.choices[rows], samples.losses[rows], step)
        found.append(model.predict(ALL[:4]))
    return np.array(found)


def test_a_costly_rung_is_fitted_rarely(rng):
    samples = drawn(800, rng, noise=0.1)
    changes = {}
    for growth in (CHEAP_GROWTH, COSTLY_GROWTH):
        found = told(streaming(growth), samples, range(100))
        changes[growth] = int((np.diff(found, axis=0) != 0.0).any(axis=1).sum())
    assert changes[COSTLY_GROWTH] <= 12 < 35 < changes[CHEAP_GROWTH] < 50


def test_streaming_learns_and_forgets(rng):
    model, samples = streaming(max_samples=200), drawn(800, rng, noise=0.1)
    told(model, samples, range(50))
    assert kendall_tau(model.predict(ALL), additive(ALL)) > 0.9
    old = model.num_samples
    told(model, Samples(choices=samples.choices, losses=-samples.losses, steps=samples.steps), range(50, 80))
    assert 100 <= model.num_samples <= 200
    assert (old, len(model.choices)) == (old, model.num_samples)
    assert kendall_tau(model.predict(ALL), -additive(ALL)) > 0.9


def test_what_was_recorded_is_learnt_at_once_and_continued(rng):
    samples = drawn(120, rng, noise=0.1)
    one, other = streaming(), Ladder(ridge_rungs(SIZES), num_candidates=SIZES, num_repeats=1)
    told(one, drawn(40, rng, lambda choices: -additive(choices)), range(5))
    one.fit(samples.choices, samples.losses, samples.steps)
    assert (one.predict(ALL) == fitted(other, samples).predict(ALL)).all(), "what came before is forgotten"
    assert (one.choices == samples.choices).all()
    one.observe(samples.choices[:40], samples.losses[:40] + 9.0, 99)
    assert one.num_samples == 160
    assert (one.predict(ALL) != other.predict(ALL)).any()


@pytest.mark.parametrize("stop", [0, 1, 30])
def test_a_stored_ladder_continues_bit_by_bit(rng, stop):
    samples = drawn(400, rng, paired, noise=0.3)
    one, other = streaming(), streaming()
    told(one, samples, range(stop))
    other.load_state_dict(json.loads(json.dumps(one.state_dict(), allow_nan=False)))
    first, second = (told(model, samples, range(stop, 50)) for model in (one, other))
    assert (first == second).all()
    assert one.state_dict() == other.state_dict()
    assert (one.importance() == other.importance()).all()


def test_the_doubly_robust_gradient_takes_the_ladder(rng):
    """And with it the distribution ends at the optimum."""
    table = CostTable((Factor((0,), np.arange(1.0, 4.0)),))
    optimizer = PooledOptimizer(
        num_candidates=SIZES,
        objectives=[Objective(tables={"flops": table}, caps={"flops": 10.0})],
        estimator="doubly_robust",
        surrogate=streaming(),
    )
    for _ in range(40):
        choices = optimizer.ask(6, rng)
        optimizer.tell(choices, additive(choices) + 0.1 * rng.normal(size=6))
    assert optimizer.modes()[0].tolist() == ALL[additive(ALL).argmin()].tolist()
    assert optimizer.diagnostics.r_squared[0] > 0.5


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


def test_models_say_what_is_missing(rng):
    for model in (RidgePredictor(SIZES), ladder(), streaming()):
        with pytest.raises(ValueError, match="predict before fit"):
            model.predict(ALL)
    with pytest.raises(ValueError, match="no samples"):
        RidgePredictor(SIZES).fit(ALL[:0], np.empty(0), np.empty(0, dtype=np.int64))
    with pytest.raises(ValueError, match="each name once"):
        Ladder([*ridge_rungs(SIZES), *ridge_rungs(SIZES)], num_candidates=SIZES)
    with pytest.raises(ValueError, match="expected at least 2 folds"):
        cross_validate(NUMPY_MODELS["ridge"], drawn(9, rng), num_folds=5, num_repeats=1, seed=0)


def test_a_state_of_another_space_or_ladder_is_refused(rng):
    model = fitted(ladder(), drawn(40, rng))
    wider = Ladder(ridge_rungs((3, 9)), num_candidates=(3, 9))
    with pytest.raises(ValueError, match=r"shape \(5, 4\); expected \(2, 9\)"):
        wider.load_state_dict(model.state_dict())
    only = Ladder(ridge_rungs(SIZES)[1:], num_candidates=SIZES)
    with pytest.raises(ValueError, match="rung 'ridge'; expected one of pairs"):
        only.load_state_dict(model.state_dict())
