"""What breaking a cap costs a profile while it searches. [search.md, Hard caps: an adaptive coefficient]

A sample that breaks a cap is worse by ε_k times the violation, and ε_k follows the distribution: dearer while its
expected cost is above the cap, cheaper below::

    log ε_k ← log ε_k + η clip(max_m E_{p_k}[R_m] / B_m - 1, -1, 1)

with θ_k without its margin. What the cap allows has no price at all, unlike with ε R/B, so that the best feasible
architecture stays the best one. It acts on what is evaluated: what no profile can afford is drawn again instead, so a
profile alone, or with its own samples only, hardly ever sees a violation, and its price says nothing.

Ranking all that breaks a cap behind all that does not is the limit of a large ε. It learns less: as long as few samples
are feasible, it tells the distribution of violations alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray

FIRST_PRICE = 0.25
"""Of a violation of 100 %, in robust standard deviations of the first losses."""
ETA = 0.1
"""By how much log ε moves at most in a step."""
LEAST, MOST = -2.0, 20.0
"""log ε stays within so much of its start: a price that fell while a cap was slack has to be back in time when it is
not, and an impossible cap must not raise it without end."""


class CapPrices:
    """ε (K,) in the unit of the losses."""

    def __init__(self, num_profiles: int) -> None:
        self._start: float | None = None
        self._logs = np.zeros(num_profiles)  # log ε_k minus the logarithm of the start

    def begin(self, losses: FloatArray) -> None:
        """Take the unit of ``losses`` (n,), the first that are told and differ; later calls change nothing."""
        spread = 1.4826 * float(np.median(np.abs(losses - np.median(losses)))) or float(losses.std())
        if self._start is None and spread > 0.0:
            self._start = FIRST_PRICE * spread

    @property
    def values(self) -> FloatArray:
        """ε (K,); in units of 1 before any losses differed."""
        prices: FloatArray = (FIRST_PRICE if self._start is None else self._start) * np.exp(self._logs)
        return prices

    def follow(self, excess: FloatArray) -> None:
        """Take max_m (E[R_m]/B_m - 1) of every distribution (K,)."""
        moved = self._logs + ETA * np.clip(excess, -1.0, 1.0)
        self._logs = np.clip(moved, LEAST, MOST)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit by bit, as plain lists and numbers."""
        return {"start": self._start, "logs": self._logs.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self._start = None if state["start"] is None else float(state["start"])
        self._logs = np.array(state["logs"], dtype=np.float64)
