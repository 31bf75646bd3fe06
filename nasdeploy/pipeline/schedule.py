"""How much work the schedule is, what that takes on this machine, and how ``--time-budget`` scales it.

The unit of work is one training image of the space's largest network, forward and backward.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import Job
from nasdeploy.settings import BuildSettings, parse_duration
from nasdeploy.training.precision import autocast
from nasdeploy.training.recalibration import MIN_IMAGES
from nasdeploy.training.schedules import make_optimizer

# Measured on the default space: a forward pass costs about a sixth of a step, a sampled network half of the largest.
FORWARD_SHARE = 1 / 6
SAMPLED_SHARE = 0.5
SMALLEST_SHARE = 0.1
EXPORT_SECONDS = 3.0
CERTIFY_SECONDS = 8.0
SCORE_SECONDS = 0.03
"""Of one draw of random weights, beside the images that pass through it: the weights and the last layer."""
GRAPH_SECONDS = 40.0
"""Of proxy validation with a graph network: to pretrain it, and to choose between it and the simpler models."""
MEMORY_TABLE_SECONDS = 15.0
MIN_SCALE = 0.02
SCALED_PHASES = ("random weights", "search", "retrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPhase:
    """A phase and the seconds that it is expected to take."""

    name: str
    seconds: float


def planned_phases(
    settings: BuildSettings,
    *,
    image_sizes: Sequence[int],
    num_runtimes: int,
    images_per_second: float,
    num_memory_tables: int = 0,
    split_sizes: tuple[int, int] = (10_000, 2_500),
) -> list[PlannedPhase]:
    """Return the phases of a build and how long they take where the largest network trains at that speed.

    image_sizes: that of the images, or those to choose from, in pixels. num_memory_tables: of runtimes with a profile
    that budgets memory. split_sizes: how many images there are to train on and to validate.
    """
    num_profiles = len(settings.profiles)
    files = num_profiles * (EXPORT_SECONDS + CERTIFY_SECONDS / 3) + CERTIFY_SECONDS * num_runtimes
    retrained = num_profiles * (3 if settings.baselines else 1)
    memory = MEMORY_TABLE_SECONDS * num_memory_tables
    return [
        PlannedPhase(name="latency tables", seconds=table_seconds(image_sizes) * num_runtimes),
        *([PlannedPhase(name="memory tables", seconds=memory)] if memory else []),
        *_search_phases(settings, images_per_second=images_per_second, split_sizes=split_sizes),
        PlannedPhase(name="retrain", seconds=_retrain_work(settings, retrained) / images_per_second),
        PlannedPhase(name="export, verify, certify", seconds=files),
    ]


def _search_phases(
    settings: BuildSettings, *, images_per_second: float, split_sizes: tuple[int, int]
) -> list[PlannedPhase]:
    """Return the phases that choose architectures: random weights, shared weights, or one before the other."""
    phases = []
    if settings.search.weighs_at_random:
        draws = settings.search.random_weight.num_evaluations * settings.search.random_weight.num_seeds
        work = _scoring_work(settings, split_sizes)
        seconds = draws * (work / images_per_second + SCORE_SECONDS)
        phases.append(PlannedPhase(name="random weights", seconds=seconds))
    if settings.search.trains_weights:
        phases += [
            PlannedPhase(name="search", seconds=_search_work(settings) / images_per_second),
            PlannedPhase(
                name="select",
                seconds=_selection_work(settings) / images_per_second + _model_seconds(settings),
            ),
        ]
    return phases


def table_seconds(image_sizes: Sequence[int]) -> float:
    """Return about how long a latency table takes; fitted to tables of 28 to 224 px and of three sizes together."""
    areas = [size**2 for size in image_sizes]
    return 5.0 + 0.825e-3 * sum(areas) / len(areas) + 0.425e-3 * sum(areas)


def _search_work(settings: BuildSettings) -> float:
    search = settings.search
    ends = (1.0 + SMALLEST_SHARE) / search.sandwich_interval
    trained = search.batch_size * (SAMPLED_SHARE * search.num_weight_samples + ends)
    evaluated = search.num_loss_samples * search.loss_batch_size * SAMPLED_SHARE * FORWARD_SHARE
    return search.num_steps * (trained + (1.0 - search.warm_up_share) * evaluated / search.loss_interval)


def _scoring_work(settings: BuildSettings, split_sizes: tuple[int, int]) -> float:
    """Return the work of one draw of random weights: batch norm, then the features of both parts of the images."""
    num_images = settings.search.random_weight.num_images
    passed = min(num_images, MIN_IMAGES) + sum(min(num_images, size) for size in split_sizes)
    return passed * SAMPLED_SHARE * FORWARD_SHARE


def _selection_work(settings: BuildSettings) -> float:
    return len(settings.profiles) * settings.search.num_finalists * 2_500 * SAMPLED_SHARE * FORWARD_SHARE


def _model_seconds(settings: BuildSettings) -> float:
    """Return how long the model of the losses takes that finalists are chosen by, where that is not next to nothing."""
    search = settings.search
    return GRAPH_SECONDS if search.predictor == "proxy" and "graph" in search.proxy.rungs else 0.0


def _retrain_work(settings: BuildSettings, num_networks: int) -> float:
    images = settings.retrain.num_steps * settings.retrain.batch_size
    teacher = FORWARD_SHARE if settings.search.trains_weights else 0.0
    return images * (num_networks * SAMPLED_SHARE + teacher)


def scaled(
    settings: BuildSettings,
    *,
    image_sizes: Sequence[int],
    num_runtimes: int,
    images_per_second: float,
    num_memory_tables: int = 0,
    split_sizes: tuple[int, int] = (10_000, 2_500),
) -> BuildSettings:
    """Return ``settings`` with the parts of its schedule (:func:`steps_of`) scaled to its time budget.

    Arguments as in :func:`planned_phases`. What does not depend on the steps is not scaled; where it alone exceeds the
    budget, the smallest schedule is used.
    """
    if settings.time_budget is None:
        return settings
    phases = planned_phases(
        settings,
        image_sizes=image_sizes,
        num_runtimes=num_runtimes,
        images_per_second=images_per_second,
        num_memory_tables=num_memory_tables,
        split_sizes=split_sizes,
    )
    by_steps = sum(phase.seconds for phase in phases if phase.name in SCALED_PHASES)
    fixed = sum(phase.seconds for phase in phases) - by_steps
    scale = max(MIN_SCALE, (parse_duration(settings.time_budget) - fixed) / by_steps)
    least = {"search": 10, "retrain": 10, "random_weight": settings.search.random_weight.population_size}
    steps = {part: max(least[part], round(scale * number)) for part, number in steps_of(settings).items()}
    return with_steps(settings, steps)


def steps_of(settings: BuildSettings) -> dict[str, int]:
    """Return the parts of the schedule that a time budget scales, as ``run.json`` has them."""
    steps = {"search": settings.search.num_steps, "retrain": settings.retrain.num_steps}
    if settings.search.weighs_at_random:
        steps["random_weight"] = settings.search.random_weight.num_evaluations
    return steps


def with_steps(settings: BuildSettings, steps: Mapping[str, int]) -> BuildSettings:
    """Return ``settings`` with the parts of the schedule that ``steps`` has, as :func:`steps_of` returns them."""
    search, retrain = settings.search, settings.retrain
    scored = steps.get("random_weight", search.random_weight.num_evaluations)
    return settings.model_copy(
        update={
            "search": search.model_copy(
                update={
                    "num_steps": steps["search"],
                    "random_weight": search.random_weight.model_copy(update={"num_evaluations": scored}),
                }
            ),
            "retrain": retrain.model_copy(update={"num_steps": steps["retrain"]}),
        }
    )


def training_speed(job: Job, *, num_steps: int = 8) -> float:
    """Return the images per second of plain training of the largest network, by the median step."""
    network = build_network(job.space, job.space.largest(), job.normalise()).to(job.device)
    network = network.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, weight_decay=0.0)
    batch_size = job.settings.retrain.batch_size
    batches = job.batches(job.train, purpose="speed", batch_size=batch_size, augment=True)
    seconds = []
    for _ in range(num_steps + 2):
        started = time.perf_counter()
        images, labels = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with autocast(job.device):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds.append(time.perf_counter() - started)
    return batch_size / sorted(seconds[2:])[num_steps // 2]
