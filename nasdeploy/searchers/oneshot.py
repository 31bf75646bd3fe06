"""The one-shot search: shared weights and K distributions learn in turns, from the same data. [search.md, One step]"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nasdeploy.costs.table import IntArray
from nasdeploy.data import TrainingBatches
from nasdeploy.errors import ConfigError
from nasdeploy.networks import Supernet
from nasdeploy.optim.pooled import Diagnostics, PooledOptimizer
from nasdeploy.settings import SearchSettings
from nasdeploy.spaces.base import Architecture
from nasdeploy.training.schedules import make_optimizer, one_cycle
from nasdeploy.training.supernet import architecture_losses, train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStep:
    """What one step did. loss: mean of the networks trained in it, a scalar still on the device.

    diagnostics: of the distributions when they last moved, None in the warm-up, when only the weights learn.
    """

    step: int
    loss: Tensor
    diagnostics: Diagnostics | None


def run_search(
    supernet: Supernet,
    optimizer: PooledOptimizer,
    *,
    train: TrainingBatches,
    valid: TrainingBatches,
    settings: SearchSettings,
    rng: np.random.Generator,
) -> Iterator[SearchStep]:
    """Train ``supernet`` and move the distributions of ``optimizer``, one :class:`SearchStep` at a time.

    train, valid: batches of the two parts of the training split; valid of ``settings.loss_batch_size`` images.
    """
    weights = make_optimizer(supernet, weight_decay=settings.weight_decay)
    schedule = one_cycle(weights, learning_rate=settings.learning_rate, num_steps=settings.num_steps)
    num_warm_up = min(round(settings.warm_up_share * settings.num_steps), settings.num_steps - 1)
    for step in range(settings.num_steps):
        warming_up = step < num_warm_up
        uniform_share = 1.0 if warming_up else settings.uniform_share
        drawn = optimizer.ask_for_weights(settings.num_weight_samples, rng, uniform_share=uniform_share)
        images, labels = next(train)
        loss = train_step(
            supernet,
            weights,
            images=images,
            labels=labels,
            architectures=[*to_architectures(drawn), *_ends(supernet, step, settings.sandwich_interval)],
            label_smoothing=settings.label_smoothing,
        )
        schedule.step()
        if not warming_up and (step - num_warm_up) % settings.loss_interval == 0:
            _move_distributions(supernet, optimizer, valid, settings.num_loss_samples, rng)
        yield SearchStep(step=step + 1, loss=loss, diagnostics=optimizer.diagnostics)


def _ends(supernet: Supernet, step: int, interval: int) -> list[Architecture]:
    """Return the smallest and the largest architecture in every ``interval``-th step, else nothing.

    The sandwich rule (Yu & Huang 2019) adds them to every step. For equal time that ranks the others worse: on
    Fashion-MNIST their supernet losses then no longer fell with size, since most of the time went into the two ends.
    """
    return [supernet.space.smallest(), supernet.space.largest()] if step % interval == 0 else []


def _move_distributions(
    supernet: Supernet, optimizer: PooledOptimizer, valid: TrainingBatches, n: int, rng: np.random.Generator
) -> None:
    """Evaluate n architectures of the mixture once, on one common batch: each loss serves all K distributions."""
    choices = optimizer.ask(n, rng)
    images, labels = next(valid)
    losses = architecture_losses(supernet, to_architectures(choices), images, labels)
    if not np.isfinite(losses).all():
        raise ConfigError(
            "search.learning_rate: the training of the shared weights diverged (a loss is not finite); "
            "expected a lower rate, such as 0.05"
        )
    optimizer.tell(choices, np.array(losses, dtype=np.float64))


def to_architectures(choices: IntArray) -> list[Architecture]:
    """Return the rows of ``choices`` (n, D) as architectures."""
    return [Architecture(tuple(row)) for row in choices.tolist()]
