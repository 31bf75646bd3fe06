"""The evolutionary proposer: what it breeds, for whom, and how it explores."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim import categorical
from nasdeploy.optim.evolution import EvolutionaryProposer, EvolutionConfig
from nasdeploy.optim.gaussian_predictor import GaussianPredictor
from nasdeploy.optim.gaussian_process import Posterior
from nasdeploy.optim.ladder import proxy_ladder, ridge_rungs
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.streaming import StreamingLadder

SIZES = (3, 4, 2, 4, 3)
ALL = np.array(list(product(*map(range, SIZES))))
EFFECTS = np.random.default_rng(5).normal(size=(5, 4))
COST = CostTable(tuple(Factor((d,), np.arange(1.0, count + 1.0)) for d, count in enumerate(SIZES)))
NUM_NEEDED = sum(SIZES) - len(SIZES)


def true_loss(choices):
    return EFFECTS[np.arange(5), choices].sum(axis=1)


def objectives(*caps):
    return [Objective(tables={"flops": COST}, caps={"flops": cap}) for cap in caps]


def ladder(goals):
    model = proxy_ladder(SIZES, goals, rungs=ridge_rungs(SIZES), num_repeats=1)
    return StreamingLadder(model, num_decisions=5)


def evolution(*caps, model=None, **options):
    goals = objectives(*caps)
    masks, owns_model = options.pop("masks", None), options.pop("owns_model", True)
    return EvolutionaryProposer(
        num_candidates=SIZES,
        objectives=goals,
        masks=masks,
        model=model or ladder(goals),
        owns_model=owns_model,
        config=EvolutionConfig(**options),
    )


def searched(rng, proposer, steps, n=6):
    """Evaluate what is proposed, or at random where nothing is; return the batches that were proposed."""
    batches = []
    for step in range(steps):
        choices = proposer.propose(n, rng)
        batches.append(choices)
        if len(choices) == 0:
            choices = ALL[rng.choice(len(ALL), n)]
        proposer.tell(choices, true_loss(choices), step)
    return batches


class KnownModel:
    """ψ is the truth; ``seen`` were evaluated and are known exactly, others up to ``deviation``."""

    max_samples = 2048

    def __init__(self, seen, importance=None, deviation=0.0):
        self.choices, self.deviation = seen, deviation
        self.observed = 0
        self._importance = np.zeros((5, 4)) if importance is None else importance

    @property
    def num_samples(self):
        return max(len(self.choices), NUM_NEEDED)

    def observe(self, choices, losses, step):
        self.observed += 1

    def predict(self, choices):
        return true_loss(choices)

    def posterior(self, choices):
        seen = (choices[:, None] == self.choices).all(axis=2).any(axis=1)
        variance = np.where(seen, 0.0, self.deviation**2)
        return Posterior(mean=self.predict(choices), covariance=np.diag(variance), noise=0.1)

    def gradient(self, theta):
        return np.where(categorical.mask_array(SIZES), np.broadcast_to(EFFECTS, theta.shape), 0.0)

    def importance(self):
        return self._importance

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_model_waits_for_enough_losses(rng):
    proposer = evolution(12.0)
    choices = ALL[rng.choice(len(ALL), NUM_NEEDED - 1)]
    proposer.tell(choices, true_loss(choices), 0)
    assert proposer.propose(4, rng).shape == (0, 5)
    proposer.tell(ALL[:1], true_loss(ALL[:1]), 1)
    assert len(proposer.propose(4, rng)) == 4


@pytest.mark.parametrize("make", [ladder, lambda goals: GaussianPredictor(SIZES)], ids=["ladder", "gp"])
def test_every_profile_is_answered_with_its_optimum(rng, make):
    caps = (8.0, 10.0, 14.0)
    proposer = evolution(*caps, model=make(objectives(*caps)))
    searched(rng, proposer, steps=12)
    for cap, answer in zip(caps, proposer.answers(rng), strict=True):
        allowed = ALL[COST.of(ALL) <= cap]
        assert answer[0].tolist() == allowed[true_loss(allowed).argmin()].tolist()


def test_a_mutation_descends_the_modelled_loss(rng):
    """One generation from one parent: the best single change comes first, without any exploration."""
    for parent in ALL[rng.choice(len(ALL), 10)]:
        proposer = evolution(
            100.0,
            model=KnownModel(parent[None], deviation=100.0),
            num_generations=1,
            explore_share=0.0,
            num_children=3,
        )
        around = categorical.neighbours(parent, categorical.mask_array(SIZES))
        order = np.argsort(true_loss(around))
        assert proposer.propose(3, rng).tolist() == around[order[:3]].tolist()


def test_generations_on_the_model_reach_its_optimum(rng):
    worst = ALL[true_loss(ALL).argmax()][None]
    best = ALL[true_loss(ALL).argmin()].tolist()
    for generations, reached in ((1, False), (8, True)):
        proposer = evolution(100.0, model=KnownModel(worst), num_generations=generations, explore_share=0.0)
        assert (proposer.propose(1, rng)[0].tolist() == best) == reached


def test_proposals_are_feasible_for_the_profile_whose_turn_it_is(rng):
    caps = (7.0, 14.0, 9.0)
    masks = [tuple(tuple(c != forbidden for c in range(count)) for count in SIZES) for forbidden in (1, 3, 2)]
    batches = searched(rng, evolution(*caps, masks=masks), steps=20, n=4)
    proposed = np.concatenate(batches)
    turns = np.arange(len(proposed)) % 3
    assert len(proposed) > 60
    assert (COST.of(proposed) <= np.array(caps)[turns]).all()
    assert (proposed != np.array([1, 3, 2])[turns][:, None]).all()


def test_nothing_is_proposed_twice_in_a_batch(rng):
    proposer = evolution(7.5)
    allowed = ALL[COST.of(ALL) <= 7.5]
    batches = searched(rng, proposer, steps=12, n=8)
    for batch in batches:
        assert len(np.unique(batch, axis=0)) == len(batch)
    assert len(batches[-1]) == 8
    assert len(evolution(7.5, model=KnownModel(allowed)).propose(99, rng)) == len(allowed)


def test_what_was_evaluated_is_proposed_again_only_where_it_is_better_by_more_than_is_unknown(rng):
    order = np.argsort(true_loss(ALL))
    known, gap = ALL[order[:40]], np.ptp(true_loss(ALL[order]))
    for deviation, again in ((0.0, 8), (2.2 * gap, 0)):  # half of it counts
        model = KnownModel(known, deviation=deviation)
        proposed = evolution(100.0, model=model, explore_share=0.0).propose(8, rng)
        assert len(proposed) == 8
        assert (proposed[:, None] == known).all(axis=2).any(axis=1).sum() == again


def test_exploration_is_of_what_was_not_evaluated(rng):
    known = ALL[np.argsort(true_loss(ALL))[:40]]
    proposed = evolution(100.0, model=KnownModel(known), explore_share=1.0).propose(8, rng)
    assert len(proposed) == 8
    assert not (proposed[:, None] == known).all(axis=2).any()


def test_exploration_is_scaled_by_what_is_not_important(rng):
    """All candidates have an OIW of 1 but two; one of these has 0.5, and is tried half as often."""
    importance = np.ones((5, 4))
    importance[1, 3], importance[3, 2] = 0.0, 0.5
    parent = np.array([0, 0, 0, 0, 0])
    counts = np.zeros(2)
    for _ in range(600):
        proposer = evolution(
            100.0, model=KnownModel(parent[None], importance), explore_share=1.0, num_generations=0
        )
        child = proposer.propose(1, rng)[0]
        changed = np.flatnonzero(child != parent)
        assert changed.tolist() in ([1], [3])
        assert child[changed[0]] == (3 if changed[0] == 1 else 2)
        counts[int(changed[0] == 3)] += 1
    assert counts[0] / 600 == pytest.approx(2.0 / 3.0, abs=0.06)


def test_importance_of_one_everywhere_still_explores(rng):
    proposer = evolution(100.0, model=KnownModel(ALL[:1], np.ones((5, 4))), explore_share=1.0)
    assert len(proposer.propose(5, rng)) == 5


def test_half_of_the_parents_were_evaluated(rng):
    """Although what is only modelled is better."""
    order = np.argsort(true_loss(ALL))
    known = ALL[order[100:150]]
    proposer = evolution(100.0, model=KnownModel(known), num_parents=12)
    population = proposer._population(known, evaluated=True).joined(
        proposer._population(ALL[order[:50]], evaluated=False)
    )
    parents = proposer._parents(population, 0)
    assert population.choices[parents].tolist() == [*known[:6].tolist(), *ALL[order[:6]].tolist()]


def test_from_outside_the_caps_evolution_ends_inside(rng):
    largest = np.array([[2, 3, 1, 3, 2]])
    proposer = evolution(6.0, model=KnownModel(largest), num_generations=12, explore_share=0.0)
    found = proposer.propose(2, rng)
    assert len(found) == 2
    assert (COST.of(found) <= 6.0).all()


def test_caps_that_nothing_keeps_have_no_proposals(rng):
    proposer = evolution(4.5, 12.0)
    proposed = np.concatenate(searched(rng, proposer, steps=10))
    assert (COST.of(proposed) <= 12.0).all()
    nothing, something = proposer.answers(rng)
    assert (len(nothing), len(something)) == (0, 1)


def test_a_mask_that_nothing_evaluated_keeps_is_sampled(rng):
    mask = tuple(tuple(c > 0 for c in range(count)) for count in SIZES)
    proposer = evolution(100.0, model=KnownModel(ALL[:1]), masks=[mask], explore_share=0.0)
    proposed = proposer.propose(3, rng)
    assert len(proposed) == 3
    assert (proposed > 0).all()


def test_the_same_seed_proposes_the_same_and_a_stored_state_continues_bit_by_bit():
    one, twin, other = (evolution(9.0, 12.0) for _ in range(3))
    searched(np.random.default_rng(3), one, steps=8, n=5)
    searched(np.random.default_rng(3), twin, steps=8, n=5)
    assert one.state_dict()["turn"] == 1, "it is the second profile's"
    other.load_state_dict(json.loads(json.dumps(one.state_dict(), allow_nan=False)))
    found = [
        np.concatenate(searched(np.random.default_rng(7), proposer, steps=5, n=3)).tolist()
        for proposer in (one, twin, other)
    ]
    assert found[0] == found[1] == found[2]


def test_a_shared_model_is_neither_told_nor_stored_twice(rng):
    model = KnownModel(ALL[:20])
    for owns_model, expected in ((False, 0), (True, 1)):
        proposer = evolution(12.0, model=model, owns_model=owns_model)
        proposer.tell(ALL[:2], true_loss(ALL[:2]), 0)
        assert model.observed == expected
        assert (proposer.state_dict()["model"] is None) == (not owns_model)
        proposer.load_state_dict(proposer.state_dict())


def test_the_optimiser_takes_its_proposals_beside_a_shared_ladder(rng):
    goals = objectives(9.0, 14.0)
    model = ladder(goals)
    proposer = EvolutionaryProposer(num_candidates=SIZES, objectives=goals, model=model, owns_model=False)
    optimizer = PooledOptimizer(
        num_candidates=SIZES,
        objectives=goals,
        estimator="doubly_robust",
        surrogate=model,
        proposer=proposer,
        guided_share=0.5,
    )
    for _ in range(12):
        choices = optimizer.ask(6, rng)
        optimizer.tell(choices, true_loss(choices))
    assert model.num_samples == 72
    for cap, answer in zip((9.0, 14.0), proposer.answers(rng), strict=True):
        allowed = ALL[COST.of(ALL) <= cap]
        assert answer[0].tolist() == allowed[true_loss(allowed).argmin()].tolist()


def test_a_space_with_a_single_architecture_is_proposed_once(rng):
    model = KnownModel(np.zeros((1, 1), dtype=np.int64))
    model.gradient, model.predict = np.zeros_like, lambda choices: np.zeros(len(choices))
    free = Objective(tables={"flops": CostTable(())})
    proposer = EvolutionaryProposer(num_candidates=(1,), objectives=[free], model=model)
    assert proposer.propose(3, rng).tolist() == [[0]]
