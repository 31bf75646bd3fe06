"""What random weights say of each profile: the networks that it may choose from, and the one that it has.

Made from the archive of the run and the costs of the profile, and stored, so that a report needs no table of costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.exporters.metadata import architecture_hash
from nasdeploy.files import write_json
from nasdeploy.optim import categorical
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.objectives import make_objective
from nasdeploy.pipeline.random_weight import (
    SCHEMA,
    budgeted,
    evaluation_seed,
    make_evaluator,
    stored_archive,
)
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.runs import read_json
from nasdeploy.searchers.archived import ScoredArchive
from nasdeploy.searchers.evaluator import Evaluator
from nasdeploy.searchers.evolution import front_of
from nasdeploy.spaces.base import Architecture

TABLE_SCHEMA = "nasdeploy/random-weight-table/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredNetwork:
    """A network by names, its top-1 error with random weights, the standard error of that, and its costs by metric."""

    architecture: Mapping[str, str]
    error: float
    standard_error: float
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWeightTable:
    """The answer for one profile.

    networks: those of the archive within its caps that no other beats in error and in all metrics that it budgets, by
    error. chosen: the network that the run selected for it, whether in the archive or not. num_feasible: of the
    archive.
    """

    networks: tuple[ScoredNetwork, ...]
    chosen: ScoredNetwork
    num_feasible: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWeightResult:
    """What was scored, and the table of every profile. limits: what such errors do not say."""

    num_evaluations: int
    num_seeds: int
    seconds: float
    limits: tuple[str, ...]
    tables: Mapping[str, RandomWeightTable]


def store_tables(job: Job, costs: Mapping[str, ProfileCosts]) -> None:
    """Write the table of every profile of ``costs`` whose network is another one than in the stored table."""
    archive: ScoredArchive | None = None
    evaluator: Evaluator | None = None
    for name, one in costs.items():
        path, chosen = job.folder.random_weight_table(name), stored_architecture(job, name)
        key = architecture_hash(job.space.name, job.space.to_names(chosen))
        if path.exists() and read_json(path, schema=TABLE_SCHEMA)["hash"] == key:
            continue
        archive, evaluator = archive or stored_archive(job), evaluator or make_evaluator(job)
        table = _table(job, one, archive, chosen, evaluator)
        write_json(path, {"schema": TABLE_SCHEMA, "profile": name, "hash": key, **asdict(table)})


def random_weight_result(job: Job) -> RandomWeightResult | None:
    """Return what is stored for the profiles of ``job``, None where the run has scored nothing."""
    if not job.folder.random_weight.exists():
        return None
    stored = read_json(job.folder.random_weight, schema=SCHEMA)
    return RandomWeightResult(
        num_evaluations=len(stored["losses"]),
        num_seeds=stored["num_seeds"],
        seconds=stored["seconds"],
        limits=tuple(stored["limits"]),
        tables={
            profile.name: _table_of(
                read_json(job.folder.random_weight_table(profile.name), schema=TABLE_SCHEMA)
            )
            for profile in job.profiles
        },
    )


def _table(
    job: Job, costs: ProfileCosts, archive: ScoredArchive, chosen: Architecture, evaluator: Evaluator
) -> RandomWeightTable:
    objective, mask = (
        make_objective(costs),
        categorical.mask_array(job.space.num_candidates(), costs.mask),
    )
    front = front_of(
        choices=archive.choices,
        losses=archive.losses,
        objective=objective,
        mask=mask,
        metrics=budgeted(costs),
    )
    own = np.array([chosen.choices])
    scores = archive.score(own, evaluator=evaluator, seed=evaluation_seed(job))
    allowed = categorical.within(mask, archive.choices)
    return RandomWeightTable(
        networks=_networks(job, costs, archive.choices[front], archive.losses[front], archive.errors[front]),
        chosen=_networks(job, costs, own, scores.losses, scores.errors)[0],
        num_feasible=int((allowed & objective.feasible(archive.choices)).sum()),
    )


def _networks(
    job: Job, costs: ProfileCosts, choices: IntArray, losses: FloatArray, errors: FloatArray
) -> tuple[ScoredNetwork, ...]:
    """Return a row for each of ``choices`` (n, D)."""
    columns = {metric: table.of(choices).tolist() for metric, table in costs.tables.items()}
    rows: Sequence[Any] = choices.tolist()
    return tuple(
        ScoredNetwork(
            architecture=job.space.to_names(Architecture(tuple(row))),
            error=float(losses[i]),
            standard_error=float(errors[i]),
            costs={metric: column[i] for metric, column in columns.items()},
        )
        for i, row in enumerate(rows)
    )


def _table_of(stored: Mapping[str, Any]) -> RandomWeightTable:
    return RandomWeightTable(
        networks=tuple(ScoredNetwork(**row) for row in stored["networks"]),
        chosen=ScoredNetwork(**stored["chosen"]),
        num_feasible=stored["num_feasible"],
    )
