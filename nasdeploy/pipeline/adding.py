"""Where the architectures of a profile come from: the search of the run, or its adaptation to a profile added later.

A search covers every profile whose candidates it trained (:func:`nasdeploy.searchers.adapting.uncovered`), with the
same data, space and settings. Such a profile may join the run after the search, without training shared weights again.
Which model it follows, and who proposes what is evaluated for it, say the settings of the search.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nasdeploy.errors import RunFolderError
from nasdeploy.files import write_json, write_whole
from nasdeploy.networks import Supernet
from nasdeploy.optim import draws
from nasdeploy.optim.added import added_optimizer
from nasdeploy.optim.estimators import Evaluated
from nasdeploy.optim.strategy import Strategy
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.evaluations import GUIDED, evaluation_rows, evaluations_csv
from nasdeploy.pipeline.loss_models import make_guide
from nasdeploy.pipeline.objectives import make_objective
from nasdeploy.pipeline.step_rows import Row
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.profiles import HardwareProfile
from nasdeploy.runs import read_json
from nasdeploy.searchers.adapting import Adapted, adapt, uncovered
from nasdeploy.spaces.base import SearchSpace

ADAPTATION_SCHEMA = "nasdeploy/adaptation/1"


def adapted(job: Job, costs: ProfileCosts, supernet: Supernet, joint: Strategy) -> Strategy:
    """Return the distribution of an added profile: the stored one, or the search adapted to it now.

    It depends on the search alone, not on profiles that were added before: the order in which they come, and one that
    is added again, change nothing.
    """
    name, path = costs.profile.name, job.folder.adapted(costs.profile.name)
    objective = make_objective(costs)
    if path.exists():
        stored = added_optimizer(joint.num_candidates, objective=objective, mask=costs.mask)
        stored.load_state_dict(read_json(path, schema=ADAPTATION_SCHEMA)["optimizer"])
        return stored
    settings = job.settings.search
    started = time.perf_counter()
    job.observer.start(f"adapt {name}")
    found = adapt(
        joint,
        objective=objective,
        mask=costs.mask,
        supernet=supernet,
        valid=job.batches(
            job.valid, purpose=f"adapt/{name}", batch_size=settings.loss_batch_size, augment=False
        ),
        num_loss_samples=settings.num_loss_samples,
        num_steps=settings.num_added_steps,
        rng=np.random.default_rng(job.seed(f"adapt/{name}/architectures")),
        class_weights=job.class_weights,
        guide=make_guide(job, objective, costs.mask),
    )
    seconds = time.perf_counter() - started
    within = int(objective.feasible(joint.archive.choices).sum())
    write_whole(job.folder.adapted_evaluations(name), _evaluations(job.space, name, found.told).encode())
    write_json(path, _facts(name, found, joint, seconds=seconds, within=within))
    job.observer.finish(f"adapt {name}", {"seconds": round(seconds, 1), "recorded within its caps": within})
    return found.optimizer


def _evaluations(space: SearchSpace, name: str, told: Sequence[Evaluated]) -> str:
    """Return what was evaluated for the profile ``name`` alone, in steps of its own, as CSV."""
    rows: list[Row] = []
    for step, one in enumerate(told, start=1):
        owners = one.draw.owners.tolist()
        rows += evaluation_rows(
            space,
            one.draw.choices,
            one.losses,
            steps=[step] * len(owners),
            origins=[GUIDED if k == draws.GUIDED else name for k in owners],
        )
    return evaluations_csv(rows)


def _facts(name: str, found: Adapted, joint: Strategy, *, seconds: float, within: int) -> dict[str, Any]:
    return {
        "schema": ADAPTATION_SCHEMA,
        "profile": name,
        "seconds": seconds,
        "num_recorded": len(joint.archive.losses),
        "num_recorded_within_caps": within,
        "num_evaluations": sum(len(one.losses) for one in found.told),
        "optimizer": found.optimizer.state_dict(),
    }


def check_trained(job: Job, stored: Mapping[str, Any], new: Sequence[HardwareProfile]) -> None:
    """Raise RunFolderError where a profile of ``new`` may use a candidate that no weights were trained for.

    stored: the content of ``run.json``.
    """
    trained = [
        job.space.candidate_mask(stored["profiles"][name]["runtime"]["channel_multiple"])
        for name in stored["searched"]
    ]
    for profile in new:
        missing = uncovered(
            job.space, searched=trained, wanted=job.space.candidate_mask(profile.runtime.channel_multiple)
        )
        if missing is not None:
            raise RunFolderError(
                f"{job.folder.path}: its search does not cover {profile.name}: no network with {missing} was trained; "
                "search for all profiles together in another folder (--output-dir)"
            )
