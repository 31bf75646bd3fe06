"""The price of breaking a cap: how it follows the distribution, and what the distribution does."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.sampled import SampledCost
from nasdeploy.costs.table import CostTable, Factor, TableStack
from nasdeploy.optim import categorical
from nasdeploy.optim.objective import Judge, Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.prices import ETA, FIRST_PRICE, LEAST, MOST, CapPrices

SIZES = (2, 3, 2)
ALL = np.array(list(product(*map(range, SIZES))))
RNG = np.random.default_rng(4)
FLOPS = CostTable((Factor((0, 1), RNG.random((2, 3))), Factor((2,), RNG.random(2))), constant=0.5)
LATENCY = CostTable((Factor((0,), RNG.random(2)), Factor((1, 2), RNG.random((3, 2)))))
WHOLE = CostTable((Factor((0, 1, 2), RNG.random(SIZES)),), constant=2.0)


def thetas():
    raw = np.where(categorical.mask_array(SIZES), np.random.default_rng(8).random((4, 3, 3)) + 0.2, 0.0)
    return raw / raw.sum(axis=-1, keepdims=True)


def test_expected_costs_of_a_stack_are_those_of_enumeration():
    theta, tables = thetas(), (FLOPS, LATENCY, WHOLE, CostTable((), constant=3.0))
    found = TableStack(tables).expected(theta)
    chances = np.exp(categorical.log_probability(theta, ALL))  # (K, n)
    expected = np.stack([chances @ table.of(ALL) for table in tables])
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[:3, 1] == pytest.approx([table.expected(theta[1]) for table in tables[:3]], rel=1e-12)


def test_a_cost_that_is_no_table_is_asked_itself():
    sampled = SampledCost(lambda choices: FLOPS.of(choices) ** 2, SIZES)
    theta = thetas()
    found = TableStack((FLOPS, sampled)).expected(theta)
    assert found[1].tolist() == [sampled.expected(one) for one in theta]


def test_excess_is_that_of_the_tightest_cap():
    objectives = [
        Objective(tables={"flops": FLOPS, "latency": LATENCY}, caps=caps)
        for caps in ({"flops": 1.0, "latency": 0.5}, {"latency": 9.0}, {}, {"flops": 0.2})
    ]
    theta = thetas()
    flops, latency = TableStack((FLOPS, LATENCY)).expected(theta)
    expected = [max(flops[0], 2.0 * latency[0]) - 1.0, latency[1] / 9.0 - 1.0, -1.0, flops[3] / 0.2 - 1.0]
    assert Judge(objectives).expected_excess(theta) == pytest.approx(expected, rel=1e-12)


def test_a_price_grows_while_the_cap_is_exceeded_and_falls_below_it():
    prices = CapPrices(4)
    prices.begin(np.array([1.0, 2.0, 3.0]))
    start = FIRST_PRICE * 1.4826
    assert prices.values == pytest.approx(np.full(4, start))
    prices.follow(np.array([0.5, -0.2, 7.0, -1.0]))
    assert np.log(prices.values / start) == pytest.approx(ETA * np.array([0.5, -0.2, 1.0, -1.0]))
    for _ in range(1000):
        prices.follow(np.array([2.0, -1.0, 0.0, 0.0]))
    assert np.log(prices.values[:2] / start) == pytest.approx([MOST, LEAST])


def test_the_unit_is_that_of_the_first_losses_that_differ():
    prices = CapPrices(1)
    assert prices.values == pytest.approx([FIRST_PRICE])
    for losses in ([5.0] * 3, [2.0]):
        prices.begin(np.array(losses))
        assert prices.values == pytest.approx([FIRST_PRICE])
    prices.begin(np.array([5.0, 5.0, 5.0, 9.0]))  # most are equal: their standard deviation
    assert prices.values == pytest.approx([FIRST_PRICE * 3.0**0.5])
    prices.begin(np.array([0.0, 1000.0]))
    assert prices.values == pytest.approx([FIRST_PRICE * 3.0**0.5])


# ── in the search ────────────────────────────────────────────────────────────────────────────────

WIDE = (3,) * 6
EVERY = np.array(list(product(range(3), repeat=6)))
COST = CostTable(tuple(Factor((d,), np.array([1.0, 2.0, 3.0])) for d in range(6)))


def search(cap, *, steps, estimator="importance", seed=0, unit=1.0):
    """Return a search where what costs more is better, for a profile with a cap and one without."""
    objectives = [Objective(tables={"flops": COST}, caps=caps) for caps in ({"flops": cap}, {})]
    optimizer = PooledOptimizer(num_candidates=WIDE, objectives=objectives, estimator=estimator)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        choices = optimizer.ask(8, rng)
        optimizer.tell(choices, -unit * choices.sum(axis=1) + 0.1 * unit * rng.normal(size=len(choices)))
    return optimizer


@pytest.mark.parametrize("estimator", ["importance", "doubly_robust"])
def test_the_expected_cost_ends_at_the_cap(estimator):
    costs = [search(11.0, steps=300, estimator=estimator, seed=s).expected_cost(0, "flops") for s in range(3)]
    assert np.mean(costs) == pytest.approx(11.0, rel=0.1)


@pytest.mark.parametrize("estimator", ["importance", "doubly_robust"])
def test_the_unit_of_the_losses_does_not_matter(estimator):
    one, other = (search(11.0, steps=40, estimator=estimator, unit=unit) for unit in (1.0, 2.0**20))
    np.testing.assert_allclose(one.theta, other.theta, atol=1e-9)


def test_a_search_continues_with_its_prices_bit_by_bit():
    first = search(9.0, steps=20)
    state = json.loads(json.dumps(first.state_dict()))
    second = search(9.0, steps=0)
    second.load_state_dict(state)
    for optimizer in (first, second):
        rng = np.random.default_rng(3)
        for _ in range(5):
            choices = optimizer.ask(8, rng)
            optimizer.tell(choices, -choices.sum(axis=1).astype(float))
    assert (first.theta == second.theta).all()
    assert first.state_dict() == second.state_dict()


def test_a_state_without_prices_is_read():
    first = search(9.0, steps=5)
    state = first.state_dict()
    del state["prices"]
    second = search(9.0, steps=0)
    second.load_state_dict(state)
    choices = second.ask(8, np.random.default_rng(1))
    second.tell(choices, -choices.sum(axis=1).astype(float))
    assert np.isfinite(second.theta).all()
