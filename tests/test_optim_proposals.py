"""Architectures that a model proposes, and a search that is stored and continued."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import ESTIMATORS, PooledOptimizer

SIZES = (4, 3, 4, 2, 4, 3)
D = len(SIZES)
EFFECTS = np.random.default_rng(3).normal(size=(D, 4))
COST = CostTable(tuple(Factor((d,), np.arange(1.0, 1.0 + size)) for d, size in enumerate(SIZES)))
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


class Neighbours:
    """A proposer: neighbours of the best it was told, fewer than asked for at first, and what it was told."""

    def __init__(self, most=100):
        self.most = most
        self.best, self.loss, self.told = [0] * D, np.inf, []

    def propose(self, count, rng):
        found = np.tile(self.best, (min(count, self.most, len(self.told)), 1))
        changed = rng.integers(D, size=len(found))
        found[np.arange(len(found)), changed] = rng.integers(np.array(SIZES)[changed])
        return found

    def tell(self, choices, losses, step):
        self.told.append([step, choices.tolist(), losses.tolist()])
        if losses.min() < self.loss:
            self.best, self.loss = choices[losses.argmin()].tolist(), float(losses.min())

    def state_dict(self):
        return {"best": self.best, "loss": self.loss, "told": self.told}

    def load_state_dict(self, state):
        self.best, self.loss, self.told = state["best"], state["loss"], list(state["told"])


@pytest.mark.parametrize("guided_share", [0.0, 0.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_resumed_optimizer_continues_bit_by_bit(estimator, guided_share):
    def build():
        objectives = [capped(12.0), priced(3.0), priced(0.7)]
        return PooledOptimizer(
            num_candidates=SIZES,
            objectives=objectives,
            estimator=estimator,
            archive_size=40,
            proposer=Neighbours(),
            guided_share=guided_share,
        )

    rng = np.random.default_rng(6)
    first = build()
    advance(first, 25, 4, rng, noise=0.2)
    choices = first.ask(4, rng)  # asked, not yet told
    second, twin_rng = build(), np.random.default_rng()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    twin_rng.bit_generator.state = rng.bit_generator.state
    for optimizer, generator in ((first, rng), (second, twin_rng)):
        optimizer.tell(choices, true_loss(choices))
        advance(optimizer, 25, 4, generator, noise=0.2)
    assert first.state_dict() == second.state_dict()
    assert first.diagnostics == second.diagnostics


def test_proposals_are_evaluated_and_told_but_move_nothing(rng):
    def trajectory(offset, estimator):
        rng = np.random.default_rng(4)
        proposer = Neighbours()
        optimizer = PooledOptimizer(
            num_candidates=SIZES,
            objectives=[priced(1.0), priced(5.0)],
            estimator=estimator,
            proposer=proposer,
            guided_share=0.25,
        )
        for step in range(20):
            num_proposed = min(2, step)  # those it gives; the rest is drawn
            choices = optimizer.ask(8, rng)
            assert len(choices) == 8
            losses = true_loss(choices)
            losses[8 - num_proposed :] += offset
            optimizer.tell(choices, losses)
            assert proposer.told[-1] == [step, choices.tolist(), losses.tolist()]
            assert optimizer.archive.choices[-8:].tolist() == choices.tolist()
        assert sum(optimizer.diagnostics.own_share) > 0.0
        return optimizer.theta

    for estimator in ("importance", "independent"):
        np.testing.assert_allclose(trajectory(0.0, estimator), trajectory(50.0, estimator), atol=1e-13)
    # the model of the loss, on the other hand, learns from them
    moved = trajectory(0.0, "doubly_robust") - trajectory(50.0, "doubly_robust")
    assert np.abs(moved).max() > 0.01


def test_a_share_of_what_is_asked_is_proposed(rng):
    for most, expected in ((100, 6), (2, 2)):
        proposer = Neighbours(most)
        proposer.told = [None] * 50
        optimizer = PooledOptimizer(
            num_candidates=SIZES, objectives=[FREE], proposer=proposer, guided_share=0.5
        )
        proposer.best = [3, 2, 3, 1, 3, 2]
        choices = optimizer.ask(12, rng)
        owners = np.array(optimizer.state_dict()["asked"]["owners"])
        assert len(choices) == 12
        assert (owners == -1).sum() == expected
        assert ((choices[owners == -1] != proposer.best).sum(axis=1) <= 1).all()


def test_only_proposals_are_a_step_without_a_gradient(rng):
    proposer = Neighbours()
    proposer.told = [None] * 50
    for estimator in ESTIMATORS:
        optimizer = PooledOptimizer(
            num_candidates=SIZES, objectives=[FREE], estimator=estimator, proposer=proposer, guided_share=1.0
        )
        optimizer.tell(optimizer.ask(4, rng), np.arange(4.0))
        drawn = 1.0 if estimator == "doubly_robust" else 0.0  # its model sees more than its own proposals
        assert optimizer.diagnostics.ess == (drawn,)
        assert optimizer.diagnostics.stepped == (False,)


@pytest.mark.parametrize(
    "proposals", [np.zeros((3, D), dtype=int), np.zeros((1, 2), dtype=int), np.full((1, D), 3)]
)
def test_proposals_that_are_no_architectures_are_refused(rng, proposals):
    proposer = Neighbours()
    proposer.propose = lambda count, rng: proposals
    optimizer = PooledOptimizer(num_candidates=SIZES, objectives=[FREE], proposer=proposer, guided_share=0.5)
    with pytest.raises(ValueError, match="at most 2 architectures of 6 decisions"):
        optimizer.ask(4, rng)
