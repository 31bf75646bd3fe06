"""The one-shot search for all profiles together: shared weights and a distribution for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasdeploy.costs.table import FloatArray
from nasdeploy.data import Split
from nasdeploy.files import write_json, write_whole
from nasdeploy.networks import Supernet
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.selection import scaled_decision
from nasdeploy.optim.strategy import Strategy
from nasdeploy.pipeline.adding import adapted, check_trained
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.evaluations import Evaluations
from nasdeploy.pipeline.history import SHOWN_METRICS, History, mean_ess, to_csv
from nasdeploy.pipeline.importance import store_importance
from nasdeploy.pipeline.loss_models import make_predictor, make_proposer, make_surrogate
from nasdeploy.pipeline.methods import SearchTotals
from nasdeploy.pipeline.objectives import make_objective
from nasdeploy.pipeline.resuming import Checkpoint, carry_out
from nasdeploy.pipeline.schedule import training_speed
from nasdeploy.pipeline.steps import StepReports
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.profiles import HardwareProfile
from nasdeploy.progress import Value
from nasdeploy.runs import read_json
from nasdeploy.searchers.oneshot import OneShotSearch, SearchStep
from nasdeploy.searchers.selecting import FinalistJudge, Source, SupernetOutcome
from nasdeploy.spaces.base import to_architectures

RESULT_SCHEMA = "nasdeploy/search/1"
STATE_SCHEMA = "nasdeploy/search-state/1"
CHECKPOINT_SCHEMA = "nasdeploy/search-checkpoint/1"


WarmStart = Callable[[Job, Mapping[str, ProfileCosts]], FloatArray | None]


class OneShot:
    """The :class:`nasdeploy.pipeline.methods.SearchMethod` of shared weights; a profile may join it later.

    warm_start: gives where the distributions start (K, D, C), None: uniform.
    """

    def __init__(self, *, warm_start: WarmStart) -> None:
        self._warm_start = warm_start

    def is_finished(self, job: Job) -> bool:
        """Return whether the run folder holds a finished search."""
        folder = job.folder
        return all(path.exists() for path in (folder.search_result, folder.supernet, folder.search_state))

    def outcome(self, job: Job, costs: Mapping[str, ProfileCosts]) -> SupernetOutcome:
        """Return shared weights and the distributions of all profiles, stored ones, or searched or adapted now."""
        names = [profile.name for profile in job.searched]
        supernet, joint = self._searched(job, {name: costs[name] for name in names})
        sources = {}
        for profile in job.profiles:
            if profile.name in names:
                sources[profile.name] = Source(strategy=joint, k=names.index(profile.name))
            else:
                sources[profile.name] = Source(
                    strategy=adapted(job, costs[profile.name], supernet, joint), k=0
                )
        outcome = SupernetOutcome(
            judge=FinalistJudge(
                supernet, images=lambda a: _images(job.at(a)), class_weights=job.class_weights
            ),
            sources=sources,
            make_model=lambda objectives: make_predictor(job, objectives),
            seed=job.seed("select"),
            scaled=scaled_decision(job.space),
        )
        if not job.folder.importance.exists():
            model = outcome.model(joint)
            store_importance(job.folder, job.space, model, archive=joint.archive, mask=joint.mask)
        return outcome

    def check_covers(self, job: Job, stored: Mapping[str, Any], new: Sequence[HardwareProfile]) -> None:
        """Raise RunFolderError where a profile of ``new`` may use what the shared weights were not trained for."""
        check_trained(job, stored, new)

    def totals(self, job: Job) -> SearchTotals:
        """Return the steps of the shared weights and their seconds."""
        stored = read_json(job.folder.search_result)
        return SearchTotals(num_steps=stored["num_steps"], seconds=stored["seconds"], trained_weights=True)

    def _searched(self, job: Job, costs: Mapping[str, ProfileCosts]) -> tuple[Supernet, Strategy]:
        """Return the trained supernet and the distributions: from the run folder, or searched now and stored there.

        costs: of the profiles that the search is for, in the order of its distributions.
        """
        start = None if self.is_finished(job) else self._warm_start(job, costs)
        supernet, optimizer = make_supernet(job), make_strategy(job, costs, initial_theta=start)
        if not self.is_finished(job):
            _search(job, costs, supernet, optimizer)
            return supernet, optimizer
        folder = job.folder
        leftovers = (folder.search_checkpoint, folder.search_history_part, folder.search_evaluations_part)
        for leftover in leftovers:  # of a kill
            leftover.unlink(missing_ok=True)
        supernet.load_state_dict(folder.load_tensors(folder.supernet))
        optimizer.load_state_dict(read_json(folder.search_state, schema=STATE_SCHEMA)["optimizer"])
        return supernet, optimizer


def _images(job: Job) -> tuple[Tensor, Split]:
    return job.recalibration_images, job.valid


def make_supernet(job: Job) -> Supernet:
    """Return the untrained supernet on the training device."""
    supernet = Supernet(job.space, job.normalise(), job.generator("supernet")).to(job.device)
    return supernet.to(memory_format=torch.channels_last)


def make_strategy(
    job: Job, costs: Mapping[str, ProfileCosts], *, initial_theta: FloatArray | None = None
) -> Strategy:
    """Return the K distributions at their start, ``initial_theta`` (K, D, C) or uniform: the seat of what learns."""
    settings, num_candidates = job.settings.search, job.space.num_candidates()
    objectives, masks = [make_objective(one) for one in costs.values()], [one.mask for one in costs.values()]
    robust = settings.estimator == "doubly_robust"
    guided_share = settings.guided_share if robust else 0.0
    surrogate = make_surrogate(job, objectives) if robust else None
    proposer = make_proposer(job, objectives, masks, surrogate=surrogate) if guided_share > 0.0 else None
    return PooledOptimizer(
        num_candidates=num_candidates,
        objectives=objectives,
        masks=masks,
        estimator=settings.estimator,
        initial_theta=initial_theta,
        surrogate=surrogate,
        proposer=proposer,
        guided_share=guided_share,
    )


def _search(job: Job, costs: Mapping[str, ProfileCosts], supernet: Supernet, optimizer: Strategy) -> None:
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
    optimizer: Strategy,
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
