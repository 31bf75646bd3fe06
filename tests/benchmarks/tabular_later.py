"""A budget that comes after the search, against a search that had it from the start, where the answers are known.

    python tests/benchmarks/tabular_later.py [--seeds 20] [--totals 180 600] [--extra 0 60 120] [--jobs 2]
    python tests/benchmarks/tabular_later.py --problem nb201 --table nb201.npz [--loss c10] [--devices pixel3 titanx_1]

Per seed, each of the K budgets is left out in turn: a search for the others, then the one is added with so many
evaluations of its own; and a search for all K with as many evaluations in all. "alone": a search for the one budget
with the added evaluations and nothing recorded. The answer is the evaluated architecture that is best by a model of
all evaluations; nothing more is evaluated for it. Regret is that of the one budget, mean over the budgets; differences
are paired by seed, with the 95 % interval of their mean.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from statistics_of_pairs import interval
from tabular_arms import GUIDED_BATCH, GUIDED_SHARE
from tabular_problems import Problem, nasbench_201, nasbench_macro

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.errors import NasdeployError
from nasdeploy.optim.acquisition import KnowledgeGradient, loss_model
from nasdeploy.optim.added import Addition
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.selection import shortlist

START, LATER, ALONE = ARMS = ("from the start", "added later", "alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which problem and which evaluations: what the command line says."""

    problem: str
    table: Path | None
    loss: str
    devices: tuple[str, ...]
    totals: tuple[int, ...]
    extra: tuple[int, ...]

    def build(self) -> Problem:
        """Return the problem."""
        if self.table is None:
            return nasbench_macro()
        return nasbench_201(self.table, data=self.loss, devices=self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The regret of one budget after ``total`` evaluations for the others, or for all, and ``extra`` more."""

    arm: str
    seed: int
    budget: int
    total: int
    extra: int
    regret: float
    violated: bool


class Losses:
    """What evaluations show in one seed: it depends on how often an architecture was evaluated before."""

    def __init__(self, problem: Problem, seed: int, visits: dict[bytes, int] | None = None) -> None:
        self._problem, self._seed = problem, seed
        self._visits = dict(visits or {})

    def copy(self) -> Losses:
        """Return losses that go on from here on their own."""
        return Losses(self._problem, self._seed, self._visits)

    def of(self, choices: IntArray) -> FloatArray:
        """Evaluate ``choices`` (n, D): losses (n,)."""
        visits = np.empty(len(choices), dtype=np.int64)
        for i, architecture in enumerate(choices):
            visits[i] = self._visits.get(architecture.tobytes(), 0)
            self._visits[architecture.tobytes()] = int(visits[i]) + 1
        return self._problem.observe(choices, visits, self._seed)


def evaluate(optimizer: PooledOptimizer, losses: Losses, count: int, rng: np.random.Generator) -> None:
    """Ask for ``count`` evaluations and tell them."""
    for _ in range(count // GUIDED_BATCH):
        choices = optimizer.ask(GUIDED_BATCH, rng)
        optimizer.tell(choices, losses.of(choices))


def search_for(problem: Problem, budgets: Sequence[int]) -> PooledOptimizer:
    """Return a search for some of the budgets, at its start."""
    objectives = [problem.objectives[k] for k in budgets]
    return PooledOptimizer(
        num_candidates=problem.num_candidates,
        objectives=objectives,
        estimator="doubly_robust",
        proposer=KnowledgeGradient(num_candidates=problem.num_candidates, objectives=objectives),
        guided_share=GUIDED_SHARE,
    )


def judged(problem: Problem, optimizer: PooledOptimizer, budget: int) -> tuple[float, bool]:
    """Return the regret of the answer to ``budget``, and whether it breaks a cap."""
    model = loss_model(problem.num_candidates, [problem.objectives[budget]])
    model.fit(optimizer.archive.choices, optimizer.archive.losses, optimizer.archive.steps)
    seen = np.unique(optimizer.archive.choices, axis=0)
    found = shortlist(seen, objective=problem.objectives[budget], surrogate=model, size=1)
    answers = problem.fallback.copy()
    answers[budget] = found[0] if len(found) else answers[budget]
    regrets, violated = problem.regrets(answers)
    return float(regrets[budget]), bool(violated[budget])


def result(arm: str, seed: int, *, budget: int, total: int, extra: int, found: tuple[float, bool]) -> Result:
    """Return one result."""
    return Result(
        arm=arm, seed=seed, budget=budget, total=total, extra=extra, regret=found[0], violated=found[1]
    )


def from_the_start(problem: Problem, request: Request, seed: int) -> Iterator[Result]:
    """Yield the answers to all budgets of a search for all of them."""
    budgets = range(len(problem.budgets))
    optimizer, losses = search_for(problem, budgets), Losses(problem, seed)
    rng, done = np.random.default_rng(seed), 0
    wanted = sorted((total + extra, total, extra) for total in request.totals for extra in request.extra)
    for evaluations, total, extra in wanted:
        evaluate(optimizer, losses, evaluations - done, rng)
        done = evaluations
        for k in budgets:
            found = judged(problem, optimizer, k)
            yield result(START, seed, budget=k, total=total, extra=extra, found=found)


def added_later(problem: Problem, request: Request, seed: int, budget: int) -> Iterator[Result]:
    """Yield the answers to ``budget``, added to searches for the others."""
    optimizer = search_for(problem, [k for k in range(len(problem.budgets)) if k != budget])
    losses, rng, done = Losses(problem, seed), np.random.default_rng([seed, budget]), 0
    allowed = tuple((True,) * count for count in problem.num_candidates)
    for total in request.totals:
        evaluate(optimizer, losses, total - done, rng)
        own_losses, own_rng, own_done = losses.copy(), np.random.default_rng([seed, budget, total]), 0
        addition = Addition(
            optimizer,
            objective=problem.objectives[budget],
            mask=allowed,
            num_evaluations=max(request.extra),
            rng=own_rng,
        )
        for extra in request.extra:
            evaluate(addition.optimizer, own_losses, extra - own_done, own_rng)
            found = judged(problem, addition.optimizer, budget)
            yield result(LATER, seed, budget=budget, total=total, extra=extra, found=found)
            own_done = extra
        done = total


def alone(problem: Problem, request: Request, seed: int, budget: int) -> Iterator[Result]:
    """Yield the answers to ``budget`` of searches for it alone, with what the others get in addition."""
    optimizer, losses = search_for(problem, [budget]), Losses(problem, seed)
    rng, done = np.random.default_rng([seed, budget]), 0
    for extra in filter(None, request.extra):
        evaluate(optimizer, losses, extra - done, rng)
        done = extra
        found = judged(problem, optimizer, budget)
        for total in request.totals:
            yield result(ALONE, seed, budget=budget, total=total, extra=extra, found=found)


def carry_out(request: Request, seed: int, budget: int | None) -> list[Result]:
    """Return the results of one seed: of one budget, or of the search that had all of them. For a process."""
    problem = request.build()
    if budget is None:
        return list(from_the_start(problem, request, seed))
    return [*added_later(problem, request, seed, budget), *alone(problem, request, seed, budget)]


def carry_out_all(request: Request, seeds: Sequence[int], num_budgets: int, jobs: int) -> list[Result]:
    """Return all results, from processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the libraries that a new process loads
    results: list[Result] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        parts = [
            pool.submit(carry_out, request, seed, budget)
            for seed in seeds
            for budget in (None, *range(num_budgets))
        ]
        for count, part in enumerate(as_completed(parts), start=1):
            results += part.result()
            if sys.stderr.isatty():
                print(f"\r{count} of {len(parts)} searches", end="", file=sys.stderr, flush=True)
    return results


class Regrets:
    """Regrets by arm, evaluations and seed."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results

    def by_seed(self, arm: str, total: int, extra: int, budgets: Sequence[int]) -> list[float]:
        """Return the regret of each seed in turn, mean over ``budgets``."""
        seeds: dict[int, list[float]] = {}
        for one in self._results:
            if (one.arm, one.total, one.extra) == (arm, total, extra) and one.budget in budgets:
                seeds.setdefault(one.seed, []).append(one.regret)
        return [statistics.fmean(seeds[seed]) for seed in sorted(seeds)]

    def line(self, total: int, extra: int, budgets: Sequence[int]) -> str:
        """Return one line of a table."""
        start, later, single = (self.by_seed(arm, total, extra, budgets) for arm in ARMS)
        cells = [
            f"{total:5} + {extra:<4}",
            f"{statistics.fmean(start):14.3f}",
            f"{statistics.fmean(later):11.3f}",
        ]
        cells.append(f"{statistics.fmean(single):6.3f}" if single else "     -")
        for other in (start, single):
            pairs = [one - two for one, two in zip(later, other, strict=False)]
            cells.append(f"{interval(pairs) if len(pairs) > 1 else '-':27}")
        return "  ".join(cells).rstrip()

    def violated(self) -> str:
        """Return how many answers break a cap, by arm."""
        counts = {arm: [one.violated for one in self._results if one.arm == arm] for arm in ARMS}
        return ", ".join(f"{arm} {sum(broken)} of {len(broken)}" for arm, broken in counts.items())


def print_tables(problem: Problem, request: Request, results: Sequence[Result]) -> None:
    """Print the table of all budgets, and one of each budget."""
    regrets, budgets = Regrets(results), range(len(problem.budgets))
    header = "evaluations  from the start  added later   alone  later minus start [95 %]     later minus alone [95 %]"
    for name, some in [("all budgets", budgets), *((problem.budgets[k], range(k, k + 1)) for k in budgets)]:
        print(f"\n{name}\n{header}")
        for total in request.totals:
            for extra in request.extra:
                print(regrets.line(total, extra, some))
    print(f"\nanswers that break a cap: {regrets.violated()}")


def counts(text: str) -> int:
    """Return a number of evaluations. Raises ValueError where it is not made of whole steps."""
    if int(text) < 0 or int(text) % GUIDED_BATCH:
        raise ValueError(text)
    return int(text)


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=("macro", "nb201"), default="macro")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--loss", default="c10")
    parser.add_argument("--devices", nargs="+", default=())
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--totals", type=counts, nargs="+", default=[180, 600], help=f"multiples of {GUIDED_BATCH}"
    )
    parser.add_argument(
        "--extra", type=counts, nargs="+", default=[0, 60, 120], help=f"multiples of {GUIDED_BATCH}"
    )
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if (arguments.problem == "nb201") != (arguments.table is not None and arguments.table.is_file()):
        parser.error(f"--table {arguments.table}: expected the path of nb201.npz, for --problem nb201 alone")
    return arguments


def main() -> int:
    """Carry out all searches and print the tables."""
    arguments = parsed()
    request = Request(
        problem=arguments.problem,
        table=arguments.table,
        loss=arguments.loss,
        devices=tuple(arguments.devices),
        totals=tuple(sorted(arguments.totals)),
        extra=tuple(sorted(arguments.extra)),
    )
    try:
        problem = request.build()
    except NasdeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    results = carry_out_all(request, seeds, len(problem.budgets), arguments.jobs)
    print(f"\n{problem.name}: {len(problem.budgets)} budgets, each left out in turn; {len(seeds)} seeds")
    print_tables(problem, request, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
