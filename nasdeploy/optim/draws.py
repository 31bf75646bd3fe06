"""Which architectures are evaluated: drawn from the mixture q, or proposed by a model. [search.md, One step, 2]"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.importance import log_mixture
from nasdeploy.optim.objective import Judge

MAX_REDRAWS = 16
GUIDED = -1
"""The owner of an architecture that a model proposed. Nothing is known of the probability with which it came, so it
has log q = inf, hence weight 0 for every distribution: archive and surrogate learn from it, no gradient does."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """Architectures and where they come from.

    choices: (n, D). owners: (n,), the distribution that each was drawn from, or GUIDED. log_q: (n,) of this very
    draw. accepted: estimate of q(A), the share of q that some profile can afford; what is outside was drawn again.
    seed: of the free draws that an estimator may add.
    """

    choices: IntArray
    owners: IntArray
    log_q: FloatArray
    accepted: float = 1.0
    seed: int = 0

    @property
    def drawn(self) -> BoolArray:
        """(n,): which were drawn from q, not proposed."""
        return np.not_equal(self.owners, GUIDED)

    def with_guided(self, proposals: IntArray) -> Draw:
        """Return the draw with ``proposals`` (m, D) behind it."""
        return Draw(
            choices=np.concatenate([self.choices, proposals]),
            owners=np.concatenate([self.owners, np.full(len(proposals), GUIDED)]),
            log_q=np.concatenate([self.log_q, np.full(len(proposals), np.inf)]),
            accepted=self.accepted,
            seed=self.seed,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the draw as plain lists and finite numbers."""
        return {
            "choices": self.choices.tolist(),
            "owners": self.owners.tolist(),
            "log_q": np.where(self.drawn, self.log_q, 0.0).tolist(),
            "accepted": self.accepted,
            "seed": self.seed,
        }


def draw_of(state: dict[str, Any]) -> Draw:
    """Return the draw of a ``state_dict``; version 0.1 did not store all of it."""
    owners = np.array(state["owners"], dtype=np.int64)
    log_q = np.array(state["log_q"], dtype=np.float64)
    return Draw(
        choices=np.array(state["choices"], dtype=np.int64),
        owners=owners,
        log_q=np.where(owners == GUIDED, np.inf, log_q),
        accepted=float(state.get("accepted", 1.0)),
        seed=int(state.get("seed", 0)),
    )


class Mixture:
    """q(c) = Σ_k α_k p_k(c), cut to what some profile can afford.

    alpha: (K,). mask: (K, D, C). own_only: what is too expensive is drawn again from the same distribution, until its
    own profile can afford it; else from the whole mixture, until any can.
    """

    def __init__(self, *, alpha: FloatArray, mask: BoolArray, judge: Judge, own_only: bool) -> None:
        self._alpha, self._mask = alpha, mask
        self._judge = judge
        self._own_only = own_only

    def draw(self, theta: FloatArray, n: int, rng: np.random.Generator) -> Draw:
        """Return ``n`` architectures, floor or ceil of n α_k from distribution k: theta (K, D, C).

        What nobody can afford is drawn again at most 16 times; then it is returned as it is.
        """
        owners = categorical.systematic_owners(self._alpha, n, rng)  # (n,)
        choices = categorical.sample_owned(theta, owners, rng)  # (n, D)
        wasted = np.flatnonzero(~self._affordable(choices, owners))
        accepted = 1.0 - wasted.size / max(n, 1)  # strata are in proportion, so its mean is q(A)
        for _ in range(MAX_REDRAWS):
            if wasted.size == 0:
                break
            if not self._own_only:
                # from the whole mixture, not from the same p_k: so accepted draws follow q, cut to A
                owners[wasted] = rng.choice(len(self._alpha), size=wasted.size, p=self._alpha)
            choices[wasted] = categorical.sample_owned(theta, owners[wasted], rng)
            wasted = wasted[~self._affordable(choices[wasted], owners[wasted])]
        log_q = log_mixture(categorical.log_probability(theta, choices), self._alpha)
        return Draw(choices=choices, owners=owners, log_q=log_q, accepted=accepted)

    def _affordable(self, choices: IntArray, owners: IntArray) -> BoolArray:
        """Return (n,): can some profile afford it, within its mask; or, for own_only, can its own?"""
        if not self._judge.has_caps:  # what p_k draws lies in its own mask
            return np.ones(len(choices), dtype=np.bool_)
        feasible = self._judge.judge(choices).violation == 0.0  # (K, n)
        by_profile = feasible & categorical.within(self._mask, choices)
        affordable: BoolArray = by_profile.any(axis=0)
        if self._own_only:
            affordable = by_profile[owners, np.arange(len(owners))]
        return affordable
