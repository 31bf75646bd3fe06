"""Rivals of the tabular benchmark: evolution of our own writing, pymoo's NSGA-II, optuna's TPE and NSGA-II.

All budgets share one archive: whatever an arm evaluates, every budget may answer with it. None evaluates what no
budget can afford, since costs are known, and none evaluates an architecture twice while it finds new ones. Where
observations are noisy, each keeps a share of its evaluations to look again at the best it found, as a practitioner
would: without, the luckiest observation wins, and more evaluations make the answers worse. pymoo and optuna are
imported where they are needed.
"""

from __future__ import annotations

import warnings
from collections import deque
from importlib.util import find_spec
from typing import Any

import numpy as np
from tabular_arms import MAX_TRIES, Arm, Observer, random_architectures, settled

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.objective import rank

POPULATION, TOURNAMENT = 50, 25
"""Of the evolution: the best of six pairs on the two tables themselves. The others have populations of 50, too."""


def regularised_evolution(observer: Observer, rng: np.random.Generator) -> IntArray:
    """Aging evolution [Real et al., AAAI 2019, algorithm 1], the budgets in turn, with one population.

    The parent is the best for the budget whose turn it is among 25 drawn from the 50 youngest; one decision
    mutates, until the child is new and that budget can afford it.
    """
    start = random_architectures(observer, min(POPULATION, observer.total // 2), rng)
    observer.evaluate(start)
    population = deque(range(len(start)), maxlen=POPULATION)
    turn = 0
    while observer.left:
        k = turn % len(observer.problem.objectives)
        turn += 1
        drawn = rng.choice(np.array(population), size=min(TOURNAMENT, len(population)), replace=False)
        ranks = rank(observer.losses[drawn] + observer.penalty[k, drawn], observer.violation[k, drawn])
        child = _mutated(observer, observer.choices[drawn[ranks.argmin()]], k, rng)
        population.append(len(observer.losses))
        observer.evaluate(child[None])
    return settled(observer)


def _mutated(observer: Observer, parent: IntArray, k: int, rng: np.random.Generator) -> IntArray:
    """Return ``parent`` (D,) with one decision changed; with one more after each 16 that will not do."""
    sizes = np.array(observer.problem.num_candidates)
    objective = observer.problem.objectives[k]
    for attempt in range(MAX_TRIES):
        child = parent.copy()
        changed = rng.choice(len(sizes), size=min(1 + attempt // 16, len(sizes)), replace=False)
        child[changed] = (child[changed] + rng.integers(1, np.maximum(sizes[changed], 2))) % sizes[changed]
        if not observer.seen(child) and objective.feasible(child[None])[0]:
            return child
    other: IntArray = random_architectures(observer, 1, rng)[0]
    return other


def shared_cost(observer: Observer, choices: IntArray) -> FloatArray:
    """Return the second objective of the multi-objective rivals (n,).

    One metric: its cost. Several devices: the mean of their costs, each relative to its largest cap or
    reference. The devices agree too well for an objective each, with which nearly all points would be
    non-dominated.
    """
    tables = {
        name: table
        for objective in observer.problem.objectives
        for name, table in objective.tables.items()
        if name in objective.caps or name in objective.coefficients
    }
    scales = {
        name: max(o.caps.get(name, o.references.get(name, 0.0)) for o in observer.problem.objectives)
        for name in tables
    }
    costs: FloatArray = np.mean([table.of(choices) / scales[name] for name, table in tables.items()], axis=0)
    return costs


def pymoo_nsga2(observer: Observer, rng: np.random.Generator) -> IntArray:
    """pymoo's NSGA-II on (loss, cost), with uniform crossover and uniform mutation of categories.

    Children that no budget can afford are dropped before they are evaluated.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.mutation import Mutation
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.problems.static import StaticProblem

    sizes = np.array(observer.problem.num_candidates)

    class OtherCandidate(Mutation):  # type: ignore[misc]
        def _do(self, problem: Any, X: IntArray, **_: Any) -> IntArray:
            other = (X + rng.integers(1, np.maximum(sizes, 2), size=X.shape)) % sizes
            return np.where(rng.random(X.shape) < 1.0 / len(sizes), other, X)

    problem = PymooProblem(n_var=len(sizes), n_obj=2, xl=np.zeros(len(sizes)), xu=sizes - 1, vtype=int)
    algorithm = NSGA2(
        pop_size=POPULATION,
        sampling=random_architectures(observer, min(POPULATION, observer.total // 2), rng),
        crossover=UniformCrossover(),
        mutation=OtherCandidate(),
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, seed=int(rng.integers(2**31)), verbose=False, termination=("n_gen", 10**6))
    idle = 0
    while observer.left and idle < MAX_TRIES:
        asked = algorithm.ask()
        if asked is None:
            break
        choices = asked.get("X").astype(np.int64).reshape(len(asked), len(sizes))
        new = np.array([not observer.seen(np.ascontiguousarray(c)) for c in choices], dtype=bool)
        kept = np.flatnonzero(new & observer.affordable(choices))[: observer.left]
        idle = 0 if len(kept) else idle + 1
        infills = asked[kept] if len(kept) else Population()
        if len(kept):
            values = np.stack(
                [observer.evaluate(choices[kept]), shared_cost(observer, choices[kept])], axis=1
            )
            Evaluator().eval(StaticProblem(problem, F=values), infills)
        algorithm.tell(infills=infills)
    _spend_the_rest(observer, rng)
    return settled(observer)


def optuna_tpe(observer: Observer, rng: np.random.Generator) -> IntArray:
    """optuna's multivariate TPE: one study per budget, the budgets in turn, every study told every loss.

    Each study holds f_k of the whole archive, with the violation of its caps as optuna's constraint.
    """
    optuna = _optuna()
    distributions = _distributions(optuna, observer)
    studies = [
        optuna.create_study(
            sampler=optuna.samplers.TPESampler(
                multivariate=True,
                n_startup_trials=10,
                seed=int(rng.integers(2**31)),
            )
        )
        for _ in observer.problem.objectives
    ]
    turn = 0
    while observer.left:
        k = turn % len(studies)
        turn += 1
        trial, choices = _asked(optuna, studies[k], distributions, observer, [k])
        loss = observer.evaluate(choices[None])[0]
        for other, study in enumerate(studies):
            value = float(loss + observer.penalty[other, -1])
            violation = float(observer.violation[other, -1])
            if other == k:
                trial.set_constraint("caps", violation)
                study.tell(trial, value)
            else:
                study.add_trial(
                    optuna.trial.create_trial(
                        params=trial.params,
                        distributions=distributions,
                        value=value,
                        constraints={"caps": violation},
                    )
                )
    return settled(observer)


def optuna_nsga2(observer: Observer, rng: np.random.Generator) -> IntArray:
    """optuna's NSGA-II on (loss, cost) with its defaults."""
    optuna = _optuna()
    distributions = _distributions(optuna, observer)
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=int(rng.integers(2**31))),
    )
    budgets = list(range(len(observer.problem.objectives)))
    while observer.left:
        trial, choices = _asked(optuna, study, distributions, observer, budgets)
        loss = observer.evaluate(choices[None])[0]
        study.tell(trial, [float(loss), float(shared_cost(observer, choices[None])[0])])
    return settled(observer)


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _distributions(optuna: Any, observer: Observer) -> dict[str, Any]:
    return {
        f"d{d}": optuna.distributions.CategoricalDistribution(tuple(range(size)))
        for d, size in enumerate(observer.problem.num_candidates)
    }


def _asked(
    optuna: Any, study: Any, distributions: dict[str, Any], observer: Observer, budgets: list[int]
) -> tuple[Any, IntArray]:
    """Return a trial of ``study`` and its architecture (D,): new, and affordable for one of ``budgets``.

    What will not do is told as failed, which the samplers leave out; after 16 tries anything will do.
    """
    for attempt in range(16):
        trial = study.ask(distributions)
        choices = np.array([trial.params[name] for name in distributions], dtype=np.int64)
        violation = observer.judge.judge(choices[None]).violation[budgets, 0]
        if attempt == 15 or (not observer.seen(choices) and (violation == 0.0).any()):
            break
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return trial, choices


def _spend_the_rest(observer: Observer, rng: np.random.Generator) -> None:
    if observer.left:
        observer.evaluate(random_architectures(observer, observer.left, rng))


RIVALS: dict[str, Arm] = {"regularised evolution": regularised_evolution}
if find_spec("pymoo"):
    RIVALS["NSGA-II (pymoo)"] = pymoo_nsga2
if find_spec("optuna"):
    RIVALS["TPE (optuna)"] = optuna_tpe
    RIVALS["NSGA-II (optuna)"] = optuna_nsga2
