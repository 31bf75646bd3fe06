"""The search with random weights: NSGA-II over their error and the costs, one archive for all profiles.

It trains nothing but last layers, so that its answer takes minutes. [alternatives.md, A]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nasdeploy.costs.joint_caps import JointCaps
from nasdeploy.costs.table import Cost, FloatArray, IntArray
from nasdeploy.files import write_json, write_whole
from nasdeploy.optim import categorical
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.objective import Judge
from nasdeploy.optim.selection import scaled_decision
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.devices import where
from nasdeploy.pipeline.methods import SearchTotals
from nasdeploy.pipeline.objectives import make_objective
from nasdeploy.pipeline.resuming import Checkpoint, carry_out
from nasdeploy.pipeline.step_rows import csv_text
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.profiles import HardwareProfile
from nasdeploy.runs import read_json
from nasdeploy.searchers.archived import ArchiveOutcome, ScoredArchive
from nasdeploy.searchers.evaluator import Evaluator
from nasdeploy.searchers.evolution import MultiObjectiveSearch, relative_cost
from nasdeploy.searchers.random_weight import LIMITS, RandomWeightEvaluator
from nasdeploy.searchers.scoring import Scored, ScoringLoop
from nasdeploy.spaces.base import to_architectures

SCHEMA = "nasdeploy/random-weight/1"
CHECKPOINT_SCHEMA = "nasdeploy/random-weight-checkpoint/1"
PHASE = "random weights"
CSV_HEADER = ("generation", "error", "standard_error")


class RandomWeight:
    """The :class:`nasdeploy.pipeline.methods.SearchMethod` that trains no weights; any profile may join it later."""

    def is_finished(self, job: Job) -> bool:
        """Return whether the run folder holds a finished archive."""
        return job.folder.random_weight.exists()

    def outcome(self, job: Job, costs: Mapping[str, ProfileCosts]) -> ArchiveOutcome:
        """Return the archive, stored or made now, from which each profile of ``job`` reads its answer."""
        evaluator = make_evaluator(job)
        archive = scored_archive(job, {p.name: costs[p.name] for p in job.searched}, evaluator)
        return ArchiveOutcome(
            archive,
            num_candidates=job.space.num_candidates(),
            masks={profile.name: costs[profile.name].mask for profile in job.profiles},
            evaluator=evaluator,
            seed=evaluation_seed(job),
            scaled=scaled_decision(job.space),
        )

    def check_covers(self, job: Job, stored: Mapping[str, Any], new: Sequence[HardwareProfile]) -> None:
        """Refuse nothing: a profile whose caps no scored network keeps gets one that is scored for it."""

    def totals(self, job: Job) -> SearchTotals:
        """Return how many architectures were scored, and in how many seconds."""
        stored = read_json(job.folder.random_weight, schema=SCHEMA)
        return SearchTotals(num_steps=len(stored["losses"]), seconds=stored["seconds"], trained_weights=False)


def make_evaluator(job: Job) -> RandomWeightEvaluator:
    """Return the evaluator of the settings, on the images of ``job``."""
    settings = job.settings.search.random_weight
    return RandomWeightEvaluator(
        job.space,
        job.normalise(),
        images=lambda architecture: (job.at(architecture).train, job.at(architecture).valid),
        num_images=settings.num_images,
        num_seeds=settings.num_seeds,
        ridge=settings.ridge,
        head=settings.head,
        class_weights=job.class_weights,
    )


def evaluation_seed(job: Job) -> int:
    """Return the seed of the weights: the same for every architecture of a run."""
    return job.seed("random weights/weights")


def scored_archive(job: Job, costs: Mapping[str, ProfileCosts], evaluator: Evaluator) -> ScoredArchive:
    """Return the archive of the run: stored, or made now for all profiles of ``costs`` together."""
    if not job.folder.random_weight.exists():
        _search(job, costs, evaluator)
    job.folder.random_weight_checkpoint.unlink(missing_ok=True)  # a kill may have left it
    return stored_archive(job)


def stored_archive(job: Job) -> ScoredArchive:
    """Return the finished archive of the run folder. Raises RunFolderError where it is damaged."""
    stored = read_json(job.folder.random_weight, schema=SCHEMA)
    return ScoredArchive(
        choices=np.array(stored["choices"], dtype=np.int64).reshape(-1, len(job.space.decisions)),
        losses=np.array(stored["losses"], dtype=np.float64),
        errors=np.array(stored["errors"], dtype=np.float64),
    )


def _search(job: Job, costs: Mapping[str, ProfileCosts], evaluator: Evaluator) -> None:
    settings = job.settings.search.random_weight
    job.observer.start(PHASE, settings.num_evaluations)
    masks = np.stack([categorical.mask_array(job.space.num_candidates(), one.mask) for one in costs.values()])
    loop = ScoringLoop(
        _nsga2(job, costs, masks),
        evaluator,
        cost=_mean_cost(costs, np.logical_or.reduce(masks)),
        num_evaluations=settings.num_evaluations,
        seed=evaluation_seed(job),
    )
    owner = "/".join([job.fingerprint(), *costs])
    checkpoint = Checkpoint(job.folder.random_weight_checkpoint, schema=CHECKPOINT_SCHEMA, owner=owner)

    def after_step(scored: Scored) -> None:
        found = {"generation": scored.generation, "error": scored.loss, "standard_error": scored.error}
        job.observer.advance(PHASE, scored.step, found)

    seconds = carry_out(loop, checkpoint, after_step=after_step)
    write_whole(job.folder.random_weight_evaluations, _csv(job, loop).encode())
    write_json(job.folder.random_weight, _facts(job, loop, seconds))
    checkpoint.discard()
    job.observer.finish(PHASE, {"seconds": round(seconds, 1)})


def _nsga2(job: Job, costs: Mapping[str, ProfileCosts], masks: BoolArray) -> MultiObjectiveSearch:
    """Return the search at its start; masks: (K, D, C).

    It scores what some profile can afford, and first, for each, the network that is nearest to its caps: so that even
    tight caps have one that was scored. Of more profiles than ``population_size`` the first have it.
    """
    settings = job.settings.search.random_weight
    objectives = [make_objective(one) for one in costs.values()]
    judge = Judge(objectives)
    nearest = [
        JointCaps(objective.tables, objective.caps, one.mask).nearest().choices
        for objective, one in zip(objectives, costs.values(), strict=True)
        if objective.caps
    ]

    def affordable(choices: IntArray) -> BoolArray:
        feasible = judge.judge(choices).violation == 0.0  # (K, n)
        found: BoolArray = (feasible & categorical.within(masks, choices)).any(axis=0)
        return found

    return MultiObjectiveSearch(
        mask=np.logical_or.reduce(masks),
        num_evaluations=settings.num_evaluations,
        population_size=settings.population_size,
        seed=job.seed("random weights/search"),
        first=np.array(nearest, dtype=np.int64).reshape(-1, masks.shape[1]),
        affordable=affordable,
    )


def _mean_cost(costs: Mapping[str, ProfileCosts], mask: BoolArray) -> Callable[[IntArray], FloatArray]:
    """Return the mean of all metrics that some profile budgets, relative to a random network inside ``mask`` (D, C).

    Every metric counts once, however many profiles budget it; what differs by runtime is the mean over the runtimes.
    """
    tables: dict[str, dict[tuple[str, str], Cost]] = {}
    for one in costs.values():
        runtime = one.profile.runtime.key(), where(one.profile)
        for metric in budgeted(one):
            tables.setdefault(metric, {}).setdefault(runtime, one.tables[metric])
    parts = [relative_cost(list(found.values()), mask) for found in tables.values()]

    def cost(choices: IntArray) -> FloatArray:
        mean: FloatArray = np.mean([part(choices) for part in parts], axis=0)
        return mean

    return cost


def budgeted(costs: ProfileCosts) -> tuple[str, ...]:
    """Return the metrics that a profile budgets, by a cap or by a coefficient, in the order of its tables."""
    limits = costs.limits
    return tuple(metric for metric in costs.tables if metric in limits.caps or metric in limits.coefficients)


def _csv(job: Job, loop: ScoringLoop) -> str:
    """Return everything that was scored, as CSV; losses keep all their digits."""
    rows = zip(
        loop.generations,
        loop.losses.tolist(),
        loop.errors.tolist(),
        to_architectures(loop.choices),
        strict=True,
    )
    return csv_text(
        (
            {
                "generation": generation,
                "error": repr(loss),
                "standard_error": repr(error),
                **{_column(name): value for name, value in job.space.to_names(architecture).items()},
            }
            for generation, loss, error, architecture in rows
        ),
        first=CSV_HEADER,
    )


def _column(decision: str) -> str:
    return f"decision {decision}" if decision in CSV_HEADER else decision


def _facts(job: Job, loop: ScoringLoop, seconds: float) -> dict[str, Any]:
    settings = job.settings.search.random_weight
    return {
        "schema": SCHEMA,
        "seconds": seconds,
        "num_generations": max(loop.generations, default=0),
        "num_images": settings.num_images,
        "num_seeds": settings.num_seeds,
        "head": settings.head,
        "limits": list(LIMITS),
        "choices": loop.choices.tolist(),
        "losses": loop.losses.tolist(),
        "errors": loop.errors.tolist(),
    }
