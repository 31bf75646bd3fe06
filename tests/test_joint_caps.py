"""Several caps at once: as enumeration says on small spaces, proven where it can be, and found where it is rare."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.joint_caps import JointCaps
from nasdeploy.costs.relaxation import Goal, Relaxation
from nasdeploy.costs.sampled import SampledCost
from nasdeploy.costs.table import CostTable, Factor, FloatArray, IntArray
from nasdeploy.spaces import make_space
from nasdeploy.spaces.base import CandidateMask, SearchSpace

SIZES = (3, 2, 4, 3, 1, 3)
METRICS = ("params", "flops", "latency")


def full(sizes: tuple[int, ...]) -> CandidateMask:
    return tuple((True,) * size for size in sizes)


def allowed(mask: CandidateMask) -> IntArray:
    """Return all architectures (n, D) within ``mask``."""
    return np.array(list(product(*(np.flatnonzero(row) for row in mask))))


def random_tables(rng: np.random.Generator, sizes: tuple[int, ...] = SIZES) -> dict[str, CostTable]:
    """Return chains of pairs, small whole numbers, so that architectures tie."""
    scopes = [*((d, d + 1) for d in range(len(sizes) - 1)), (2,), ()]
    return {
        metric: CostTable(
            tuple(Factor(ds, rng.integers(0, 6, size=[sizes[d] for d in ds])) for ds in scopes), 1.0
        )
        for metric in METRICS
    }


def violations(tables: dict[str, CostTable], caps: dict[str, float], choices: IntArray) -> FloatArray:
    return sum(np.maximum(0.0, tables[metric].of(choices) / cap - 1.0) for metric, cap in caps.items())


def random_problem(seed: int) -> tuple[dict[str, CostTable], dict[str, float], CandidateMask]:
    """Return tables, a mask, and caps near the least of each metric: some can be met together, some cannot."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng)
    mask = tuple(tuple(bool(b) for b in rng.random(size) < 0.8) for size in SIZES)
    mask = tuple(row if any(row) else (True, *row[1:]) for row in mask)
    share = rng.uniform(0.05, 0.6)
    caps = {}
    for metric, table in tables.items():
        costs = table.of(allowed(mask))
        caps[metric] = float(np.floor(costs.min() + share * (costs.max() - costs.min())))
    return tables, caps, mask


@pytest.mark.parametrize("seed", range(60))
def test_the_nearest_is_that_of_enumeration_and_its_absence_is_proven(seed: int) -> None:
    tables, caps, mask = random_problem(seed)
    least = violations(tables, caps, allowed(mask)).min()
    found = JointCaps(tables, caps, mask).nearest()
    assert found.violation == pytest.approx(least, abs=1e-12)
    assert violations(tables, caps, np.array([found.choices]))[0] == pytest.approx(found.violation, abs=1e-12)
    assert all(row[c] for row, c in zip(mask, found.choices, strict=True))
    assert found.bound <= found.violation
    assert found.feasible == (least == 0.0)
    assert found.proven == (least > 0.0)


def test_both_outcomes_are_among_the_random_problems() -> None:
    found = [JointCaps(*random_problem(seed)).nearest() for seed in range(60)]
    assert 10 < sum(one.feasible for one in found) < 50


@pytest.mark.parametrize("seed", range(30))
def test_the_least_within_the_other_caps_is_that_of_enumeration(seed: int) -> None:
    tables, caps, mask = random_problem(seed)
    joint = JointCaps(tables, caps, mask)
    joint.nearest()
    choices = allowed(mask)
    for metric in METRICS:
        others = {name: cap for name, cap in caps.items() if name != metric}
        inside = tables[metric].of(choices[violations(tables, others, choices) == 0.0])
        found = joint.least(metric)
        assert found == (inside.min() if len(inside) else None)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_below_every_value(seed: int) -> None:
    tables, caps, mask = random_problem(seed)
    rng = np.random.default_rng(seed)
    limits = np.array([caps[metric] for metric in METRICS])
    relaxation = Relaxation([tables[metric] for metric in METRICS], limits, mask)
    loads = np.stack([tables[metric].of(allowed(mask)) for metric in METRICS], axis=1) / limits
    multipliers = np.concatenate([np.eye(3), rng.random((50, 3)), 10.0 * rng.random((50, 3))])
    least, _ = relaxation.least(multipliers)
    np.testing.assert_allclose(least, (loads @ multipliers.T).min(axis=0), rtol=1e-12)
    soft = Goal(weights=np.zeros(3), penalties=np.ones(3), hard=np.zeros(3, dtype=bool))
    assert soft.bounds(least, multipliers).max() <= soft.values(loads).min()
    hard = Goal(weights=np.array([1.0, 0, 0]), penalties=np.zeros(3), hard=np.array([False, True, True]))
    multipliers[3:, 0] = rng.integers(0, 2, size=100)
    least, _ = relaxation.least(multipliers)
    assert hard.bounds(least, multipliers).max() <= hard.values(loads).min()


