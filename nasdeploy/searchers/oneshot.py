"""The one-shot search: shared weights and K distributions learn in turns, from the same data. [search.md, One step]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from nasdeploy.checkpoints import load_optimizer
from nasdeploy.costs.table import IntArray
from nasdeploy.data import Batch, TrainingBatches
from nasdeploy.errors import ConfigError
from nasdeploy.networks import Supernet
from nasdeploy.optim.pooled import Diagnostics
from nasdeploy.optim.strategy import Strategy
from nasdeploy.settings import SearchSettings
from nasdeploy.spaces.base import Architecture, to_architectures
from nasdeploy.training.schedules import make_optimizer, one_cycle, schedule_state
from nasdeploy.training.supernet import architecture_losses, train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStep:
    """What one step did. loss: mean of the networks trained in it, a scalar still on the device.

    diagnostics: of the distributions when they last moved, None in the warm-up, when only the weights learn.
    """

    step: int
    loss: Tensor
    diagnostics: Diagnostics | None


class OneShotSearch:
    """Shared weights and distributions that learn in turns, step by step; it can be stored between any two steps.

    train, valid: batches of the two parts of the training split; valid of ``settings.loss_batch_size`` images.
    class_weights: (num_classes,) of the losses, None: all 1.
    """

    def __init__(
        self,
        supernet: Supernet,
        optimizer: Strategy,
        *,
        train: TrainingBatches,
        valid: TrainingBatches,
        settings: SearchSettings,
        rng: np.random.Generator,
        class_weights: Tensor | None = None,
    ) -> None:
        self.num_done = 0
        self.num_steps = settings.num_steps
        self._supernet, self._optimizer = supernet, optimizer
        self._train, self._valid = train, valid
        self._settings, self._rng, self._class_weights = settings, rng, class_weights
        self._weights = make_optimizer(supernet, weight_decay=settings.weight_decay)
        self._schedule = one_cycle(
            self._weights, learning_rate=settings.learning_rate, num_steps=settings.num_steps
        )
        self._num_warm_up = min(round(settings.warm_up_share * settings.num_steps), settings.num_steps - 1)

    def step(self) -> SearchStep:
        """Train the weights on one batch and, where it is their turn, move the distributions."""
        settings, step = self._settings, self.num_done
        warming_up = step < self._num_warm_up
        drawn = self._optimizer.ask_for_weights(
            settings.num_weight_samples,
            self._rng,
            uniform_share=1.0 if warming_up else settings.uniform_share,
        )
        images, labels = next(self._train)
        ends = _ends(self._supernet, step, settings.sandwich_interval)
        loss = train_step(
            self._supernet,
            self._weights,
            images=images,
            labels=labels,
            architectures=[*to_architectures(drawn), *ends],
            label_smoothing=settings.label_smoothing,
            class_weights=self._class_weights,
        )
        self._schedule.step()
        if not warming_up and (step - self._num_warm_up) % settings.loss_interval == 0:
            self._move_distributions()
        self.num_done = step + 1
        return SearchStep(step=self.num_done, loss=loss, diagnostics=self._optimizer.diagnostics)

    def _move_distributions(self) -> None:
        """Evaluate architectures of the mixture once, on one common batch: each loss serves all K distributions."""
        choices = self._optimizer.ask(self._settings.num_loss_samples, self._rng)
        evaluate_and_tell(
            self._supernet, self._optimizer, choices, next(self._valid), class_weights=self._class_weights
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the steps to come depend on, as tensors and plain data."""
        return {
            "num_done": self.num_done,
            "supernet": self._supernet.state_dict(),
            "weights": self._weights.state_dict(),
            "schedule": schedule_state(self._schedule),
            "optimizer": self._optimizer.state_dict(),
            "rng": self._rng.bit_generator.state,
            "train": self._train.state_dict(),
            "valid": self._valid.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken: the steps that follow are the same, bit by bit."""
        self.num_done = int(state["num_done"])
        self._supernet.load_state_dict(state["supernet"])
        load_optimizer(self._weights, state["weights"])
        self._schedule.load_state_dict(state["schedule"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.bit_generator.state = state["rng"]
        self._train.load_state_dict(state["train"])
        self._valid.load_state_dict(state["valid"])


def _ends(supernet: Supernet, step: int, interval: int) -> list[Architecture]:
    """Return the smallest and the largest architecture in every ``interval``-th step, else nothing.

    The sandwich rule (Yu & Huang 2019) adds them to every step. For equal time that ranks the others worse: on
    Fashion-MNIST their supernet losses then no longer fell with size, since most of the time went into the two ends.
    """
    return [supernet.space.smallest(), supernet.space.largest()] if step % interval == 0 else []


def evaluate_and_tell(
    supernet: Supernet,
    optimizer: Strategy,
    choices: IntArray,
    batch: Batch,
    *,
    class_weights: Tensor | None = None,
) -> None:
    """Evaluate ``choices`` (n, D), what ``optimizer`` asked for, on one batch, and tell it the losses.

    Raises ConfigError for a loss that is not finite.
    """
    images, labels = batch
    losses = architecture_losses(
        supernet, to_architectures(choices), images, labels, class_weights=class_weights
    )
    if not np.isfinite(losses).all():
        raise ConfigError(
            "search.learning_rate: the training of the shared weights diverged (a loss is not finite); "
            "expected a lower rate, such as 0.05"
        )
    optimizer.tell(choices, np.array(losses, dtype=np.float64))
