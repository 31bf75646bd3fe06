"""One step of the shared weights, and the losses of many architectures on one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.networks import Supernet
from nasdeploy.spaces.base import Architecture
from nasdeploy.training.precision import autocast

MAX_GRADIENT_NORM = 5.0  # search.md, "One step", 1


def train_step(
    supernet: Supernet,
    optimizer: torch.optim.Optimizer,
    *,
    images: Tensor,
    labels: Tensor,
    architectures: Sequence[Architecture],
    label_smoothing: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Update the shared weights by the mean gradient of ``architectures``, clipped to norm 5; return their mean loss.

    images: (B, C, s, s), 0..255. class_weights: (num_classes,). The loss stays on the device: no value is read back.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=images.device)
    for architecture in architectures:
        with autocast(images.device):
            logits = supernet(images, architecture)
        loss = F.cross_entropy(
            logits.float(), labels, weight=class_weights, label_smoothing=label_smoothing
        ) / len(architectures)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    nn.utils.clip_grad_norm_(supernet.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return total


@torch.no_grad()
def architecture_losses(
    supernet: Supernet,
    architectures: Sequence[Architecture],
    images: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
) -> list[float]:
    """Return the cross entropy of each architecture on one common batch, by batch statistics.

    Equal architectures are computed once; the values cross from the device in one transfer.
    """
    distinct = list(dict.fromkeys(architectures))
    losses = []
    for architecture in distinct:
        with autocast(images.device):
            logits = supernet(images, architecture)
        losses.append(F.cross_entropy(logits.float(), labels, weight=class_weights))
    values = dict(zip(distinct, torch.stack(losses).double().tolist(), strict=True))
    return [values[architecture] for architecture in architectures]