def needle(num_decisions: int = 16) -> tuple[dict[str, CostTable], dict[str, float], CandidateMask]:
    """Return caps that one architecture of 3**16 meets: all candidates 1, far from where either cost is least."""
    rows = [np.array([0.0, 1.0, 4.0]), np.array([4.0, 1.0, 0.0])]
    tables = {
        metric: CostTable(tuple(Factor((d,), row) for d in range(num_decisions)))
        for metric, row in zip(("params", "flops"), rows, strict=True)
    }
    caps = dict.fromkeys(tables, float(num_decisions))
    return tables, caps, full((3,) * num_decisions)


def test_caps_that_one_architecture_in_millions_meets_are_met() -> None:
    tables, caps, mask = needle()
    found = JointCaps(tables, caps, mask).nearest()
    assert found.feasible
    assert found.choices == (1,) * 16
    lower = {metric: cap - 1.0 for metric, cap in caps.items()}
    nothing = JointCaps(tables, lower, mask).nearest()
    assert nothing.proven
    assert nothing.violation == pytest.approx(violations(tables, lower, np.full((1, 16), 1))[0])


def test_what_bounds_alone_do_not_decide_is_decided() -> None:
    # the halves of an odd total cannot be equal: the relaxation, which may mix architectures, does not see it
    weights = [3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0, 22.0, 28.0]
    tables = {
        "params": CostTable(tuple(Factor((d,), np.array([0.0, w])) for d, w in enumerate(weights))),
        "flops": CostTable(tuple(Factor((d,), np.array([w, 0.0])) for d, w in enumerate(weights))),
    }
    half = sum(weights) / 2.0
    found = JointCaps(tables, dict.fromkeys(tables, half), full((2,) * 9)).nearest()
    assert half % 1.0 == 0.5
    assert found.violation == pytest.approx(0.5 / half)
    assert found.proven


def cube(space: SearchSpace, tables: dict[str, CostTable], seed: int) -> dict[str, float]:
    """Return caps that an architecture near the front of random ones just keeps."""
    rng = np.random.default_rng(seed)
    choices = np.stack([rng.integers(count, size=4000) for count in space.num_candidates()], axis=1)
    costs = np.stack([table.of(choices) for table in tables.values()], axis=1)
    best = np.argmin((costs / costs.mean(axis=0)).max(axis=1) + 0.1 * rng.random(4000))
    return dict(zip(tables, costs[best].tolist(), strict=True))


@pytest.mark.parametrize("sizes", [(), (40, 48, 64)])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.6])
def test_real_spaces_are_decided_quickly_and_the_same_twice(sizes: tuple[int, ...], share: float) -> None:
    space = make_space("mobile", (3, 64, 64), 10, sizes) if sizes else make_space("mobile", (1, 28, 28), 10)
    rng = np.random.default_rng(1)
    counted = counting_tables(space)
    tables = dict(counted) | {"latency": noisy(counted["flops"], rng)}
    caps = {metric: share * cap for metric, cap in cube(space, tables, seed=0).items()}
    started = time.process_time()
    joint = JointCaps(tables, caps, space.full_mask())
    found = joint.nearest()
    least = {metric: joint.least(metric) for metric in caps} if not found.feasible else {}
    assert time.process_time() - started < 1.0  # 0.1 s on a free core
    again = JointCaps(tables, caps, space.full_mask())
    assert again.nearest() == found
    assert {metric: again.least(metric) for metric in least} == least
    if share == 1.0:
        assert found.feasible


def noisy(table: CostTable, rng: np.random.Generator) -> CostTable:
    """Return a cost like ``table`` whose layers are dearer or cheaper by up to a half."""
    return CostTable(
        tuple(
            Factor(f.decisions, 1e-6 * f.values * rng.uniform(0.5, 1.5, size=f.values.shape))
            for f in table.factors
        ),
        0.01,
    )


@pytest.mark.parametrize("seed", range(10))
def test_costs_without_tables_are_met_where_enumeration_meets_them(seed: int) -> None:
    tables, caps, mask = random_problem(seed)
    costs = tables | {"latency": SampledCost(tables["latency"].of, SIZES)}
    least = violations(tables, caps, allowed(mask)).min()
    joint = JointCaps(costs, caps, mask)
    found = joint.nearest()
    assert found.violation == pytest.approx(least, abs=1e-12)
    assert not found.proven
    if not found.feasible:
        others = violations(tables, {m: caps[m] for m in ("params", "flops")}, allowed(mask))
        assert (joint.least("latency") is None) == (others.min() > 0.0)


def test_one_factor_over_all_decisions_is_decided_exactly(rng: np.random.Generator) -> None:
    sizes = (5,) * 6
    tables = {metric: CostTable((Factor(tuple(range(6)), rng.random(sizes) + 0.5),)) for metric in ("a", "b")}
    choices = allowed(full(sizes))
    together = np.maximum(tables["a"].of(choices), tables["b"].of(choices))
    best = float(together.min())
    assert JointCaps(tables, {"a": best, "b": best}, full(sizes)).nearest().feasible
    found = JointCaps(tables, {"a": 0.999 * best, "b": 0.999 * best}, full(sizes)).nearest()
    assert found.proven
    expected = violations(tables, {"a": 0.999 * best, "b": 0.999 * best}, choices).min()
    assert found.violation == pytest.approx(expected)
