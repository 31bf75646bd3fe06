"""The arms of the tabular benchmark that nasdeploy itself provides, and the protocol of all of them.

An arm is a function of an :class:`Observer`, which counts, and a generator; it returns one answer per budget
(K, D). Costs are free for every arm, so none evaluates what no budget can afford.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from tabular_problems import Problem

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.acquisition import KnowledgeGradient, Proposer, knee_of
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.evolution import EvolutionaryProposer
from nasdeploy.optim.features import CostFeatures
from nasdeploy.optim.gaussian_predictor import GaussianPredictor
from nasdeploy.optim.ladder import proxy_ladder, ridge_rungs
from nasdeploy.optim.objective import Judge
from nasdeploy.optim.pooled import ESTIMATORS, Estimator, PooledOptimizer
from nasdeploy.optim.streaming import StreamingLadder, StreamingPredictor
from nasdeploy.optim.surrogate import StreamingSurrogate

Arm = Callable[["Observer", np.random.Generator], IntArray]

DEFAULT_ARM = "doubly_robust, guided + selection"
BATCH = 12
"""Architectures per step of a search that ends without selection, whatever the problem, the budgets and the total."""
GUIDED_BATCH = 4
"""The same where a model proposes architectures: the fewer at once, the more each is worth."""
GUIDED_SHARE = 0.75
"""Of the architectures of a step, those that the model proposes where the search is guided, as in the settings."""
SEARCH_SHARE = 0.5
"""Of the evaluations, the share before the selection begins."""
GUIDED_SEARCH_SHARE = 0.75
"""The same where the search is guided already, so that little changes when the selection begins."""
REPEAT_SHARE = 0.4
"""Where observations are noisy, the share of all evaluations that arms without a model look again at the best with."""
MAX_TRIES = 64


class Observer:
    """Shows losses of one seed and counts: no arm can evaluate more than ``total`` architectures.

    choices: (N, D) and losses: (N,) that were shown so far, repetitions included; penalty and violation:
    (K, N). reserve: how many evaluations are kept back for :func:`settled`.
    """

    def __init__(self, problem: Problem, *, total: int, seed: int) -> None:
        self.problem = problem
        self.total = total
        self.seed = seed
        self.judge = Judge(problem.objectives)
        self.reserve = int(REPEAT_SHARE * total) if problem.noisy else 0
        self._visits: dict[bytes, int] = {}
        self.choices: IntArray = np.empty((0, len(problem.num_candidates)), dtype=np.int64)
        self.losses: FloatArray = np.empty(0)
        self.penalty: FloatArray = np.empty((len(problem.objectives), 0))
        self.violation: FloatArray = np.empty((len(problem.objectives), 0))

    @property
    def left(self) -> int:
        """How many evaluations are left, without those that are kept back."""
        return self.total - self.reserve - len(self.losses)

    def seen(self, architecture: IntArray) -> bool:
        """Whether the architecture (D,) was evaluated."""
        return architecture.tobytes() in self._visits

    def affordable(self, choices: IntArray) -> BoolArray:
        """Return whether some budget can afford each of ``choices`` (n, D): (n,)."""
        return np.asarray((self.judge.judge(choices).violation == 0.0).any(axis=0))

    def evaluate(self, choices: IntArray) -> FloatArray:
        """Return what an evaluation of each of ``choices`` (n, D) shows (n,).

        Raises ValueError when more are asked for than are left.
        """
        choices = np.ascontiguousarray(choices, dtype=np.int64)
        if len(choices) > self.left:
            raise ValueError(f"{len(choices)} evaluations asked for, {self.left} of {self.total} are left")
        visits = np.empty(len(choices), dtype=np.int64)
        for i, architecture in enumerate(choices):
            key = architecture.tobytes()
            visits[i] = self._visits.get(key, 0)
            self._visits[key] = visits[i] + 1
        losses = self.problem.observe(choices, visits, self.seed)
        judged = self.judge.judge(choices)
        self.choices = np.concatenate([self.choices, choices])
        self.losses = np.concatenate([self.losses, losses])
        self.penalty = np.concatenate([self.penalty, judged.penalty], axis=1)
        self.violation = np.concatenate([self.violation, judged.violation], axis=1)
        return losses


def best_observed(observer: Observer) -> IntArray:
    """Return per budget the feasible architecture (K, D) with the lowest mean of what it showed plus its penalty.

    Where nothing feasible was evaluated it is the problem's fallback, which needs no evaluation.
    """
    distinct, first, group = np.unique(observer.choices, axis=0, return_index=True, return_inverse=True)
    means = np.bincount(group.ravel(), observer.losses) / np.bincount(group.ravel())
    values = np.where(
        observer.violation[:, first] > 0.0, np.inf, means + observer.penalty[:, first]
    )  # (K, m)
    answers = distinct[values.argmin(axis=1)]
    nothing = np.isinf(values.min(axis=1))
    return np.where(nothing[:, None], observer.problem.fallback, answers)


def settled(observer: Observer) -> IntArray:
    """Return the best observed (K, D) after what was kept back went into a second, third, … look at it."""
    observer.reserve = 0
    while observer.left:
        observer.evaluate(np.unique(best_observed(observer), axis=0)[: observer.left])
    return best_observed(observer)


def random_architectures(observer: Observer, n: int, rng: np.random.Generator) -> IntArray:
    """Return ``n`` architectures (n, D), uniform among those that are new and that some budget can afford.

    After 64 tries for one it is returned as it is.
    """
    drawn = rng.integers(0, observer.problem.num_candidates, size=(n, len(observer.problem.num_candidates)))
    known: set[bytes] = set()
    for i in range(n):
        for _ in range(MAX_TRIES):
            fresh = drawn[i].tobytes() not in known and not observer.seen(drawn[i])
            if fresh and observer.affordable(drawn[i : i + 1])[0]:
                break
            drawn[i] = rng.integers(0, observer.problem.num_candidates)
        known.add(drawn[i].tobytes())
    return drawn


def random_search(observer: Observer, rng: np.random.Generator) -> IntArray:
    """Uniform architectures, each once; answers by what they showed."""
    observer.evaluate(random_architectures(observer, observer.left, rng))
    return settled(observer)


def random_start(observer: Observer, rng: np.random.Generator) -> IntArray:
    """Uniform architectures for half of the evaluations, then the same selection as ours."""
    proposer, step = knowledge_gradient(observer.problem), 0
    observer.reserve = observer.total - max(1, int(SEARCH_SHARE * observer.total))
    while observer.left:
        choices = random_architectures(observer, min(GUIDED_BATCH, observer.left), rng)
        proposer.tell(choices, observer.evaluate(choices), step)
        step += 1
    return select_guided(observer, proposer, step, rng)


class Answering(Proposer, Protocol):
    """A proposer that answers, too."""

    def answers(self, rng: np.random.Generator, *, size: int = 1) -> list[IntArray]:
        """Return, for each profile, at most ``size`` feasible architectures (m, D), best first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """Who proposes and answers, and the model of the doubly robust gradient; None: its default."""

    proposer: Answering
    surrogate: StreamingSurrogate | None = None


