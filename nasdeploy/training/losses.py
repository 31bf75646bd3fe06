"""Losses, all means over the B images of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy between soft targets (B, N) and the soft-max of ``logits`` (B, N).

    Its gradient is that of the Kullback-Leibler divergence (Hinton, Vinyals, Dean 2015, temperature 1).
    """
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


def mixed_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    soft_targets: Tensor | None,
    distillation_weight: float,
    label_smoothing: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """(1 - w) · cross entropy with the labels + w · distillation; w = 0 where there are no soft targets."""
    hard = F.cross_entropy(logits.float(), labels, weight=class_weights, label_smoothing=label_smoothing)
    if soft_targets is None or distillation_weight == 0.0:
        return hard
    return (1.0 - distillation_weight) * hard + distillation_weight * distillation_loss(logits, soft_targets)


@torch.no_grad()
def soft_targets(logits: Tensor) -> Tensor:
    """Return the probabilities (B, N) of ``logits``, detached."""
    return F.softmax(logits.detach().float(), dim=1)
