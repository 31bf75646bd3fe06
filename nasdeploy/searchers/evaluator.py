"""The seat of what scores an architecture without knowing any profile: one evaluation serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nasdeploy.costs.table import FloatArray
from nasdeploy.spaces.base import Architecture


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """What n architectures were given: ``losses`` (n,), lower is better, and their standard errors ``errors`` (n,).

    What the loss is, and what its standard error covers, is the evaluator's to say.
    """

    losses: FloatArray
    errors: FloatArray


class Evaluator(Protocol):
    """Scores architectures, whatever they cost and whichever profile asks."""

    def score(self, architectures: Sequence[Architecture], *, seed: int) -> Scores:
        """Return the scores of ``architectures`` (n); equal seeds give equal scores, to the bit."""
        ...
