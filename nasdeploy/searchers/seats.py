"""What a finished search leaves behind, whatever its method: the seat between a search and what ships.

The selection and the training of what ships ask three things and know nothing else of how architectures were found:
which candidates a profile has, how the best of them compare, and whether there are trained weights to start from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from nasdeploy.costs.table import IntArray
from nasdeploy.optim.objective import Objective
from nasdeploy.spaces.base import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A finalist: its loss and accuracy on the whole validation split, as its search judges architectures."""

    architecture: Architecture
    loss: float
    accuracy: float


class SearchOutcome(Protocol):
    """What a search found, for every profile by name."""

    def candidates(self, profile: str, *, objective: Objective) -> IntArray:
        """Return feasible architectures (m, D), the most promising first; empty where none was found.

        objective: of the profile, perhaps with tighter caps than the search had.
        """
        ...

    def ranked(self, profile: str, found: IntArray, *, objective: Objective, size: int) -> list[Ranked]:
        """Return at most ``size`` of ``found`` (m, D), m >= 1, by loss plus weighted costs, the best first."""
        ...

    def trained(self, architecture: Architecture) -> nn.Module | None:
        """Return the network with the weights that the search trained, on its device; None where it trained none."""
        ...
