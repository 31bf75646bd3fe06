"""How an encoder learns a space before any loss is known: by giving back the graphs of random architectures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nasdeploy.predictors.encoder import AutoencoderSize, GraphAutoencoder, GraphBatch
from nasdeploy.spaces.graph_view import FloatArray, GraphView, IntArray

OPERATION_WEIGHT = 3.0
"""Of the squared errors of the operations, beside the edges: with 1 some encoders still mistake 20 % of them."""
NUM_NORMED = 512
"""The statistics of the batch norms are those of so many graphs, once the weights stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingSettings:
    """learning_rate: the highest, in a cycle that begins and ends lower."""

    num_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 5e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """Shares of what is decoded rightly: of all operations, and of all pairs of nodes that a path may join.

    majority: what always saying "not linked", or always "linked", would get of the pairs.
    """

    operations: float
    edges: float
    majority: float


def pretrain(
    view: GraphView,
    *,
    seed: int,
    size: AutoencoderSize | None = None,
    settings: PretrainingSettings | None = None,
    device: torch.device | str = "cpu",
) -> GraphAutoencoder:
    """Return an autoencoder of the graphs of ``view``, to evaluate with.

    All architectures are random ones, while the papers take those that a search sampled besides: so what is learnt does
    not depend on when the first losses came, every model of a job shares one encoder, and a run that is resumed has the
    same one without storing it. The same seed gives the same weights to the bit on the same machine. Global random
    generators are left as they were.
    """
    settings = settings or PretrainingSettings()
    rng = np.random.default_rng(seed)
    model = GraphAutoencoder(
        num_operations=len(view.vocabulary),
        num_roles=view.num_roles,
        size=size,
        generator=torch.Generator().manual_seed(seed),
    ).to(device)
    pairs = pair_places(view).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_steps, pct_start=0.1
    )
    for _ in range(settings.num_steps):
        batch = model.batch(view.of(random_choices(view, settings.batch_size, rng)))
        optimizer.zero_grad(set_to_none=True)
        reconstruction_loss(model, batch, pairs).backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        schedule.step()
    _settle_norms(model, model.batch(view.of(random_choices(view, NUM_NORMED, rng))))
    return model.eval().requires_grad_(False)


def reconstruction_loss(model: GraphAutoencoder, batch: GraphBatch, pairs: Tensor) -> Tensor:
    """Return the squared error of the operations, thrice, and the cross-entropy of the edges.

    pairs: of :func:`pair_places`.
    """
    z = model.nodes(batch)
    wrong = model.operation_logits(z).softmax(dim=2) - batch.operations  # (n, N, V)
    linked = _linked(batch).flatten(1)[:, pairs]  # (n, number of pairs)
    logits = model.edge_logits(z).flatten(1)[:, pairs]
    errors = (wrong**2).sum(dim=2).mean()
    return OPERATION_WEIGHT * errors + F.binary_cross_entropy_with_logits(logits, linked)


@torch.no_grad()
def reconstruction(model: GraphAutoencoder, view: GraphView, choices: IntArray) -> Reconstruction:
    """Return how much of the graphs of ``choices`` (n, D) is decoded rightly."""
    batch = model.batch(view.of(choices))
    pairs = pair_places(view).to(batch.adjacency.device)
    z = model.nodes(batch)
    right = model.operation_logits(z).argmax(dim=2) == batch.operations.argmax(dim=2)
    linked = _linked(batch).flatten(1)[:, pairs] > 0.5
    edges = (model.edge_logits(z).flatten(1)[:, pairs] > 0.0) == linked
    share = float(linked.double().mean())
    return Reconstruction(
        operations=float(right.double().mean()),
        edges=float(edges.double().mean()),
        majority=max(share, 1.0 - share),
    )


def possible_pairs(view: GraphView) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return which pairs of different nodes (N, N) lie in one part of the graph: others are never linked."""
    theta: FloatArray = np.ones((len(view.num_candidates), max(view.num_candidates)))
    linked = view.relaxed(theta).adjacency > 0.0
    joined = linked | linked.T | np.eye(len(linked), dtype=np.bool_)
    for _ in range(int(np.ceil(np.log2(max(len(joined), 2))))):
        joined = joined.astype(np.float64) @ joined > 0.0  # paths of twice the length
    return joined & ~np.eye(len(joined), dtype=np.bool_)


def pair_places(view: GraphView) -> Tensor:
    """Return where the pairs of :func:`possible_pairs` lie in N² numbers: indices, since a mask has to be counted.

    Counting would make the processor wait for a GPU at every step.
    """
    return torch.from_numpy(np.flatnonzero(possible_pairs(view)))


def random_choices(view: GraphView, count: int, rng: np.random.Generator) -> IntArray:
    """Return ``count`` architectures (count, D), uniformly drawn."""
    return np.stack([rng.integers(size, size=count) for size in view.num_candidates], axis=1)


def _linked(batch: GraphBatch) -> Tensor:
    """Return whether nodes are linked (n, N, N), in either direction, as 0 or 1."""
    return torch.maximum(batch.adjacency, batch.adjacency.transpose(1, 2))


@torch.no_grad()
def _settle_norms(model: GraphAutoencoder, batch: GraphBatch) -> None:
    """Take the statistics of the batch norms from ``batch`` alone, not from weights that have changed since."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches: there is one
    model.train()
    model.nodes(batch)
