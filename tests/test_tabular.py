"""The tabular benchmark, its committed table, and the quality of the search on it."""

from __future__ import annotations

import importlib
import statistics
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.errors import ConfigError
from nasdeploy.optim.objective import Objective

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # the benchmarks are scripts, not a package
arms = importlib.import_module("tabular_arms")
ofa = importlib.import_module("tabular_ofa")
problems = importlib.import_module("tabular_problems")
report = importlib.import_module("tabular_report")
rivals = importlib.import_module("tabular_rivals")

ALL_ARMS = {**arms.OWN_ARMS, "regularised evolution": rivals.regularised_evolution}
BEST = np.array([[int(digit) for digit in arch] for arch in ("22212220", "22212202")])
MOST_REGRET = 0.25
"""Of the default arm on NAS-Bench-Macro with 240 evaluations, mean of three seeds; random search: 0.47."""


@pytest.fixture(scope="module")
def macro():
    return problems.nasbench_macro()


@pytest.fixture(scope="module")
def capped():
    """A small table with two costs, whose tightest caps only a few of 243 architectures meet."""
    choices = np.array(list(product(range(3), repeat=5)))
    rng = np.random.default_rng(2)
    effects = np.sort(rng.normal(size=(5, 3)), axis=1)[:, ::-1]  # what costs more is better
    losses = effects[np.arange(5), choices].sum(axis=1)
    costs = {
        "ms": choices @ np.array([1.0, 2.0, 3.0, 4.0, 5.0]) + 1.0,
        "kb": choices @ np.array([5.0, 4.0, 3.0, 2.0, 1.0]) + 1.0,
    }
    table = problems.Table("toy", choices, costs)
    tables = {name: table.cost(name) for name in costs}
    budgets = {
        f"{cap}": Objective(tables=tables, caps={"ms": cap, "kb": 1.2 * cap}) for cap in (3.5, 8.0, 14.0)
    }
    return table.problem("toy", losses=losses, budgets=budgets)


def test_the_committed_table_is_nas_bench_macro(macro):
    choices = np.array(list(product(range(3), repeat=8)))
    accuracies = 100.0 - macro.losses(choices)
    assert len(choices) == 6561
    assert accuracies.max() == pytest.approx(93.1267, abs=5e-5)
    assert 100.0 - macro.losses(BEST) == pytest.approx(accuracies.max())
    flops = macro.objectives[0].tables["flops"].of(choices)
    assert (flops.min(), flops.max()) == pytest.approx((0.0, 10.0))
    assert [o.coefficients["flops"] for o in macro.objectives] == [0.02, 0.1, 0.2, 0.35, 0.6, 1.0]


def test_the_licence_lies_beside_the_table():
    text = (problems.NASBENCH_MACRO.parent / "LICENSE.nasbench_macro").read_text()
    assert "61a2bfc2ca0dce04d0997e6cf498047c27d6acf2" in text
    assert "Copyright 2021 Xiu Su" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text


def test_regret_is_zero_for_the_optimum_and_positive_elsewhere(macro):
    choices = np.array(list(product(range(3), repeat=8)))
    for k, objective in enumerate(macro.objectives):
        values = macro.losses(choices) + objective.penalty(choices)
        answers = np.tile(choices[values.argmin()], (6, 1))
        regrets, violated = macro.regrets(answers)
        assert regrets[k] == pytest.approx(0.0, abs=1e-12)
        assert (regrets >= -1e-12).all()
        assert not violated.any()
    assert (macro.regrets(np.zeros((6, 8), dtype=np.int64))[0] > 1.0).all()


def test_an_observation_is_a_recorded_run_and_noise_the_same_for_all_who_ask(macro):
    repeated = np.tile(BEST[:1], (4000, 1))
    shown = macro.observe(repeated, np.arange(4000), 3)
    recorded = problems.read_csv(problems.NASBENCH_MACRO)
    row = list(recorded["arch"]).index("22212220")
    runs = np.array([100.0 - float(recorded[f"acc{run}"][row]) for run in range(3)])
    assert shown.mean() == pytest.approx(runs.mean(), abs=0.04)
    assert shown.std() == pytest.approx(np.sqrt(0.25 + runs.var()), rel=0.05)
    assert macro.observe(BEST[::-1], np.zeros(2), 3)[1] == shown[0]  # in whatever order
    assert macro.observe(BEST[:1], np.zeros(1), 4)[0] != shown[0]  # another seed


