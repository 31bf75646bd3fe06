"""Training of one selected network: from the supernet's weights or from random ones, with distillation and EMA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nasdeploy.data import TrainingBatches
from nasdeploy.settings import RetrainSettings
from nasdeploy.training.losses import mixed_loss, soft_targets
from nasdeploy.training.precision import autocast
from nasdeploy.training.schedules import make_optimizer, one_cycle
from nasdeploy.training.supernet import MAX_GRADIENT_NORM

ReportStep = Callable[[int, Tensor], None]
"""Called after every step with the number of steps done and the loss, still on the device."""


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


def retrain(
    network: nn.Module,
    batches: TrainingBatches,
    settings: RetrainSettings,
    *,
    teacher: Teacher | None,
    report: ReportStep | None = None,
) -> nn.Module:
    """Train ``network`` for ``settings.num_steps`` batches; return the moving average of it, in evaluation mode.

    The weight of the teacher falls linearly to zero: a supernet's largest network is soon worse than its pupil.
    The average covers the batch-norm statistics too (Izmailov et al. 2018 recompute them; with a decay they follow).
    """
    network.train()
    optimizer = make_optimizer(network, weight_decay=settings.weight_decay)
    schedule = one_cycle(optimizer, learning_rate=settings.learning_rate, num_steps=settings.num_steps)
    ema = get_ema_multi_avg_fn(_decay(settings))  # type: ignore[no-untyped-call]
    average = AveragedModel(network, multi_avg_fn=ema, use_buffers=True)
    for step in range(settings.num_steps):
        images, labels = next(batches)
        targets = teacher.targets(step, images) if teacher is not None else None
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device):
            logits = network(images)
        loss = mixed_loss(
            logits,
            labels,
            soft_targets=targets,
            distillation_weight=settings.distillation_weight * (1.0 - step / settings.num_steps),
            label_smoothing=settings.label_smoothing,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if report is not None:
            report(step + 1, loss.detach())
    averaged: nn.Module = average.module
    return averaged.eval()


def _decay(settings: RetrainSettings) -> float:
    """Return the EMA decay, less for a short run: it must forget where it started at least five times over."""
    return max(0.0, min(settings.ema_decay, 1.0 - 5.0 / settings.num_steps))
