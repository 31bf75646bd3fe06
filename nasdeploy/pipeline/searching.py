"""Phase 2: what the search of the run found for every profile. Which method it is, only the list here knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nasdeploy.errors import RunFolderError
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.methods import SearchMethod
from nasdeploy.pipeline.oneshot import OneShot
from nasdeploy.pipeline.random_weight import RandomWeight
from nasdeploy.pipeline.random_weight_tables import store_tables
from nasdeploy.pipeline.tables import ProfileCosts, profile_costs, require_counts_feasible
from nasdeploy.pipeline.warm_starting import warm_start
from nasdeploy.searchers.seats import SearchOutcome

METHODS: dict[str, SearchMethod] = {
    "supernet": OneShot(warm_start=warm_start),
    "random-weight": RandomWeight(),
}
"""By ``search.evaluator`` of the settings."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What the search left behind, and the costs of the profiles of the job by their names."""

    outcome: SearchOutcome
    costs: Mapping[str, ProfileCosts]


def method_of(job: Job) -> SearchMethod:
    """Return the method that the settings name."""
    return METHODS[job.settings.search.evaluator]


def find_networks(job: Job) -> Found:
    """Return what was found for all profiles of ``job``: stored, or searched now.

    Raises InfeasibleError, before any training, where a profile has a budget that the space cannot meet.
    """
    require_counts_feasible(job)
    costs = profile_costs(job)
    outcome = method_of(job).outcome(job, costs)
    return Found(outcome=outcome, costs={profile.name: costs[profile.name] for profile in job.profiles})


def describe_selected(job: Job, costs: Mapping[str, ProfileCosts]) -> None:
    """Store what else the run can say of the networks that were selected for the profiles of ``costs``.

    Where nothing has changed since the last time, nothing is done.
    """
    if job.settings.search.weighs_at_random:
        store_tables(job, costs)


def is_searched(job: Job) -> bool:
    """Return whether the run folder holds a finished search."""
    return method_of(job).is_finished(job)


def check_joining(job: Job, stored: Mapping[str, Any]) -> None:
    """Check that those profiles of ``job`` that the run does not know yet may become a part of it.

    stored: the content of ``run.json``. Raises RunFolderError where the search is unfinished or does not cover a
    profile, and where a profile has another definition than in the run.
    """
    new = []
    for profile in job.profiles:
        known = stored["profiles"].get(profile.name)
        if known is None:
            new.append(profile)
        elif known != profile.to_dict():
            raise RunFolderError(
                f"{job.folder.path}: its profile '{profile.name}' is another one; give this one another name, choose "
                "another folder with --output-dir, or start over with --no-resume"
            )
    if not new:
        return
    if not is_searched(job):
        raise RunFolderError(
            f"{job.folder.path}: its search, for {', '.join(stored['searched'])}, is not finished; let the command "
            f"that began it finish before {', '.join(profile.name for profile in new)} is added, or choose another "
            "folder with --output-dir"
        )
    method_of(job).check_covers(job, stored, new)
