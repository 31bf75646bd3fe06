"""Optimisers and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

MOMENTUM = 0.9
WARM_UP_SHARE = 0.2


def make_optimizer(module: nn.Module, *, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum; only weight matrices decay, not biases or batch norms."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)


def one_cycle(optimizer: torch.optim.Optimizer, *, learning_rate: float, num_steps: int) -> OneCycleLR:
    """Return a cosine warm-up to ``learning_rate`` and a cosine decay to zero over ``num_steps``."""
    return OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=max(num_steps, 2),
        pct_start=_warm_up_share(num_steps),
        cycle_momentum=False,
    )


def schedule_state(schedule: OneCycleLR) -> dict[str, Any]:
    """Return where ``schedule`` stands; its rates follow from that in closed form."""
    return {"last_epoch": schedule.last_epoch, "_step_count": schedule._step_count}


def _warm_up_share(num_steps: int) -> float:
    """Return the share of the warm-up; torch divides by its number of steps less one, which may not be 0."""
    return 0.5 if num_steps * WARM_UP_SHARE == 1.0 else WARM_UP_SHARE
