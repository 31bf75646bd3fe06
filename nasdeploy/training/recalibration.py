"""Batch-norm statistics of one network, recomputed from training images."""

from __future__ import annotations

import torch
from torch import nn

from nasdeploy.data import Images
from nasdeploy.training.precision import autocast

MIN_IMAGES = 1_000  # search.md, "Supernet practice"


@torch.no_grad()
def recalibrate(network: nn.Module, images: Images, *, batch_size: int = 250) -> None:
    """Set the statistics of the batch norms to the plain average over ``images`` (N, C, s, s), uint8 or float.

    The network is left in evaluation mode. Recalibrate a copy (``Supernet.extract`` gives one), never the supernet.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    network.train()
    num_chunks = -(-len(images) // batch_size)
    # Equal sizes: the average weighs each chunk alike.
    for rows in torch.tensor_split(torch.arange(len(images)), num_chunks):
        chunk = images[int(rows[0]) : int(rows[-1]) + 1]
        with autocast(chunk.device):
            network(chunk.float().contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
