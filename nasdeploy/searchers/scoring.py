"""A multi-objective search that scores one architecture a step, so that it can be stored between any two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.searchers.evaluator import Evaluator
from nasdeploy.searchers.evolution import MultiObjectiveSearch
from nasdeploy.spaces.base import to_architectures


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One evaluation: how many there are now, of which generation from 1 it is, its loss with its standard error."""

    step: int
    generation: int
    loss: float
    error: float


class ScoringLoop:
    """Scores ``num_steps`` architectures, or all that ``search`` finds, by loss and by ``cost``.

    The search knows whole generations: it is told the values of one once all of it is scored. seed: of the evaluator.
    """

    def __init__(
        self,
        search: MultiObjectiveSearch,
        evaluator: Evaluator,
        *,
        cost: Callable[[IntArray], FloatArray],
        num_evaluations: int,
        seed: int,
    ) -> None:
        self.num_done, self.num_steps = 0, num_evaluations
        self._search, self._evaluator, self._cost, self._seed = search, evaluator, cost, seed
        self._planned: IntArray | None = None  # (n, D) of the generation that is being scored
        self._losses: list[float] = []
        self._errors: list[float] = []
        self._generations: list[int] = []

    @property
    def choices(self) -> IntArray:
        """(N, D): what was scored in whole generations, in order."""
        return self._search.choices

    @property
    def losses(self) -> FloatArray:
        """(N,)."""
        return np.array(self._losses[: len(self.choices)])

    @property
    def errors(self) -> FloatArray:
        """(N,): standard errors of the losses."""
        return np.array(self._errors[: len(self.choices)])

    @property
    def generations(self) -> list[int]:
        """The generation of each, from 1."""
        return self._generations[: len(self.choices)]

    def step(self) -> Scored:
        """Score one architecture. Raises ValueError where ``num_done`` says that the search is over."""
        planned = self._plan() if self._planned is None else self._planned
        if planned is None:
            raise ValueError("step: there is nothing left to score; expected num_done < num_steps")
        self._planned = planned
        place = len(self._losses) - len(self._search.choices)
        found = self._evaluator.score(to_architectures(planned[place : place + 1]), seed=self._seed)
        self._losses.append(float(found.losses[0]))
        self._errors.append(float(found.errors[0]))
        self._generations.append(self._generation())
        scored = Scored(
            step=len(self._losses),
            generation=self._generations[-1],
            loss=self._losses[-1],
            error=self._errors[-1],
        )
        if place + 1 == len(planned):
            self._search.tell(self._values(planned))
            self._planned = self._plan()
        self.num_done = self.num_steps if self._planned is None else len(self._losses)
        return scored

    def _generation(self) -> int:
        """Return the number of the generation that is being scored."""
        whole = self._generations[: len(self._search.choices)]
        return 1 + (whole[-1] if whole else 0)

    def _plan(self) -> IntArray | None:
        """Return what the next generation wants scored (n, D), None where the search is over."""
        asked = self._search.ask()
        return asked if len(asked) else None

    def _values(self, choices: IntArray) -> FloatArray:
        """Return loss and cost (n, 2) of the generation that was scored."""
        losses = np.array(self._losses[len(self._search.choices) :])
        return np.stack([losses, self._cost(choices)], axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the steps to come depend on, as plain data."""
        return {
            "search": self._search.state_dict(),
            "losses": list(self._losses),
            "errors": list(self._errors),
            "generations": list(self._generations),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken: the steps that follow are the same, bit by bit."""
        self._search.load_state_dict(state["search"])
        self._losses, self._errors = list(state["losses"]), list(state["errors"])
        self._generations = list(state["generations"])
        self._planned = self._plan()
        self.num_done = self.num_steps if self._planned is None else len(self._losses)
