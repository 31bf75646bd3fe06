"""Hard caps in the search: what breaks one is ranked last, or dearer until the distribution meets the cap.

    python tests/benchmarks/tabular_caps.py --table nb201.npz [--loss c10] [--totals 300 600] [--seeds 20]
        [--devices pixel3]

NAS-Bench-201, each device's latency under three caps, all in one run. "excess" is what nasdeploy does: f = L + ε times
the violation, with log ε ← log ε + η clip(R̄/B - 1, -1, 1) after every step, R̄ the expected cost of the distribution
without its margin. "all" prices all of the cost: f = L + ε R/B, with the same ε. "ranked": feasible samples by their
loss, then the others by violation, which is the limit of a large ε. Only what some budget can afford is evaluated.
Regret of the feasible mode (or the likeliest feasible architecture), and of the best evaluated one: neither looks
again or asks for more.
"""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from statistics_of_pairs import interval
from tabular_arms import BATCH, Observer, best_observed, feasible_modes
from tabular_problems import NB201_LOSSES, Problem, nasbench_201

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.objective import Judge, Judgement
from nasdeploy.optim.pooled import Estimator, PooledOptimizer
from nasdeploy.optim.prices import CapPrices

EXCESS, ALL, RANKED = "excess", "all", "ranked"
WAYS = (EXCESS, ALL, RANKED)
ESTIMATOR: Estimator = "importance"
"""Whose gradient is of ranks alone, so that a large ε does not hide the losses."""
LARGE = 1e9


class WholePrices(Judge):
    """Counts R/B of the one cap of a profile as its violation, so that all of the cost has a price."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.objectives)
        caps = [next(iter(objective.caps.items())) for objective in problem.objectives]
        self._tables = [o.tables[metric] for o, (metric, _) in zip(problem.objectives, caps, strict=True)]
        self._limits = np.array([limit for _, limit in caps])  # B (K,)

    def judge(self, choices: IntArray) -> Judgement:
        """Return penalty and R/B (K, n) of ``choices`` (n, D)."""
        shared = {id(table): table.of(choices) for table in self._tables}
        use = np.stack([shared[id(table)] for table in self._tables]) / self._limits[:, None]
        return Judgement(penalty=np.zeros_like(use), violation=use)


class LargePrices(CapPrices):
    """A violation is worse than any loss."""

    @property
    def values(self) -> FloatArray:
        """ε (K,)."""
        return np.full(len(self._logs), LARGE)


def searched(problem: Problem, way: str, *, total: int, seed: int) -> tuple[float, float]:
    """Return the mean regret of the modes and of the best observed after one run."""
    observer, rng = Observer(problem, total=total, seed=seed), np.random.default_rng([seed, total])
    optimizer = PooledOptimizer(
        num_candidates=problem.num_candidates, objectives=problem.objectives, estimator=ESTIMATOR
    )
    if way == ALL:  # what is drawn is judged as ever
        optimizer._judge = WholePrices(problem)
    if way == RANKED:
        optimizer._prices = LargePrices(len(problem.objectives))
    while observer.left:
        choices = optimizer.ask(min(BATCH, observer.left), rng)
        optimizer.tell(choices, observer.evaluate(choices))
    answers = feasible_modes(observer, optimizer, rng), best_observed(observer)
    regrets = [float(problem.regrets(answer)[0].mean()) for answer in answers]
    return regrets[0], regrets[1]


@cache
def _problem(path: Path, data: str, devices: tuple[str, ...]) -> Problem:
    return nasbench_201(path, data=data, devices=devices)


def _job(
    job: tuple[str, int, int], *, path: Path, data: str, devices: tuple[str, ...]
) -> tuple[float, float]:
    way, total, seed = job
    return searched(_problem(path, data, devices), way, total=total, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--loss", choices=NB201_LOSSES, default=NB201_LOSSES[0])
    parser.add_argument("--devices", nargs="*", default=[], help="latency columns; all by default")
    parser.add_argument("--totals", type=int, nargs="+", default=[300, 600])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    jobs = list(product(WAYS, arguments.totals, seeds))
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = (
        "1"  # read when NumPy loads, in the workers
    )
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as workers:
        run = partial(_job, path=arguments.table, data=arguments.loss, devices=tuple(arguments.devices))
        found = dict(zip(jobs, workers.map(run, jobs, chunksize=4), strict=True))
    for total, (place, answer) in product(arguments.totals, enumerate(("mode", "best evaluated"))):
        print(
            f"\n{arguments.loss}, {total} evaluations, {len(seeds)} seeds, {answer}: regret, minus {EXCESS} [95 %]"
        )
        for way in WAYS:
            own = [found[way, total, seed][place] for seed in seeds]
            excess = [found[EXCESS, total, seed][place] for seed in seeds]
            pairs = [here - there for here, there in zip(own, excess, strict=True)]
            print(f"{way:8s} {statistics.fmean(own):.3f}  {interval(pairs) if way != EXCESS else ''}")


if __name__ == "__main__":
    main()
