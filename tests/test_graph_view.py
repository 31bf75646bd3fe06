"""Architectures as graphs: chains, cells, and what a relaxed architecture looks like."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nasdeploy.errors import ConfigError
from nasdeploy.optim.categorical import one_hot, uniform
from nasdeploy.spaces import Decision, make_space
from nasdeploy.spaces.graph_view import DecisionGraph, Edge, Node, cell_view, chain_view, graph_view

SOURCES = ("previous", "before")


def cell_decisions(num_nodes: int = 2) -> list[Decision]:
    decisions = []
    for cell in ("normal", "reduction"):
        for i in range(num_nodes):
            inputs = (*(f"node{j}" for j in reversed(range(i))), *SOURCES)
            for side in (1, 2):
                decisions.append(Decision(name=f"{cell}.node{i}.input{side}", candidates=inputs))
                decisions.append(
                    Decision(name=f"{cell}.node{i}.operation{side}", candidates=("identity", "sep3"))
                )
    return [*decisions, Decision(name="channels", candidates=("8", "16", "24"))]


def random_choices(view: DecisionGraph, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(size, size=count) for size in view.num_candidates], axis=1)


@pytest.fixture(scope="module")
def cell() -> DecisionGraph:
    return cell_view(cell_decisions(), num_nodes=2)


def test_a_space_without_a_view_is_a_chain_of_its_decisions():
    space = make_space("mobile", (1, 28, 28), 10)
    view = graph_view(space)
    choices = np.array([space.largest().choices])
    graphs = view.of(choices)
    names = [d.candidates[c] for d, c in zip(space.decisions, choices[0], strict=True)]
    assert [view.vocabulary[place] for place in graphs.operations[0]] == names
    assert np.argwhere(graphs.adjacency[0]).tolist() == list(map(list, pairwise(range(len(names)))))
    assert view.num_roles == len(names)  # no two places of a chain may change places


def test_the_space_of_cells_brings_its_own_view():
    view = graph_view(make_space("cell", (1, 28, 28), 10))
    choices = np.array([make_space("cell", (1, 28, 28), 10).smallest().choices])
    graphs = view.of(choices)
    assert graphs.operations.shape == (1, 17 + 17 + 1)
    assert int(graphs.adjacency.sum()) == 2 * 5 * (2 + 2)  # each operation reads one value and feeds one sum
    assert not graphs.adjacency[0, :17, 17:].any()
    assert not graphs.adjacency[0, 17:, :17].any()


def test_a_cell_by_hand(cell: DecisionGraph):
    #          node0: previous/identity + before/sep3; node1: node0/sep3 + before/identity
    normal = [0, 0, 1, 1, 0, 1, 2, 0]
    graphs = cell.of(np.array([normal + [0] * 8 + [2]]))
    names = [cell.vocabulary[place] for place in graphs.operations[0]]
    assert names[:8] == ["previous", "before", "identity", "sep3", "sum", "sep3", "identity", "sum"]
    assert names[-1] == "channels=24"
    edges = {(s, t) for s, t in np.argwhere(graphs.adjacency[0]).tolist() if s < 8}
    assert edges == {(0, 2), (2, 4), (1, 3), (3, 4), (4, 5), (5, 7), (1, 6), (6, 7)}
    assert graphs.roles[0].tolist() == [0] * 8 + [1] * 8 + [2]


def test_a_relaxed_one_hot_is_the_graph_itself(cell: DecisionGraph):
    choices = random_choices(cell, 20)
    graphs, relaxed = cell.of(choices), cell.relaxed(one_hot(choices, max(cell.num_candidates)))
    np.testing.assert_array_equal(relaxed.adjacency, graphs.adjacency)
    np.testing.assert_array_equal(relaxed.operations, one_hot(graphs.operations, len(cell.vocabulary)))
    np.testing.assert_array_equal(relaxed.roles, graphs.roles[0])


def test_a_relaxed_graph_is_the_mean_of_graphs(cell: DecisionGraph):
    """By the mean over all candidates of each decision in turn, since every entry hangs on one decision at most."""
    mask = np.arange(max(cell.num_candidates)) < np.array(cell.num_candidates)[:, None]
    choices = random_choices(cell, 20_000)
    graphs, relaxed = cell.of(choices), cell.relaxed(uniform(mask))
    np.testing.assert_allclose(relaxed.adjacency, graphs.adjacency.mean(axis=0), atol=0.02)
    found = one_hot(graphs.operations, len(cell.vocabulary)).mean(axis=0)
    np.testing.assert_allclose(relaxed.operations, found, atol=0.02)


def test_gradients_are_carried_back_to_every_candidate(cell: DecisionGraph):
    rng = np.random.default_rng(1)
    theta, move = rng.random((2, 3, len(cell.num_candidates), max(cell.num_candidates)))
    here, there = cell.relaxed(theta), cell.relaxed(theta + move)
    operations, adjacency = rng.random(here.operations.shape), rng.random(here.adjacency.shape)
    change = operations * (there.operations - here.operations)
    change_of_edges = adjacency * (there.adjacency - here.adjacency)
    gradient = cell.pull_back(operations, adjacency)
    np.testing.assert_allclose((gradient * move).sum(), change.sum() + change_of_edges.sum())
    mask = np.arange(max(cell.num_candidates)) < np.array(cell.num_candidates)[:, None]
    assert (gradient[:, mask] != 0.0).all()
    assert (gradient[:, ~mask] == 0.0).all()


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        (
            [Node(role="a", operations=("x", "y"), decision=0)],
            [],
            "node 0 .* has 2 operations; .* 3 candidates",
        ),
        ([Node(role="a", operations=("x",), decision=1)], [], "hangs on decision 1; expected one below 1"),
        ([Node(role="a", operations=("x",))], [Edge(source=0, target=1)], "edge 0 -> 1; .* the 1 nodes once"),
        (
            [Node(role="a", operations=("x",))] * 2,
            [Edge(source=0, target=1), Edge(source=0, target=1, decision=0, candidates=(1,))],
            "edge 0 -> 1; expected each pair",
        ),
        (
            [Node(role="a", operations=("x",))] * 2,
            [Edge(source=0, target=1, decision=0, candidates=(3,))],
            "candidates below 3",
        ),
    ],
)
def test_a_wrong_graph_is_refused(nodes: list[Node], edges: list[Edge], message: str):
    with pytest.raises(ConfigError, match=message):
        DecisionGraph([3], nodes=nodes, edges=edges)


def test_a_cell_without_its_decisions_is_refused():
    decisions = cell_decisions()
    with pytest.raises(ConfigError, match=r"no decision 'reduction\.node1\.operation2'"):
        cell_view([d for d in decisions if d.name != "reduction.node1.operation2"], num_nodes=2)
    wrong = Decision(name="normal.node0.input1", candidates=("previous", "node1"))
    with pytest.raises(
        ConfigError, match=r"normal\.node0\.input1 = 'node1'; expected one of previous, before"
    ):
        cell_view([wrong, *decisions[1:]], num_nodes=2)


def test_a_chain_of_one_decision():
    view = chain_view([Decision(name="only", candidates=("a", "b"))])
    graphs = view.of(np.array([[1], [0]]))
    assert graphs.operations.tolist() == [[1], [0]]
    assert not graphs.adjacency.any()
