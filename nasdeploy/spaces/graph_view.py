"""Architectures as graphs: which operation each node holds, and which nodes feed which. Pure NumPy.

Every entry of a graph depends on one decision at most, so that graphs are linear in one-hot choices: a relaxed
architecture has expected operations and an expected adjacency, exact under independent decisions, and a gradient with
respect to them is carried back to the decisions exactly.

Notation: n architectures, D decisions, C = the largest number of candidates, N nodes, V operations (the vocabulary),
E edges that a decision sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from nasdeploy.errors import ConfigError

if TYPE_CHECKING:
    from nasdeploy.spaces.base import Decision, SearchSpace

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NUM_SIDES = 2
"""Inputs, and operations, of a node of a cell."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graphs:
    """n graphs of N nodes; the order of the nodes of a graph means nothing.

    operations: (n, N) places in the vocabulary. roles: (n, N), which kind of place a node is. adjacency: (n, N, N),
    [i, s, t] says whether node t takes the value of node s.
    """

    operations: IntArray
    roles: IntArray
    adjacency: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelaxedGraph:
    """What is expected of a graph under independent decisions: operations (..., N, V), adjacency (..., N, N).

    roles: (N,), which are the same for all architectures.
    """

    operations: FloatArray
    roles: IntArray
    adjacency: FloatArray


class GraphView(Protocol):
    """How the architectures of a space look as graphs, all of them with the same N nodes and roles."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The names of the V operations that nodes may hold."""
        ...

    @property
    def num_candidates(self) -> tuple[int, ...]:
        """(C_1, …, C_D) of the space."""
        ...

    @property
    def num_roles(self) -> int:
        """Roles are 0 to one less. Nodes of one role may change places, so they are told apart by edges only."""
        ...

    def of(self, choices: IntArray) -> Graphs:
        """Return the graphs of ``choices`` (n, D)."""
        ...

    def relaxed(self, theta: FloatArray) -> RelaxedGraph:
        """Return what is expected under ``theta`` (..., D, C): affine in it, and equal to ``of`` on one-hots."""
        ...

    def pull_back(self, operations: FloatArray, adjacency: FloatArray) -> FloatArray:
        """Return the gradient (..., D, C) with respect to theta of what has these with respect to the relaxed graph.

        operations: (..., N, V). adjacency: (..., N, N). The transpose of :meth:`relaxed`; 0 in the padding of theta.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node. operations: one for each candidate of its decision, or a single one where ``decision`` is None."""

    role: str
    operations: tuple[str, ...]
    decision: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """An edge between places of nodes: always there, or with these candidates of ``decision`` only."""

    source: int
    target: int
    decision: int | None = None
    candidates: tuple[int, ...] = ()


