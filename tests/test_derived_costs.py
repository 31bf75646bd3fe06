"""Costs over derived values: a space of cells, in which layers depend on what no node reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs import memory_law
from nasdeploy.costs.calibration import Accuracy, Calibration, fit
from nasdeploy.costs.counting import LayerCount, count_layer, count_network, counting_tables
from nasdeploy.costs.file_size import file_size_table
from nasdeploy.costs.graphs import graph_layers, network_graph, random_weights, serialise
from nasdeploy.costs.joint_caps import JointCaps
from nasdeploy.costs.relaxation import Goal, Relaxation
from nasdeploy.costs.sampled import SampledCost
from nasdeploy.costs.table import Cost, CostTable, Factor, FloatArray, IntArray, TableStack, tabulate
from nasdeploy.costs.table_data import LatencyTable, LayerTime
from nasdeploy.costs.table_models import stratified_architectures
from nasdeploy.errors import ConfigError
from nasdeploy.networks.network import Normalise, build_network
from nasdeploy.optim import categorical
from nasdeploy.optim.features import OFFSET, CostFeatures
from nasdeploy.optim.objective import Judge, Objective
from nasdeploy.optim.selection import SelectionConfig, propose, scaled_decision, widened
from nasdeploy.profiles import Runtime
from nasdeploy.spaces import make_space
from nasdeploy.spaces.base import Architecture, CandidateMask, LayerSpec, SearchSpace
from nasdeploy.spaces.cell import CellConfig, cell_space

# One node in each cell: all 20 000 architectures can be looked at.
TINY = cell_space(
    (1, 16, 16), 3, CellConfig(channels=(8, 16), cells=("normal", "reduction", "normal"), num_nodes=1)
)
SIZES = TINY.num_candidates()
ALL = np.array(list(product(*map(range, SIZES))))
FULL = TINY.full_mask()


@pytest.fixture(scope="module")
def cell() -> SearchSpace:
    return make_space("cell", (1, 28, 28), 10)


def work(layer: LayerSpec) -> float:
    """Return a price like that of multiply-adds: whole numbers, so that sums are exact."""
    mixed = layer.in_channels * layer.out_channels if layer.kind != "sum" else layer.in_channels
    depthwise = layer.in_channels * layer.kernel**2
    return float((depthwise if "pool" in layer.kind else mixed + depthwise) * layer.out_size**2)


def random_price(seed: int) -> Callable[[LayerSpec], float]:
    """Return prices that no order of the candidates explains."""
    rng = np.random.default_rng(seed)
    prices: dict[LayerSpec, float] = {}
    return lambda layer: prices.setdefault(layer, float(rng.integers(1, 1000)))


def architectures(choices: IntArray) -> list[Architecture]:
    return [Architecture(tuple(row)) for row in choices.tolist()]


def drawn(space: SearchSpace, count: int, rng: np.random.Generator) -> IntArray:
    return np.stack([rng.integers(size, size=count) for size in space.num_candidates()], axis=1)


def random_theta(rng: np.random.Generator) -> FloatArray:
    theta = np.zeros((len(SIZES), max(SIZES)))
    for d, size in enumerate(SIZES):
        theta[d, :size] = rng.dirichlet(np.ones(size))
    return theta


def random_mask(rng: np.random.Generator) -> CandidateMask:
    mask = (tuple(bool(b) for b in rng.random(size) < 0.6) for size in SIZES)
    return tuple(row if any(row) else (*row[:-1], True) for row in mask)


def inside(mask: CandidateMask) -> IntArray:
    return ALL[categorical.within(categorical.mask_array(SIZES, mask), ALL)]


@pytest.mark.parametrize("price", [work, random_price(0)])
def test_a_table_costs_what_the_layers_of_a_network_cost(
    price: Callable[[LayerSpec], float], rng: np.random.Generator
) -> None:
    for space in (TINY, make_space("cell", (1, 28, 28), 10)):
        choices = drawn(space, 100, rng)
        expected = [7.0 + sum(map(price, space.decode(a))) for a in architectures(choices)]
        assert tabulate(space, price, constant=7.0).of(choices).tolist() == expected


def test_slots_over_the_same_decisions_share_a_factor() -> None:
    factors = tabulate(TINY, work).factors
    assert len({factor.decisions for factor in factors}) == len(factors) < len(TINY.slots)


def test_an_expectation_is_that_of_enumeration(rng: np.random.Generator) -> None:
    tables = [tabulate(TINY, work), tabulate(TINY, random_price(1), 5.0)]
    thetas = np.stack([random_theta(rng) for _ in range(3)])
    thetas[0] = categorical.uniform(categorical.mask_array(SIZES, random_mask(rng)))  # with zeros
    thetas = thetas[[0, 1, 2, 1]]  # equal rows share a marginal
    found = TableStack(tables).expected(thetas)
    for k, theta in enumerate(thetas):
        probability = theta[np.arange(len(SIZES)), ALL].prod(axis=1)
        for m, table in enumerate(tables):
            assert found[m, k] == pytest.approx(probability @ table.of(ALL), rel=1e-11)
            assert table.expected(theta) == pytest.approx(found[m, k], rel=1e-13)


@pytest.mark.parametrize("seed", range(8))
def test_the_least_cost_within_a_mask_is_that_of_enumeration(seed: int) -> None:
    table, mask = tabulate(TINY, random_price(seed)), random_mask(np.random.default_rng(seed))
    least = table.of(inside(mask)).min()
    found = table.least(mask)
    assert found.cost == table.minimum(mask) == least
    assert table.of(np.array([table.cheapest(mask)]))[0] == least
    assert all(row[c] for row, c in zip(mask, found.choices, strict=True))
    assert found.bound <= least
    assert found.proven == (found.bound == least)


ENDS = TINY.derived[0]
READS_PREVIOUS = [TINY.decisions[d].candidates.index("previous") for d in ENDS.decisions]


def unread(where_none: float) -> CostTable:
    """Return a cost of what no node reads: ``where_none`` if all is read, else 1; reading "before" costs 0.1."""
    values = np.ones(ENDS.num_values)
    values[0] = where_none
    rows = [0.1 * (np.arange(2) != c) for c in READS_PREVIOUS]
    reading = [Factor((d,), row) for d, row in zip(ENDS.decisions, rows, strict=True)]
    return replace(tabulate(TINY, work), factors=(Factor((len(SIZES),), values), *reading))


def test_a_bound_that_no_architecture_meets_is_no_proof_and_the_least_is_found_all_the_same() -> None:
    found = unread(0.0).least(FULL)  # by the bound all is read, and "previous" is all that is read
    assert found.bound == 0.0
    assert found.cost == unread(0.0).of(ALL).min() == pytest.approx(0.1)
    assert not found.proven
    assert unread(5.0).least(FULL).proven


def test_derived_values_that_a_mask_rules_out_do_not_weaken_the_bound() -> None:
    twice = list(FULL)
    for d, c in zip(ENDS.decisions, READS_PREVIOUS, strict=True):
        twice[d] = (c == 0, c == 1)
    found = unread(0.0).least(tuple(twice))  # "before" is always left
    assert found.bound == found.cost == 1.0


def test_a_stack_gives_each_kind_of_cost_its_own() -> None:
    tables = [tabulate(TINY, work), CostTable((Factor((0,), np.array([1.0, 2.0])),), 3.0)]
    costs: list[Cost] = [*tables, SampledCost(tables[0].of, SIZES)]
    np.testing.assert_array_equal(TableStack(costs).of(ALL), [cost.of(ALL) for cost in costs])


def test_tables_of_two_spaces_do_not_go_together() -> None:
    other = cell_space((1, 16, 16), 3, CellConfig(channels=(8, 16), num_nodes=2))
    tables = (tabulate(TINY, work), tabulate(other, work))
    with pytest.raises(ValueError, match="one search space"):
        TableStack(tables)
    with pytest.raises(ValueError, match="one search space"):
        tables[0].plus(tables[1])


@pytest.mark.parametrize("row", [[2] + [0] * 8, [0, 5] + [0] * 7, [0] * 8 + [-1], [0] * 8])
def test_choices_outside_the_space_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 9 decisions"):
        tabulate(TINY, work).of(np.array([row]))


def test_a_table_stays_what_it_is_when_it_is_scaled_added_and_stored() -> None:
    table = tabulate(TINY, work)
    np.testing.assert_array_equal(table.scaled(3.0, 2.0).of(ALL), 3.0 + 2.0 * table.of(ALL))
    np.testing.assert_array_equal(table.plus(CostTable((), 1.0)).of(ALL), 1.0 + table.of(ALL))
    copy = CostTable.from_json(table.to_json(), table.extension)
    np.testing.assert_array_equal(copy.of(ALL), table.of(ALL))


# ── several caps ─────────────────────────────────────────────────────────────────────────────────


def problem(seed: int) -> tuple[dict[str, CostTable], dict[str, float], CandidateMask]:
    """Return tables and caps near the least of each: some can be met together, some cannot."""
    rng = np.random.default_rng(seed)
    tables = {m: tabulate(TINY, random_price(10 * seed + i)) for i, m in enumerate(("params", "latency"))}
    mask, share = random_mask(rng), rng.uniform(0.02, 0.25)
    caps = {}
    for metric, table in tables.items():
        costs = table.of(inside(mask))
        caps[metric] = float(np.floor(costs.min() + share * (costs.max() - costs.min())))
    return tables, caps, mask


@pytest.mark.parametrize("seed", range(12))
def test_the_architecture_nearest_to_several_caps_is_that_of_enumeration(seed: int) -> None:
    tables, caps, mask = problem(seed)
    choices = inside(mask)
    loads = np.stack([tables[m].of(choices) / cap for m, cap in caps.items()], axis=1)
    least = np.maximum(loads - 1.0, 0.0).sum(axis=1).min()
    joint = JointCaps(tables, caps, mask)
    found = joint.nearest()
    assert found.violation == pytest.approx(least, abs=1e-12)
    assert found.bound <= least + 1e-12
    assert found.proven <= (least > 0.0)
    if least > 0.0:
        within = loads[:, 0] <= 1.0
        assert joint.least("latency") == tables["latency"].of(choices[within]).min()


def test_what_cannot_be_met_is_mostly_proven_so() -> None:
    found = [JointCaps(*problem(seed)).nearest() for seed in range(12)]
    assert 2 < sum(not one.feasible for one in found) < 12
    assert all(one.proven for one in found if not one.feasible)


def test_bounds_are_below_every_value(rng: np.random.Generator) -> None:
    tables, caps, mask = problem(3)
    limits = np.array(list(caps.values()))
    relaxation = Relaxation(list(tables.values()), limits, mask)
    choices = inside(mask)
    loads = np.stack([table.of(choices) for table in tables.values()], axis=1) / limits
    multipliers = np.concatenate([np.eye(2), rng.random((30, 2))])
    least, _ = relaxation.least(multipliers)
    assert (least <= (loads @ multipliers.T).min(axis=0) + 1e-12).all()
    soft = Goal(weights=np.zeros(2), penalties=np.ones(2), hard=np.zeros(2, dtype=bool))
    assert soft.bounds(least, multipliers).max() <= soft.values(loads).min()


# ── objectives, models, selection ────────────────────────────────────────────────────────────────


def test_a_judge_sees_derived_costs_as_any_other(rng: np.random.Generator) -> None:
    table = tabulate(TINY, work)
    cap = float(np.median(table.of(ALL)))
    objective = Objective(
        tables={"flops": table},
        caps={"flops": cap},
        coefficients={"flops": 2.0},
        references={"flops": cap},
    )
    judged = Judge([objective]).judge(ALL)
    np.testing.assert_allclose(judged.penalty[0], 2.0 * table.of(ALL) / cap, rtol=1e-14)
    assert ((judged.violation[0] == 0.0) == (table.of(ALL) <= cap)).all()
    theta = np.stack([random_theta(rng) for _ in range(1)])
    assert Judge([objective]).expected_excess(theta)[0] == pytest.approx(table.expected(theta[0]) / cap - 1.0)


class Counted:
    """A cost that is no table, and how many architectures it was asked for."""

    def __init__(self, table: CostTable) -> None:
        self.table, self.asked = table, 0

    def of(self, choices: IntArray) -> FloatArray:
        self.asked += len(choices)
        return self.table.of(choices)

    def expected(self, theta: FloatArray) -> float:
        return self.table.expected(theta)

    def minimum(self, mask: CandidateMask) -> float:
        return self.table.minimum(mask)

    def cheapest(self, mask: CandidateMask) -> tuple[int, ...]:
        return self.table.cheapest(mask)


def test_the_features_of_a_cost_begin_at_the_least_there_is(
    cell: SearchSpace, rng: np.random.Generator
) -> None:
    """Not at the least of some draws: what is cheaper than all of them is told apart too."""
    table = tabulate(cell, work)
    features = CostFeatures(cell.num_candidates(), [Objective(tables={"flops": table})])
    choices = np.concatenate([[cell.smallest().choices], drawn(cell, 2000, rng)])
    costs, found = table.of(choices), features.of(choices)[:, 0]
    assert costs[0] < 0.5 * costs[1:].min()
    above = np.exp(found * features._spread + features._mean) - OFFSET
    np.testing.assert_allclose(above, (costs - costs[0]) / features._unit, atol=1e-9)


def test_the_features_of_a_cost_that_is_no_table_ask_once_for_each_architecture() -> None:
    cost, constant = Counted(tabulate(TINY, work)), Counted(CostTable((), 3.0))
    features = CostFeatures(SIZES, [Objective(tables={"flops": cost, "params": constant})])
    assert len(features) == 1
    assert cost.asked == constant.asked
    cost.asked = constant.asked = 0
    features.of(ALL[:100])
    assert (cost.asked, constant.asked) == (100, 0)


CHANNELS = len(SIZES) - 1
MASK = categorical.mask_array(SIZES)


def with_channels(choices: IntArray, candidate: int) -> IntArray:
    changed = choices.copy()
    changed[:, CHANNELS] = candidate
    return changed


def two_caps() -> Objective:
    tables = {"flops": tabulate(TINY, work), "params": tabulate(TINY, random_price(5))}
    shares = {"flops": 0.8, "params": 0.5}
    caps = {m: float(np.quantile(table.of(ALL), shares[m])) for m, table in tables.items()}
    return Objective(tables=tables, caps=caps)


def test_the_decision_that_is_solved_for_gets_the_largest_candidate_that_keeps_all_caps() -> None:
    objective = two_caps()
    narrow, wide = (objective.feasible(with_channels(ALL, c)) for c in (0, 1))
    found = widened(ALL, decision=CHANNELS, mask=MASK, objective=objective)
    assert (found[:, :CHANNELS] == ALL[:, :CHANNELS]).all()
    expected = np.where(wide, 1, np.where(narrow, 0, ALL[:, CHANNELS]))
    assert (found[:, CHANNELS] == expected).all()
    assert objective.feasible(found).sum() == (narrow | wide).sum()
    assert 0 < wide.sum() < (narrow | wide).sum() < len(ALL)  # each case occurs


def test_what_is_solved_for_keeps_to_the_mask() -> None:
    mask = MASK.copy()
    mask[CHANNELS, 1] = False
    found = widened(with_channels(ALL, 0), decision=CHANNELS, mask=mask, objective=two_caps())
    assert (found[:, CHANNELS] == 0).all()


def test_an_objective_with_coefficients_solves_for_nothing() -> None:
    objective = two_caps()
    priced = replace(objective, coefficients={"flops": 0.1}, references={"flops": 1e5})
    assert (widened(ALL, decision=CHANNELS, mask=MASK, objective=priced) == ALL).all()
    unpriced = replace(objective, coefficients={"flops": 0.0}, references={"flops": 1e5})
    assert (widened(ALL, decision=CHANNELS, mask=MASK, objective=unpriced) != ALL).any()


class Likes:
    """A model of the loss that likes candidate 0 everywhere: the narrowest network as well."""

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        raise AssertionError("is fitted already")

    def predict(self, choices: IntArray) -> FloatArray:
        return np.asarray(choices.sum(axis=1), dtype=np.float64)

    def r_squared(self, choices: IntArray, losses: FloatArray) -> float:
        return 1.0


def test_candidates_of_a_profile_are_solved_for_before_they_are_ranked(rng: np.random.Generator) -> None:
    objective = two_caps()
    dear = ALL[~objective.feasible(ALL) & (ALL[:, CHANNELS] == 1)][:50]  # feasible with fewer channels only
    found = {
        scaled: propose(
            theta=categorical.uniform(MASK),
            mask=MASK,
            objective=objective,
            seen=dear,
            surrogate=Likes(),
            rng=rng,
            config=SelectionConfig(num_samples=8, num_likeliest=4, beam=4),
            scaled=scaled,
        )
        for scaled in (None, CHANNELS)
    }
    assert all(objective.feasible(one).all() for one in found.values())
    solved = found[CHANNELS]
    assert len(np.unique(solved, axis=0)) == len(solved)
    assert (solved == widened(solved, decision=CHANNELS, mask=MASK, objective=objective)).all()
    assert (found[None][:, CHANNELS] == 0).sum() > (solved[:, CHANNELS] == 0).sum()


def test_which_decision_is_solved_for_is_told_by_the_space() -> None:
    assert scaled_decision(TINY) == CHANNELS
    assert scaled_decision(make_space("mobile", (1, 28, 28), 10)) is None


# ── what layers of cells cost ────────────────────────────────────────────────────────────────────


def test_parameters_and_flops_are_those_of_the_built_network(
    cell: SearchSpace, rng: np.random.Generator
) -> None:
    tables = counting_tables(cell)
    found = [cell.smallest(), *stratified_architectures(cell, 2, rng), cell.largest()]
    counts = [
        count_network(build_network(cell, a, Normalise((127.5,), (127.5,))), cell.image_shape) for a in found
    ]
    choices = np.array([a.choices for a in found])
    assert tables["params"].of(choices).tolist() == [count.params for count in counts]
    assert tables["flops"].of(choices).tolist() == [count.flops for count in counts]


def test_the_ends_of_the_space_are_its_cheapest_and_dearest_networks(cell: SearchSpace) -> None:
    """A share of the range, such as a cap of 20 %, is one of all networks."""
    ends = np.array([cell.smallest().choices, cell.largest().choices])
    for table in counting_tables(cell).values():
        low, high = table.of(ends)
        least, most = table.least(cell.full_mask()), table.scaled(0.0, -1.0).least(cell.full_mask())
        assert (least.cost, -most.cost) == (low, high)
        assert least.proven
        assert most.proven


def test_layers_without_weights_and_of_several_values_are_counted() -> None:
    pool = LayerSpec(kind="avg_pool", in_channels=8, out_channels=8, size=14, kernel=3)
    total = LayerSpec(kind="sum", in_channels=8, out_channels=8, size=14, num_inputs=2)
    assert count_layer(pool) == count_layer(total) == LayerCount(params=0, flops=0, macs=0)
    join = LayerSpec(kind="join", in_channels=24, out_channels=8, size=14, num_inputs=3)
    multiply_adds = 24 * 8 * 14**2
    assert count_layer(join) == LayerCount(
        params=24 * 8 + 16, flops=multiply_adds + 2 * 8 * 14**2, macs=multiply_adds
    )


def real_size(space: SearchSpace, architecture: Architecture) -> int:
    layers = graph_layers(
        space.placed(architecture), lambda spec: random_weights(spec, np.random.default_rng(0))
    )
    shape = space.image_shape
    return len(serialise(network_graph(layers, image_shape=shape, mean=[0.0], scale=[1.0], batch_size=None)))


def test_the_size_of_a_file_is_told_by_its_architecture(cell: SearchSpace, rng: np.random.Generator) -> None:
    table = file_size_table(cell)
    small = cell.smallest().choices[:-1]
    scaled = [Architecture((*small, c)) for c in range(4)]
    predicted = table.of(np.array([a.choices for a in scaled]))
    assert np.abs(predicted - [real_size(cell, a) for a in scaled]).max() <= 4
    found = stratified_architectures(cell, 20, rng)  # in which layers may or may not begin alike
    real = np.array([real_size(cell, a) for a in found])
    errors = table.of(np.array([a.choices for a in found])) / real - 1.0
    assert np.abs(errors).max() < 0.02
    assert np.abs(errors).mean() < 0.005


def test_the_memory_of_a_network_follows_from_sums_and_the_largest_working_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_law, "MAX_ENTRIES", 10**6)  # of all slots, where they go together
    terms = memory_law.term_tables(TINY)
    choices = ALL[::173]
    layers = [TINY.decode(a) for a in architectures(choices)]
    assert terms["weights"].of(choices).tolist() == [sum(map(memory_law.weight_bytes, row)) for row in layers]
    largest = np.array([max(map(memory_law.working_set_bytes, row)) for row in layers])
    found = terms["working_set"].of(choices)
    assert (found <= largest).all()
    assert (found == largest).mean() > 0.9
    (factor,) = terms[
        "working_set"
    ].factors  # whose expectation would not be exact with a value and what it sums up
    derived = [one for e, one in enumerate(TINY.derived) if len(SIZES) + e in factor.decisions]
    assert derived
    assert not set(factor.decisions) & {d for one in derived for d in one.decisions}


def test_a_join_holds_what_it_reads_side_by_side_before_and_behind_its_activation() -> None:
    join = LayerSpec(kind="join", in_channels=24, out_channels=8, size=14, num_inputs=3)
    assert memory_law.working_set_bytes(join) == 4.0 * 2 * 24 * 14**2
    assert memory_law.activation_bytes(join) == 4.0 * (2 * 24 + 8) * 14**2
    total = LayerSpec(kind="sum", in_channels=8, out_channels=8, size=14, num_inputs=2)
    assert memory_law.working_set_bytes(total) == 4.0 * 3 * 8 * 14**2


# ── latency ──────────────────────────────────────────────────────────────────────────────────────


def made_up_ms(layer: LayerSpec) -> float:
    return 1e-4 + work(layer) / 1e9


def test_pools_cost_something_else_in_a_network_than_alone(
    cell: SearchSpace, rng: np.random.Generator
) -> None:
    alone = {layer: made_up_ms(layer) for layer in cell.distinct_layers()}
    networks = [cell.decode(a) for a in stratified_architectures(cell, 40, rng)]
    shares = {"max_pool": 0.4, "avg_pool": 0.4}
    times = np.array(
        [0.02 + sum(shares.get(layer.kind, 1.0) * alone[layer] for layer in row) for row in networks]
    )
    fitted = fit(networks, times, alone)
    predicted = [fitted.network_ms(row, alone) for row in networks]
    np.testing.assert_allclose(predicted, times, rtol=1e-9)
    assert fitted.coefficients["pools"] == pytest.approx(-0.6)


@pytest.fixture(scope="module")
def latency_table() -> LatencyTable:
    runtime = Runtime(
        engine="onnxruntime",
        provider="CPUExecutionProvider",
        threads=1,
        batch_size=1,
        precision="fp32",
        channel_multiple=8,
    )
    return LatencyTable(
        runtime_key=runtime.key(),
        channel_multiple=8,
        space_name=TINY.name,
        space_fingerprint=TINY.fingerprint(),
        machine={"cpu": "A"},
        seed=0,
        measured_at="2024-01-01T00:00:00+00:00",
        seconds=1.0,
        entries=tuple(
            LayerTime(spec=layer, ms=made_up_ms(layer), spread=0.0) for layer in TINY.distinct_layers()
        ),
        bridge=None,
        calibration=Calibration(constant_ms=0.5, coefficients={"table": 1.0, "pools": -0.5}),
        accuracy=Accuracy(**dict.fromkeys(Accuracy.__dataclass_fields__, 0)),
        held_out=(),
        smallest_ms=1.0,
        largest_ms=2.0,
    )


def test_a_latency_table_over_derived_values_adds_up_its_layers(latency_table: LatencyTable) -> None:
    choices = ALL[::1999]
    alone = {entry.spec: entry.ms for entry in latency_table.entries}
    expected = [latency_table.calibration.network_ms(TINY.decode(a), alone) for a in architectures(choices)]
    np.testing.assert_allclose(latency_table.cost_table(TINY).of(choices), expected, rtol=1e-12)


def test_a_stored_layer_says_how_many_values_it_reads_only_where_it_reads_several(
    latency_table: LatencyTable,
) -> None:
    stored = json.loads(json.dumps(latency_table.to_json()))
    rows = {entry["spec"]["kind"]: entry["spec"] for entry in stored["entries"]}
    assert "num_inputs" not in rows["separable"]  # as tables were stored when there were chains only
    assert rows["sum"]["num_inputs"] == 2
    copy = LatencyTable.from_json(stored)
    assert [entry.spec for entry in copy.entries] == list(TINY.distinct_layers())
    stored["entries"][0]["spec"]["groups"] = 1
    with pytest.raises(ConfigError, match="do not belong there"):
        LatencyTable.from_json(stored)
