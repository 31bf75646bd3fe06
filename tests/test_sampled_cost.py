"""Costs that no table holds: asked by architecture, and used by objectives, judges and budgets as tables are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.sampled import SampledCost
from nasdeploy.costs.table import Cost, CostTable, Factor, FloatArray, IntArray, TableStack
from nasdeploy.optim.objective import Judge, Objective

SIZES = (3, 4, 2, 3, 3)
ALL = np.array(list(product(*map(range, SIZES))))
FULL = tuple((True,) * size for size in SIZES)


def longest(choices: IntArray) -> FloatArray:
    """Return a cost that is no sum: the dearest of three parallel branches, and what they share."""
    branches = np.stack([choices[:, 0] + choices[:, 1], 2.0 * choices[:, 2], choices[:, 3] ** 2], axis=1)
    return 1.0 + branches.max(axis=1) + 0.5 * choices[:, 4] * (choices[:, 0] == 1)


def tabulated() -> CostTable:
    """Return the same cost as one factor over all decisions."""
    return CostTable((Factor(tuple(range(len(SIZES))), longest(ALL).reshape(SIZES)),))


def random_theta(rng: np.random.Generator) -> FloatArray:
    theta = np.zeros((len(SIZES), max(SIZES)))
    for d, size in enumerate(SIZES):
        theta[d, :size] = rng.dirichlet(np.ones(size))
    return theta


COSTS: list[Cost] = [tabulated(), SampledCost(longest, SIZES)]


@pytest.mark.parametrize("cost", COSTS)
def test_a_cost_that_is_no_sum_is_that_of_the_function(cost: Cost) -> None:
    assert (cost.of(ALL) == longest(ALL)).all()


@pytest.mark.parametrize("cost", COSTS)
def test_the_least_cost_within_a_mask_is_that_of_enumeration(cost: Cost, rng: np.random.Generator) -> None:
    for _ in range(20):
        mask = tuple(tuple(bool(b) for b in rng.random(size) < 0.6) for size in SIZES)
        mask = tuple(row if any(row) else (*row[:-1], True) for row in mask)
        inside = ALL[[all(row[c] for row, c in zip(mask, choice, strict=True)) for choice in ALL]]
        cheapest = cost.cheapest(mask)
        assert cost.minimum(mask) == longest(inside).min() == longest(np.array([cheapest]))[0]
        assert all(row[c] for row, c in zip(mask, cheapest, strict=True))


def test_an_expectation_is_that_of_enumeration_within_its_sampling_error(rng: np.random.Generator) -> None:
    sampled = SampledCost(longest, SIZES, num_samples=20_000)
    for _ in range(5):
        theta = random_theta(rng)
        probability = theta[np.arange(len(SIZES)), ALL].prod(axis=1)
        exact = tabulated().expected(theta)
        assert exact == pytest.approx(probability @ longest(ALL), rel=1e-12)
        error = np.sqrt(probability @ longest(ALL) ** 2 - exact**2) / np.sqrt(20_000)
        assert abs(sampled.expected(theta) - exact) < 5.0 * error
        assert sampled.expected(theta) == sampled.expected(theta)


def test_a_stack_of_tables_and_other_costs_gives_each_its_own(rng: np.random.Generator) -> None:
    additive = CostTable(tuple(Factor((d,), rng.random(size)) for d, size in enumerate(SIZES)), 2.0)
    costs = (additive, SampledCost(longest, SIZES), tabulated())
    np.testing.assert_allclose(TableStack(costs).of(ALL), [cost.of(ALL) for cost in costs], rtol=1e-14)


def test_objectives_judge_by_either_kind_alike() -> None:
    caps, weights = {"latency": 4.5}, {"latency": 0.4}
    objectives = [
        Objective(tables={"latency": cost}, caps=caps, coefficients=weights, references={"latency": 5.0})
        for cost in COSTS
    ]
    judged = Judge(objectives).judge(ALL)
    assert (judged.penalty[0] == judged.penalty[1]).all()
    assert (judged.violation[0] == judged.violation[1]).all()
    assert (objectives[1].feasible(ALL) == (longest(ALL) <= 4.5)).all()
    losses = -np.arange(float(len(ALL)))
    assert (objectives[0].order(losses, ALL) == objectives[1].order(losses, ALL)).all()


@pytest.mark.parametrize("row", [[3, 0, 0, 0, 0], [0, 0, 0, 0, -1], [0, 0, 0, 0]])
def test_choices_outside_the_space_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 5 decisions"):
        SampledCost(longest, SIZES).of(np.array([row]))


@pytest.mark.parametrize("wrong", [lambda c: np.ones(1), lambda c: np.full(len(c), np.nan)])
def test_a_function_that_gives_no_finite_cost_for_each_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="expected one finite cost for each"):
        SampledCost(wrong, SIZES).of(ALL)
