"""Distributions that start from the best of an earlier search. Frequencies by hand; margins: search.md, Margin."""

from __future__ import annotations

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim import categorical
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.warm_start import elite, warm_theta

SIZES = (3, 2, 4)
FULL = categorical.mask_array(SIZES)
NARROW = categorical.mask_array(SIZES, ((True, False, True), (True, True), (True, True, True, False)))
SUM = CostTable(tuple(Factor((d,), np.arange(size) + 1.0) for d, size in enumerate(SIZES)))  # 3 to 9
CHOICES = np.array(
    [[2, 1, 3], [0, 0, 0], [1, 1, 0], [0, 1, 1], [2, 0, 1], [0, 0, 2]]
)  # cost 9, 3, 5, 5, 6, 5
LOSSES = np.array([0.1, 0.9, 0.5, 0.4, 0.3, 0.6])


def capped(cap: float) -> Objective:
    return Objective(tables={"params": SUM}, caps={"params": cap})


def test_theta_is_smoothed_frequency() -> None:
    chosen = np.array([[0, 1, 3], [0, 0, 3], [2, 1, 0], [0, 1, 3]])
    theta = warm_theta([chosen], FULL[None], smoothing=0.4)
    expected = np.zeros((3, 4))
    expected[0, :3] = 0.6 * np.array([3, 0, 1]) / 4 + 0.4 / 3
    expected[1, :2] = 0.6 * np.array([1, 3]) / 4 + 0.4 / 2
    expected[2] = 0.6 * np.array([1, 0, 0, 3]) / 4 + 0.4 / 4
    np.testing.assert_allclose(theta[0], categorical.with_margin(expected, FULL), atol=1e-15)
    assert theta.shape == (1, 3, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 1.0])
def test_theta_has_the_margin_inside_the_mask_and_zero_outside(smoothing: float) -> None:
    masks = np.stack([FULL, NARROW])
    theta = warm_theta([np.array([[1, 0, 3]]), np.array([[2, 1, 1]])], masks, smoothing=smoothing)
    np.testing.assert_allclose(theta.sum(axis=-1), 1.0, atol=1e-15)
    assert not theta[~masks].any()
    assert (theta >= np.where(masks, categorical.margin(masks), 0.0) - 1e-15).all()


def test_without_smoothing_one_architecture_is_all_that_is_left_but_the_margin() -> None:
    theta = warm_theta([np.array([[2, 1, 1]])], NARROW[None], smoothing=0.0)
    assert categorical.mode(theta[0]).tolist() == [2, 1, 1]
    sharp = categorical.without_margin(theta[0], NARROW)
    np.testing.assert_allclose(sharp[np.arange(3), [2, 1, 1]], 1.0, atol=1e-15)


def test_full_smoothing_and_an_empty_elite_are_uniform() -> None:
    masks = np.stack([FULL, NARROW])
    nothing = np.empty((0, 3), dtype=np.int64)
    expected = categorical.uniform(masks)
    theta = warm_theta([np.array([[1, 0, 3]]), np.array([[2, 1, 1]])], masks, smoothing=1.0)
    np.testing.assert_allclose(theta, expected, atol=1e-15)
    np.testing.assert_allclose(warm_theta([nothing] * 2, masks, smoothing=0.4), expected, atol=1e-15)


def test_an_optimizer_starts_where_it_is_told() -> None:
    theta = warm_theta([CHOICES[:2], CHOICES[3:]], np.stack([FULL, FULL]), smoothing=0.4)
    optimizer = PooledOptimizer(
        num_candidates=SIZES, objectives=[capped(6.0), capped(9.0)], initial_theta=theta
    )
    np.testing.assert_allclose(optimizer.theta, theta, atol=1e-15)


def test_the_elite_is_the_best_within_the_caps() -> None:
    found = elite(choices=CHOICES, losses=LOSSES, objective=capped(5.5), mask=FULL, num_elite=2)
    assert found.tolist() == [[0, 1, 1], [1, 1, 0]]  # the two of cost 9 and 6 have lower losses


def test_weighted_costs_count() -> None:
    dear = Objective(tables={"params": SUM}, coefficients={"params": 1.0}, references={"params": 5.0})
    found = elite(choices=CHOICES, losses=LOSSES, objective=dear, mask=FULL, num_elite=6)
    values = LOSSES + SUM.of(CHOICES) / 5.0
    assert found.tolist() == CHOICES[np.argsort(values)].tolist()
    assert found[0].tolist() == [0, 1, 1]  # 1.4; by the loss alone [2, 1, 3] would lead


def test_infeasible_architectures_do_not_fill_up_an_elite() -> None:
    found = elite(choices=CHOICES, losses=LOSSES, objective=capped(5.5), mask=FULL, num_elite=6)
    assert len(found) == 4
    assert SUM.of(found).max() <= 5.5


def test_where_nothing_is_feasible_the_least_violation_leads() -> None:
    found = elite(choices=CHOICES, losses=LOSSES, objective=capped(2.0), mask=FULL, num_elite=2)
    assert found.tolist() == [[0, 0, 0], [1, 1, 0]]  # cost 3, then 5; among equals the first evaluated


def test_the_elite_keeps_to_the_mask() -> None:
    found = elite(choices=CHOICES, losses=LOSSES, objective=capped(9.0), mask=NARROW, num_elite=6)
    assert found.tolist() == [[2, 0, 1], [0, 1, 1], [0, 0, 2], [0, 0, 0]]
    assert warm_theta([found], NARROW[None], smoothing=0.4).shape == (1, 3, 4)


def test_wrong_arguments_are_refused() -> None:
    inside, outside = np.array([[0, 0, 0]]), np.array([[1, 0, 0]])
    with pytest.raises(ValueError, match="from 0 to 1 and one elite for each"):
        warm_theta([inside], FULL[None], smoothing=1.5)
    with pytest.raises(ValueError, match="one elite for each"):
        warm_theta([inside, inside], FULL[None], smoothing=0.4)
    with pytest.raises(ValueError, match="expected architectures inside a mask"):
        warm_theta([outside], NARROW[None], smoothing=0.4)
