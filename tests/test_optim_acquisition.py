"""What is evaluated next: the knowledge gradient against Monte Carlo, and what it proposes and answers."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim.acquisition import SAMPLES_PER_PARAMETER, KnowledgeGradient, _gain, knee_of
from nasdeploy.optim.gaussian_process import Posterior
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.selection import paired_errors, settled

SIZES = (3, 4, 2, 4, 3)
ALL = np.array(list(product(*map(range, SIZES))))
EFFECTS = np.random.default_rng(5).normal(size=(5, 4))
COST = CostTable(tuple(Factor((d,), np.arange(1.0, count + 1.0)) for d, count in enumerate(SIZES)))
NUM_NEEDED = SAMPLES_PER_PARAMETER * (sum(SIZES) - len(SIZES))


def true_loss(choices):
    return EFFECTS[np.arange(5), choices].sum(axis=1)


def objectives(*caps):
    return [Objective(tables={"flops": COST}, caps={"flops": cap}) for cap in caps]


def random_choices(n, rng):
    return ALL[rng.choice(len(ALL), n)]


def searched(rng, proposer, steps, n=6):
    """Evaluate what is proposed, or at random where nothing is; return all that was proposed (N, D)."""
    proposed = []
    for step in range(steps):
        choices = proposer.propose(n, rng)
        proposed.append(choices)
        if len(choices) == 0:
            choices = random_choices(n, rng)
        proposer.tell(choices, true_loss(choices), step)
    return np.concatenate(proposed)


def test_gain_is_the_expected_fall_of_the_least_mean(rng):
    """Against draws of what an observation would show."""
    root = rng.normal(size=(6, 6))
    mean, covariance, noise = rng.normal(size=6), root @ root.T, 0.3
    penalties = np.stack([np.zeros(6), rng.normal(size=6), [np.inf, 0.0, np.inf, 0.5, 0.0, np.inf]])
    values = mean + penalties
    found = _gain(values, Posterior(mean=mean, covariance=covariance, noise=noise))
    for c in range(6):
        shown = np.sqrt(covariance[c, c] + noise) * rng.normal(size=200_000)
        moved = values[:, None] + np.outer(shown / (covariance[c, c] + noise), covariance[c])[None]
        expected = (values.min(axis=1) - moved.min(axis=2).mean(axis=1)).sum()
        assert found[c] == pytest.approx(expected, abs=0.05)


def test_nothing_is_gained_where_everything_is_known():
    values = np.array([[1.0, 2.0, 3.0]])
    posterior = Posterior(mean=values[0], covariance=np.zeros((3, 3)), noise=0.1)
    assert _gain(values, posterior) == pytest.approx(np.zeros(3), abs=1e-12)


def test_a_model_waits_for_enough_losses(rng):
    proposer = KnowledgeGradient(num_candidates=SIZES, objectives=objectives(12.0))
    choices = random_choices(NUM_NEEDED - 1, rng)
    proposer.tell(choices, true_loss(choices), 0)
    assert proposer.propose(4, rng).shape == (0, 5)
    proposer.tell(ALL[:1], true_loss(ALL[:1]), 1)
    assert proposer.propose(4, rng).shape == (4, 5)


def test_answers_are_the_optima_of_all_profiles(rng):
    caps = (8.0, 10.0, 14.0)
    proposer = KnowledgeGradient(num_candidates=SIZES, objectives=objectives(*caps))
    searched(rng, proposer, steps=16)  # 96 of 288
    for cap, (answer, *_) in zip(caps, proposer.answers(rng, size=3), strict=True):
        allowed = ALL[COST.of(ALL) <= cap]
        assert answer.tolist() == allowed[true_loss(allowed).argmin()].tolist()


def test_proposals_are_better_than_random_ones(rng):
    proposer = KnowledgeGradient(num_candidates=SIZES, objectives=objectives(10.0))
    proposed = searched(rng, proposer, steps=12)
    allowed = ALL[COST.of(ALL) <= 10.0]
    assert true_loss(proposed).mean() < np.quantile(true_loss(allowed), 0.25)


def test_what_no_profile_can_have_is_not_proposed(rng):
    masks = [
        tuple(tuple(c != 1 for c in range(count)) for count in SIZES),
        tuple(tuple(c != 2 for c in range(count)) for count in SIZES),
    ]
    proposer = KnowledgeGradient(num_candidates=SIZES, objectives=objectives(9.0, 11.0), masks=masks)
    proposed = searched(rng, proposer, steps=14)
    first = (COST.of(proposed) <= 9.0) & ~(proposed == 1).any(axis=1)
    second = (COST.of(proposed) <= 11.0) & ~(proposed == 2).any(axis=1)
    assert len(proposed) > 30
    assert (first | second).all()
    for cap, forbidden, answer in zip((9.0, 11.0), (1, 2), proposer.answers(rng), strict=True):
        assert COST.of(answer)[0] <= cap
        assert (answer != forbidden).all()


def test_caps_that_nothing_keeps_have_no_answer(rng):
    proposer = KnowledgeGradient(num_candidates=SIZES, objectives=objectives(4.5, 12.0))
    searched(rng, proposer, steps=10)
    nothing, something = proposer.answers(rng)
    assert (len(nothing), len(something)) == (0, 1)
    alone = KnowledgeGradient(num_candidates=SIZES, objectives=objectives(4.5))
    assert len(searched(rng, alone, steps=10)) == 0


def test_a_stored_proposer_continues_bit_by_bit(rng):
    one, other = (KnowledgeGradient(num_candidates=SIZES, objectives=objectives(9.0, 12.0)) for _ in range(2))
    searched(rng, one, steps=9)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    first, second = (searched(np.random.default_rng(7), proposer, steps=4) for proposer in (one, other))
    assert (first == second).all()


def test_losses_are_compressed_less_where_costs_have_prices():
    price = Objective(tables={"flops": COST}, coefficients={"flops": 0.5}, references={"flops": 1.0})
    free = Objective(tables={"flops": COST}, coefficients={"flops": 0.0}, references={"flops": 1.0})
    assert knee_of([*objectives(8.0), free]) == 0.0
    assert knee_of([*objectives(8.0), price]) > 2.0


def test_settled_losses_trust_the_more_precise_side():
    expected, measured = np.array([0.0, 1.0, 2.0]), np.array([5.0, 6.5, 6.5])
    sure_of_model = settled(
        expected=expected, covariance=1e-9 * np.eye(3), measured=measured, errors=np.full(3, 1.0)
    )
    assert np.diff(sure_of_model) == pytest.approx([1.0, 1.0])
    assert sure_of_model.mean() == pytest.approx(measured.mean())  # at the level of the measurement
    exact = settled(expected=expected, covariance=np.eye(3), measured=measured, errors=np.zeros(3))
    assert exact == pytest.approx(measured)
    # by hand: level 5, then half way between expected + 5 and measured
    both = settled(expected=expected, covariance=np.eye(3), measured=measured, errors=np.ones(3))
    assert both == pytest.approx([5.0, 6.25, 6.75])
    nothing_known = settled(
        expected=expected, covariance=np.zeros((3, 3)), measured=measured, errors=np.zeros(3)
    )
    assert (nothing_known == measured).all()


def test_what_the_model_does_not_know_of_all_finalists_does_not_count():
    """A common shift of all is not uncertainty about their order."""
    expected, measured, errors = np.array([0.0, 1.0]), np.array([3.0, 3.0]), np.ones(2)
    alone, shifted = (
        settled(expected=expected, covariance=np.eye(2) + common, measured=measured, errors=errors)
        for common in (0.0, 1000.0)
    )
    assert shifted == pytest.approx(alone, abs=1e-6)


def test_errors_leave_out_what_all_networks_share(rng):
    hard = 10.0 * rng.random(400)
    own = rng.normal(size=(3, 400))
    assert paired_errors(hard + own) == pytest.approx(paired_errors(own))
    for count in (2, 3, 8):
        found = paired_errors(rng.normal(size=(count, 40_000)))
        assert found == pytest.approx(np.full(count, 1.0 / 200.0), rel=0.03)
    assert paired_errors(np.array([[1.0, 1.0], [2.0, 2.0]])) == pytest.approx([0.0, 0.0])
