"""What a profile wants, and in which order."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.errors import ConfigError
from nasdeploy.optim.objective import Judge, Objective, rank

ALL = np.array(list(product(range(3), range(3))))
FLOPS = CostTable((Factor((0,), np.array([1.0, 2, 3])), Factor((1,), np.array([10.0, 20, 30]))))
LATENCY = CostTable((Factor((0, 1), np.arange(9.0).reshape(3, 3)),), 0.5)
TABLES = {"flops": FLOPS, "latency": LATENCY}


def weighted() -> Objective:
    return Objective(
        tables=TABLES,
        caps={"flops": 22.0, "latency": 5.0},
        coefficients={"flops": 0.3, "latency": 2.0},
        references={"flops": 33.0, "latency": 8.5},
    )


def test_penalty_is_the_weighted_cost_sum():
    expected = 0.3 * FLOPS.of(ALL) / 33.0 + 2.0 * LATENCY.of(ALL) / 8.5
    np.testing.assert_allclose(weighted().penalty(ALL), expected, rtol=1e-14)


def test_violation_adds_the_relative_excess_of_every_cap():
    expected = np.maximum(0, FLOPS.of(ALL) / 22 - 1) + np.maximum(0, LATENCY.of(ALL) / 5 - 1)
    np.testing.assert_allclose(weighted().violation(ALL), expected, rtol=1e-12)
    assert (weighted().feasible(ALL) == (expected == 0.0)).all()
    assert 0 < weighted().feasible(ALL).sum() < len(ALL)


def test_a_cap_is_met_at_its_value_and_broken_one_unit_above():
    table = CostTable((Factor((0,), np.array([10**9, 10**9 + 1])),))
    objective = Objective(tables={"flops": table}, caps={"flops": 1e9})
    assert objective.feasible(np.array([[0], [1]])).tolist() == [True, False]


def test_a_measured_cap_equal_to_a_cost_holds_whatever_the_batch(rng):
    table = CostTable(tuple(Factor((d,), rng.random(4)) for d in range(40)))
    choices = rng.integers(4, size=(64, 40))
    for row, cost in zip(choices, table.of(choices), strict=True):
        assert Objective(tables={"latency": table}, caps={"latency": cost}).feasible(row[None]).all()


def test_every_feasible_one_comes_before_every_other(rng):
    objective = weighted()
    losses = 100.0 * rng.normal(size=len(ALL))
    ranks, feasible = objective.order(losses, ALL), objective.feasible(ALL)
    assert ranks[feasible].max() < ranks[~feasible].min()
    f = losses + objective.penalty(ALL)
    assert (np.argsort(ranks[feasible]) == np.argsort(f[feasible])).all()
    violation = objective.violation(ALL)[~feasible]
    assert (np.diff(violation[np.argsort(ranks[~feasible])]) >= 0).all()


def test_equal_keys_share_a_rank():
    values = np.array([1.0, 0.0, 1.0, 7.0, -9.0])
    violation = np.array([0.0, 0.0, 0.0, 1e-9, 1e-9])
    assert rank(values, violation).tolist() == [1, 0, 1, 2, 2]


def test_nothing_has_no_ranks():
    assert rank(np.empty(0), np.empty(0)).shape == (0,)


def test_an_objective_without_costs_ranks_by_loss():
    objective = Objective(tables={})
    assert objective.order(np.array([3.0, 1.0, 2.0]), ALL[:3]).tolist() == [2, 0, 1]
    assert objective.feasible(ALL).all()


def test_many_objectives_are_judged_as_each_alone():
    capped = Objective(tables={"flops": LATENCY}, caps={"flops": 3.0})
    objectives = [weighted(), Objective(tables=TABLES), capped, weighted()]
    judged = Judge(objectives).judge(ALL)
    for k, objective in enumerate(objectives):
        np.testing.assert_allclose(judged.penalty[k], objective.penalty(ALL), rtol=1e-14)
        np.testing.assert_allclose(judged.violation[k], objective.violation(ALL), rtol=1e-14)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caps": {"params": 5.0}}, "budget.params.max: no cost table"),
        ({"caps": {"flops": 0.0}}, "budget.flops.max = 0.0"),
        ({"caps": {"flops": np.inf}}, "budget.flops.max = inf"),
        ({"coefficients": {"flops": -1.0}, "references": {"flops": 1.0}}, "budget.flops.coefficient = -1"),
        ({"coefficients": {"flops": 1.0}}, "budget.flops.reference = 0"),
        ({"caps": {"flops": np.nan}}, "budget.flops.max = nan"),
    ],
)
def test_wrong_budgets_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Objective(tables=TABLES, **wrong)
