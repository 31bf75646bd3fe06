"""Operation importance weights: the formula, its mean over gradients, and its ends."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nasdeploy.optim.operation_importance import (
    OperationImportance,
    comparable,
    operation_importance,
    spread_of,
)


def test_importance_by_hand():
    """(3, 4, 0): r = (9, 16, 0), ‖r‖ = 18.358."""
    found = operation_importance(np.array([[3.0, 4.0, 0.0]]))
    assert found[0] == pytest.approx([0.490, 0.872, 0.0], abs=5e-4)
    assert found[0] == pytest.approx(np.array([9.0, 16.0, 0.0]) / (np.sqrt(337.0) + 1e-6), rel=1e-12)


def test_a_zero_gradient_has_no_importance():
    found = operation_importance(np.zeros((2, 3, 4)))
    assert (found == 0.0).all()
    tiny = operation_importance(np.array([[1e-200, 0.0]]))
    assert np.isfinite(tiny).all()


def test_signs_and_other_decisions_do_not_count(rng):
    gradient = rng.normal(size=(4, 3))
    found = operation_importance(gradient)
    assert (operation_importance(-gradient) == found).all()
    scaled = operation_importance(gradient * np.array([[1.0], [100.0], [1.0], [1.0]]))
    assert scaled[[0, 2, 3]] == pytest.approx(found[[0, 2, 3]])
    assert ((found >= 0.0) & (found < 1.0)).all()


def test_only_differences_within_a_decision_and_in_units_of_the_losses_count(rng):
    mask = np.array([[True, True, True], [True, True, False]])
    losses, gradients = rng.normal(size=20), rng.normal(size=(5, 2, 3))
    found = comparable(gradients, mask, spread=spread_of(losses))
    assert found[:, ~mask] == pytest.approx(np.zeros((5, 1)))
    assert found.sum(axis=-1) == pytest.approx(np.zeros((5, 2)), abs=1e-12)
    importance = operation_importance(found)
    raised = gradients + np.array([[0.0], [100.0]])
    assert operation_importance(comparable(raised, mask, spread=spread_of(losses))) == pytest.approx(
        importance
    )
    in_cents = comparable(0.01 * gradients, mask, spread=spread_of(0.01 * losses + 3.0))
    assert operation_importance(in_cents) == pytest.approx(importance)
    assert spread_of(np.full(3, 0.1)) == 1.0


def test_the_mean_runs_over_all_gradients(rng):
    gradients = rng.normal(size=(7, 4, 3))
    one = OperationImportance(4, 3)
    assert (one.values == 0.0).all()
    one.update(gradients[0])
    one.update(gradients[1:6].reshape(5, 1, 4, 3))
    one.update_with(operation_importance(gradients[6]))
    expected = np.mean([operation_importance(gradient) for gradient in gradients], axis=0)
    assert one.values == pytest.approx(expected, rel=1e-12)
    other = OperationImportance(4, 3)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (other.values == one.values).all()
