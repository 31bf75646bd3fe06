"""What says before a training how good a network will be, for the benchmark beside it.

A scorer takes the architectures (n) and returns one number for each (n,): the larger, the better it is expected to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from nasdeploy.costs.latency_table import LatencyTable
from nasdeploy.costs.table import CostTable
from nasdeploy.errors import ConfigError
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.objective import Objective
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.oneshot import make_predictor, make_supernet
from nasdeploy.pipeline.random_weight import make_evaluator
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.searchers.selecting import FinalistJudge
from nasdeploy.spaces.base import Architecture

FloatArray = npt.NDArray[np.float64]
RUNGS = ("ridge", "pairs", "graph")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What scorers may know. run: of a search that is finished, for those that learn from one; None: there is none."""

    job: Job
    run: RunFolder | None

    @property
    def search(self) -> RunFolder:
        """The run. Raises ConfigError where there is none."""
        if self.run is None:
            raise ConfigError("--run: expected the folder of a finished search")
        return self.run


Scorer = Callable[[Known, Sequence[Architecture]], FloatArray]


def by_count(metric: str, known: Known, architectures: Sequence[Architecture]) -> FloatArray:
    """Return "params" or "flops": larger networks are expected to be better."""
    return known.job.counts[metric].of(_choices(architectures))


def by_latency(known: Known, architectures: Sequence[Architecture]) -> FloatArray:
    """Return the latency by the table of the run's first profile."""
    return _latency_tables(known)[0].of(_choices(architectures))


def by_random_weights(known: Known, architectures: Sequence[Architecture]) -> FloatArray:
    """Return the accuracy of a linear head on random features, by the default settings."""
    scores = make_evaluator(known.job).score(architectures, seed=known.job.seed("random weights/weights"))
    return -scores.losses


def by_shared_weights(known: Known, architectures: Sequence[Architecture]) -> FloatArray:
    """Return minus the loss on the validation split with shared weights, batch norms recalibrated."""
    job, supernet = known.job, make_supernet(known.job)
    supernet.load_state_dict(known.search.load_tensors(known.search.supernet))
    judge = FinalistJudge(
        supernet,
        images=lambda a: (job.at(a).recalibration_images, job.at(a).valid),
        class_weights=job.class_weights,
    )
    return -np.array([judge.judge(architecture).loss for architecture in architectures])


def by_recorded_losses(
    predictor: str, rungs: Sequence[str], known: Known, architectures: Sequence[Architecture]
) -> FloatArray:
    """Return minus the loss that a model of the losses of the search predicts.

    predictor, rungs: as in ``search.predictor`` and ``search.proxy.rungs``.
    """
    job, archive = known.job, _archive(known)
    if len(archive.losses) == 0:
        raise ConfigError(f"{known.search.path}: its search evaluated nothing; expected a longer one")
    proxy = job.settings.search.proxy.model_copy(update={"rungs": tuple(rungs)})
    search = job.settings.search.model_copy(update={"predictor": predictor, "proxy": proxy})
    job = job.with_(
        settings=job.settings.model_copy(update={"search": search}),
        observer=job.observer,
        searched=job.searched,
        threads=job.threads,
    )
    tables = [{**job.counts, "latency": table} for table in _latency_tables(known)]
    model = make_predictor(job, [Objective(tables=one) for one in tables])
    model.fit(archive.choices, archive.losses, archive.steps)
    return -model.predict(_choices(architectures))


SCORERS: dict[str, Scorer] = {
    "parameters": partial(by_count, "params"),
    "FLOPs": partial(by_count, "flops"),
    "latency table": by_latency,
    "random weights": by_random_weights,
    "shared weights, recalibrated": by_shared_weights,
    "recorded losses, Gaussian process": partial(by_recorded_losses, "gaussian-process", RUNGS),
    **{f"recorded losses, {rung}": partial(by_recorded_losses, "proxy", (rung,)) for rung in RUNGS},
    "recorded losses, chosen rung": partial(by_recorded_losses, "proxy", RUNGS),
}


def _choices(architectures: Sequence[Architecture]) -> npt.NDArray[np.int64]:
    return np.array([architecture.choices for architecture in architectures], dtype=np.int64)


def _latency_tables(known: Known) -> list[CostTable]:
    """Return a table for each profile that the search was for."""
    stored = [read_json(known.search.latency(profile.name))["table"] for profile in known.job.searched]
    return [LatencyTable.from_json(table).cost_table(known.job.space) for table in stored]


def _archive(known: Known) -> Archive:
    """Return the evaluations that the search remembered: what its selection learnt from."""
    rows = read_json(known.search.search_state)["optimizer"]["archive"]
    archive = Archive(len(known.job.space.decisions), max(1, sum(len(row["losses"]) for row in rows)))
    archive.load_state_dict(rows)
    return archive
