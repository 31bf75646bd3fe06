"""From evaluated architectures to the natural gradient of every distribution: a seat with three occupants.

"independent" and "importance" are here; "doubly_robust" is in :mod:`nasdeploy.optim.doubly_robust`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.asng import natural_gradient
from nasdeploy.optim.categorical import BoolArray, log_probability
from nasdeploy.optim.draws import Draw, draw_of
from nasdeploy.optim.importance import MIN_ESS, effective_sample_size, importance_weights
from nasdeploy.optim.objective import Judge
from nasdeploy.optim.utility import rank_utility, truncation_share

MAX_POOLED_STEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluated:
    """A draw with its losses: ``losses`` (n,) as told, ``centred`` minus the mean of those drawn from q.

    penalty, violation: (K, n). Proposals have no part in the mean, so that the level does not depend on them.
    """

    draw: Draw
    losses: FloatArray
    centred: FloatArray
    penalty: FloatArray
    violation: FloatArray


def evaluated(draw: Draw, losses: FloatArray, judge: Judge) -> Evaluated:
    """Return ``draw`` with its losses (n,), judged for every profile."""
    judged = judge.judge(draw.choices)
    compared = losses[draw.drawn] if draw.drawn.any() else losses
    return Evaluated(
        draw=draw,
        losses=losses,
        centred=losses - compared.mean(),
        penalty=judged.penalty,
        violation=judged.violation,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """What a step says about every distribution.

    gradient: (K, D, C), ascent on utilities. unit: (K,), what those are measured in. ready: (K,), whether it may be
    followed. ess: effective samples (K,). own_share: (K,), share of the weight on samples drawn from its own
    distribution. r_squared: (K,), of the surrogate on earlier fresh samples, None without one.
    """

    gradient: FloatArray
    unit: FloatArray
    ready: BoolArray
    ess: FloatArray
    own_share: FloatArray
    r_squared: FloatArray | None


class GradientEstimator(Protocol):
    """The seat. ``own_draws_only``: a distribution uses none but its own samples. ``draws_freely``: needs a seed."""

    own_draws_only: bool
    draws_freely: bool

    @property
    def waiting(self) -> BoolArray:
        """(K,): which distributions wait for more samples."""
        ...

    @property
    def gate_openings(self) -> IntArray:
        """(K,): how often so far one that had waited went on."""
        ...

    def estimate(self, told: Evaluated, theta: FloatArray, *, prices: FloatArray, step: int) -> Estimate:
        """Take what was told in ``step`` and return the gradients at ``theta`` (K, D, C), which it was drawn from.

        prices: ε (K,), of a violation.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit by bit, as plain lists, numbers and text."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; other keys are somebody else's."""
        ...


class RankEstimator:
    """The weighted rank utility of all samples, or of its own ones only for the baseline. [search.md, ASNG update]

    Why a distribution with too few effective samples does not step: ASNG rescales any gradient to full length.
    With one effective sample the utilities nearly vanish, and the crumbs of foreign samples would become a full
    step: a random walk. Such a distribution keeps the samples of up to 12 steps and acts once enough have
    accumulated.
    """

    draws_freely = False

    def __init__(self, *, num_profiles: int, judge: Judge, own_draws_only: bool) -> None:
        self.own_draws_only = own_draws_only
        self._judge = judge
        self._recent: deque[Evaluated] = deque(maxlen=MAX_POOLED_STEPS)
        self._held = np.zeros(
            num_profiles, dtype=np.int64
        )  # how many steps before this one it has not used yet
        self._openings = np.zeros(num_profiles, dtype=np.int64)

    @property
    def waiting(self) -> BoolArray:
        """(K,): which distributions wait for more samples."""
        return np.greater(self._held, 0)

    @property
    def gate_openings(self) -> IntArray:
        """(K,): how often so far one that had waited went on."""
        return self._openings

    def estimate(self, told: Evaluated, theta: FloatArray, *, prices: FloatArray, step: int) -> Estimate:
        """Take what was told in ``step`` and return the gradients at ``theta`` (K, D, C); prices: (K,)."""
        self._recent.append(told)
        pool = list(self._recent)
        choices = np.concatenate([one.draw.choices for one in pool])  # (N, D)
        owners = np.concatenate([one.draw.owners for one in pool])
        ages = np.repeat(np.arange(len(pool))[::-1], [len(one.losses) for one in pool])  # (N,)
        weights = self._weights(theta, choices, owners, np.concatenate([one.draw.log_q for one in pool]))
        weights = np.where(
            ages <= self._held[:, None], weights, 0.0
        )  # (K, N) this step and those not used yet
        ess = effective_sample_size(weights)  # (K,)
        ready = ess >= MIN_ESS

        values = [one.centred + one.penalty + prices[:, None] * one.violation for one in pool]
        keys = np.concatenate(values, axis=1)
        utilities = rank_utility(keys, weights, truncation_share(ess))  # (K, N), the weights inside
        self._openings = self._openings + (ready & self.waiting)
        self._held = np.where(ready, 0, np.minimum(self._held + 1, MAX_POOLED_STEPS - 1))
        while len(self._recent) > self._held.max():
            self._recent.popleft()
        return Estimate(
            gradient=natural_gradient(utilities, choices, theta),
            unit=np.ones(len(theta)),
            ready=ready,
            ess=ess,
            own_share=own_shares(weights, owners),
            r_squared=None,
        )

    def _weights(
        self, theta: FloatArray, choices: IntArray, owners: IntArray, log_q: FloatArray
    ) -> FloatArray:
        """Return w_k = p_k / q (K, N), up to a factor, which the utility and the ESS do not see.

        Redrawing cuts p_k and q to the affordable set A: w_k changes by p_k(A) and by q(A), the same for a
        whole step. Between held steps q(A) differs a little; that is left out, since only an estimate of it
        could be put in.
        """
        if self.own_draws_only:
            return np.equal(owners, np.arange(len(theta))[:, None]).astype(np.float64)
        return importance_weights(log_probability(theta, choices), log_q)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit by bit, as plain lists and numbers."""
        return {
            "held": self._held.tolist(),
            "recent": [{**step.draw.state_dict(), "losses": step.losses.tolist()} for step in self._recent],
            "gate_openings": self._openings.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self._held = np.array(state["held"], dtype=np.int64)
        self._openings = np.array(state.get("gate_openings", [0] * len(self._held)), dtype=np.int64)
        self._recent.clear()
        for row in state["recent"]:
            self._recent.append(
                evaluated(draw_of(row), np.array(row["losses"], dtype=np.float64), self._judge)
            )


def own_shares(weights: FloatArray, owners: IntArray) -> FloatArray:
    """Return the share of ``weights`` (K, n) on samples that distribution k drew itself (K,), 0 without any."""
    own = np.equal(owners, np.arange(len(weights))[:, None])
    total = weights.sum(axis=1)
    shares: FloatArray = np.where(own, weights, 0.0).sum(axis=1) / np.where(total > 0.0, total, 1.0)
    return shares
