"""The seat of a search method in the pipeline. :mod:`nasdeploy.pipeline.searching` holds the list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.profiles import HardwareProfile
from nasdeploy.searchers.seats import SearchOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTotals:
    """How much a finished search did: its steps, the seconds that they took, and whether it trained weights."""

    num_steps: int
    seconds: float
    trained_weights: bool


class SearchMethod(Protocol):
    """Finds architectures and keeps what it found in the run folder. It holds no state of a job."""

    def is_finished(self, job: Job) -> bool:
        """Return whether the run folder holds a finished search."""
        ...

    def outcome(self, job: Job, costs: Mapping[str, ProfileCosts]) -> SearchOutcome:
        """Return what was found for all profiles of ``job``: from the run folder, or searched now and stored there.

        costs: of the profiles that the search is for and of those of the job, in this order. A search that was
        interrupted is continued.
        """
        ...

    def check_covers(self, job: Job, stored: Mapping[str, Any], new: Sequence[HardwareProfile]) -> None:
        """Raise RunFolderError where the finished search cannot answer for a profile of ``new``.

        stored: the content of ``run.json``.
        """
        ...

    def totals(self, job: Job) -> SearchTotals:
        """Return how much the finished search did."""
        ...