def pooled(
    observer: Observer,
    rng: np.random.Generator,
    *,
    estimator: Estimator,
    guide: Callable[[Problem], Guide] | None = None,
    guided: bool = False,
    selecting: bool,
) -> IntArray:
    """Ours: K distributions by ``estimator``; answers by the modes or, if ``selecting``, by the selection.

    guided: a share of each step is proposed by the model that the selection uses, too.
    """
    problem = observer.problem
    found = guide(problem) if guide is not None else Guide(proposer=knowledge_gradient(problem))
    proposer = found.proposer
    optimizer = PooledOptimizer(
        num_candidates=problem.num_candidates,
        objectives=problem.objectives,
        estimator=estimator,
        surrogate=found.surrogate,
        proposer=proposer,
        guided_share=GUIDED_SHARE if guided else 0.0,
    )
    share = GUIDED_SEARCH_SHARE if guided else SEARCH_SHARE
    batch = GUIDED_BATCH if selecting else BATCH
    observer.reserve = observer.total - max(1, int(share * observer.total)) if selecting else 0
    while observer.left:
        choices = optimizer.ask(min(batch, observer.left), rng)
        optimizer.tell(choices, observer.evaluate(choices))
    if not selecting:
        return feasible_modes(observer, optimizer, rng)
    return select_guided(observer, proposer, optimizer.num_steps, rng)


def knowledge_gradient(problem: Problem) -> KnowledgeGradient:
    """Return the proposer of the product for ``problem``."""
    return KnowledgeGradient(num_candidates=problem.num_candidates, objectives=problem.objectives)