class DecisionGraph:
    """A :class:`GraphView` from nodes and edges as data.

    Raises ConfigError for a node that has not one operation for each candidate, and for an edge that exists twice,
    leads nowhere or hangs on a candidate that there is not.
    """

    def __init__(
        self, num_candidates: Sequence[int], *, nodes: Sequence[Node], edges: Sequence[Edge]
    ) -> None:
        self.num_candidates = tuple(num_candidates)
        self.nodes, self.edges = tuple(nodes), tuple(edges)
        self._check()
        self.vocabulary = tuple(dict.fromkeys(name for node in nodes for name in node.operations))
        roles = tuple(dict.fromkeys(node.role for node in nodes))
        self.num_roles = len(roles)
        self._roles = np.array([roles.index(node.role) for node in nodes], dtype=np.int64)  # (N,)
        num_decisions, width = len(self.num_candidates), max(self.num_candidates, default=1)
        # A decision more stands for what is fixed: it has one candidate, of probability 1.
        self._node_decisions = _decisions(nodes, num_decisions)  # (N,)
        self._edge_decisions = _decisions(edges, num_decisions)  # (E,)
        self._sources = np.array([edge.source for edge in edges], dtype=np.int64)  # (E,)
        self._targets = np.array([edge.target for edge in edges], dtype=np.int64)  # (E,)
        self._operations = np.zeros((len(nodes), width), dtype=np.int64)  # (N, C)
        self._operation_map = np.zeros((num_decisions + 1, width, len(nodes), len(self.vocabulary)))
        for i, node in enumerate(nodes):
            for c, name in enumerate(node.operations):
                self._operations[i, c] = self.vocabulary.index(name)
                self._operation_map[self._node_decisions[i], c, i, self._operations[i, c]] = 1.0
        self._present = np.zeros((len(edges), width), dtype=np.bool_)  # (E, C)
        self._edge_map = np.zeros((num_decisions + 1, width, len(nodes), len(nodes)))
        for i, edge in enumerate(edges):
            candidates = [0] if edge.decision is None else list(edge.candidates)
            self._present[i, candidates] = True
            self._edge_map[self._edge_decisions[i], candidates, edge.source, edge.target] = 1.0

    def of(self, choices: IntArray) -> Graphs:
        """Return the graphs of ``choices`` (n, D)."""
        count, size = len(choices), len(self.nodes)
        taken = np.concatenate([choices, np.zeros((count, 1), dtype=np.int64)], axis=1)  # (n, D + 1)
        adjacency = np.zeros((count, size, size), dtype=np.bool_)
        edges = np.arange(len(self.edges))
        adjacency[:, self._sources, self._targets] = self._present[edges, taken[:, self._edge_decisions]]
        return Graphs(
            operations=self._operations[np.arange(size), taken[:, self._node_decisions]],
            roles=np.broadcast_to(self._roles, (count, size)),
            adjacency=adjacency,
        )

    def relaxed(self, theta: FloatArray) -> RelaxedGraph:
        """Return what is expected under ``theta`` (..., D, C)."""
        return RelaxedGraph(
            operations=_through(self._operation_map, theta),
            roles=self._roles,
            adjacency=_through(self._edge_map, theta),
        )

    def pull_back(self, operations: FloatArray, adjacency: FloatArray) -> FloatArray:
        """Return the gradient (..., D, C) with respect to theta, from (..., N, V) and (..., N, N)."""
        return _back(self._operation_map, operations) + _back(self._edge_map, adjacency)

    def _check(self) -> None:
        for i, node in enumerate(self.nodes):
            if len(node.operations) != self._count(node.decision, f"node {i}"):
                raise ConfigError(
                    f"graph: node {i} ({node.role}) has {len(node.operations)} operations; "
                    f"expected one for each of {self._count(node.decision, f'node {i}')} candidates"
                )
        seen = set()
        for edge in self.edges:
            ends, name = (edge.source, edge.target), f"edge {edge.source} -> {edge.target}"
            count = self._count(edge.decision, name)
            if ends in seen or not all(0 <= end < len(self.nodes) for end in ends):
                raise ConfigError(f"graph: {name}; expected each pair of the {len(self.nodes)} nodes once")
            if not all(0 <= candidate < count for candidate in edge.candidates):
                raise ConfigError(
                    f"graph: {name} hangs on {edge.candidates}; expected candidates below {count}"
                )
            seen.add(ends)

    def _count(self, decision: int | None, name: str) -> int:
        """Return how many candidates ``decision`` has, 1 for None."""
        if decision is None:
            return 1
        if not 0 <= decision < len(self.num_candidates):
            raise ConfigError(
                f"graph: {name} hangs on decision {decision}; expected one below {len(self.num_candidates)}"
            )
        return self.num_candidates[decision]


def _decisions(entries: Sequence[Node | Edge], fixed: int) -> IntArray:
    """Return the decision that each of ``entries`` hangs on; ``fixed`` for none."""
    return np.array([fixed if one.decision is None else one.decision for one in entries], dtype=np.int64)


def _through(table: FloatArray, theta: FloatArray) -> FloatArray:
    """Return Σ_dc θ_dc table_dc + table_fixed (..., x, y); ``table`` is (D + 1, C, x, y), ``theta`` (..., D, C)."""
    size = table.shape[1] * (len(table) - 1)
    flat = theta.reshape(-1, size) @ table[:-1].reshape(size, -1)
    found: FloatArray = flat.reshape(*theta.shape[:-2], *table.shape[2:]) + table[-1, 0]
    return found


