"""Phase 2: the one-shot search for all profiles together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nasdeploy.files import write_json, write_whole
from nasdeploy.networks import Supernet
from nasdeploy.optim.acquisition import KnowledgeGradient, loss_model
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.evaluations import Evaluations
from nasdeploy.pipeline.history import SHOWN_METRICS, History, mean_ess, to_csv
from nasdeploy.pipeline.resuming import Checkpoint, carry_out
from nasdeploy.pipeline.schedule import training_speed
from nasdeploy.pipeline.steps import StepReports
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.progress import Value
from nasdeploy.runs import read_json
from nasdeploy.searchers.oneshot import OneShotSearch, SearchStep, to_architectures

RESULT_SCHEMA = "nasdeploy/search/1"
STATE_SCHEMA = "nasdeploy/search-state/1"
CHECKPOINT_SCHEMA = "nasdeploy/search-checkpoint/1"


MAX_SAMPLES = 768
"""Losses that proposals are made by: those of the latest weights, and few enough that a step costs little."""


def make_objective(costs: ProfileCosts, *, tightened: Mapping[str, float] | None = None) -> Objective:
    """Return the objective of a profile.

    Its caps on what is measured keep the margins that the tables need. tightened: factors on caps, after a measurement
    broke one.
    """
    caps = dict(costs.limits.caps)
    if "latency" in caps:
        caps["latency"] *= costs.latency_margin
    if "peak_memory" in caps:
        caps["peak_memory"] *= costs.memory_margin
    for metric, factor in (tightened or {}).items():
        caps[metric] *= factor
    return Objective(
        tables=costs.tables,
        caps=caps,
        coefficients=costs.limits.coefficients,
        references=costs.limits.references,
    )


def make_supernet(job: Job) -> Supernet:
    """Return the untrained supernet on the training device."""
    supernet = Supernet(job.space, job.normalise(), job.generator("supernet")).to(job.device)
    return supernet.to(memory_format=torch.channels_last)


def make_optimizer(job: Job, costs: Mapping[str, ProfileCosts]) -> PooledOptimizer:
    """Return the K distributions at their start."""
    settings, num_candidates = job.settings.search, job.space.num_candidates()
    objectives, masks = [make_objective(one) for one in costs.values()], [one.mask for one in costs.values()]
    guided_share = settings.guided_share if settings.estimator == "doubly_robust" else 0.0
    proposer = None
    if guided_share > 0.0:
        proposer = KnowledgeGradient(
            num_candidates=num_candidates,
            objectives=objectives,
            masks=masks,
            model=loss_model(num_candidates, objectives, max_samples=MAX_SAMPLES),
        )
    return PooledOptimizer(
        num_candidates=num_candidates,
        objectives=objectives,
        masks=masks,
        estimator=settings.estimator,
        proposer=proposer,
        guided_share=guided_share,
    )


def searched(job: Job, costs: Mapping[str, ProfileCosts]) -> tuple[Supernet, PooledOptimizer]:
    """Return the trained supernet and the distributions: from the run folder, or searched now and stored there.

    costs: of the profiles that the search is for, in the order of its distributions.
    """
    supernet, optimizer = make_supernet(job), make_optimizer(job, costs)
    if is_searched(job):
        folder = job.folder
        for leftover in (  # of a kill
            folder.search_checkpoint,
            folder.search_history_part,
            folder.search_evaluations_part,
        ):
            leftover.unlink(missing_ok=True)
        supernet.load_state_dict(job.folder.load_tensors(job.folder.supernet))
        optimizer.load_state_dict(read_json(job.folder.search_state, schema=STATE_SCHEMA)["optimizer"])
    else:
        _search(job, costs, supernet, optimizer)
    return supernet, optimizer


def is_searched(job: Job) -> bool:
    """Return whether the run folder holds a finished search."""
    folder = job.folder
    return all(path.exists() for path in (folder.search_result, folder.supernet, folder.search_state))


def _search(
    job: Job, costs: Mapping[str, ProfileCosts], supernet: Supernet, optimizer: PooledOptimizer
) -> None:
    settings = job.settings.search
    speed = training_speed(job)
    job.observer.note(f"the largest network trains at {speed:.0f} images/s here ({job.threads} threads)")
    job.observer.start("search", settings.num_steps)
    loop = OneShotSearch(
        supernet,
        optimizer,
        train=job.batches(job.train, purpose="search/train", batch_size=settings.batch_size, augment=True),
        valid=job.batches(
            job.valid, purpose="search/valid", batch_size=settings.loss_batch_size, augment=False
        ),
        settings=settings,
        rng=np.random.default_rng(job.seed("search/architectures")),
        class_weights=job.class_weights,
    )
    history = History(job.folder.search_history_part, names=list(costs), optimizer=optimizer)
    evaluations = Evaluations(
        job.folder.search_evaluations_part, names=list(costs), space=job.space, optimizer=optimizer
    )
    checkpoint = Checkpoint(
        job.folder.search_checkpoint, schema=CHECKPOINT_SCHEMA, owner="/".join([job.fingerprint(), *costs])
    )

    reports = StepReports(job.observer, "search")

    def after_step(step: SearchStep) -> None:
        evaluations.add(step.step)
        reports.add(step.step, step.loss, history.add(step))

    def before_save() -> None:
        history.flush()
        evaluations.flush()
        reports.flush()

    seconds = carry_out(loop, checkpoint, after_step=after_step, before_save=before_save)
    reports.flush()
    rows = history.rows(settings.num_steps)
    job.folder.save_tensors(job.folder.supernet, supernet.state_dict())
    write_json(job.folder.search_state, {"schema": STATE_SCHEMA, "optimizer": optimizer.state_dict()})
    write_whole(job.folder.search_history, to_csv(rows).encode())
    write_whole(job.folder.search_evaluations, evaluations.to_csv().encode())
    write_json(
        job.folder.search_result, _result(job, optimizer, names=list(costs), rows=rows, seconds=seconds)
    )
    checkpoint.discard()
    history.discard()
    evaluations.discard()
    job.observer.finish("search", {"seconds": round(seconds, 1)})


def _result(
    job: Job,
    optimizer: PooledOptimizer,
    *,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Value]],
    seconds: float,
) -> dict[str, object]:
    settings = job.settings.search
    modes = to_architectures(optimizer.modes())
    diagnostics = optimizer.diagnostics
    return {
        "schema": RESULT_SCHEMA,
        "num_steps": settings.num_steps,
        "seconds": seconds,
        "images_per_second": settings.num_steps * settings.batch_size / seconds,
        "num_evaluations": optimizer.num_steps * settings.num_loss_samples,
        "estimator": settings.estimator,
        "profiles": {
            name: {
                "mode": job.space.to_names(modes[k]),
                "entropy": diagnostics.entropy[k] if diagnostics else None,
                "ess": mean_ess(rows, name),
                "expected_costs": {metric: optimizer.expected_cost(k, metric) for metric in SHOWN_METRICS},
            }
            for k, name in enumerate(names)
        },
    }