def evolution(
    observer: Observer, rng: np.random.Generator, *, model: Callable[[Problem], StreamingPredictor]
) -> IntArray:
    """Evolution on the modelled loss from the first evaluation on, without distributions."""
    problem = observer.problem
    proposer = EvolutionaryProposer(
        num_candidates=problem.num_candidates, objectives=problem.objectives, model=model(problem)
    )
    return select_guided(observer, proposer, 0, rng)


def proxy_guide(problem: Problem) -> Guide:
    """Return proxy validation in every seat: the gradient, the proposals and the answers."""
    proposer = EvolutionaryProposer(
        num_candidates=problem.num_candidates, objectives=problem.objectives, model=proxy_model(problem)
    )
    return Guide(proposer=proposer, surrogate=proxy_model(problem))


def evolution_guide(problem: Problem) -> Guide:
    """Return evolution on a Gaussian process; the gradient has its default model."""
    proposer = EvolutionaryProposer(
        num_candidates=problem.num_candidates, objectives=problem.objectives, model=gaussian_model(problem)
    )
    return Guide(proposer=proposer)


def proxy_model(problem: Problem) -> StreamingLadder:
    """Return the ladder of the rungs in closed form."""
    rungs = ridge_rungs(problem.num_candidates)
    return StreamingLadder(
        proxy_ladder(problem.num_candidates, problem.objectives, rungs=rungs),
        num_decisions=len(problem.num_candidates),
    )


def gaussian_model(problem: Problem) -> GaussianPredictor:
    """Return the model of the product for ``problem``, with gradients."""
    return GaussianPredictor(
        problem.num_candidates,
        features=CostFeatures(problem.num_candidates, problem.objectives),
        knee=knee_of(problem.objectives),
    )


def feasible_modes(observer: Observer, optimizer: PooledOptimizer, rng: np.random.Generator) -> IntArray:
    """Return the modes (K, D) or, where a mode breaks a cap, the likeliest feasible architecture.

    It is looked for among 4096 draws and all that was evaluated.
    """
    answers = optimizer.modes()
    for k, objective in enumerate(observer.problem.objectives):
        if objective.feasible(answers[k : k + 1])[0]:
            continue
        theta = optimizer.theta[k]
        drawn = categorical.sample(np.broadcast_to(theta, (4096, *theta.shape)), rng)
        known = np.concatenate([observer.problem.fallback[k : k + 1], observer.choices, drawn])
        known = known[objective.feasible(known)]
        answers[k] = known[categorical.log_probability(theta, known).argmax()]
    return answers


def select_guided(observer: Observer, proposer: Answering, step: int, rng: np.random.Generator) -> IntArray:
    """Spend what is left of the evaluations on what the model of all losses proposes; return answers (K, D).

    It may propose what was evaluated before, where that is worth more than something new. Answers by what the model
    expects. step: of the next evaluation.
    """
    observer.reserve = 0
    while observer.left:
        count = min(GUIDED_BATCH, observer.left)
        choices = proposer.propose(count, rng)
        if len(choices) == 0:  # too little is known
            choices = random_architectures(observer, count, rng)
        proposer.tell(choices, observer.evaluate(choices), step)
        step += 1
    answers = proposer.answers(rng)
    fallback = observer.problem.fallback
    return np.stack([found[0] if len(found) else fallback[k] for k, found in enumerate(answers)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one run of an arm returned: choices (K, D), and how many evaluations it used."""

    choices: IntArray
    num_evaluations: int


def run(arm: Arm, problem: Problem, *, total: int, seed: int) -> Answer:
    """Return the answer of ``arm`` with at most ``total`` evaluations, repetitions included."""
    observer = Observer(problem, total=total, seed=seed)
    choices = arm(observer, np.random.default_rng([seed, total]))
    return Answer(choices=choices, num_evaluations=len(observer.losses))


OWN_ARMS: dict[str, Arm] = {
    "random search": random_search,
    "random start + selection": random_start,
    **{
        name + suffix: partial(pooled, estimator=name, selecting=selecting)
        for name in ESTIMATORS
        for suffix, selecting in (("", False), (" + selection", True))
    },
    DEFAULT_ARM: partial(pooled, estimator="doubly_robust", guided=True, selecting=True),
    "proxy evolution": partial(evolution, model=proxy_model),
    "evolution": partial(evolution, model=gaussian_model),
    "doubly_robust, proxy + selection": partial(
        pooled, estimator="doubly_robust", guide=proxy_guide, guided=True, selecting=True
    ),
    "doubly_robust, evolution + selection": partial(
        pooled, estimator="doubly_robust", guide=evolution_guide, guided=True, selecting=True
    ),
}