@pytest.mark.parametrize("name", ALL_ARMS)
def test_arms_use_what_they_may_and_answer_within_every_cap(name, capped):
    answer = arms.run(ALL_ARMS[name], capped, total=40, seed=0)
    assert answer.num_evaluations == 40
    assert answer.choices.shape == (3, 5)
    regrets, violated = capped.regrets(answer.choices)
    assert not violated.any()
    assert (regrets >= 0.0).all()


@pytest.mark.parametrize("name", ALL_ARMS)
def test_runs_repeat_by_seed_and_differ_between_seeds(name, macro):
    first, again, other = (arms.run(ALL_ARMS[name], macro, total=28, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.choices, again.choices)
    assert not np.array_equal(first.choices, other.choices)


def test_the_observer_refuses_one_evaluation_too_many(capped):
    observer = arms.Observer(capped, total=3, seed=0)
    observer.evaluate(np.zeros((2, 5), dtype=np.int64))
    with pytest.raises(ValueError, match="1 of 3 are left"):
        observer.evaluate(np.zeros((2, 5), dtype=np.int64))
    assert observer.left == 1


def test_archive_answers_by_the_mean_of_what_was_observed(macro):
    observer = arms.Observer(macro, total=4, seed=0)
    observer.choices = np.array([BEST[0], BEST[1], BEST[0], np.zeros(8, dtype=np.int64)])
    observer.losses = np.array([1.0, 3.0, 6.0, 90.0])  # 3.5 on the mean against 3.0
    judged = observer.judge.judge(observer.choices)
    observer.penalty, observer.violation = judged.penalty, judged.violation
    assert np.array_equal(arms.best_observed(observer)[0], BEST[1])


def test_without_a_feasible_observation_the_fallback_answers(capped):
    observer = arms.Observer(capped, total=1, seed=0)
    observer.evaluate(np.full((1, 5), 2))
    assert np.array_equal(arms.best_observed(observer), capped.fallback)
    assert not capped.regrets(capped.fallback)[1].any()


def test_an_answer_that_breaks_its_cap_is_counted_and_worth_the_fallback(capped):
    regrets, violated = capped.regrets(np.full((3, 5), 2))
    assert violated.tolist() == [1, 1, 1]
    assert regrets == pytest.approx(capped.regrets(capped.fallback)[0])


def test_any_table_is_read_from_csv_and_npz(tmp_path):
    rows = [(a, b, 10 + 10 * i, 50 + a + b) for i, a in enumerate((3, 5, 7)) for b in (1, 2)]
    text = "kernel,width,ms,top1\n" + "\n".join(",".join(map(str, row)) for row in rows)
    (tmp_path / "t.csv").write_text(text)
    np.savez(
        tmp_path / "t.npz", **dict(zip(("kernel", "width", "ms", "top1"), np.array(rows).T, strict=True))
    )
    for name in ("t.csv", "t.npz"):
        problem = problems.any_table(
            tmp_path / name, decisions=("kernel", "width"), loss="-top1", costs=("ms",)
        )
        assert problem.num_candidates == (3, 2)
        assert problem.budgets == ("ms 20 %", "ms 40 %", "ms 60 %")
        assert problem.optimum.tolist() == [-55.0, -57.0, -57.0]


def test_a_table_with_a_missing_combination_or_column_is_refused_in_one_line(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,loss,ms\n0,0,1,1\n0,1,1,1\n1,0,1,1\n")
    with pytest.raises(ConfigError, match="3 rows, 3 of them distinct; expected each of the 4 combinations"):
        problems.any_table(tmp_path / "t.csv", decisions=("a", "b"), loss="loss", costs=("ms",))
    with pytest.raises(ConfigError, match="no column 'kb'; expected one of a, b, loss, ms"):
        problems.any_table(tmp_path / "t.csv", decisions=("a", "b"), loss="loss", costs=("kb",))


def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path):
    for text in ("", "a,b\n", "a,b\n0,1\n0\n"):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ConfigError, match=r"t\.csv: not a table; expected a CSV file with a header"):
            problems.any_table(tmp_path / "t.csv", decisions=("a",), loss="b", costs=("b",))


