"""How many evaluations the search needs, where the best architecture of every budget is known.

    python tests/benchmarks/tabular.py --problem macro [--seeds 20] [--totals 180 600 1200] [--jobs 2]
    python tests/benchmarks/tabular.py --problem nb201 --table nb201.npz [--loss c10] [--devices pixel3 titanx_1]
    python tests/benchmarks/tabular.py --problem ofa --table ofa_acc_predictor.npz --lookup ofa_note10_lut.json.gz
    python tests/benchmarks/tabular.py --problem table --table my.csv --decisions a,b,c --loss error --costs ms,kb
        [--arms ARM ...] [--results runs.jsonl] [--figure regret.svg]

macro: NAS-Bench-Macro, in this repository; six prices of FLOPs; an observation is one of three recorded runs and
noise. nb201: NAS-Bench-201, every device's latency under three caps in one run. ofa: once-for-all's predicted accuracy
and its latency table, eight caps; the optimum is not known there, so regret is against the best that any arm or a long
search with the true losses found. table: any complete table; caps at the 20, 40 and 60 % quantiles of each cost.

Regret: the true objective of an arm's answer minus the optimum, mean over the budgets. Every arm sees the same losses
in a seed, answers all budgets from one run, and pays for every evaluation, those of its selection and its repetitions
too. An answer that breaks a cap counts as violated and is worth what the cheapest architecture is worth. Differences
are paired by seed. One line of JSON per run goes to --results; a second call continues there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tabular_arms import DEFAULT_ARM, OWN_ARMS, Arm, run
from tabular_ofa import SEARCH_ROUNDS, once_for_all
from tabular_problems import Problem, any_table, nasbench_201, nasbench_macro
from tabular_report import Line, Runs, comparison, write_figure
from tabular_rivals import RIVALS

from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.errors import ConfigError, NasdeployError

ARMS: dict[str, Arm] = {**RIVALS, **OWN_ARMS}
OPTIONAL = ("pymoo", "optuna")
MACRO, NB201, OFA, TABLE = PROBLEMS = ("macro", "nb201", "ofa", "table")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which problem: what the command line says, to build it again in every process."""

    problem: str
    table: Path | None = None
    lookup: Path | None = None
    loss: str | None = None
    devices: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()

    def build(self, *, optimum: bool) -> Problem:
        """Return the problem. Without ``optimum`` a long search for it is left out.

        Raises ConfigError for a missing option or file.
        """
        if self.problem == MACRO:
            return nasbench_macro()
        path = _existing("--table", self.table)
        if self.problem == NB201:
            return nasbench_201(path, data=self.loss or "c10", devices=self.devices)
        if self.problem == OFA:
            lookup = _existing("--lookup", self.lookup)
            return once_for_all(path, lookup, search_rounds=SEARCH_ROUNDS if optimum else 0)
        for option in ("decisions", "loss", "costs"):
            if not getattr(self, option):
                raise ConfigError(f"--problem table: --{option} is missing; expected the names of columns")
        return any_table(path, decisions=self.decisions, loss=self.loss or "", costs=self.costs)


def _existing(option: str, path: Path | None) -> Path:
    if path is None or not path.is_file():
        raise ConfigError(f"{option} {path}: no such file; expected the path of the problem's data")
    return path


_problems: dict[Request, Problem] = {}


def carry_out(request: Request, arm: str, total: int, seed: int) -> dict[str, Any]:
    """Return the answers of one run as lists, with its seconds. Runs in a process of the pool."""
    if request not in _problems:
        _problems[request] = request.build(optimum=False)
    started = time.perf_counter()
    answer = run(ARMS[arm], _problems[request], total=total, seed=seed)
    return {
        "arm": arm,
        "total": total,
        "seed": seed,
        "evaluations": answer.num_evaluations,
        "seconds": time.perf_counter() - started,
        "choices": answer.choices.tolist(),
    }


