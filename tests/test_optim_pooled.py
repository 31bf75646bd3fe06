"""K distributions from one stream of evaluations. Numbers: search.md, "Tests"."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim import categorical as cat
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.surrogate import RidgeSurrogate

SIZES = (4, 3, 4, 2, 4, 3)
D = len(SIZES)
EFFECTS = np.random.default_rng(3).normal(size=(D, 4))
COST = CostTable(tuple(Factor((d,), np.arange(1.0, 1.0 + size)) for d, size in enumerate(SIZES)))
ALL = np.array(list(product(*map(range, SIZES))))
FREE = Objective(tables={"flops": COST})


def true_loss(choices):
    return EFFECTS[np.arange(choices.shape[1]), choices].sum(axis=1)


def priced(coefficient):
    return Objective(
        tables={"flops": COST}, coefficients={"flops": coefficient}, references={"flops": float(sum(SIZES))}
    )


def capped(cap):
    return Objective(tables={"flops": COST}, caps={"flops": cap})


def advance(optimizer, steps, n, rng, noise=0.0):
    for _ in range(steps):
        choices = optimizer.ask(n, rng)
        optimizer.tell(choices, true_loss(choices) + noise * rng.normal(size=n))


def near(architecture, sharpness=1.0):
    """Return theta (D, 4) that puts ``sharpness`` of each decision on ``architecture``."""
    theta = (1 - sharpness) * cat.uniform(cat.mask_array(SIZES))
    theta[np.arange(D), architecture] += sharpness
    return theta


def parted(num=2, **options):
    """Distributions so far apart that a sample of one weighs nothing for the others."""
    sizes = (5,) * 30
    start = np.zeros((num, 30, 5))
    for k in range(num):
        start[k, :, k] = 1.0
    table = CostTable(tuple(Factor((d,), np.arange(1.0, 6.0)) for d in range(30)))
    objective = Objective(tables={"flops": table}, coefficients={"flops": 1.0}, references={"flops": 1.0})
    return PooledOptimizer(num_candidates=sizes, objectives=[objective] * num, initial_theta=start, **options)


def test_3_equal_distributions_use_every_sample_fully(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE] * 3)
    advance(optimizer, 1, 12, rng)
    assert optimizer.diagnostics.ess == pytest.approx((12.0,) * 3)
    assert optimizer.diagnostics.own_share == pytest.approx((1 / 3,) * 3)
    assert all(optimizer.diagnostics.stepped)


def test_7_one_effective_sample_leaves_theta_alone(rng):
    optimizer = parted(alpha=(0.999, 0.001))
    before = optimizer.theta
    choices = optimizer.ask(1, rng)
    optimizer.tell(choices, np.ones(1))
    assert max(optimizer.diagnostics.ess) < 1.9
    assert optimizer.diagnostics.stepped == (False, False)
    assert optimizer.diagnostics.gated == (True, True)
    assert (optimizer.theta == before).all()


def test_gated_distribution_acts_once_enough_samples_have_accumulated(rng):
    optimizer = parted(num=1)
    optimizer.tell(optimizer.ask(1, rng), np.zeros(1))
    assert optimizer.diagnostics.gated == (True,)
    optimizer.tell(optimizer.ask(1, rng), np.zeros(1))
    assert optimizer.diagnostics.ess == (2.0,)
    assert optimizer.diagnostics.stepped == (True,)
    assert optimizer.diagnostics.gate_openings == (1,)
    assert optimizer.state_dict()["recent"] == []


def test_held_losses_are_compared_without_the_level_of_their_batch(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[Objective(tables={})])
    before = optimizer.theta
    for level in (0.0, 100.0, -50.0, 7.0):
        optimizer.tell(optimizer.ask(1, rng), np.full(1, level))
    assert (optimizer.theta == before).all()


def test_at_most_twelve_steps_are_pooled(rng):
    optimizer = parted(alpha=(1 - 1e-12, 1e-12))
    for _ in range(30):
        choices = optimizer.ask(2, rng)
        optimizer.tell(choices, np.zeros(2))
    assert optimizer.diagnostics.gated == (False, True)
    assert len(optimizer.state_dict()["recent"]) == 11


def test_held_samples_keep_the_mixture_of_their_own_draw(rng):
    start = np.stack([near([0] * D, 0.9), near([1] * D, 0.9)])
    alpha = np.array([0.95, 0.05])
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE] * 2, alpha=alpha, initial_theta=start)
    draws = []
    for _ in range(12):
        before = optimizer.theta
        choices = optimizer.ask(4, rng)
        q = alpha @ np.exp(cat.log_probability(before, choices))
        draws.append((choices, q))
        optimizer.tell(choices, true_loss(choices))
        pooled = [np.exp(cat.log_probability(before[1], c)) / q_then for c, q_then in draws]
        weights = np.concatenate(pooled)
        expected = weights.sum() ** 2 / (weights**2).sum()
        assert optimizer.diagnostics.ess[1] == pytest.approx(expected)
        if not optimizer.diagnostics.gated[1]:
            break
    assert 1 < len(draws) < 12


def test_8_all_modes_of_a_separable_problem_are_found(rng):
    coefficients = (0.0, 3.0, 8.0, 40.0)
    objectives = [priced(coefficient) for coefficient in coefficients]
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=objectives)
    advance(optimizer, 1200, 24, rng)
    costs = []
    for k, objective in enumerate(objectives):
        best = ALL[np.argmin(true_loss(ALL) + objective.penalty(ALL))]
        assert optimizer.modes()[k].tolist() == best.tolist()
        costs.append(optimizer.expected_cost(k, "flops"))
    assert sorted(costs, reverse=True) == costs
    assert costs[-1] < costs[1] < costs[0]


def test_independent_distributions_ignore_foreign_losses():
    def trajectory(foreign):
        rng = np.random.default_rng(4)
        optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE] * 2, estimator="independent")
        for _ in range(20):
            choices = optimizer.ask(8, rng)
            losses = true_loss(choices)
            losses[4:] *= foreign  # the second profile's half
            optimizer.tell(choices, losses)
        return optimizer

    first, second = trajectory(1.0), trajectory(-5.0)
    np.testing.assert_allclose(first.theta[0], second.theta[0], atol=1e-13)
    assert np.abs(first.theta[1] - second.theta[1]).max() > 0.1
    assert first.diagnostics.own_share == (1.0, 1.0)
    assert first.diagnostics.ess == (4.0, 4.0)


def test_pooling_learns_faster_than_independent_runs():
    def regret(estimator):
        total = 0.0
        for seed in range(4):
            rng = np.random.default_rng(seed)
            objectives = [priced(0.1 * k) for k in range(6)]
            optimizer = PooledOptimizer(num_candidates=SIZES, objectives=objectives, estimator=estimator)
            advance(optimizer, 60, 12, rng, noise=0.3)
            total += sum(true_loss(optimizer.modes())) / 6
        return total

    assert regret("importance") < regret("independent")


def test_samples_are_spread_over_the_mixture(rng):
    optimizer = parted(num=4, alpha=(0.1, 0.2, 0.3, 0.4))
    choices = optimizer.ask(40, rng)
    nearest = np.array([[np.sum(row == k) for k in range(4)] for row in choices]).argmax(axis=1)
    assert np.bincount(nearest).tolist() == [4, 8, 12, 16]


def test_number_of_samples_does_not_grow_with_the_profiles(rng):
    optimizer = parted(num=5)
    for _ in range(5):
        choices = optimizer.ask(2, rng)
        assert choices.shape == (2, 30)
        assert choices.dtype == np.int64
        optimizer.tell(choices, rng.normal(size=2))
        assert np.isfinite(optimizer.theta).all()


def test_masks_hold_for_every_draw_and_every_theta(rng):
    narrow = (
        (True, False, True, False),
        (False, True, True),
        (True,) * 4,
        (True, True),
        (False,) * 3 + (True,),
        (True,) * 3,
    )
    full = tuple((True,) * size for size in SIZES)
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE] * 2, masks=[narrow, full])
    advance(optimizer, 100, 8, rng)
    narrow_mask = cat.mask_array(SIZES, narrow)
    assert not optimizer.theta[0][~narrow_mask].any()
    assert cat.within(narrow_mask, optimizer.modes()[:1]).all()
    assert cat.within(narrow_mask, optimizer.archive.choices).mean() < 1.0
    allowed = ALL[cat.within(narrow_mask, ALL)]
    assert true_loss(optimizer.modes()[:1])[0] == pytest.approx(true_loss(allowed).min(), abs=0.5)


def test_only_what_some_profile_affords_is_evaluated(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[capped(11.0), capped(14.0)])
    assert COST.of(ALL).mean() > 12.0
    assert (COST.of(optimizer.ask(200, rng)) <= 14.0).all()
    independent = PooledOptimizer(
        num_candidates=SIZES, objectives=[capped(11.0), capped(14.0)], estimator="independent"
    )
    assert (COST.of(independent.ask(200, rng)[:100]) <= 11.0).all()


def test_a_cheap_sample_that_only_breaks_masks_is_drawn_again(rng):
    # candidate 1: too expensive for the first profile, forbidden for the second, which could pay for it
    masks = [((True, True, False),), ((False, False, True),)]
    table = CostTable((Factor((0,), np.array([1.0, 5.0, 5.0])),))
    objectives = [Objective(tables={"flops": table}, caps={"flops": cap}) for cap in (2.0, 9.0)]
    optimizer = PooledOptimizer(num_candidates=(3,), objectives=objectives, masks=masks)
    assert set(optimizer.ask(100, rng)[:, 0].tolist()) == {0, 2}


def test_redrawn_samples_follow_the_mixture_cut_to_what_is_affordable(rng):
    start = np.stack([near([0] * D, 0.3), near([3, 2, 3, 1, 3, 2], 0.3)])
    objectives = [capped(13.0)] * 2
    optimizer = PooledOptimizer(
        num_candidates=SIZES, objectives=objectives, alpha=(0.3, 0.7), initial_theta=start
    )
    q = np.array([0.3, 0.7]) @ np.exp(cat.log_probability(optimizer.theta, ALL)) * (COST.of(ALL) <= 13.0)
    q /= q.sum()
    n = 40_000
    drawn = optimizer.ask(n, rng)
    for d, size in enumerate(SIZES):
        expected = np.bincount(ALL[:, d], weights=q, minlength=size)
        shares = np.bincount(drawn[:, d], minlength=size) / n
        assert np.abs(shares - expected).max() < 4.5 * 0.5 / np.sqrt(n)


def test_distribution_learns_the_best_under_a_cap(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[capped(9.0), capped(13.0)])
    advance(optimizer, 800, 16, rng)
    for k, cap in enumerate((9.0, 13.0)):
        mode = optimizer.modes()[k : k + 1]
        allowed = ALL[COST.of(ALL) <= cap]
        assert COST.of(mode)[0] <= cap
        assert true_loss(mode)[0] <= np.sort(true_loss(allowed))[len(allowed) // 50]


def test_impossible_cap_pulls_towards_the_least_violation(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[capped(5.5)])
    advance(optimizer, 300, 12, rng)
    assert optimizer.modes()[0].tolist() == [0] * D


def test_weight_draws_have_a_uniform_share(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE], initial_theta=near([0] * D)[None])
    warm_up = optimizer.ask_for_weights(8000, rng, uniform_share=1.0)
    for d, size in enumerate(SIZES):
        np.testing.assert_allclose(np.bincount(warm_up[:, d]) / 8000, 1 / size, atol=0.03)
    mixed = [np.sum(optimizer.ask_for_weights(5, rng, uniform_share=0.1)[:, 0] > 0) for _ in range(400)]
    lowest = optimizer.theta[0, 0, 1]
    assert np.mean(mixed) == pytest.approx(5 * (0.1 * 0.75 + 0.9 * 3 * lowest), abs=0.15)


def test_weight_draws_stay_inside_the_union_of_the_masks(rng):
    masks = [((True, False, False), (True, True)), ((False, True, False), (True, True))]
    optimizer = PooledOptimizer(num_candidates=(3, 2), objectives=[Objective(tables={})] * 2, masks=masks)
    assert set(optimizer.ask_for_weights(100, rng, uniform_share=1.0)[:, 0].tolist()) == {0, 1}


def test_weight_draws_do_not_disturb_what_was_asked(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE])
    choices = optimizer.ask(4, rng)
    optimizer.ask_for_weights(4, rng, uniform_share=0.5)
    optimizer.tell(choices, true_loss(choices))


def test_a_state_of_version_0_1_is_read(rng):
    optimizer = parted(alpha=(1 - 1e-12, 1e-12))
    for _ in range(3):
        choices = optimizer.ask(2, rng)
        optimizer.tell(choices, rng.normal(size=2))
    state = optimizer.state_dict()
    old = {key: state[key] for key in ("num_steps", "distributions", "held", "asked", "archive")}
    old["recent"] = [
        {"choices": row["choices"], "owners": row["owners"], "log_q": row["log_q"], "losses": row["losses"]}
        for row in state["recent"]
    ]
    names = ("ess", "stepped", "gated", "own_share", "entropy")
    old["diagnostics"] = {name: state["diagnostics"][name] for name in names}
    again = parted(alpha=(1 - 1e-12, 1e-12))
    again.load_state_dict(old)
    choices = optimizer.ask(2, np.random.default_rng(1))
    assert choices.tolist() == again.ask(2, np.random.default_rng(1)).tolist()
    optimizer.tell(choices, np.ones(2))
    again.tell(choices, np.ones(2))
    assert optimizer.theta.tolist() == again.theta.tolist()
    assert optimizer.diagnostics.ess == again.diagnostics.ess
    assert again.diagnostics.gate_openings[0] == 0


def test_state_of_another_problem_is_refused(rng):
    state = PooledOptimizer(num_candidates=SIZES, objectives=[FREE]).state_dict()
    robust = PooledOptimizer(num_candidates=SIZES, objectives=[FREE], estimator="doubly_robust")
    with pytest.raises(ValueError, match="of estimator 'importance'; expected 'doubly_robust'"):
        robust.load_state_dict(state)
    with pytest.raises(ValueError, match="expected 2"):
        PooledOptimizer(num_candidates=SIZES, objectives=[FREE] * 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
        PooledOptimizer(num_candidates=(3, 2), objectives=[Objective(tables={})]).load_state_dict(state)


def test_initial_theta_is_brought_inside_mask_and_margin():
    mask = ((True, True, False), (False, True))
    start = np.array([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]])
    optimizer = PooledOptimizer(
        num_candidates=(3, 2), objectives=[Objective(tables={})], masks=[mask], initial_theta=start
    )
    np.testing.assert_allclose(optimizer.theta[0], [[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]])
    np.testing.assert_allclose(optimizer.sharp_theta[0], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


def test_only_the_last_asked_choices_can_be_told(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE])
    with pytest.raises(ValueError, match="last ask"):
        optimizer.tell(ALL[:4], np.zeros(4))
    choices = optimizer.ask(4, rng)
    with pytest.raises(ValueError, match="2 of 4 losses are not finite"):
        optimizer.tell(choices, np.array([0.0, np.nan, np.inf, 1.0]))
    with pytest.raises(ValueError, match="last ask"):
        optimizer.tell(choices, np.zeros(3))
    optimizer.tell(choices, np.zeros(4))
    with pytest.raises(ValueError, match="last ask"):
        optimizer.tell(choices, np.zeros(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": []}, "0 objectives"),
        ({"masks": []}, "1 objectives"),
        ({"estimator": "magic"}, "expected one of independent, importance, doubly_robust"),
        ({"alpha": (0.5,)}, "sum to 1"),
        ({"alpha": (0.5, 0.5)}, "expected 1 positive shares"),
        ({"initial_theta": np.zeros((1, 2, 2))}, "initial_theta"),
        ({"archive_size": 0}, "archive_size"),
        ({"guided_share": 0.5}, "a proposer"),
        ({"guided_share": 1.5}, "from 0 to 1"),
        ({"surrogate": RidgeSurrogate(SIZES)}, 'expected estimator = "doubly_robust"'),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PooledOptimizer(**{"num_candidates": SIZES, "objectives": [FREE], **options})


def test_nothing_to_draw_is_refused(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE])
    with pytest.raises(ValueError, match=r"ask: n = 0; expected at least 1"):
        optimizer.ask(0, rng)
    with pytest.raises(ValueError, match=r"uniform_share = 1\.5"):
        optimizer.ask_for_weights(2, rng, uniform_share=1.5)


def test_entropy_falls_from_uniform(rng):
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE])
    advance(optimizer, 1, 8, rng)
    first = optimizer.diagnostics.entropy[0]
    advance(optimizer, 200, 8, rng)
    assert optimizer.diagnostics.entropy[0] < first < np.log(len(ALL))
