"""Evaluate a network in evaluation mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.data import Images, image_chunks
from nasdeploy.training.precision import autocast


@torch.no_grad()
def predict(network: nn.Module, images: Images, *, batch_size: int = 250) -> Tensor:
    """Return the logits (N, num_classes), float32, of images (N, C, s, s), uint8 or float, 0..255."""
    network.eval()
    logits = []
    for chunk in image_chunks(images, batch_size):
        with autocast(chunk.device):
            logits.append(network(chunk.float().contiguous(memory_format=torch.channels_last)).float())
    return torch.cat(logits)


def losses_and_accuracy(
    network: nn.Module, images: Images, labels: Tensor, *, class_weights: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return the cross entropy of each image (N,), float32 on the CPU, and the top-1 accuracy in [0, 1].

    With weights by class, the mean of the losses is the weighted mean.
    """
    logits = predict(network, images)
    losses = F.cross_entropy(logits, labels, weight=class_weights, reduction="none")
    if class_weights is not None:
        losses = losses / class_weights[labels].mean()
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return losses.cpu(), float(accuracy)


def loss_and_accuracy(
    network: nn.Module, images: Images, labels: Tensor, *, class_weights: Tensor | None = None
) -> tuple[float, float]:
    """Return the mean cross entropy, weighted by class where weights are given, and the top-1 accuracy in [0, 1]."""
    losses, accuracy = losses_and_accuracy(network, images, labels, class_weights=class_weights)
    return float(losses.mean()), accuracy