def lookup():
    """Return a latency table: 1 ms per layer outside the blocks, 0.01 ms times kernel and expansion in them."""
    means = dict.fromkeys(ofa.FIXED_LAYERS, 1.0)
    for unit, block, kernel, expansion in product(range(5), range(4), ofa.KERNELS, ofa.EXPANSIONS):
        means[ofa.block_key(unit, block, kernel, expansion)] = 0.01 * kernel * expansion
    return means


def test_blocks_that_lack_cost_nothing_and_are_encoded_as_zeros():
    table = ofa.latency_table(lookup())
    small = np.zeros((1, 45), dtype=np.int64)
    assert table.of(small) == pytest.approx(6 + 10 * 0.09)  # five units of two blocks, kernel 3, expansion 3
    assert table.of(small + 2) == pytest.approx(6 + 20 * 0.42)
    unused = small.copy()
    unused[0, ofa.block_decisions(0, 3)] = 2
    assert table.of(unused) == table.of(small)
    assert np.array_equal(ofa.features(unused), ofa.features(small))
    assert np.array_equal(ofa.canonical(unused), small)
    encoded = ofa.features(small)[0]
    assert encoded.sum() == 10 + 10 + 1
    assert np.flatnonzero(encoded[:12]).tolist() == [0, 3]  # kernel 3 in both blocks of the first unit
    assert encoded[127] == 1.0  # resolution 224
    assert np.flatnonzero(ofa.features(small + 2)[0, 60:72]).tolist() == [2, 5, 8, 11]


def test_the_long_search_finds_the_best_under_a_cap_of_an_additive_loss():
    cost = CostTable(tuple(Factor((d,), np.arange(3.0)) for d in range(45)), 1.0)
    objective = Objective(tables={"ms": cost}, caps={"ms": 31.0})
    doubled = list(ofa.block_decisions(0, 0))

    def losses(choices):
        return -choices[:, doubled].sum(axis=1) - choices.sum(axis=1)

    start = np.zeros(45, dtype=np.int64)
    found = ofa.long_search(objective, losses, start, known=start[None], rounds=15, restarts=2)
    assert losses(found[:1])[0] == -34.0  # 30 units of cost, four of them where they count twice
    assert objective.feasible(found).all()


def test_a_better_answer_than_the_reference_moves_it():
    lines = [
        {"arm": arm, "total": 10, "seed": seed, "regrets": {"k": regret}, "violated": [], "seconds": 0.0}
        for arm, seed, regret in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, -0.25), ("b", 1, 0.15))
    ]
    runs = report.Runs(lines)
    assert [runs.mean_regret(line) for line in lines] == pytest.approx([0.75, 0.95, 0.0, 0.4])
    table = report.comparison(runs, default="b")
    assert "0.850 +0.6500" in table  # a: its mean, and its mean of paired differences
    assert "0 of 2" in table


def test_the_figure_is_an_svg_with_a_panel_for_each_budget(tmp_path):
    lines = [
        {
            "arm": "a",
            "total": total,
            "seed": 0,
            "regrets": {"k1": 1.0, "k2": 2.0},
            "violated": [],
            "seconds": 0.0,
        }
        for total in (10, 20)
    ]
    report.write_figure(report.Runs(lines), tmp_path / "f.svg", title="toy", default="a")
    text = (tmp_path / "f.svg").read_text()
    assert all(name in text for name in ("mean of all budgets", "k1", "k2", "toy", "mean regret"))


def test_the_default_arm_holds_its_quality_on_nas_bench_macro(macro):
    def mean_regret(name):
        return statistics.fmean(
            macro.regrets(arms.run(ALL_ARMS[name], macro, total=240, seed=seed).choices)[0].mean()
            for seed in range(3)
        )

    ours = mean_regret(arms.DEFAULT_ARM)
    assert ours < mean_regret("random search")
    assert ours < MOST_REGRET
