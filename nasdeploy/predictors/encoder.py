"""The graph autoencoder: a graph isomorphism network over dense adjacencies, and what reads graphs back from it.

Xu et al., *How Powerful are Graph Neural Networks?*, ICLR 2019 (GIN): h ← MLP((1 + ε) h + Σ of the neighbours' h), each
with batch norm and ReLU; Yan et al., *Does Unsupervised Architecture Representation Learning Help Neural Architecture
Search?*, NeurIPS 2020 (arch2vec): operations and edges are decoded from the nodes' embeddings z, as softmax(W z + b)
and sigmoid(z zᵀ). Two things differ, because a space of cells could not be given back in 300 steps without them:

* a round hears from predecessors and from successors apart, since an edge has a direction: from predecessors alone, or
  from both without distinction, 94 and 77 % of the operations came back instead of all;
* edges are sigmoid(z zᵀ + c), with c learnt: at most L + 1 vectors of L numbers have negative products with each
  other, and twins have positive ones, while most nodes of a cell are not linked. Without c, 81 % of the edges came
  back instead of 87 %, where always saying "not linked" gets 85 %.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.networks.operations import initialise
from nasdeploy.predictors.arrays import from_plain, to_plain
from nasdeploy.spaces.graph_view import Graphs, RelaxedGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderSize:
    """width: numbers of a node within the rounds. latent: in its embedding z. num_rounds: how far a node hears."""

    width: int = 128
    latent: int = 16
    num_rounds: int = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphBatch:
    """Graphs as tensors: operations (n, N, V) and roles (n, N, R), one-hot or relaxed, adjacency (n, N, N)."""

    operations: Tensor
    roles: Tensor
    adjacency: Tensor


class GraphAutoencoder(nn.Module):
    """Embeds nodes and whole graphs, and decodes them. Weights come from ``generator``.

    The global random generator is left as it was.
    """

    def __init__(
        self,
        *,
        num_operations: int,
        num_roles: int,
        size: AutoencoderSize | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_operations, self.num_roles, self.size = num_operations, num_roles, size or AutoencoderSize()
        width, latent = self.size.width, self.size.latent
        with torch.random.fork_rng(devices=[]):  # the constructors of torch.nn draw from the global generator
            inputs = [num_operations + num_roles] + [width] * (self.size.num_rounds - 1)
            self.rounds = nn.ModuleList(_Round(count, width) for count in inputs)
            self.to_latent = nn.Linear(width, latent)
            self.to_operations = nn.Linear(latent, num_operations)
        self.edge_offset = nn.Parameter(torch.zeros(()))
        initialise(self, generator or torch.Generator().manual_seed(0))

    @property
    def embedding_size(self) -> int:
        """P: an embedding holds the sum of z over all nodes and, where there are several roles, over each role."""
        return self.size.latent * (1 + self.num_roles if self.num_roles > 1 else 1)

    def batch(self, graphs: Graphs) -> GraphBatch:
        """Return ``graphs`` as tensors of the type and on the device of the weights."""
        to = self.edge_offset
        operations = _tensor(graphs.operations).to(to.device)
        roles = _tensor(graphs.roles).to(to.device)
        return GraphBatch(
            operations=F.one_hot(operations, self.num_operations).to(to.dtype),
            roles=F.one_hot(roles, self.num_roles).to(to.dtype),
            adjacency=_tensor(graphs.adjacency).to(to),
        )

    def relaxed_batch(self, graph: RelaxedGraph) -> GraphBatch:
        """Return relaxed graphs (n, N, V), (n, N, N) as tensors, as :meth:`batch` does."""
        to = self.edge_offset
        operations = _tensor(graph.operations).to(to)  # (n, N, V)
        roles = F.one_hot(_tensor(graph.roles).to(to.device), self.num_roles).to(to.dtype)  # (N, R)
        return GraphBatch(
            operations=operations,
            roles=roles.expand(len(operations), -1, -1),
            adjacency=_tensor(graph.adjacency).to(to),
        )

    def nodes(self, batch: GraphBatch) -> Tensor:
        """Return z (n, N, L) of every node."""
        h = torch.cat([batch.operations, batch.roles], dim=2)  # (n, N, V + R)
        for one in self.rounds:
            h = one(h, batch.adjacency)  # (n, N, width)
        z: Tensor = self.to_latent(h)
        return z

    def embed(self, batch: GraphBatch) -> Tensor:
        """Return the embeddings (n, P) of whole graphs: sums, which no numbering of the nodes changes."""
        z = self.nodes(batch)
        total = z.sum(dim=1)  # (n, L)
        if self.num_roles == 1:
            return total
        by_role = batch.roles.transpose(1, 2) @ z  # (n, R, L)
        return torch.cat([total, by_role.flatten(1)], dim=1)

    def operation_logits(self, z: Tensor) -> Tensor:
        """Return what decodes the operation of each node, (n, N, L) -> (n, N, V)."""
        logits: Tensor = self.to_operations(z)
        return logits

    def edge_logits(self, z: Tensor) -> Tensor:
        """Return what decodes whether two nodes are linked, in either direction, (n, N, L) -> (n, N, N)."""
        return z @ z.transpose(1, 2) + self.edge_offset

    def plain(self) -> dict[str, Any]:
        """Return sizes and weights as plain lists, numbers and text."""
        return {
            "num_operations": self.num_operations,
            "num_roles": self.num_roles,
            "size": asdict(self.size),
            "weights": to_plain(self.state_dict()),
        }

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> GraphAutoencoder:
        """Return what :meth:`plain` describes, on the CPU, to evaluate with."""
        found = cls(
            num_operations=int(state["num_operations"]),
            num_roles=int(state["num_roles"]),
            size=AutoencoderSize(**state["size"]),
        )
        weights = from_plain(state["weights"])
        found.to(weights["edge_offset"].dtype).load_state_dict(weights)
        return found.eval().requires_grad_(False)


def _tensor(values: np.ndarray[Any, Any]) -> Tensor:
    """Return a copy of ``values`` as a tensor: a view may hold one row for all graphs, which cannot be written to."""
    return torch.from_numpy(np.array(values))


class _Round(nn.Module):
    """h ← relu(BN(MLP([(1 + ε) h + Aᵀ h, (1 + ε) h + A h]))): what flows in beside what flows out."""

    def __init__(self, num_inputs: int, width: int) -> None:
        super().__init__()
        self.epsilon = nn.Parameter(torch.zeros(()))
        self.first = nn.Linear(2 * num_inputs, width)
        self.second = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, h: Tensor, adjacency: Tensor) -> Tensor:
        own = (1.0 + self.epsilon) * h  # (n, N, inputs)
        heard = torch.cat([own + adjacency.transpose(1, 2) @ h, own + adjacency @ h], dim=2)
        mixed = self.second(F.relu(self.first(heard)))  # (n, N, width)
        return F.relu(self.norm(mixed.flatten(0, 1))).view_as(mixed)