def _back(table: FloatArray, gradient: FloatArray) -> FloatArray:
    """Return the gradient (..., D, C) with respect to theta from that (..., x, y) of what :func:`_through` returns."""
    size = table.shape[1] * (len(table) - 1)
    flat = gradient.reshape(-1, table[0, 0].size) @ table[:-1].reshape(size, -1).T
    found: FloatArray = flat.reshape(*gradient.shape[:-2], len(table) - 1, table.shape[1])
    return found


def graph_view(space: SearchSpace) -> GraphView:
    """Return how the architectures of ``space`` look as graphs: its own view, or that of a chain."""
    return space.graph if space.graph is not None else chain_view(space.decisions)


def chain_view(decisions: Sequence[Decision]) -> DecisionGraph:
    """Return the view of a chain: a node for each decision, which feeds the next one, and holds its candidate.

    The role of a node is its decision, since no two places of a chain may change places.
    """
    nodes = [Node(role=one.name, operations=one.candidates, decision=d) for d, one in enumerate(decisions)]
    edges = [Edge(source=d, target=d + 1) for d in range(len(decisions) - 1)]
    return DecisionGraph([len(one.candidates) for one in decisions], nodes=nodes, edges=edges)


def cell_view(
    decisions: Sequence[Decision],
    *,
    cells: Sequence[str] = ("normal", "reduction"),
    num_nodes: int = 5,
    inputs: Sequence[str] = ("previous", "before"),
) -> DecisionGraph:
    """Return the view of a space of cells: for each cell a graph of its own, and a node for every other decision.

    A cell has a node for each of its ``inputs`` and, for each of its ``num_nodes`` nodes i, two operations and their
    sum: 17 nodes for 5. Decisions are called "<cell>.node<i>.input<side>" and "….operation<side>", side 1 and 2;
    candidates of an input are the names of ``inputs`` and "node<j>". Nodes of one cell have one role, so that how
    they are numbered makes no difference. Raises ConfigError where a decision is missing or a candidate unknown.
    """
    left = {one.name: d for d, one in enumerate(decisions)}
    nodes: list[Node] = []
    edges: list[Edge] = []
    for cell in cells:
        values: dict[str, int] = {}  # what can be read -> its node
        for name in inputs:
            values[name] = len(nodes)
            nodes.append(Node(role=cell, operations=(name,)))
        for i in range(num_nodes):
            total = len(nodes) + NUM_SIDES
            for side in range(1, NUM_SIDES + 1):
                reads = _taken(left, f"{cell}.node{i}.input{side}")
                runs = _taken(left, f"{cell}.node{i}.operation{side}")
                edges += _readers(decisions[reads], reads, values=values, target=len(nodes))
                edges.append(Edge(source=len(nodes), target=total))
                nodes.append(Node(role=cell, operations=decisions[runs].candidates, decision=runs))
            values[f"node{i}"] = total
            nodes.append(Node(role=cell, operations=("sum",)))
    for name, d in left.items():
        names = tuple(f"{name}={candidate}" for candidate in decisions[d].candidates)
        nodes.append(Node(role=name, operations=names, decision=d))
    return DecisionGraph([len(one.candidates) for one in decisions], nodes=nodes, edges=edges)


def _taken(left: dict[str, int], name: str) -> int:
    """Return where the decision called ``name`` stands, and take it off the list of those that are left."""
    if name not in left:
        raise ConfigError(f"graph: no decision '{name}'; expected one for each side of each node of a cell")
    return left.pop(name)


def _readers(decision: Decision, place: int, *, values: dict[str, int], target: int) -> list[Edge]:
    """Return an edge to ``target`` for each of the candidates of an input."""
    for name in decision.candidates:
        if name not in values:
            raise ConfigError(f"graph: {decision.name} = '{name}'; expected one of {', '.join(values)}")
    return [
        Edge(source=values[name], target=target, decision=place, candidates=(c,))
        for c, name in enumerate(decision.candidates)
    ]
