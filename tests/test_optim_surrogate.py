"""The ridge surrogate, the archive it learns from, and selection."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim import categorical as cat
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.categorical import neighbours
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.selection import SelectionConfig, propose, shortlist
from nasdeploy.optim.surrogate import RidgeSurrogate

SIZES = (3, 4, 2, 4, 3)
ALL = np.array(list(product(*map(range, SIZES))))
EFFECTS = np.random.default_rng(5).normal(size=(5, 4))


def true_loss(choices):
    return EFFECTS[np.arange(5), choices].sum(axis=1)


def draw(n, rng):
    return np.stack([rng.integers(count, size=n) for count in SIZES], axis=1)


def fitted(rng, n=400, trend=0.0):
    steps = np.repeat(np.arange(n // 8), 8)
    choices = draw(len(steps), rng)
    surrogate = RidgeSurrogate(SIZES, covariate="linear")
    surrogate.fit(choices, true_loss(choices) + trend * steps + 0.1 * rng.normal(size=len(steps)), steps)
    return surrogate


@pytest.mark.parametrize("trend", [0.0, -0.5])
def test_additive_losses_are_learnt_whatever_the_trend(rng, trend):
    surrogate = fitted(rng, trend=trend)
    assert surrogate.r_squared(ALL, true_loss(ALL)) > 0.99
    np.testing.assert_allclose(surrogate.predict(ALL).mean(), true_loss(ALL).mean() + trend * 49, atol=0.3)


def test_useless_data_explain_nothing_of_fresh_samples(rng):
    surrogate = RidgeSurrogate(SIZES)
    surrogate.fit(draw(100, rng), rng.normal(size=100), np.arange(100))
    assert surrogate.r_squared(ALL, true_loss(ALL)) < 0.2


def test_old_samples_are_forgotten(rng):
    choices = draw(400, rng)
    steps = np.repeat([0, 1000], 200)
    losses = np.where(steps == 0, -1.0, 1.0) * true_loss(choices)
    surrogate = RidgeSurrogate(SIZES, half_life=50.0)
    surrogate.fit(choices, losses, steps)
    assert surrogate.r_squared(ALL, true_loss(ALL)) > 0.98


@pytest.mark.parametrize("n", [1, 5])
def test_constant_losses_predict_themselves(rng, n):
    surrogate = RidgeSurrogate(SIZES)
    surrogate.fit(draw(n, rng), np.full(n, 0.1), np.arange(n))
    np.testing.assert_allclose(surrogate.predict(ALL), 0.1, atol=1e-12)
    assert surrogate.r_squared(ALL, np.full(len(ALL), 2.0)) == 0.0


def test_prediction_is_scaled_with_the_losses(rng):
    choices, steps = draw(50, rng), np.arange(50)
    small, large = RidgeSurrogate(SIZES), RidgeSurrogate(SIZES)
    small.fit(choices, true_loss(choices), steps)
    large.fit(choices, 1000 * true_loss(choices) + 7, steps)
    np.testing.assert_allclose(large.predict(ALL), 1000 * small.predict(ALL) + 7, rtol=1e-9)


def test_surrogate_without_samples_says_so(rng):
    with pytest.raises(ValueError, match="predict before fit"):
        RidgeSurrogate(SIZES).predict(ALL)
    with pytest.raises(ValueError, match="no samples"):
        RidgeSurrogate(SIZES).fit(ALL[:0], np.empty(0), np.empty(0, dtype=np.int64))


def test_archive_keeps_the_latest_whole_steps(rng):
    archive = Archive(5, size=10)
    assert archive.choices.shape == (0, 5)
    for step in range(6):
        archive.add(step, draw(4, rng), np.full(4, float(step)))
    assert archive.losses.tolist() == [3.0] * 4 + [4.0] * 4 + [5.0] * 4
    assert archive.steps.tolist() == [3] * 4 + [4] * 4 + [5] * 4
    copy = Archive(5, size=10)
    copy.load_state_dict(archive.state_dict())
    assert (copy.choices == archive.choices).all()
    assert copy.state_dict() == archive.state_dict()


COST = CostTable(tuple(Factor((d,), np.arange(1.0, 1.0 + size)) for d, size in enumerate(SIZES)))
MASK = cat.mask_array(SIZES, ((True,) * 3, (True, False, True, True), (True,) * 2, (True,) * 4, (True,) * 3))


def candidates(cap, rng, seen=None):
    return propose(
        theta=cat.uniform(MASK),
        mask=MASK,
        objective=Objective(
            tables={"flops": COST},
            caps={"flops": cap},
            coefficients={"flops": 0.5},
            references={"flops": 16.0},
        ),
        seen=ALL[rng.choice(len(ALL), 40)] if seen is None else seen,
        surrogate=fitted(rng),
        rng=rng,
        config=SelectionConfig(num_samples=16, num_likeliest=4, beam=4),
    )


@pytest.mark.parametrize("cap", [6.0, 8.0, 12.0])
def test_selection_returns_only_feasible_architectures_inside_the_mask(rng, cap):
    found = candidates(cap, rng)
    assert len(found) > 0
    assert (COST.of(found) <= cap).all()
    assert cat.within(MASK, found).all()
    assert len(np.unique(found, axis=0)) == len(found)


@pytest.mark.parametrize("cap", [6.0, 8.0, 12.0])
def test_selection_puts_the_optimum_first(rng, cap):
    allowed = ALL[cat.within(MASK, ALL) & (COST.of(ALL) <= cap)]
    best = allowed[np.argmin(true_loss(allowed) + 0.5 * COST.of(allowed) / 16.0)]
    assert candidates(cap, rng)[0].tolist() == best.tolist()


def test_selection_walks_from_infeasible_starts_to_feasible_ones(rng):
    largest = np.array([[2, 3, 1, 3, 2]])
    assert len(candidates(6.0, rng, seen=largest)) > 0


def test_selection_without_feasible_architecture_is_empty(rng):
    assert candidates(4.5, rng).shape == (0, 5)


def test_shortlist_takes_the_best_of_the_feasible(rng):
    objective = Objective(tables={"flops": COST}, caps={"flops": 9.0})
    surrogate = fitted(rng)
    short = shortlist(ALL, objective=objective, surrogate=surrogate, size=7)
    feasible = ALL[COST.of(ALL) <= 9.0]
    assert (surrogate.predict(short) == np.sort(surrogate.predict(feasible))[:7]).all()


def test_neighbours_differ_in_one_allowed_decision():
    start = np.array([0, 2, 1, 3, 0])
    found = neighbours(start, MASK)
    assert len(found) == len(np.unique(found, axis=0)) == MASK.sum() - len(SIZES)
    assert ((found != start).sum(axis=1) == 1).all()
    assert cat.within(MASK, found).all()


# ── step by step ─────────────────────────────────────────────────────────────────────────────────

PAIRS = np.random.default_rng(6).normal(size=(4, 4, 4))


def paired_loss(choices):
    d = np.arange(4)
    return true_loss(choices) + PAIRS[d, choices[:, :-1], choices[:, 1:]].sum(axis=1)


def test_neighbouring_pairs_are_learnt_where_they_are_asked_for(rng):
    choices, steps = draw(600, rng), np.repeat(np.arange(60), 10)
    found = {}
    for pairs in ("none", "neighbours"):
        surrogate = RidgeSurrogate(SIZES, pairs=pairs)
        surrogate.fit(choices, paired_loss(choices), steps)
        found[pairs] = surrogate.r_squared(ALL, paired_loss(ALL))
    assert found["none"] < 0.9
    assert found["neighbours"] > 0.97


def test_pairs_are_held_back_more_than_main_effects(rng):
    """On few samples of an additive loss a small penalty of the pairs would explain noise by them."""
    choices, steps = draw(60, rng), np.repeat(np.arange(6), 10)
    losses = true_loss(choices) + rng.normal(size=60)
    found = {}
    for pair_ridge in (0.01, 4.0):
        surrogate = RidgeSurrogate(SIZES, pair_ridge=pair_ridge)
        surrogate.fit(choices, losses, steps)
        found[pair_ridge] = surrogate.r_squared(ALL, true_loss(ALL))
    assert found[4.0] > found[0.01] + 0.05


@pytest.mark.parametrize("half_life", [0.5, 20.0, 1e6])
@pytest.mark.parametrize("gap", [1, 7])
def test_observed_step_by_step_equals_fitted_at_once(rng, half_life, gap):
    streaming = RidgeSurrogate(SIZES, half_life=half_life, covariate="linear")
    choices, steps = draw(320, rng), gap * np.repeat(np.arange(80), 4)
    losses = paired_loss(choices) + 0.01 * steps
    for step in range(80):
        rows = slice(4 * step, 4 * step + 4)
        streaming.observe(choices[rows], losses[rows], int(steps[rows][0]))
        streaming.predict(ALL[:1])
    streaming.observe(choices[:0], losses[:0], int(steps[-1]))
    last = streaming.state_dict()["num_new"]
    whole = RidgeSurrogate(SIZES, half_life=half_life, covariate="linear")
    known = len(losses) - last  # the others wait for the next fit
    whole.fit(choices[:known], losses[:known], steps[:known])
    np.testing.assert_allclose(streaming.predict(ALL), whole.predict(ALL), atol=1e-8)


def test_a_fit_is_due_when_enough_is_new(rng):
    surrogate = RidgeSurrogate(SIZES)
    fits = []
    for step in range(120):
        choices = draw(8, rng)
        surrogate.observe(choices, true_loss(choices), step)
        surrogate.predict(ALL[:1])
        fits.append(surrogate.state_dict()["num_new"] == 0)
    assert all(fits[:15])
    assert 3 <= sum(fits[60:]) <= 20


def test_a_stored_model_continues_bit_by_bit(rng):
    def advance(surrogate, steps, rng):
        for step in steps:
            choices = draw(8, rng)
            surrogate.observe(choices, paired_loss(choices) + rng.normal(size=8), step)
            surrogate.predict(ALL[:1])

    for stop in (0, 1, 70, 150):
        first, generator = RidgeSurrogate(SIZES, half_life=2.0), np.random.default_rng(stop)
        advance(first, range(stop), generator)
        second, twin = RidgeSurrogate(SIZES, half_life=2.0), np.random.default_rng()
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        twin.bit_generator.state = generator.bit_generator.state
        advance(first, range(stop, stop + 60), generator)
        advance(second, range(stop, stop + 60), twin)
        assert first.predict(ALL).tolist() == second.predict(ALL).tolist()
        assert first.state_dict() == second.state_dict()


def test_a_model_of_another_space_is_refused(rng):
    surrogate = RidgeSurrogate(SIZES)
    surrogate.observe(draw(4, rng), np.arange(4.0), 0)
    with pytest.raises(ValueError, match="expected 5"):
        RidgeSurrogate((2, 3), pairs="none").load_state_dict(surrogate.state_dict())


def test_a_long_pause_forgets_what_was_before(rng):
    surrogate = RidgeSurrogate(SIZES, half_life=2.0)
    choices = draw(300, rng)
    surrogate.observe(choices, -true_loss(choices), 0)
    surrogate.observe(choices, true_loss(choices), 1_000_000)
    assert surrogate.r_squared(ALL, true_loss(ALL)) > 0.98


def test_the_model_needs_no_more_memory_with_time(rng):
    surrogate = RidgeSurrogate(SIZES)
    sizes = []
    for step in range(1500):
        choices = draw(2, rng)
        surrogate.observe(choices, true_loss(choices), step)
        if step % 17 == 0:
            sizes.append(len(surrogate.state_dict()["moments"]["pending"]))
    assert max(sizes) <= 512 < step, "at most 1024 samples wait to be added to the sums"


@pytest.mark.parametrize("wrong", [{"ridge": 0.0}, {"pair_ridge": -1.0}, {"half_life": 0.0}])
def test_a_penalty_must_be_positive(wrong):
    with pytest.raises(ValueError, match="expected positive numbers"):
        RidgeSurrogate(SIZES, **wrong)