def judged(problem: Problem, found: dict[str, Any]) -> Line:
    """Return a run's line: its regrets by budget and the budgets whose caps it breaks, in place of its answers."""
    regrets, violated = problem.regrets(np.array(found.pop("choices"), dtype=np.int64))
    by_budget = dict(zip(problem.budgets, regrets.tolist(), strict=True))
    broken = [name for name, is_broken in zip(problem.budgets, violated, strict=True) if is_broken]
    return {"problem": problem.name, **found, "regrets": by_budget, "violated": broken}


def missing_runs(arguments: argparse.Namespace, done: list[Line]) -> Iterator[tuple[str, int, int]]:
    """Yield arm, total and seed of every run that is asked for and not done."""
    have = {(line["arm"], line["total"], line["seed"]) for line in done}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for total in arguments.totals:
            for arm in arguments.arms:
                if (arm, total, seed) not in have:
                    yield arm, total, seed


def carry_out_all(arguments: argparse.Namespace, request: Request) -> list[Line]:
    """Carry out what is missing, in processes of one thread each; return all runs of the problem."""
    problem = request.build(optimum=True)
    if not problem.exact:
        print("The optimum is not known: regret is against the best that any arm or a long search found.")
    done = stored(arguments.results, problem)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the libraries that a new process loads
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        asked = [pool.submit(carry_out, request, *missing) for missing in missing_runs(arguments, done)]
        for count, future in enumerate(as_completed(asked), start=1):
            line = judged(problem, future.result())
            done.append(line)
            if arguments.results is not None:
                with arguments.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if sys.stderr.isatty():
                print(f"\r{count} of {len(asked)} runs", end="", file=sys.stderr, flush=True)
    wanted = {"arm": arguments.arms, "total": arguments.totals}
    order = {name: i for i, name in enumerate(ARMS)}
    kept = [line for line in done if all(line[key] in values for key, values in wanted.items())]
    return sorted(kept, key=lambda line: (order[line["arm"]], line["total"], line["seed"]))


def stored(results: Path | None, problem: Problem) -> list[Line]:
    """Return the runs of ``problem`` that the file holds already."""
    if results is None or not results.exists():
        return []
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    lines = [line for line in lines if line["problem"] == problem.name]
    for line in lines:
        if tuple(line["regrets"]) != problem.budgets:
            raise ConfigError(
                f"{results}: holds runs with other budgets; expected a file of its own for these"
            )
    return lines


def versions() -> str:
    """Return the machine and the versions that the numbers depend on."""
    packages = ["numpy"]
    for name in OPTIONAL:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        packages.append(name)
    machine = machine_fingerprint()
    listed = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"{machine['cpu']}, {machine['logical_cores']} cores; Python {platform.python_version()}, {listed}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=PROBLEMS, default=MACRO)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--lookup", type=Path)
    parser.add_argument("--loss", help="nb201: c10, c100 or in16; table: a column, with a minus an accuracy")
    parser.add_argument("--devices", nargs="+", default=())
    parser.add_argument("--decisions", metavar="NAME,NAME", type=_names, default=())
    parser.add_argument("--costs", metavar="NAME,NAME", type=_names, default=())
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--totals", type=int, nargs="+", default=[180, 600, 1200])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """Run what is missing and print the table."""
    arguments = parsed()
    request = Request(
        problem=arguments.problem,
        table=arguments.table,
        lookup=arguments.lookup,
        loss=arguments.loss,
        devices=tuple(arguments.devices),
        decisions=arguments.decisions,
        costs=arguments.costs,
    )
    absent = [name for name in OPTIONAL if not any(name in arm for arm in ARMS)]
    if absent:
        print(f"not installed, and so without its arms: {', '.join(absent)}", file=sys.stderr)
    try:
        lines = carry_out_all(arguments, request)
    except NasdeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    runs = Runs(lines)
    name = lines[0]["problem"]
    print(
        f"\n{name}: {len(runs.budgets)} budgets, {len({line['seed'] for line in lines})} seeds; "
        f"default: {DEFAULT_ARM}\n{versions()}\n\n{comparison(runs, default=DEFAULT_ARM)}"
    )
    if arguments.figure is not None:
        write_figure(runs, arguments.figure, title=name, default=DEFAULT_ARM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
