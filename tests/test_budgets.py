"""Budgets: shares of a space's range in numbers, soft weights, and what is said where a cap cannot be met."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from nasdeploy.costs.budgets import (
    Feasibility,
    Limits,
    can_be_met,
    feasibility,
    require_feasible,
    resolve_limits,
)
from nasdeploy.costs.sampled import SampledCost
from nasdeploy.costs.table import Cost, CostTable, Factor, tabulate
from nasdeploy.errors import InfeasibleError
from nasdeploy.profiles import HardwareProfile
from nasdeploy.spaces import SearchSpace, make_space

SPACE = make_space("mobile", (1, 28, 28), 10)


def make_profile(channel_multiple: int = 8, **budget: dict[str, Any]) -> HardwareProfile:
    """Return a profile called "device"."""
    runtime = {"channel_multiple": channel_multiple}
    return HardwareProfile.from_dict({"name": "device", "runtime": runtime, "budget": budget})


def width_table(space: SearchSpace = SPACE, constant: float = 0.0) -> CostTable:
    """Return a cost that counts the output channels of every layer."""
    return tabulate(space, lambda spec: spec.out_channels, constant)


# stem, first blocks of three stages, head, classifier; and all of the largest network
SMALLEST = 8 + (8 + 16 + 32) + 64 + 10
LARGEST = 24 + (2 * 24 + 3 * 48 + 3 * 96) + 192 + 10


def line_table(values: list[float], decision: int = 0, constant: float = 0.0) -> CostTable:
    """Return a cost that depends on one decision only."""
    return CostTable((Factor((decision,), np.array(values)),), constant)


def check(tables: Mapping[str, Cost], **budget: dict[str, Any]) -> Feasibility:
    """Return the feasibility of a budget."""
    return feasibility(make_profile(**budget), SPACE, tables)


@pytest.mark.parametrize("percent", ["0%", "12.5%", "40%", "100%"])
def test_a_share_lies_between_the_smallest_and_the_largest_network(percent: str) -> None:
    limits = resolve_limits(make_profile(params={"max": percent}), SPACE, {"params": width_table()})
    share = float(percent.rstrip("%")) / 100
    assert limits.caps == {"params": pytest.approx(SMALLEST + share * (LARGEST - SMALLEST), rel=1e-12)}
    assert limits.coefficients == limits.references == {}


def test_a_share_is_of_the_networks_that_the_device_may_use() -> None:
    profile = make_profile(16, params={"max": "50%"})
    smallest = 16 + (16 + 16 + 32) + 64 + 10  # without widths 8 and 24
    largest = 16 + (2 * 16 + 3 * 48 + 3 * 96) + 192 + 10
    caps = resolve_limits(profile, SPACE, {"params": width_table()}).caps
    assert caps["params"] == (smallest + largest) / 2


def test_a_quantity_is_taken_as_it_is() -> None:
    profile = make_profile(params={"max": "1.5k"}, latency={"max": "800us"}, file_size={"max": "1KiB"})
    limits = resolve_limits(profile, SPACE, dict.fromkeys(("params", "latency", "file_size"), width_table()))
    assert limits.caps == {"params": 1500.0, "latency": pytest.approx(0.8), "file_size": 1024.0}


def test_a_weight_is_relative_to_the_largest_network_unless_said_otherwise() -> None:
    tables = dict.fromkeys(("params", "flops", "latency"), width_table())
    profile = make_profile(
        params={"coefficient": 0.3},
        flops={"coefficient": 0.2, "reference": "50%"},
        latency={"coefficient": 0.1, "reference": "15ms"},
    )
    limits = resolve_limits(profile, SPACE, tables)
    assert limits.coefficients == {"params": 0.3, "flops": 0.2, "latency": 0.1}
    assert limits.references == {"params": LARGEST, "flops": (SMALLEST + LARGEST) / 2, "latency": 15.0}
    assert limits.caps == {}


def test_a_weight_of_zero_weighs_nothing() -> None:
    profile = make_profile(params={"max": "50%", "coefficient": 0.0})
    limits = resolve_limits(profile, SPACE, {"params": width_table()})
    assert limits.coefficients == {}
    assert "params" in limits.caps


def test_a_metric_without_a_table_is_left_out() -> None:
    profile = make_profile(latency={"max": "1us", "coefficient": 1.0}, params={"max": "50%"})
    tables = {"params": width_table()}
    assert resolve_limits(profile, SPACE, tables) == Limits(
        caps={"params": (SMALLEST + LARGEST) / 2}, coefficients={}, references={}
    )
    found = feasibility(profile, SPACE, tables)
    assert found.feasible
    assert [row.metric for row in found.rows] == ["params"]


def test_rows_show_the_range_of_the_space_in_a_fixed_order() -> None:
    tables = {"latency": width_table(), "flops": width_table(constant=5.0), "params": width_table()}
    rows = check(tables, params={"max": "40%", "coefficient": 0.5}).rows
    assert [row.metric for row in rows] == ["params", "flops", "latency"]
    assert (rows[0].smallest, rows[0].largest) == (SMALLEST, LARGEST)
    assert (rows[1].smallest, rows[1].cap, rows[1].satisfiable) == (SMALLEST + 5.0, None, True)
    assert (rows[0].coefficient, rows[1].coefficient) == (0.5, None)
    assert rows[0].smallest < rows[0].median < rows[0].largest


def test_the_median_is_that_of_random_networks() -> None:
    table = line_table([1.0, 2.0, 30.0])  # three candidates, equally likely
    (row,) = check({"params": table}, params={"max": "100%"}).rows
    assert (row.smallest, row.median, row.largest) == (1.0, 2.0, 30.0)


def test_the_cheapest_network_is_within_a_cap_of_its_own_cost() -> None:
    tables = {"params": width_table()}
    assert check(tables, params={"max": SMALLEST}).feasible
    assert check(tables, params={"max": "0%"}).feasible
    found = check(tables, params={"max": SMALLEST - 1})
    assert not found.feasible
    assert (found.rows[0].satisfiable, found.rows[0].nearest) == (False, SMALLEST)


def test_the_message_names_metric_cap_and_nearest_cap() -> None:
    found = check({"params": width_table()}, params={"max": "100"})
    assert "device: budget.params.max = 100 is below the cheapest network" in found.message
    assert f"the nearest cap that can be met is {SMALLEST}" in found.message
    with pytest.raises(InfeasibleError) as refused:
        require_feasible(found)
    assert str(refused.value) == found.message
    assert refused.value.exit_code == 3


def test_every_cap_that_cannot_be_met_is_named() -> None:
    tables = {"params": width_table(), "latency": width_table(constant=1.0), "flops": width_table()}
    message = check(tables, params={"max": 3}, latency={"max": "2ms"}, flops={"max": "50%"}).message
    assert "budget.params.max = 3 " in message
    assert "budget.latency.max = 2ms " in message
    assert "flops" not in message
    assert "\n" not in message


def test_a_feasible_budget_is_no_error() -> None:
    found = check({"params": width_table()}, params={"max": "30%"})
    require_feasible(found)
    assert found.message == "device: every cap can be met"
    assert found.rows[0].nearest is None


def test_the_cheapest_network_need_not_be_the_smallest() -> None:
    # a latency: the widest stem is the fastest here, so 0 % is not the least
    found = check({"latency": line_table([3.0, 2.0, 1.0])}, latency={"max": "0.5ms"})
    assert (found.rows[0].smallest, found.rows[0].nearest) == (3.0, 1.0)
    assert check({"latency": line_table([3.0, 2.0, 1.0])}, latency={"max": "1ms"}).feasible


def test_caps_that_exclude_one_another_are_told_apart_from_caps_that_are_too_low() -> None:
    tables = {"params": line_table([1.0, 2.0, 3.0]), "latency": line_table([3.0, 2.0, 1.0])}
    found = check(tables, params={"max": 1}, latency={"max": "1ms"})
    assert all(row.satisfiable for row in found.rows)
    assert not found.feasible
    assert "each cap can be met alone" in found.message
    assert check(tables, params={"max": 2}, latency={"max": "2ms"}).feasible


def test_the_cap_that_the_message_names_can_be_met() -> None:
    # 12344 is shown with four digits
    tables = {"params": width_table(constant=12_344.0 - SMALLEST)}
    message = check(tables, params={"max": 100}).message
    nearest = re.search(r"can be met is ([0-9.]+[kMG]?)", message)
    assert nearest is not None
    assert check(tables, params={"max": nearest[1]}).feasible, message


def test_the_exact_least_cost_is_a_cap_that_can_be_met() -> None:
    # every decision has its cheapest candidate in the middle: neither end of the space, and rarely drawn
    tables = {
        "latency": CostTable(
            tuple(
                Factor((d,), np.abs(np.arange(count) - 1.0) + 1.0)
                for d, count in enumerate(SPACE.num_candidates())
            )
        )
    }
    least = float(len(SPACE.decisions))
    assert check(tables, latency={"max": f"{least}ms"}).rows[0].satisfiable
    assert check(tables, latency={"max": f"{least}ms"}).feasible


def opposed() -> dict[str, CostTable]:
    """Return two costs of which one falls where the other rises."""
    rising = tuple(Factor((d,), np.arange(float(count))) for d, count in enumerate(SPACE.num_candidates()))
    falling = tuple(Factor(f.decisions, f.values[::-1].copy()) for f in rising)
    return {"params": CostTable(rising, 1.0), "flops": CostTable(falling, 1.0)}


def test_caps_that_cannot_be_met_together_name_the_nearest_network() -> None:
    tables = opposed()
    total = sum(SPACE.num_candidates()) - len(SPACE.decisions) + 2  # of both costs, whatever is chosen
    found = check(tables, params={"max": 12}, flops={"max": 20})
    assert all(row.satisfiable for row in found.rows)
    assert not found.feasible
    # the smaller violation is on the larger cap
    assert found.message == (
        "device: each cap can be met alone, but it is proven that no network meets all; the nearest has params 12 "
        f"(max 12), flops {total - 12} (max 20); the least of one within all other caps: params {total - 20}, "
        f"flops {total - 12}"
    )
    assert {row.metric: row.nearest for row in found.rows} == {"params": total - 20, "flops": total - 12}
    assert check(tables, params={"max": total - 20}, flops={"max": 20}).feasible
    with pytest.raises(InfeasibleError, match="each cap can be met alone"):
        require_feasible(found)


def test_caps_that_only_one_network_in_millions_meets_can_be_met() -> None:
    counts = SPACE.num_candidates()
    costs = {"params": [0.0, 1.0, 4.0, 4.0, 4.0], "flops": [4.0, 1.0, 0.0, 0.0, 0.0]}
    tables = {
        metric: CostTable(tuple(Factor((d,), np.array(row[:count])) for d, count in enumerate(counts)))
        for metric, row in costs.items()
    }
    caps = {metric: {"max": len(counts)} for metric in tables}
    assert check(tables, **caps).feasible
    assert not check(tables, params=caps["params"], flops={"max": len(counts) - 1}).feasible
    profile = make_profile(**caps)
    absolute = {metric: float(len(counts)) for metric in tables}
    assert can_be_met(absolute, profile, SPACE, tables)
    assert not can_be_met({**absolute, "flops": len(counts) - 1.0}, profile, SPACE, tables)


def test_joint_caps_are_those_of_the_networks_that_the_device_may_use() -> None:
    last = len(SPACE.decisions) - 1
    stem = Factor((0,), np.array([0.0, 1.0, 2.0]))  # 8, 16, 24 channels
    head = np.array([0.0, 1.0, 2.0])
    tables = {
        "params": CostTable((stem, Factor((last,), head))),
        "latency": CostTable((stem, Factor((last,), head[::-1].copy()))),
    }
    caps = {"params": {"max": 1}, "latency": {"max": "1ms"}}
    any_width, multiples_of_16 = (feasibility(make_profile(m, **caps), SPACE, tables) for m in (8, 16))
    assert any_width.feasible
    assert all(row.satisfiable for row in multiples_of_16.rows)
    assert not multiples_of_16.feasible
    assert {row.nearest for row in multiples_of_16.rows} == {3.0}


def test_what_no_table_holds_is_found_or_not_found_never_proven() -> None:
    tables: dict[str, Cost] = dict(opposed())
    costs = {**tables, "flops": SampledCost(tables["flops"].of, SPACE.num_candidates())}
    budget = {"params": {"max": 12}, "flops": {"max": 20}}
    exact, sampled = check(tables, **budget), check(costs, **budget)
    assert "no network was found that meets all; the nearest has" in sampled.message
    assert sampled.message == exact.message.replace(
        "it is proven that no network meets all", "no network was found that meets all"
    )
    alone = check(costs, flops={"max": 0.5})
    assert (
        "is below the cheapest network that was found; the nearest cap that can be met is 1" in alone.message
    )
    assert check(costs, params={"max": 20}, flops={"max": 30}).feasible


def test_a_share_reaches_from_the_smallest_to_the_largest_resolution() -> None:
    space = make_space("mobile", (1, 64, 64), 10, (48, 64))
    pixels = tabulate(space, lambda spec: spec.size**2)
    tables = {"flops": pixels}
    ends = [float(pixels.of(np.array([a.choices]))[0]) for a in (space.smallest(), space.largest())]
    caps = [
        resolve_limits(make_profile(flops={"max": share}), space, tables).caps["flops"]
        for share in ("0%", "100%")
    ]
    assert caps == ends
    assert ends[0] == 48**2 + 24**2 + 12**2 + 6**2 + 3**2 * 2  # stem, three first blocks, head, classifier
    found = feasibility(make_profile(flops={"max": "0%"}), space, tables)
    assert found.feasible
    (row,) = found.rows
    assert row.smallest < row.median < row.largest == ends[1]


def test_caps_that_only_a_lower_resolution_keeps_can_be_met() -> None:
    space = make_space("mobile", (1, 64, 64), 10, (48, 64))
    tables = {"flops": tabulate(space, lambda spec: spec.size**2), "params": width_table(space)}
    smallest_at_64 = float(tables["flops"].of(np.array([(1, *space.smallest().choices[1:])]))[0])
    budget = {"flops": {"max": round(smallest_at_64) - 1}}
    assert feasibility(make_profile(**budget), space, tables).feasible
    only_64 = make_space("mobile", (1, 64, 64), 10)
    alone = {"flops": tabulate(only_64, lambda spec: spec.size**2), "params": width_table(only_64)}
    assert not feasibility(make_profile(**budget), only_64, alone).feasible
    at_most = feasibility(make_profile(flops={"max": 1}), space, tables)
    assert (at_most.feasible, at_most.rows[1].nearest) == (False, at_most.rows[1].smallest)
