"""The seat of what learns where good architectures are: K distributions that are asked and told.

The loop that trains shared weights, its records and the selection know no more than this. [search.md, One step]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.estimators import Evaluated
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import Diagnostics


class Strategy(Protocol):
    """K distributions over architectures of D decisions with at most C candidates each."""

    @property
    def num_candidates(self) -> tuple[int, ...]:
        """(C_1, …, C_D)."""
        ...

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """K of them."""
        ...

    @property
    def mask(self) -> BoolArray:
        """(K, D, C): what each profile allows."""
        ...

    @property
    def theta(self) -> FloatArray:
        """(K, D, C): the probabilities of each distribution, with margin."""
        ...

    @property
    def archive(self) -> Archive:
        """What was evaluated lately."""
        ...

    @property
    def diagnostics(self) -> Diagnostics | None:
        """What the last ``tell`` did, None before it."""
        ...

    @property
    def latest(self) -> Evaluated | None:
        """What the last ``tell`` of this process took."""
        ...

    @property
    def num_steps(self) -> int:
        """How often it was told."""
        ...

    def modes(self) -> IntArray:
        """Return the likeliest architecture of each distribution: (K, D)."""
        ...

    def expected_cost(self, k: int, metric: str) -> float:
        """Return the expected cost under distribution ``k``, in the metric's unit."""
        ...

    def ask(self, n: int, rng: np.random.Generator) -> IntArray:
        """Return ``n`` architectures (n, D) to be evaluated and told."""
        ...

    def ask_for_weights(self, n: int, rng: np.random.Generator, *, uniform_share: float) -> IntArray:
        """Return ``n`` architectures (n, D) to train shared weights on, a share of them uniform ones."""
        ...

    def tell(self, choices: IntArray, losses: FloatArray) -> None:
        """Take the losses (n,) of the ``choices`` (n, D) that the last ``ask`` returned."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return all that is needed to continue bit by bit, as plain lists, numbers and text."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        ...
