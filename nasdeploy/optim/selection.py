"""Which architectures a profile should look at closely before one of them ships. [search.md, Hard caps]

The mode of a distribution alone is not good enough: the likeliest samples, all that was evaluated and the
neighbours that the surrogate likes are candidates too. Only feasible ones are returned; the caller evaluates
them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.surrogate import Surrogate
from nasdeploy.spaces.base import SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """How widely selection looks.

    num_samples: draws from the distribution. num_likeliest: how many distinct ones of them are kept. beam:
    from how many architectures neighbours are taken. num_rounds: how often, each time from the best found so
    far.
    """

    num_samples: int = 256
    num_likeliest: int = 32
    beam: int = 8
    num_rounds: int = 4


def propose(
    *,
    theta: FloatArray,
    mask: BoolArray,
    objective: Objective,
    seen: IntArray,
    surrogate: Surrogate,
    rng: np.random.Generator,
    config: SelectionConfig | None = None,
    scaled: int | None = None,
) -> IntArray:
    """Return the distinct feasible candidates of one profile: (m, D), by surrogate plus penalty, best first.

    theta, mask: (D, C) of the profile, theta with its margin. seen: (N, D) architectures already evaluated,
    for whichever profile. scaled: the decision of all that is looked at that is solved for (:func:`widened`). Empty
    when nothing feasible was met: the search for neighbours starts from the least violation.
    """
    config = config or SelectionConfig()

    def looked_at(*found: IntArray) -> IntArray:
        joined = np.concatenate(found)
        solved = (
            joined if scaled is None else widened(joined, decision=scaled, mask=mask, objective=objective)
        )
        return _distinct(solved)

    sharp = categorical.without_margin(theta, mask)
    likeliest = _likeliest(sharp, rng, config)
    known = np.concatenate([categorical.mode(sharp)[None], likeliest, seen])  # (m, D)
    known = looked_at(known[categorical.within(mask, known)])
    for _ in range(config.num_rounds):
        best = known[_ranked(known, objective, surrogate)[: config.beam]]
        wider = looked_at(known, *(categorical.neighbours(choices, mask) for choices in best))
        if len(wider) == len(known):
            break
        known = wider
    return shortlist(known, objective=objective, surrogate=surrogate, size=len(known))


def shortlist(candidates: IntArray, *, objective: Objective, surrogate: Surrogate, size: int) -> IntArray:
    """Return the feasible ones of ``candidates`` (m, D), at most ``size``, by L̂ + penalty, best first."""
    ranked = candidates[_ranked(candidates, objective, surrogate)]
    return ranked[objective.feasible(ranked)][:size]


def scaled_decision(space: SearchSpace) -> int | None:
    """Return the number of the decision that is solved for, None where the space has none (``scaled_by``)."""
    names = [decision.name for decision in space.decisions]
    return names.index(space.scaled_by) if space.scaled_by else None


def widened(choices: IntArray, *, decision: int, mask: BoolArray, objective: Objective) -> IntArray:
    """Return ``choices`` (n, D), each with the last candidate of ``decision`` with which all caps hold: (n, D).

    How papers scale a cell to a budget: by the number of channels. mask: (D, C), what is allowed. An architecture that
    keeps the caps with none of the candidates stays as it is. So do all where the objective has coefficients: there
    a wider network is not better by itself.
    """
    if any(weight > 0.0 for weight in objective.coefficients.values()):
        return choices
    solved = choices.copy()
    left = np.arange(len(choices))  # those that are too dear with every candidate so far
    for candidate in np.flatnonzero(mask[decision])[::-1]:
        tried = choices[left]
        tried[:, decision] = candidate
        holds = objective.feasible(tried)
        solved[left[holds], decision] = candidate
        left = left[~holds]
    return solved


def settled(
    *, expected: FloatArray, covariance: FloatArray, measured: FloatArray, errors: FloatArray
) -> FloatArray:
    """Return the losses (n,) of finalists by model and measurement together, at the level of the measurement.

    expected (n,), covariance (n, n): of L̂, which may lie at another level. measured, errors: (n,) losses and their
    standard errors. Each side weighs by its precision, as for any product of normal densities, so that of finalists
    which the validation images cannot tell apart the one wins that the whole search speaks for.
    """
    total = covariance + np.diag(errors**2)
    jitter = 1e-12 * float(np.abs(total).max())
    if jitter == 0.0:  # nothing is uncertain
        return measured.copy()
    inverse = np.linalg.inv(total + jitter * np.eye(len(measured)))
    level = float(inverse.sum(axis=0) @ (measured - expected)) / float(
        inverse.sum()
    )  # generalised least squares
    combined: FloatArray = expected + level + covariance @ inverse @ (measured - expected - level)
    return combined


def paired_errors(losses: FloatArray) -> FloatArray:
    """Return the standard errors (n,) of mean losses, relative to each other: ``losses`` (n, B) on the same B images.

    What all have in common, such as images that are hard for any network, says nothing about their order.
    """
    num_networks, count = losses.shape
    apart = losses - losses.mean(axis=0)  # from a mean that holds the network itself: n / (n - 1)
    alone = num_networks / max(num_networks - 1, 1)
    errors: FloatArray = np.sqrt(alone) * apart.std(axis=1) / np.sqrt(max(count - 1, 1))
    return errors


def _likeliest(theta: FloatArray, rng: np.random.Generator, config: SelectionConfig) -> IntArray:
    drawn = _distinct(categorical.sample(np.broadcast_to(theta, (config.num_samples, *theta.shape)), rng))
    order = np.argsort(-categorical.log_probability(theta, drawn), kind="stable")
    return drawn[order[: config.num_likeliest]]


def _ranked(candidates: IntArray, objective: Objective, surrogate: Surrogate) -> IntArray:
    """Return the indices that sort ``candidates`` (m, D): feasible ones by L̂ + penalty, then by violation."""
    return np.argsort(objective.order(surrogate.predict(candidates), candidates), kind="stable")


def _distinct(choices: IntArray) -> IntArray:
    """Return each architecture once, in lexicographic order."""
    return np.unique(choices, axis=0)
