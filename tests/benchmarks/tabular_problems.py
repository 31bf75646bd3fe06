"""Search problems with known answers: tables of architectures with a loss and costs, and budgets on them.

Shapes as in :mod:`nasdeploy.optim`: n architectures, N rows of a table, D decisions, K budgets.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.table import CostTable, Factor, FloatArray, IntArray
from nasdeploy.errors import ConfigError
from nasdeploy.optim.objective import Judge, Objective

NASBENCH_MACRO = Path(__file__).parent.parent / "data" / "nasbench_macro.csv.gz"
MACRO_COEFFICIENTS = (0.02, 0.1, 0.2, 0.35, 0.6, 1.0)
MACRO_RANGE = 10.0
"""FLOPs are scaled to [0, 10]."""
MACRO_NOISE = 0.5
"""Standard deviation of what is added to a recorded run, in per cent: that of a short validation."""

QUANTILES = (0.2, 0.4, 0.6)
NB201_LOSSES = ("c10", "c100", "in16")
BATCH_TWINS = ("_32", "_256")
"""Columns of nb201.npz for the same device at another batch size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Losses to be found out, costs that are known, and what K budgets want.

    losses: choices (n, D) to their true mean losses (n,). observe: choices (n, D), how often each was observed
    before (n,) and the seed of the run to what an evaluation shows (n,): the same for every arm. optimum: the
    best f_k of each budget (K,); exact says whether it is known or only the best that a long search with the
    true losses found. fallback: a feasible architecture of each budget (K, D), known without any evaluation.
    """

    name: str
    num_candidates: tuple[int, ...]
    objectives: tuple[Objective, ...]
    budgets: tuple[str, ...]
    losses: Callable[[IntArray], FloatArray]
    observe: Callable[[IntArray, IntArray, int], FloatArray]
    optimum: FloatArray
    fallback: IntArray
    exact: bool = True
    noisy: bool = False

    def values(self, answers: IntArray) -> tuple[FloatArray, IntArray]:
        """Return f_k (K,) of one answer per budget (K, D), and which answers break a cap (K,) as 0 or 1.

        An answer that breaks a cap is worth what the fallback is worth: it could not be shipped.
        """
        judged = Judge(self.objectives).judge(answers)
        violated = (np.diagonal(judged.violation) > 0.0).astype(np.int64)
        shipped = np.where(violated[:, None] > 0, self.fallback, answers)
        penalty = np.diagonal(Judge(self.objectives).judge(shipped).penalty)
        return self.losses(shipped) + penalty, violated

    def regrets(self, answers: IntArray) -> tuple[FloatArray, IntArray]:
        """Return f_k minus its optimum (K,) for one answer per budget (K, D), and which break a cap (K,)."""
        values, violated = self.values(answers)
        return values - self.optimum, violated


class Table:
    """A complete table: one row for every combination of candidates, in any order of the file.

    choices: (N, D). columns: values (N,) by name. Raises ConfigError for a missing or double combination.
    """

    def __init__(self, name: str, choices: IntArray, columns: Mapping[str, FloatArray]) -> None:
        self.num_candidates = tuple(int(size) for size in choices.max(axis=0) + 1)
        place = np.ravel_multi_index(tuple(choices.T), self.num_candidates)
        expected = int(np.prod(self.num_candidates))
        if len(np.unique(place)) != expected or len(place) != expected:
            raise ConfigError(
                f"{name}: {len(place)} rows, {len(np.unique(place))} of them distinct; expected each of the "
                f"{expected} combinations of {self.num_candidates} candidates once"
            )
        order = np.argsort(place)
        self.choices: IntArray = choices[order]  # (N, D) lexicographic
        self.columns = {key: np.asarray(values, dtype=np.float64)[order] for key, values in columns.items()}

    def rows(self, choices: IntArray) -> IntArray:
        """Return the row (n,) of each of ``choices`` (n, D)."""
        rows: IntArray = np.ravel_multi_index(tuple(choices.T), self.num_candidates).astype(np.int64)
        return rows

    def cost(self, column: str) -> CostTable:
        """Return a column as one factor over all decisions."""
        values = self.columns[column].reshape(self.num_candidates)
        return CostTable((Factor(tuple(range(len(self.num_candidates))), values),))

    def problem(
        self,
        name: str,
        *,
        losses: FloatArray,
        budgets: Mapping[str, Objective],
        observe: Callable[[IntArray, IntArray, int], FloatArray] | None = None,
    ) -> Problem:
        """Return the problem of ``budgets`` on true ``losses`` (N,); observations are exact without ``observe``."""
        objectives = tuple(budgets.values())
        judged = Judge(objectives).judge(self.choices)
        values = np.where(judged.violation == 0.0, losses + judged.penalty, np.inf)  # (K, N)
        if not np.isfinite(values).any(axis=1).all():
            raise ConfigError(f"{name}: no architecture meets every budget's caps")
        fallback = np.array([self.choices[_cheapest(self, objective)] for objective in objectives])
        return Problem(
            name=name,
            num_candidates=self.num_candidates,
            objectives=objectives,
            budgets=tuple(budgets),
            losses=lambda choices: losses[self.rows(choices)],
            observe=observe or (lambda choices, visits, seed: losses[self.rows(choices)]),
            optimum=values.min(axis=1),
            fallback=fallback,
            noisy=observe is not None,
        )


def _cheapest(table: Table, objective: Objective) -> int:
    """Return the row with the least use of its tightest cap or, without caps, the least weighted cost."""
    use = [objective.tables[metric].of(table.choices) / cap for metric, cap in objective.caps.items()]
    return int(np.max(use or [objective.penalty(table.choices)], axis=0).argmin())


def nasbench_macro(path: Path = NASBENCH_MACRO) -> Problem:
    """Return NAS-Bench-Macro with six prices of FLOPs; an observation is a recorded run and noise."""
    columns = read_csv(path)
    choices = np.array([[int(digit) for digit in arch] for arch in columns["arch"]], dtype=np.int64)
    names = ("acc0", "acc1", "acc2")
    table = Table(str(path), choices, {key: numbers(path, key, columns[key]) for key in ("flops", *names)})
    runs = 100.0 - np.stack([table.columns[name] for name in names])  # (3, N)
    flops = table.columns["flops"]
    slope = MACRO_RANGE / float(np.ptp(flops))
    cost = table.cost("flops").scaled(-slope * float(flops.min()), slope)

    def observe(asked: IntArray, visits: IntArray, seed: int) -> FloatArray:
        return observed_runs(runs, table.rows(asked), visits, seed)

    budgets = {
        f"coefficient {weight}": Objective(
            tables={"flops": cost}, coefficients={"flops": weight}, references={"flops": 1.0}
        )
        for weight in MACRO_COEFFICIENTS
    }
    return table.problem("NAS-Bench-Macro", losses=runs.mean(axis=0), budgets=budgets, observe=observe)


def observed_runs(runs: FloatArray, rows: IntArray, visits: IntArray, seed: int) -> FloatArray:
    """Return one of the recorded ``runs`` (3, N) plus noise for each of ``rows`` (n,).

    It depends on the seed, the architecture and how often it was asked for before, and on nothing else: all
    arms of a seed see the same table, whichever order they ask in.
    """
    observed = np.empty(len(rows))
    for visit in np.unique(visits):
        rng = np.random.default_rng([seed, int(visit)])
        chosen = rng.integers(len(runs), size=runs.shape[1])
        noise = rng.normal(0.0, MACRO_NOISE, size=runs.shape[1])
        here = visits == visit
        observed[here] = runs[chosen[rows[here]], rows[here]] + noise[rows[here]]
    return observed


def nasbench_201(path: Path, *, data: str = "c10", devices: Sequence[str] | None = None) -> Problem:
    """Return NAS-Bench-201 with caps at the 20, 40 and 60 % quantiles of each device's latency.

    data: "c10", "c100" or "in16": 100 minus its validation accuracy after 200 epochs, without noise. devices:
    names of latency columns; all but those of other batch sizes by default.
    """
    if data not in NB201_LOSSES:
        raise ConfigError(f"--loss {data}; expected one of {', '.join(NB201_LOSSES)}")
    with np.load(path, allow_pickle=False) as file:
        known = [key.removeprefix("lat_ms_") for key in file.files if key.startswith("lat_ms_")]
        chosen = list(devices) if devices else [name for name in known if not name.endswith(BATCH_TWINS)]
        for name in chosen:
            if name not in known:
                raise ConfigError(f"--devices {name}: no such latency in {path}; expected {', '.join(known)}")
        columns = {name: file[f"lat_ms_{name}"].astype(np.float64) for name in chosen}
        accuracy = file[f"{data}_valid_200"].astype(np.float64)
        table = Table(str(path), file["ops"].astype(np.int64), {**columns, "accuracy": accuracy})
    return table.problem(
        f"NAS-Bench-201 {data}",
        losses=100.0 - table.columns["accuracy"],
        budgets=capped_budgets({name: table.cost(name) for name in chosen}, table),
    )


def capped_budgets(costs: Mapping[str, CostTable], table: Table) -> dict[str, Objective]:
    """Return one budget per cost and quantile: that cost at most its quantile over the table."""
    return {
        f"{name} {100 * quantile:.0f} %": Objective(
            tables=dict(costs), caps={name: float(np.quantile(table.columns[name], quantile))}
        )
        for name in costs
        for quantile in QUANTILES
    }


def any_table(path: Path, *, decisions: Sequence[str], loss: str, costs: Sequence[str]) -> Problem:
    """Return the problem of a CSV (also .gz) or NPZ file with one column per decision, cost and for the loss.

    Candidates are the distinct values of a decision's column, sorted. A loss with a minus before its name is
    an accuracy. Caps stand at the 20, 40 and 60 % quantiles of each cost. Raises ConfigError for a missing
    column or combination.
    """
    columns = read_npz(path) if path.suffix == ".npz" else read_csv(path)
    sign, loss = (-1.0, loss[1:]) if loss.startswith("-") else (1.0, loss)
    for name in (*decisions, loss, *costs):
        if name not in columns:
            raise ConfigError(f"{path}: no column '{name}'; expected one of {', '.join(columns)}")
    choices = np.stack([np.unique(columns[name], return_inverse=True)[1] for name in decisions], axis=1)
    table = Table(
        str(path),
        choices.astype(np.int64),
        {name: numbers(path, name, columns[name]) for name in (loss, *costs)},
    )
    return table.problem(
        path.stem,
        losses=sign * table.columns[loss],
        budgets=capped_budgets({name: table.cost(name) for name in costs}, table),
    )


def numbers(path: Path, name: str, values: Any) -> FloatArray:
    """Return a column as finite numbers; raise ConfigError where it is none."""
    try:
        found = np.asarray(values).astype(np.float64)
    except ValueError:
        found = np.array([np.nan])
    if not np.isfinite(found).all():
        raise ConfigError(f"{path}: column '{name}' holds something else; expected finite numbers only")
    return found


def read_csv(path: Path) -> dict[str, Any]:
    """Return the columns of a CSV file with a header, as arrays of text."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if not rows or {len(row) for row in rows} != {len(header)}:
        raise ConfigError(
            f"{path}: not a table; expected a CSV file with a header and rows of {len(header)} values"
        )
    return dict(zip(header, np.array(rows).T, strict=True))


def read_npz(path: Path) -> dict[str, Any]:
    """Return the arrays of an NPZ file."""
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
