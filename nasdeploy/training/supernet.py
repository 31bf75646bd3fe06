"""One step of the shared weights, and the losses of many architectures on one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.networks import Supernet
from nasdeploy.spaces.base import Architecture
from nasdeploy.training.losses import distillation_loss, mixed_loss, soft_targets
from nasdeploy.training.precision import autocast

MAX_GRADIENT_NORM = 5.0  # search.md, "One step", 1


def train_step(
    supernet: Supernet,
    optimizer: torch.optim.Optimizer,
    *,
    images: Tensor,
    labels: Tensor,
    largest: Architecture,
    others: Sequence[Architecture],
    label_smoothing: float,
) -> Tensor:
    """Update the shared weights by the sandwich rule (Yu & Huang 2019); return the largest network's loss, detached.

    The largest network learns from the labels; its outputs are the soft targets of the ``others``. The gradient is the
    mean over all networks, clipped to norm 5. images: (B, C, s, s), 0..255. No value is read back from the device.
    """
    optimizer.zero_grad(set_to_none=True)
    share = 1.0 / (1 + len(others))
    with autocast(images.device):
        logits = supernet(images, largest)
    loss = mixed_loss(
        logits, labels, soft_targets=None, distillation_weight=0.0, label_smoothing=label_smoothing
    )
    (share * loss).backward()  # type: ignore[no-untyped-call]
    targets = soft_targets(logits)
    for architecture in others:
        with autocast(images.device):
            logits = supernet(images, architecture)
        (share * distillation_loss(logits, targets)).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(supernet.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def architecture_losses(
    supernet: Supernet, architectures: Sequence[Architecture], images: Tensor, labels: Tensor
) -> list[float]:
    """Return the cross entropy of each architecture on one common batch, by batch statistics.

    Equal architectures are computed once; the values cross from the device in one transfer.
    """
    distinct = list(dict.fromkeys(architectures))
    losses = []
    for architecture in distinct:
        with autocast(images.device):
            logits = supernet(images, architecture)
        losses.append(F.cross_entropy(logits.float(), labels))
    values = dict(zip(distinct, torch.stack(losses).double().tolist(), strict=True))
    return [values[architecture] for architecture in architectures]
