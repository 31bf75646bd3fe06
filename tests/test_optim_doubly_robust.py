"""The doubly robust gradient: unbiased whatever the model, and better with a good one. Numbers: search.md, "Tests"."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim import categorical as cat
from nasdeploy.optim.doubly_robust import DoublyRobust, model_gradient
from nasdeploy.optim.draws import Draw
from nasdeploy.optim.estimators import evaluated
from nasdeploy.optim.importance import log_mixture
from nasdeploy.optim.objective import Judge, Objective
from nasdeploy.optim.pooled import PooledOptimizer

SIZES = (2, 3)
ALL = np.array(list(product(*map(range, SIZES))))
LOSS = np.array([0.3, 2.0, -0.7, 1.1, 0.4, 3.0])  # of ALL
COST = CostTable((Factor((0,), np.array([1.0, 2.0])), Factor((1,), np.array([1.0, 2.0, 4.0]))))
ALPHA = np.array([0.4, 0.6])


class Fixed:
    """A model that knows a number for each architecture of a space, and learns nothing."""

    def __init__(self, predict):
        self.predict = predict
        self.observed = []

    def observe(self, choices, losses, step):
        self.observed.append((choices, losses, step))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def place(choices):
    """Return where the rows of ``choices`` (n, 2) stand in ALL."""
    return choices[:, 0] * SIZES[1] + choices[:, 1]


def one_hot(choices):
    return (choices[:, :, None] == np.arange(3)).astype(float)


def thetas():
    raw = np.where(cat.mask_array(SIZES), np.random.default_rng(8).random((2, 2, 3)) + 0.2, 0.0)
    return raw / raw.sum(axis=-1, keepdims=True)


def test_the_free_part_is_unbiased_for_any_number_of_draws():
    theta, values = thetas()[:1], np.random.default_rng(1).normal(size=6)
    p = np.exp(cat.log_probability(theta[0], ALL))
    expected = np.einsum("i,idj->dj", p * values, one_hot(ALL) - theta[0])
    for num in (2, 3):
        total = np.zeros_like(theta)
        for drawn in product(range(6), repeat=num):
            rows = list(drawn)
            total += p[rows].prod() * model_gradient(values[None, rows], ALL[None, rows], theta)
        np.testing.assert_allclose(total[0], expected, atol=1e-14)


CAPPED = Objective(tables={"flops": COST}, caps={"flops": 4.0})
PRICED = Objective(tables={"flops": COST}, coefficients={"flops": 0.7}, references={"flops": 2.0})
BOTH = Objective(
    tables={"flops": COST},
    caps={"flops": 3.0},
    coefficients={"flops": 0.7},
    references={"flops": 2.0},
)
WRONG = np.array([-5.0, 1.0, 7.0, -2.0, 0.5, 3.0])
HISTORY = {
    "learnt": True,
    "products": [[5.0, 8.0], [2.0, 1.0], [4.0, 9.0]],
    "shared": [6.0, 1.0, 3.0, 9.0],
    "residuals": [[1.5, -2.0], [6.0, 7.0]],
    "surrogate": {},
}
"""What earlier steps left: some trust in the model and a baseline, of each profile."""


PRICES = np.array([0.9, 3.0])


def estimator_of(state, objectives=(PRICED, PRICED), **settings):
    surrogate = settings.pop("surrogate", Fixed(lambda choices: np.zeros(len(choices))))
    estimator = DoublyRobust(num_profiles=2, judge=Judge(objectives), surrogate=surrogate, **settings)
    estimator.load_state_dict(state)
    return estimator


@pytest.mark.parametrize("objectives", [(PRICED, PRICED), (PRICED, CAPPED), (CAPPED, BOTH)])
@pytest.mark.parametrize("model", [WRONG, 3.0 * LOSS, LOSS, np.zeros(6)])
def test_11_the_gradient_is_unbiased_for_a_wrong_model_too(objectives, model):
    theta, judge = thetas(), Judge(objectives)
    log_p = cat.log_probability(theta, ALL)
    log_q = log_mixture(log_p, ALPHA)
    judged = judge.judge(ALL)
    affordable = (judged.violation == 0.0).any(axis=0)
    accepted = np.exp(log_q)[affordable].sum()
    q = np.where(affordable, np.exp(log_q), 0.0) / accepted

    loss = np.tile(LOSS - q @ LOSS, (2, 1))  # (K, 6)
    trust, baseline = estimator_of(HISTORY).trust, estimator_of(HISTORY).baseline
    known = trust[:, None] * (model - q @ model) + baseline[:, None]
    loss = np.where(affordable, loss, known)  # what nobody can afford is what the model says
    value = loss + judged.penalty + PRICES[:, None] * judged.violation
    expected = np.einsum("ki,kidj->kdj", np.exp(log_p) * value, one_hot(ALL) - theta[:, None])

    mean, free = np.zeros_like(theta), [0, 0]
    estimator = DoublyRobust(
        num_profiles=2,
        judge=judge,
        surrogate=Fixed(lambda choices: model[place(choices)]),
        num_free_draws=2,
        sample=lambda *_: np.stack([ALL[free]] * 2),
    )
    for batch in product(np.flatnonzero(affordable).tolist(), repeat=2):
        rows = list(batch)
        draw = Draw(choices=ALL[rows], owners=np.array([0, 1]), log_q=log_q[rows], accepted=accepted)
        told = evaluated(draw, 50.0 + LOSS[rows], judge)
        for pair in product(range(6), repeat=2):
            free[:] = pair  # what the sampler above returns
            estimator.load_state_dict(HISTORY)
            found = estimator.estimate(told, theta, prices=PRICES, step=3).gradient
            chance = q[rows].prod() * np.exp(log_p[:, free]).prod(axis=1)  # (K,)
            mean += chance[:, None, None] * found
    np.testing.assert_allclose(mean, -expected, atol=1e-12)


def test_a_single_draw_corrects_nothing():
    """The gradient is that of the model, whatever was lost."""
    theta, judge = thetas(), Judge((PRICED, PRICED))
    log_q = log_mixture(cat.log_probability(theta, ALL), ALPHA)
    draw = Draw(choices=ALL[[2]], owners=np.array([1]), log_q=log_q[[2]], seed=5).with_guided(ALL[[1, 3]])

    def gradient(losses):
        estimator = estimator_of(HISTORY, surrogate=Fixed(lambda choices: WRONG[place(choices)]))
        return estimator.estimate(evaluated(draw, losses, judge), theta, prices=PRICES, step=3).gradient

    np.testing.assert_array_equal(gradient(np.array([9.0, 1.0, 2.0])), gradient(np.array([-9.0, 1.0, 2.0])))


def test_proposals_leave_the_gradient_as_it_is(rng):
    theta, judge = thetas(), Judge((PRICED, CAPPED))
    log_q = log_mixture(cat.log_probability(theta, ALL), ALPHA)

    def gradient(draw, losses):
        model = Fixed(lambda choices: WRONG[place(choices)])
        estimator = DoublyRobust(num_profiles=2, judge=judge, surrogate=model)
        estimator.load_state_dict(HISTORY)
        found = estimator.estimate(evaluated(draw, losses, judge), theta, prices=PRICES, step=3)
        return found, model.observed

    rows = [0, 4, 5, 2]
    draw = Draw(choices=ALL[rows], owners=np.array([0, 0, 1, 1]), log_q=log_q[rows], seed=7)
    plain, _ = gradient(draw, LOSS[rows])
    guided, observed = gradient(draw.with_guided(ALL[[1, 3]]), np.append(LOSS[rows], [-90.0, 90.0]))
    np.testing.assert_allclose(guided.gradient, plain.gradient, atol=1e-14)
    np.testing.assert_allclose(guided.ess, plain.ess)
    assert observed[0][1].tolist() == [*LOSS[rows], -90.0, 90.0], "the model learns from all"


# ── on larger spaces ─────────────────────────────────────────────────────────────────────────────

WIDE = (3,) * 8
MAIN = np.random.default_rng(3).normal(size=(8, 3))
PAIRS = 0.6 * np.random.default_rng(4).normal(size=(7, 3, 3))
WIDE_COST = CostTable(tuple(Factor((d,), np.array([1.0, 2.0, 3.0])) for d in range(8)))
EVERY = np.array(list(product(range(3), repeat=8)))


def true_loss(choices):
    d = np.arange(8)
    return MAIN[d, choices].sum(axis=1) + PAIRS[d[:-1], choices[:, :-1], choices[:, 1:]].sum(axis=1)


def priced(coefficient):
    return Objective(
        tables={"flops": WIDE_COST}, coefficients={"flops": coefficient}, references={"flops": 8.0}
    )


def capped(cap):
    return Objective(tables={"flops": WIDE_COST}, caps={"flops": cap})


def carried_out(objectives, *, steps, seed=0, n=12, noise=0.3, unit=1.0, loss=true_loss, **options):
    """Return an optimiser after so many steps, with a common error in each as from one validation batch."""
    rng = np.random.default_rng(seed)
    optimizer = PooledOptimizer(num_candidates=WIDE, objectives=objectives, **options)
    for _ in range(steps):
        choices = optimizer.ask(n, rng)
        losses = loss(choices) + noise * rng.normal(size=n) + rng.normal()
        optimizer.tell(choices, unit * losses)
    return optimizer


def regret(optimizer):
    """Return how much worse than the optimum the modes are, averaged over profiles without caps."""
    values = [true_loss(EVERY) + objective.penalty(EVERY) for objective in optimizer.objectives]
    places = optimizer.modes() @ 3 ** np.arange(7, -1, -1)
    return np.mean([value[i] - value.min() for value, i in zip(values, places, strict=True)])


def test_a_model_of_the_loss_finds_better_architectures_with_as_many_evaluations():
    objectives = [priced(4.0 * k) for k in range(6)]

    def mean_regret(estimator):
        runs = [carried_out(objectives, steps=40, seed=seed, estimator=estimator) for seed in range(4)]
        return np.mean([regret(run) for run in runs])

    assert mean_regret("doubly_robust") < 0.5 * mean_regret("importance")


def test_a_useless_model_changes_nothing():
    """It is not trusted at all: the distributions go where they go without one, bit by bit."""
    objectives = [priced(0.0), priced(3.0)]
    harmful = Fixed(lambda choices: -true_loss(choices))
    nothing = Fixed(lambda choices: np.zeros(len(choices)))
    runs = [
        carried_out(objectives, steps=25, noise=0.0, estimator="doubly_robust", surrogate=model)
        for model in (harmful, nothing)
    ]
    assert runs[0].theta.tolist() == runs[1].theta.tolist()
    assert runs[0].diagnostics.r_squared == (0.0, 0.0)


def test_an_unrelated_model_does_no_harm():
    unrelated = np.random.default_rng(9).normal(size=(8, 3))
    objectives = [priced(0.0), priced(3.0)]

    def mean_regret(table):
        model = Fixed(lambda choices: 5.0 * table[np.arange(8), choices].sum(axis=1))
        return np.mean(
            [
                regret(carried_out(objectives, steps=80, seed=s, estimator="doubly_robust", surrogate=model))
                for s in range(4)
            ]
        )

    assert mean_regret(unrelated) < 1.3 * mean_regret(np.zeros((8, 3))) + 0.1


def test_a_perfect_model_in_the_seat_is_used():
    objectives = [priced(0.0), priced(3.0)]
    perfect = Fixed(true_loss)
    options = {"steps": 12, "n": 4, "noise": 0.0, "estimator": "doubly_robust"}
    known = carried_out(objectives, surrogate=perfect, **options)
    assert known.diagnostics.r_squared == pytest.approx((1.0, 1.0))
    assert [step for _, _, step in perfect.observed] == list(range(12))
    ignorant = carried_out(objectives, surrogate=Fixed(lambda choices: np.zeros(len(choices))), **options)
    assert regret(known) < 0.5 * regret(ignorant)


def test_r_squared_tells_how_good_the_model_is():
    good = carried_out([priced(0.0)] * 2, steps=60, noise=0.1, estimator="doubly_robust", delta_0=0.05)
    poor = carried_out([priced(0.0)] * 2, steps=60, noise=6.0, estimator="doubly_robust", delta_0=0.05)
    assert min(good.diagnostics.r_squared) > 0.8
    assert max(poor.diagnostics.r_squared) < 0.5
    assert carried_out([priced(0.0)], steps=1).diagnostics.r_squared == (None,)


def test_the_unit_of_the_losses_does_not_matter():
    runs = [
        carried_out([priced(0.0)] * 2, steps=20, unit=unit, estimator="doubly_robust")
        for unit in (1.0, 2.0**-30)
    ]
    np.testing.assert_allclose(runs[0].theta, runs[1].theta, atol=1e-9)
    assert np.abs(runs[0].theta - 1 / 3).max() > 0.2, "they went somewhere"


def test_equal_losses_move_nothing():
    optimizer = carried_out(
        [priced(0.0)] * 2, steps=5, noise=0.0, loss=lambda c: np.full(len(c), 0.1), estimator="doubly_robust"
    )
    np.testing.assert_allclose(optimizer.theta, 1 / 3, atol=1e-15)
    assert optimizer.diagnostics.stepped == (False, False)


def test_costs_alone_are_followed_without_a_loss_that_differs():
    optimizer = carried_out(
        [priced(1.0)], steps=60, noise=0.0, loss=lambda c: np.full(len(c), 0.1), estimator="doubly_robust"
    )
    assert optimizer.modes().tolist() == [[0] * 8]


def test_caps_hold_and_a_broken_one_is_repaired():
    optimizer = carried_out([capped(11.0), capped(16.0)], steps=150, estimator="doubly_robust")
    for k, cap in enumerate((11.0, 16.0)):
        (mode,) = optimizer.modes()[k : k + 1]
        allowed = true_loss(EVERY[WIDE_COST.of(EVERY) <= cap])
        assert WIDE_COST.of(mode[None])[0] <= cap
        assert (allowed < true_loss(mode[None])[0]).mean() < 0.03
    impossible = carried_out([capped(7.5)], steps=200, estimator="doubly_robust")
    assert impossible.modes().tolist() == [[0] * 8], "towards the least violation"


def test_one_sample_a_step_is_accepted():
    optimizer = carried_out([priced(2.0)] * 3, steps=30, n=1, estimator="doubly_robust")
    assert np.isfinite(optimizer.theta).all()
    assert optimizer.diagnostics.gated == (False,) * 3
    assert optimizer.diagnostics.gate_openings == (0,) * 3
