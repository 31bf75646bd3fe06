"""Training of one selected network: from the supernet's weights or from random ones, with distillation and EMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nasdeploy.checkpoints import load_optimizer
from nasdeploy.data import TrainingBatches
from nasdeploy.settings import RetrainSettings
from nasdeploy.training.losses import mixed_loss, soft_targets
from nasdeploy.training.precision import autocast
from nasdeploy.training.schedules import make_optimizer, one_cycle, schedule_state
from nasdeploy.training.supernet import MAX_GRADIENT_NORM

MAX_KEPT_TARGETS = 50_000_000
"""200 MB: 5 million images of 10 classes. What comes later in a longer schedule is computed for every profile."""


class Teacher:
    """The soft targets of one network for a fixed sequence of batches.

    Every profile retrains on the same sequence (same data, same seed), so that each batch is computed once, whatever
    the number of profiles.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval()
        self._targets: list[Tensor] = []
        self._num_kept = 0

    @torch.no_grad()
    def targets(self, step: int, images: Tensor) -> Tensor:
        """Return the probabilities (B, N) for the batch of ``step``; steps come in order the first time."""
        if step < len(self._targets):
            return self._targets[step]
        with autocast(images.device):
            targets = soft_targets(self._network(images))
        if step == len(self._targets) and self._num_kept + targets.numel() <= MAX_KEPT_TARGETS:
            self._targets.append(targets)
            self._num_kept += targets.numel()
        return targets


class Retraining:
    """Training of ``network`` for ``settings.num_steps`` batches, step by step, with a moving average of it.

    It can be stored between any two steps. The weight of the teacher falls linearly to zero: a supernet's largest
    network is soon worse than its pupil. The average covers the batch-norm statistics too (Izmailov et al. 2018
    recompute them; with a decay they follow). class_weights: (num_classes,) of the labels' loss, None: all 1.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: TrainingBatches,
        settings: RetrainSettings,
        *,
        teacher: Teacher | None,
        class_weights: Tensor | None = None,
    ) -> None:
        self.num_done = 0
        self.num_steps = settings.num_steps
        self._network = network.train()
        self._batches, self._settings = batches, settings
        self._teacher, self._class_weights = teacher, class_weights
        self._optimizer = make_optimizer(network, weight_decay=settings.weight_decay)
        self._schedule = one_cycle(
            self._optimizer, learning_rate=settings.learning_rate, num_steps=settings.num_steps
        )
        ema = get_ema_multi_avg_fn(_decay(settings))  # type: ignore[no-untyped-call]
        self._average = AveragedModel(network, multi_avg_fn=ema, use_buffers=True)

    def step(self) -> Tensor:
        """Train on one batch; return the loss, a scalar still on the device."""
        settings, step = self._settings, self.num_done
        images, labels = next(self._batches)
        targets = self._teacher.targets(step, images) if self._teacher is not None else None
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(images.device):
            logits = self._network(images)
        loss = mixed_loss(
            logits,
            labels,
            soft_targets=targets,
            distillation_weight=settings.distillation_weight * (1.0 - step / settings.num_steps),
            label_smoothing=settings.label_smoothing,
            class_weights=self._class_weights,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._network.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._average.update_parameters(self._network)
        self.num_done = step + 1
        return loss.detach()

    def result(self) -> nn.Module:
        """Return the moving average, in evaluation mode."""
        averaged: nn.Module = self._average.module
        return averaged.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the steps to come depend on, as tensors and plain data."""
        return {
            "num_done": self.num_done,
            "network": self._network.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": schedule_state(self._schedule),
            "batches": self._batches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken: the steps that follow are the same, bit by bit."""
        self.num_done = int(state["num_done"])
        self._network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        load_optimizer(self._optimizer, state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._batches.load_state_dict(state["batches"])


def _decay(settings: RetrainSettings) -> float:
    """Return the EMA decay, less for a short run: it must forget where it started at least five times over."""
    return max(0.0, min(settings.ema_decay, 1.0 - 5.0 / settings.num_steps))
