"""The ASNG update against a plain twin, and what it must survive. Numbers: search.md, "Tests"."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nasdeploy.optim import categorical as cat
from nasdeploy.optim.asng import Asng, natural_gradient
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import ESTIMATORS, PooledOptimizer


class PlainAsng:
    """One distribution by the equations of arXiv 1905.08537, one decision at a time, with lists."""

    def __init__(self, sizes):
        self.theta = [np.full(c, 1.0 / c) for c in sizes]
        self.num_parameters = sum(c - 1 for c in sizes)
        self.s = np.zeros(self.num_parameters)
        self.gamma, self.Delta = 0.0, 1.0

    def update(self, choices, losses):
        n = len(losses)
        mu = math.ceil(n / 4)
        utilities = np.zeros(n)
        utilities[np.argsort(losses)[:mu]] = 1.0 / mu
        utilities[np.argsort(losses)[n - mu :]] = -1.0 / mu
        gradient = [np.zeros(len(t)) for t in self.theta]
        for row, utility in zip(choices, utilities, strict=True):
            for d, t in enumerate(self.theta):
                gradient[d] += utility * (np.eye(len(t))[row[d]] - t)
        rooted = [
            g[j] / math.sqrt(t[j]) + math.sqrt(t[j]) * sum(g[:-1]) / (t[-1] + math.sqrt(t[-1]))
            for g, t in zip(gradient, self.theta, strict=True)
            for j in range(len(t) - 1)
        ]
        norm = math.sqrt(sum(value**2 for value in rooted))
        if norm < 1e-6:  # the best and the worst are the same architecture
            return
        delta = 1.0 / self.Delta
        beta = delta / math.sqrt(self.num_parameters)
        self.s = (1 - beta) * self.s + math.sqrt(beta * (2 - beta)) * np.array(rooted) / norm
        self.gamma = (1 - beta) ** 2 * self.gamma + beta * (2 - beta)
        self.Delta *= math.exp(beta * (self.gamma - self.s @ self.s / 1.5))
        self.Delta = max(self.Delta, 1.0 / math.sqrt(self.num_parameters))
        self.theta = [
            self.inside(t + delta / norm * g, len(self.theta))
            for t, g in zip(self.theta, gradient, strict=True)
        ]

    @staticmethod
    def inside(t, num_decisions):
        c = len(t)
        lowest = min(1 / (num_decisions * (c - 1)), 1 / (2 * c))
        t = np.maximum(t, lowest)
        return lowest + (t - lowest) * (1 - c * lowest) / sum(t - lowest)


@pytest.mark.parametrize("n", [4, 6, 8])
def test_1_one_distribution_follows_plain_asng(n):
    sizes = (2, 3, 5, 4, 3, 2)
    effects = np.random.default_rng(1).normal(size=(6, 5))
    optimizer = PooledOptimizer(num_candidates=sizes, objectives=[Objective(tables={})])
    twin, rng = PlainAsng(sizes), np.random.default_rng(2)
    for _ in range(200):
        choices = optimizer.ask(n, rng)
        losses = effects[np.arange(6), choices].sum(axis=1) + rng.normal(size=n)
        optimizer.tell(choices, losses)
        twin.update(choices, losses)
        for d, expected in enumerate(twin.theta):
            np.testing.assert_allclose(optimizer.theta[0, d, : sizes[d]], expected, rtol=0, atol=1e-12)
    assert optimizer.diagnostics.ess == (n,)
    assert max(map(max, twin.theta)) > 0.8, "the trajectory went somewhere"


def test_norms_by_f_root_and_by_theta_agree(rng):
    mask = cat.mask_array((3, 4, 2), ((True, True, True), (False, True, True, False), (True, True)))
    theta = cat.with_margin(np.where(mask, rng.random(mask.shape), 0.0), mask)
    asng = Asng(theta / theta.sum(axis=-1, keepdims=True), mask, delta_0=1.0)
    gradient = np.where(mask, rng.normal(size=mask.shape), 0.0)
    gradient -= np.where(mask, gradient.sum(axis=-1, keepdims=True) / mask.sum(axis=-1, keepdims=True), 0.0)
    assert asng.step(gradient)
    beta = 1.0 / math.sqrt(asng.num_parameters)
    assert (asng.s**2).sum() == pytest.approx(beta * (2 - beta))  # |F^{1/2} G| / |G|_F = 1


def test_natural_gradient_equals_its_plain_form(rng):
    theta = cat.uniform(cat.mask_array((3, 2, 4)))
    choices = cat.sample(np.repeat(theta[None], 9, axis=0), rng)
    utilities = rng.normal(size=9)
    one_hot = (choices[:, :, None] == np.arange(4)).astype(float)
    expected = np.einsum("i,idj->dj", utilities, one_hot - theta)
    np.testing.assert_allclose(natural_gradient(utilities, choices, theta), expected, atol=1e-14)


def test_distributions_together_move_as_each_alone(rng):
    masks = np.stack(
        [cat.mask_array((3, 4, 1)), cat.mask_array((3, 4, 1), ((True, False, True), (True,) * 4, (True,)))]
    )
    together = Asng(cat.uniform(masks), masks, delta_0=0.4)
    alone = [Asng(cat.uniform(mask), mask, delta_0=0.4) for mask in masks]
    for _ in range(50):
        drawn = cat.sample(np.repeat(together.theta[1:], 7, axis=0), rng)  # within both masks
        utilities = rng.normal(size=(2, 7))
        ready = rng.random(2) < 0.7
        gradient = natural_gradient(utilities, drawn, together.theta)
        moved = together.step(gradient, ready=ready)
        for k, one in enumerate(alone):
            np.testing.assert_allclose(
                natural_gradient(utilities[k], drawn, one.theta), gradient[k], atol=1e-13
            )
            assert moved[k] == (one.step(gradient[k]) if ready[k] else False)
            np.testing.assert_allclose(together.theta[k], one.theta, atol=1e-12)
            np.testing.assert_allclose(together.Delta[k], one.Delta, rtol=1e-12)
    assert together.Delta[0] != together.Delta[1]


def test_vanishing_gradient_changes_nothing():
    mask = cat.mask_array((3, 2))
    asng = Asng(cat.uniform(mask), mask, delta_0=1.0)
    before = asng.state_dict()
    assert not asng.step(np.full(mask.shape, 1e-8) * mask)
    assert asng.state_dict() == before


def test_beta_never_exceeds_one(rng):
    mask = cat.mask_array((2,))
    asng = Asng(cat.uniform(mask), mask, delta_0=50.0)
    for sign in rng.choice([-1.0, 1.0], size=300):
        asng.step(sign * np.array([[1.0, -1.0]]))
        assert asng.delta_0 / asng.Delta / math.sqrt(asng.num_parameters) <= 1.0 + 1e-15
        assert np.isfinite(asng.theta).all()
        assert np.isfinite(asng.s).all()


def test_step_divisor_has_a_floor():
    mask = cat.mask_array((3, 3))
    asng = Asng(cat.uniform(mask), mask, delta_0=1.0)
    (state,) = asng.state_dict()
    asng.load_state_dict([{**state, "s": np.full(mask.shape, 10.0).tolist()}])
    asng.step(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert asng.Delta == 1.0 / math.sqrt(4)


@pytest.mark.parametrize("delta_0", [0.0, -1.0, math.inf, math.nan])
def test_step_length_must_be_positive(delta_0):
    mask = cat.mask_array((2,))
    with pytest.raises(ValueError, match="delta_0"):
        Asng(cat.uniform(mask), mask, delta_0=delta_0)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (2,), (5,), (2, 2), (3, 1), (4, 1, 2)])
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("num_profiles", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_5_degenerate_problems_keep_theta_valid(rng, sizes, n, num_profiles, estimator, noise):
    objectives = [Objective(tables={})] * num_profiles
    optimizer = PooledOptimizer(num_candidates=sizes, objectives=objectives, estimator=estimator)
    lowest = np.where(optimizer.mask, cat.margin(optimizer.mask), 0.0)
    for _ in range(20):
        choices = optimizer.ask(n, rng)
        optimizer.tell(choices, 3.0 + noise * rng.normal(size=n))
        np.testing.assert_allclose(optimizer.theta.sum(axis=-1), 1.0, atol=1e-14)
        assert (optimizer.theta >= lowest - 1e-15).all()
    if noise == 0.0:
        np.testing.assert_allclose(optimizer.theta, cat.uniform(optimizer.mask), atol=1e-15)
