"""Cost tables: exact, vectorised, and the same as adding up layer by layer."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.elimination import best_positions, eliminate, elimination_order
from nasdeploy.costs.table import CostTable, Factor, TableStack, allowed_entries, tabulate
from nasdeploy.errors import ConfigError
from nasdeploy.spaces import make_space
from nasdeploy.spaces.base import Architecture, LayerSpec
from nasdeploy.spaces.mobile import mobile_space

SIZES = (2, 3, 1, 4)
ALL = np.array(list(product(*map(range, SIZES))))


def random_table(rng: np.random.Generator) -> CostTable:
    factors = [(0,), (1, 0), (3, 1, 2), (1, 0), ()]
    return CostTable(tuple(Factor(ds, rng.random([SIZES[d] for d in ds])) for ds in factors), 0.25)


def slow_cost(table: CostTable, choices: np.ndarray) -> list[float]:
    return [
        table.constant + sum(float(f.values[tuple(row[d] for d in f.decisions)]) for f in table.factors)
        for row in choices
    ]


def layer_cost(layer: LayerSpec) -> float:
    return layer.in_channels * layer.out_channels * layer.kernel**2 + layer.expand


def test_cost_is_the_sum_over_factors(rng):
    table = random_table(rng)
    np.testing.assert_allclose(table.of(ALL), slow_cost(table, ALL), rtol=1e-14)


def test_whole_numbers_stay_exact_to_the_last_unit():
    large = np.array([2**51 + 1, 2**51 + 3])
    table = CostTable((Factor((0,), large), Factor((1,), large)), 1.0)
    assert table.of(np.array([[0, 1]])).tolist() == [2**52 + 5]


def test_tabulated_space_costs_what_its_layers_cost(rng):
    space = mobile_space((3, 32, 32), 10)
    table = tabulate(space, layer_cost, constant=7.0)
    choices = np.stack([rng.integers(count, size=50) for count in space.num_candidates()], axis=1)
    layers = [space.decode(Architecture(tuple(map(int, row)))) for row in choices]
    assert table.of(choices).tolist() == [7.0 + sum(map(layer_cost, row)) for row in layers]


def test_a_table_with_resolutions_stays_small_and_costs_what_its_layers_cost(rng):
    sizes = (96, 128, 160)
    space = make_space("mobile", (3, 160, 160), 10, sizes)
    table = tabulate(space, lambda layer: layer_cost(layer) * layer.size**2)
    choices = np.stack([rng.integers(count, size=50) for count in space.num_candidates()], axis=1)
    layers = [space.decode(Architecture(tuple(map(int, row)))) for row in choices]
    expected = [sum(layer_cost(layer) * layer.size**2 for layer in row) for row in layers]
    assert table.of(choices).tolist() == expected
    assert sum(factor.values.size for factor in table.factors) < 3000
    for r in range(len(sizes)):  # the least cost of every resolution, and of all together
        mask = (tuple(i == r for i in range(3)), *space.full_mask()[1:])
        assert table.of(np.array([table.cheapest(mask)]))[0] == table.minimum(mask)
    assert table.minimum(space.full_mask()) == table.minimum(((True, False, False), *space.full_mask()[1:]))


def test_each_distinct_layer_is_priced_once():
    space = mobile_space((3, 32, 32), 10)
    priced = []
    tabulate(space, lambda layer: float(len(priced.append(layer) or priced)))
    assert len(priced) == len(set(priced)) == len(space.distinct_layers())


def test_tables_are_scaled_and_added(rng):
    first, second = random_table(rng), random_table(rng)
    combined = first.scaled(3.0, 2.0).plus(second)
    np.testing.assert_allclose(combined.of(ALL), 3.0 + 2.0 * first.of(ALL) + second.of(ALL), rtol=1e-14)


def test_stacked_tables_agree_with_single_ones(rng):
    tables = [random_table(rng), CostTable((), 5.0), random_table(rng)]
    np.testing.assert_allclose(TableStack(tables).of(ALL), [table.of(ALL) for table in tables], rtol=1e-14)


def test_no_tables_cost_nothing():
    assert TableStack(()).of(ALL).shape == (0, len(ALL))


def test_json_round_trip_is_exact(rng):
    table = random_table(rng)
    copy = CostTable.from_json(json.loads(json.dumps(table.to_json())))
    assert copy.of(ALL).tolist() == table.of(ALL).tolist()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"constant": 0.0, "factors": [{"decisions": [0]}]},
        {"constant": "x", "factors": []},
        {"constant": 0.0, "factors": [{"decisions": [0], "values": [[1.0], [2.0, 3.0]]}]},
        {"constant": 0.0, "factors": [{"decisions": [0, 1], "values": [1.0]}]},
        {"constant": 0.0, "factors": [{"decisions": [0, 0], "values": [[1.0]]}]},
        {"constant": 0.0, "factors": [{"decisions": [0], "values": [float("nan")]}]},
    ],
)
def test_damaged_json_is_refused(data):
    with pytest.raises(ConfigError, match="cost table"):
        CostTable.from_json(data)


@pytest.mark.parametrize("row", [[2, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0], [0, 0, 0]])
def test_choices_outside_the_table_are_refused(rng, row):
    with pytest.raises(ValueError, match="expected at least 4 decisions"):
        random_table(rng).of(np.array([row]))


def test_tables_of_different_spaces_are_refused():
    tables = (CostTable((Factor((0,), np.zeros(2)),)), CostTable((Factor((0,), np.zeros(3)),)))
    with pytest.raises(ValueError, match="one search space"):
        TableStack(tables)


def test_expectation_equals_enumeration(rng):
    table = random_table(rng)
    theta = np.zeros((4, 4))
    for d, size in enumerate(SIZES):
        theta[d, :size] = rng.dirichlet(np.ones(size))
    probability = theta[np.arange(4), ALL].prod(axis=1)
    assert table.expected(theta) == pytest.approx(probability @ table.of(ALL), rel=1e-13)


def test_minimum_equals_enumeration(rng):
    mask = ((True, True), (False, True, True), (True,), (True, False, True, True))
    allowed = [row for row in ALL if all(mask[d][c] for d, c in enumerate(row))]
    for _ in range(20):
        table = random_table(rng)
        assert table.minimum(mask) == pytest.approx(table.of(np.array(allowed)).min(), rel=1e-13)


def test_minimum_of_a_real_space_is_met_by_no_sample(rng):
    space = mobile_space((3, 32, 32), 10)
    table = tabulate(space, lambda layer: float(rng.integers(1, 1000)))
    choices = np.stack([rng.integers(count, size=2000) for count in space.num_candidates()], axis=1)
    assert 0.0 < table.minimum(space.full_mask()) <= table.of(choices).min()


@pytest.mark.parametrize("sizes", [(5,) * 6, (3,) * 8, (4, 1, 3, 2, 5)])
def test_one_factor_over_all_decisions_is_looked_up_bounded_and_averaged_exactly(rng, sizes):
    scope = tuple(rng.permutation(len(sizes)).tolist())
    table = CostTable((Factor(scope, rng.random([sizes[d] for d in scope])),), 0.5)
    choices = np.stack([rng.integers(size, size=100) for size in sizes], axis=1)
    np.testing.assert_allclose(table.of(choices), slow_cost(table, choices), rtol=1e-14)
    everything = np.array(list(product(*map(range, sizes))))
    mask = tuple(tuple(c % 2 == 0 for c in range(size)) for size in sizes)
    allowed = everything[(everything % 2 == 0).all(axis=1)]
    assert table.minimum(mask) == table.of(allowed).min()
    assert table.of(np.array([table.cheapest(mask)]))[0] == table.minimum(mask)
    theta = np.zeros((len(sizes), max(sizes)))
    for d, size in enumerate(sizes):
        theta[d, :size] = rng.dirichlet(np.ones(size))
    probability = theta[np.arange(len(sizes)), everything].prod(axis=1)
    assert table.expected(theta) == pytest.approx(probability @ table.of(everything), rel=1e-12)


def test_sums_that_are_minimised_together_are_those_minimised_alone(rng):
    tables = [random_table(rng) for _ in range(5)]
    mask = ((True, True), (False, True, True), (True,), (True, False, True, True))
    entries = allowed_entries(tables, mask)
    least, eliminated = eliminate(entries, elimination_order([decisions for decisions, _ in entries]))
    np.testing.assert_allclose(least + 0.25, [table.minimum(mask) for table in tables], rtol=1e-13)
    positions = best_positions(eliminated, num_decisions=len(mask))
    found = np.stack([np.flatnonzero(row)[p] for row, p in zip(mask, positions.T, strict=True)], axis=1)
    costs = [table.of(choices[None])[0] for table, choices in zip(tables, found, strict=True)]
    np.testing.assert_allclose(costs, least + 0.25, rtol=1e-13)


def test_elimination_leaves_no_decision_out_and_keeps_the_tables_of_a_chain_small():
    space = mobile_space((3, 32, 32), 10)
    order = elimination_order([slot.decisions for slot in space.slots])
    assert sorted(order) == list(range(len(space.decisions)))
    table = tabulate(space, layer_cost)
    entries = allowed_entries((table,), space.full_mask())
    _, eliminated = eliminate(entries, order)
    assert max(one.costs.size for one in eliminated) <= 5 * 3 * 3


def test_a_cost_without_factors_is_its_constant_everywhere():
    table, mask = CostTable((), 3.0), ((True, True), (False, True))
    assert table.minimum(mask) == 3.0
    assert table.cheapest(mask) == (0, 1)
    assert table.expected(np.full((2, 2), 0.5)) == 3.0
