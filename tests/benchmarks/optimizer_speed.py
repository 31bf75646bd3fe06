"""What a step of the distributions costs, without the losses: python tests/benchmarks/optimizer_speed.py

One ``ask`` and one ``tell`` of each estimator: the median, and the mean, which holds the steps that fit the surrogate.
Goals for 8 profiles, 40 decisions of 4 candidates and 64 samples on one thread: at most 2 ms (importance) and 10 ms
(doubly_robust). Memory: after a tenth of the steps and at the end; it should not grow.

    python tests/benchmarks/optimizer_speed.py --steps 100000 --estimators doubly_robust --samples 8
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import platform
import resource
import time
import tracemalloc

import numpy as np

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import ESTIMATORS, Estimator, PooledOptimizer


def _problem(profiles: int, decisions: int, candidates: int) -> list[Objective]:
    """Return objectives with a cap and a coefficient each, from cheap to expensive."""
    rng = np.random.default_rng(0)
    factors = [Factor((d,), np.sort(rng.uniform(1.0, 10.0, candidates))) for d in range(decisions)]
    joint = [
        Factor((d, d + 1), rng.uniform(0.0, 2.0, (candidates, candidates))) for d in range(decisions - 1)
    ]
    tables = {"flops": CostTable(tuple(factors)), "latency": CostTable((*factors, *joint))}
    lowest = [table.minimum(((True,) * candidates,) * decisions) for table in tables.values()]
    return [
        Objective(
            tables=tables,
            caps={"flops": lowest[0] * (1.3 + 0.3 * k)},
            coefficients={"latency": 0.2 * (profiles - k)},
            references={"latency": lowest[1]},
        )
        for k in range(profiles)
    ]


def _measure(estimator: Estimator, arguments: argparse.Namespace) -> None:
    sizes = (arguments.candidates,) * arguments.decisions
    objectives = _problem(arguments.profiles, arguments.decisions, arguments.candidates)
    optimizer = PooledOptimizer(num_candidates=sizes, objectives=objectives, estimator=estimator)
    rng = np.random.default_rng(1)
    effects = rng.normal(size=(arguments.decisions, arguments.candidates))
    times, cpu = np.empty(arguments.steps), 0.0
    resident, held = [], []
    if arguments.memory:
        tracemalloc.start()
    for step in range(arguments.steps):
        started, used = time.perf_counter(), time.process_time()
        choices = optimizer.ask(arguments.samples, rng)
        asked = time.perf_counter() - started
        cpu += time.process_time() - used
        losses = effects[np.arange(arguments.decisions), choices].sum(axis=1)
        losses += 0.5 * rng.normal(size=arguments.samples)
        started, used = time.perf_counter(), time.process_time()
        optimizer.tell(choices, losses)
        times[step] = asked + time.perf_counter() - started
        cpu += time.process_time() - used
        if step in (arguments.steps // 10, arguments.steps - 1):
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            held.append(tracemalloc.get_traced_memory()[0] / 2**20 if arguments.memory else float("nan"))
    ms = 1e3 * times[min(10, arguments.steps // 2) :]
    print(
        f"{estimator:14s} median {np.median(ms):6.2f} ms  mean {ms.mean():6.2f} ms  "
        f"99 % {np.quantile(ms, 0.99):6.2f} ms  mean CPU time {1e3 * cpu / arguments.steps:6.2f} ms  "
        f"peak memory {resident[0]:.1f} -> {resident[-1]:.1f} MiB"
        + (f"  held {held[0]:.2f} -> {held[-1]:.2f} MiB" if arguments.memory else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("profiles", 8),
        ("decisions", 40),
        ("candidates", 4),
        ("samples", 64),
        ("steps", 500),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument(
        "--memory", action="store_true", help="what Python holds, too: makes the steps slower"
    )
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}, threads: {os.environ['OMP_NUM_THREADS']}, {arguments.profiles} profiles, "
        f"{arguments.decisions} decisions of {arguments.candidates}, {arguments.samples} samples a step, "
        f"{arguments.steps} steps"
    )
    for estimator in arguments.estimators:
        _measure(estimator, arguments)


if __name__ == "__main__":
    main()
