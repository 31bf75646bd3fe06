"""Proofs that caps exclude each other, where costs depend on derived values: against enumeration."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from nasdeploy.costs.joint_caps import JointCaps
from nasdeploy.costs.table import CostTable, Factor, tabulate
from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import LayerSpec
from nasdeploy.spaces.cell import CellConfig, cell_space

# Two nodes in each normal cell, so that many decisions stand behind one derived value; no reduction cell.
CELLS = cell_space((1, 16, 16), 3, CellConfig(channels=(8, 16), cells=("normal", "normal"), num_nodes=2))
MASK = CELLS.full_mask()
OWN = [d for d, decision in enumerate(CELLS.decisions) if not decision.name.startswith("reduction")]
CHOICES = np.array(list(product(*(range(len(CELLS.decisions[d].candidates)) for d in OWN))))
ALL = np.zeros((len(CHOICES), len(CELLS.decisions)), dtype=np.int64)
ALL[:, OWN] = CHOICES


def random_tables(rng: np.random.Generator) -> dict[str, CostTable]:
    def price(_: LayerSpec) -> float:
        return float(rng.integers(1, 1000))

    return {metric: tabulate(CELLS, price) for metric in ("params", "latency")}


@pytest.mark.parametrize("seed", [27, 44, 59])
def test_what_enumeration_finds_is_never_proven_away(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = random_tables(rng)
    costs = {metric: table.of(ALL) for metric, table in tables.items()}
    share = rng.uniform(0.02, 0.3)
    caps = {m: float(np.floor(c.min() + share * (c.max() - c.min()))) for m, c in costs.items()}
    least = float(sum(np.maximum(costs[m] / caps[m] - 1.0, 0.0) for m in tables).min())
    found = JointCaps(tables, caps, MASK).nearest()
    assert found.bound <= least + 1e-9
    assert not (found.proven and least == 0.0)
    assert found.violation == pytest.approx(least, abs=1e-9)


def test_decisions_behind_a_derived_value_count_where_no_table_holds_them() -> None:
    space = cell_space(
        (1, 16, 16), 3, CellConfig(channels=(8, 16), cells=("normal", "reduction", "normal"), num_nodes=1)
    )
    ends = len(
        space.decisions
    )  # "normal.ends": node 0 reads both inputs, "previous" twice, or "before" twice
    made = tabulate(space, lambda _: 1.0)
    tables = {
        "params": replace(made, factors=(Factor((ends,), np.array([3.0, 0.0, 1.9, 9.0])),)),
        "flops": replace(made, factors=(Factor((ends,), np.array([0.0, 3.0, 1.9, 9.0])),)),
    }
    assert JointCaps(tables, {"params": 2.0, "flops": 2.0}, space.full_mask()).nearest().feasible


def test_a_slot_that_depends_on_no_decision_there_is_is_refused() -> None:
    slots = (*CELLS.slots[:-1], replace(CELLS.slots[-1], decisions=(99, 40)))
    with pytest.raises(
        ConfigError, match=r"slot 'classifier' depends on number 99; expected numbers from 0 to"
    ):
        replace(CELLS, slots=slots)
