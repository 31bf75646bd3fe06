"""NSGA-II over integer choices, against enumeration: 4^5 architectures whose true front is known."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from nasdeploy.costs.table import CostTable, Factor, FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.objective import Objective
from nasdeploy.searchers.evolution import (
    MultiObjectiveSearch,
    front_of,
    mutated,
    non_dominated,
    relative_cost,
)

NUM, SIZE = 5, 4
FULL = np.ones((NUM, SIZE), dtype=np.bool_)
NARROW = categorical.mask_array((3, 2, 4), ((True, False, True), (False, True), (True, False, True, True)))
ALL = np.array(list(product(range(SIZE), repeat=NUM)))
NUM_EVALUATIONS = 512  # half of the space: with fewer, not every seed comes so near


def additive(seed: int) -> Callable[[IntArray], FloatArray]:
    """Return (error, cost) (n, 2): sums over decisions, the error falling and the cost rising with the candidate."""
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.random((NUM, SIZE)), axis=1)
    errors = np.sort(rng.random((NUM, SIZE)), axis=1)[:, ::-1]
    decisions = np.arange(NUM)
    return lambda c: np.stack([errors[decisions, c].sum(axis=1), costs[decisions, c].sum(axis=1)], axis=1)


def dominated(row: FloatArray, values: FloatArray) -> bool:
    """Return whether some row of ``values`` is nowhere higher and somewhere lower, one by one."""
    return any(all(a <= b for a, b in zip(v, row, strict=True)) and tuple(v) != tuple(row) for v in values)


def brute_force_front(values: FloatArray) -> list[int]:
    return [i for i, row in enumerate(values) if not dominated(row, values)]


def hypervolume(values: FloatArray, reference: FloatArray) -> float:
    """Return the area between two-dimensional ``values`` (n, 2) and ``reference`` (2,), strip by strip."""
    area, lowest = 0.0, reference[1]
    for x, y in values[np.argsort(values[:, 0])]:
        if y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return float(area)


def make_search(seed: int = 0, **changes: object) -> MultiObjectiveSearch:
    settings: dict[str, object] = {
        "mask": FULL,
        "num_evaluations": NUM_EVALUATIONS,
        "population_size": 24,
        "seed": seed,
    }
    return MultiObjectiveSearch(**{**settings, **changes})  # type: ignore[arg-type]


def generation(search: MultiObjectiveSearch, evaluate: Callable[[IntArray], FloatArray]) -> IntArray:
    """Evaluate a generation; return its choices (n, D), none where nothing is left."""
    born = search.ask()
    if len(born):
        search.tell(evaluate(born))
    return born


def carry_out(search: MultiObjectiveSearch, evaluate: Callable[[IntArray], FloatArray]) -> None:
    while len(generation(search, evaluate)):
        pass


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_front_is_that_of_brute_force_and_nearly_the_true_one(seed: int) -> None:
    evaluate, search = additive(seed), make_search(seed)
    carry_out(search, evaluate)
    assert non_dominated(search.values).tolist() == brute_force_front(search.values)
    truth = evaluate(ALL)
    reference = truth.max(axis=0)
    assert hypervolume(search.values, reference) >= 0.99 * hypervolume(truth, reference)


def test_every_evaluation_is_of_another_architecture_inside_the_mask() -> None:
    seen: list[IntArray] = []

    def evaluate(choices: IntArray) -> FloatArray:
        seen.append(choices)
        return np.stack([choices.sum(axis=1), -choices.sum(axis=1)], axis=1)

    search = make_search(mask=NARROW, num_evaluations=5, population_size=4)
    carry_out(search, evaluate)
    found = np.concatenate(seen)
    np.testing.assert_array_equal(found, search.choices)
    assert len(found) == len(np.unique(found, axis=0)) == 5
    assert categorical.within(NARROW, found).all()


def test_a_small_space_is_exhausted() -> None:
    search = make_search(mask=NARROW, num_evaluations=100, population_size=4)
    carry_out(search, lambda c: np.stack([c.sum(axis=1), c[:, 2]], axis=1))
    assert len(search.choices) == 2 * 1 * 3
    assert search.done


def test_the_first_generation_goes_from_small_to_large() -> None:
    search = make_search(num_evaluations=24)
    born = generation(search, additive(0))
    assert born[:2].tolist() == [[0] * NUM, [SIZE - 1] * NUM]
    sizes = born[2:].sum(axis=1)
    assert np.corrcoef(np.arange(len(sizes)), sizes)[0, 1] > 0.7
    assert search.done
    assert len(search.ask()) == 0


def test_what_is_to_come_first_does() -> None:
    first = np.array([[1, 2, 3, 0, 1], [1, 2, 3, 0, 1], [3, 0, 3, 0, 3]])
    born = generation(make_search(first=first), additive(0))
    assert born[:2].tolist() == [[1, 2, 3, 0, 1], [3, 0, 3, 0, 3]]
    with pytest.raises(ValueError, match="outside the mask"):
        make_search(mask=NARROW, first=np.array([[1, 1, 0]]))


def test_what_nobody_can_afford_is_not_evaluated() -> None:
    first = np.full((1, NUM), SIZE - 1)
    search = make_search(affordable=lambda c: c.sum(axis=1) <= 4, num_evaluations=100, first=first)
    carry_out(search, additive(0))
    assert search.choices[0].sum() == 15  # what was asked for, whatever it costs
    assert search.choices[1:].sum(axis=1).max() <= 4
    assert len(search.choices) > 80  # of the 120 that can be afforded


def state_of(search: MultiObjectiveSearch) -> str:
    return json.dumps(search.state_dict(), allow_nan=False)


def test_a_stored_search_continues_bit_by_bit() -> None:
    evaluate, whole = additive(3), make_search(3)
    states = [state_of(whole)]
    while len(generation(whole, evaluate)):
        states.append(state_of(whole))
    states.append(state_of(whole))
    for state in states[:3]:
        resumed = make_search(99)  # the seed is of no account once a state is loaded
        resumed.load_state_dict(json.loads(state))
        carry_out(resumed, evaluate)
        assert state_of(resumed) == states[-1]


def test_what_was_asked_for_stays_until_it_is_told() -> None:
    evaluate, search, other = additive(3), make_search(3), make_search(99)
    generation(search, evaluate)
    asked = search.ask()
    other.load_state_dict(json.loads(state_of(search)))
    for one in (search, other):
        np.testing.assert_array_equal(one.ask(), asked)
        one.tell(evaluate(asked))
    assert state_of(search) == state_of(other)
    assert len(search.choices) == 48
    with pytest.raises(ValueError, match="nothing was asked for"):
        search.tell(evaluate(asked))


def test_one_affordable_architecture_is_enough() -> None:
    search = make_search(affordable=lambda c: (c == 0).all(axis=1))
    carry_out(search, additive(0))
    assert search.choices.tolist() == [[0] * NUM]
    assert non_dominated(search.values).tolist() == [0]


def test_a_state_of_another_space_is_refused() -> None:
    search = make_search()
    generation(search, additive(0))
    with pytest.raises(ValueError, match="outside the mask"):
        make_search(mask=FULL & (np.arange(SIZE) < 2)).load_state_dict(search.state_dict())


def test_the_seed_alone_decides_and_global_generators_are_left_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    found = [make_search(seed) for seed in (5, 5, 6)]
    for search in found:
        carry_out(search, additive(0))
        torch.rand(1, generator=torch.Generator())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert found[0].choices.tobytes() == found[1].choices.tobytes()
    assert found[0].choices.tobytes() != found[2].choices.tobytes()


def test_a_mutation_changes_one_decision_on_average_and_keeps_to_the_mask() -> None:
    rng = np.random.default_rng(0)
    parents = np.tile([2, 1, 3], (6000, 1))
    children = mutated(parents, NARROW, rng)
    assert categorical.within(NARROW, children).all()
    changed = (children != parents).mean(axis=0)
    np.testing.assert_allclose(changed, [0.5, 0.0, 0.5], atol=0.03)  # two decisions have a choice
    others = children[children[:, 2] != 3, 2]
    assert np.mean(others == 0) == pytest.approx(0.5, abs=0.05)  # 0 or 2, alike; 1 is forbidden


def test_equal_values_do_not_dominate_each_other() -> None:
    values = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    assert non_dominated(values).tolist() == [0, 1, 2]
    assert non_dominated(values[:0]).tolist() == []


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of finite numbers"):
        generation(make_search(), lambda c: np.full((len(c), 2), np.nan))
    with pytest.raises(ValueError, match="rows of finite numbers"):
        generation(make_search(), lambda c: np.zeros((1, 2)))


COST = CostTable(tuple(Factor((d,), (d + 1.0) * np.arange(1.0, 5.0)) for d in range(NUM)))
SIZE_COST = CostTable(tuple(Factor((d,), (5.0 - d) * np.arange(1.0, 5.0) ** 2) for d in range(NUM)))


def test_a_profile_reads_its_feasible_front_from_the_archive() -> None:
    rng = np.random.default_rng(0)
    choices = ALL[rng.permutation(len(ALL))[:200]]
    losses = rng.random(200) - 0.01 * COST.of(choices)
    mask = FULL.copy()
    mask[0, 2] = False
    objective = Objective(tables={"params": COST, "flops": SIZE_COST}, caps={"params": 40.0})
    front = front_of(
        choices=choices, losses=losses, objective=objective, mask=mask, metrics=("params", "flops")
    )
    allowed = [i for i in range(200) if choices[i, 0] != 2 and COST.of(choices[i : i + 1])[0] <= 40.0]
    values = np.stack([COST.of(choices), SIZE_COST.of(choices), losses], axis=1)
    expected = {i for i in allowed if not dominated(values[i], values[allowed])}
    assert set(front.tolist()) == expected
    assert len(expected) < len(allowed) < 200
    assert (np.diff(losses[front]) >= 0.0).all()


def test_a_profile_without_a_feasible_architecture_has_an_empty_front() -> None:
    objective = Objective(tables={"params": COST}, caps={"params": 1.0})
    front = front_of(
        choices=ALL, losses=np.zeros(len(ALL)), objective=objective, mask=FULL, metrics=("params",)
    )
    assert front.tolist() == []


def test_the_cost_of_several_devices_is_relative_to_a_random_network() -> None:
    cost = relative_cost([COST, SIZE_COST, COST], FULL)  # a table that two devices share counts once
    expected = 0.5 * (COST.of(ALL) / COST.of(ALL).mean() + SIZE_COST.of(ALL) / SIZE_COST.of(ALL).mean())
    np.testing.assert_allclose(cost(ALL), expected, rtol=1e-12)


def test_importing_the_module_does_not_import_pymoo() -> None:
    code = "import sys; import nasdeploy.searchers.evolution; sys.exit('pymoo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
