"""The graph rung: what the autoencoder gives back, and what the heads learn from it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nasdeploy.optim.categorical import one_hot
from nasdeploy.optim.cross_validation import kendall_tau
from nasdeploy.optim.ladder import Ladder, Rung, ridge_rungs
from nasdeploy.optim.predictor import RidgePredictor
from nasdeploy.predictors import (
    AutoencoderSize,
    GraphAutoencoder,
    GraphPredictor,
    GraphPredictors,
    HeadSettings,
    PretrainingSettings,
    graph_rung,
    reconstruction,
)
from nasdeploy.spaces import Decision, make_space
from nasdeploy.spaces.graph_view import (
    DecisionGraph,
    Edge,
    Graphs,
    GraphView,
    Node,
    RelaxedGraph,
    cell_view,
)

OPERATIONS = ("none", "identity", "conv", "pool")
ENDS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""Between which values the operation of each decision stands."""
SIZE = AutoencoderSize(width=48)
SMALL_HEADS = HeadSettings(num_heads=2, hidden=16, num_steps=60)


def four_to_the_six() -> DecisionGraph:
    """Return the view of a cell of six operations of four kinds; "none" takes its edges away."""
    nodes = [Node(role="value", operations=("value",))] * 4
    edges = []
    for d, (source, target) in enumerate(ENDS):
        place = len(nodes)
        nodes = [*nodes, Node(role=f"operation{d}", operations=OPERATIONS, decision=d)]
        edges.append(Edge(source=source, target=place, decision=d, candidates=(1, 2, 3)))
        edges.append(Edge(source=place, target=target, decision=d, candidates=(1, 2, 3)))
    return DecisionGraph([len(OPERATIONS)] * len(ENDS), nodes=nodes, edges=edges)


def true_losses(choices: np.ndarray) -> np.ndarray:
    """Return the losses (n,) of a table of 4096: they fall with what arrives at the output, along all paths."""
    gain = np.array([0.0, 0.5, 1.0, 0.6])[choices]  # (n, 6)
    arrives = {0: np.ones(len(choices))}
    for d, (source, target) in enumerate(ENDS):
        arrives[target] = arrives.get(target, 0.0) + gain[:, d] * arrives[source]
    return np.exp(-arrives[3])


def drawn(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(len(OPERATIONS), size=(count, len(ENDS)))


def no_steps(choices: np.ndarray) -> np.ndarray:
    return np.zeros(len(choices), dtype=np.int64)


@pytest.fixture(scope="module")
def view() -> DecisionGraph:
    return four_to_the_six()


@pytest.fixture(scope="module")
def encoder(view: DecisionGraph) -> GraphAutoencoder:
    """The one pretrained encoder of this file."""
    return GraphPredictors(view, size=SIZE, pretraining=PretrainingSettings(num_steps=200)).encoder()


@pytest.fixture(scope="module")
def fitted(view: DecisionGraph, encoder: GraphAutoencoder) -> GraphPredictor:
    choices = drawn(200, 1)
    model = GraphPredictor(view, encoder=lambda: encoder)
    model.fit(choices, true_losses(choices), np.arange(200))
    return model


def test_operations_and_edges_of_held_out_graphs_come_back(view: DecisionGraph, encoder: GraphAutoencoder):
    found = reconstruction(encoder, view, drawn(1000, 7))
    assert found.operations > 0.99
    assert found.edges > found.majority + 0.1  # of 0.77


@dataclass(frozen=True, kw_only=True, eq=False)
class Renumbered:
    """A view whose nodes are in another order in each graph."""

    inner: DecisionGraph
    seed: int = 0

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return self.inner.vocabulary

    @property
    def num_candidates(self) -> tuple[int, ...]:
        return self.inner.num_candidates

    @property
    def num_roles(self) -> int:
        return self.inner.num_roles

    def of(self, choices: np.ndarray) -> Graphs:
        graphs = self.inner.of(choices)
        rng = np.random.default_rng(self.seed)
        order = rng.permuted(np.tile(np.arange(graphs.roles.shape[1]), (len(choices), 1)), axis=1)
        rows = np.arange(len(choices))[:, None]
        return Graphs(
            operations=graphs.operations[rows, order],
            roles=graphs.roles[rows, order],
            adjacency=graphs.adjacency[rows[:, :, None], order[:, :, None], order[:, None, :]],
        )

    def relaxed(self, theta: np.ndarray) -> RelaxedGraph:
        return self.inner.relaxed(theta)

    def pull_back(self, operations: np.ndarray, adjacency: np.ndarray) -> np.ndarray:
        return self.inner.pull_back(operations, adjacency)


def test_relabelling_nodes_leaves_predictions_unchanged(view: DecisionGraph, fitted: GraphPredictor):
    other: GraphView = Renumbered(inner=view)
    model = GraphPredictor(other, encoder=GraphPredictors(other).encoder)
    model.load_state_dict(fitted.state_dict())
    choices = drawn(100, 2)
    assert not np.array_equal(other.of(choices).operations, view.of(choices).operations)
    np.testing.assert_allclose(model.predict(choices), fitted.predict(choices), atol=1e-5)
    assert np.ptp(fitted.predict(choices)) > 0.1


def test_the_two_sides_of_a_node_may_change_places():
    decisions = [
        Decision(name=f"{cell}.node{i}.{what}{side}", candidates=names)
        for cell in ("normal", "reduction")
        for i in range(2)
        for side in (1, 2)
        for what, names in (("input", ("previous", "before")), ("operation", ("identity", "sep3", "max3")))
    ]
    cells = cell_view(decisions, num_nodes=2)
    encoder = GraphAutoencoder(num_operations=len(cells.vocabulary), num_roles=cells.num_roles).eval()
    choices = np.random.default_rng(0).integers(2, size=(30, 16))
    mirrored = choices.reshape(30, 4, 2, 2)[:, :, ::-1].reshape(30, 16)
    across = choices.reshape(30, 2, 8)[:, ::-1].reshape(30, 16)  # normal and reduction: another network
    one, same, other = (encoder.embed(encoder.batch(cells.of(c))) for c in (choices, mirrored, across))
    torch.testing.assert_close(one, same)
    assert (one - other).abs().max() > 0.01


def test_gradients_are_those_of_finite_differences(view: DecisionGraph, encoder: GraphAutoencoder):
    precise = copy.deepcopy(encoder).double()
    model = GraphPredictor(view, encoder=lambda: precise, heads=SMALL_HEADS)
    choices = drawn(100, 1)
    model.fit(choices, true_losses(choices), no_steps(choices))
    theta = np.random.default_rng(3).dirichlet(np.ones(4), size=(5, 6))
    relaxed = lambda at: model._heads(  # noqa: E731
        precise.embed(precise.relaxed_batch(view.relaxed(at))), torch.zeros(len(at), dtype=torch.float64)
    )
    spread = model._fitted().spread
    psi = lambda at: spread * relaxed(at).mean(dim=0).numpy()  # noqa: E731
    gradient = model.gradient(theta)
    assert gradient.shape == (5, 6, 4)
    expected = np.empty_like(gradient)
    for d, c in np.ndindex(6, 4):
        step = np.zeros((6, 4))
        step[d, c] = 1e-6
        expected[:, d, c] = (psi(theta + step) - psi(theta - step)) / 2e-6
    np.testing.assert_allclose(gradient, expected, atol=1e-3 * np.abs(expected).max())
    hot = one_hot(choices, 4)  # where ψ is what the model predicts
    np.testing.assert_allclose(psi(hot) + model._fitted().mean, model.predict(choices))


def test_shuffled_labels_are_not_learnt(view: DecisionGraph, encoder: GraphAutoencoder):
    choices = drawn(160, 4)
    losses = true_losses(choices)
    taus = []
    for shuffle in range(50):
        rng = np.random.default_rng(shuffle)
        shuffled, order = rng.permutation(losses), rng.permutation(160)
        train, test = order[:100], order[100:]
        model = GraphPredictor(view, encoder=lambda: encoder, heads=SMALL_HEADS, seed=shuffle)
        model.fit(choices[train], shuffled[train], no_steps(train))
        taus.append(kendall_tau(model.predict(choices[test]), shuffled[test]))
    assert abs(np.mean(taus)) < 0.05


def test_it_ranks_a_table_better_than_ridge(fitted: GraphPredictor):
    choices, others = drawn(200, 1), drawn(1000, 5)
    ridge = RidgePredictor([4] * 6, num_folds=0)
    ridge.fit(choices, true_losses(choices), np.arange(200))
    tau, other = (kendall_tau(model.predict(others), true_losses(others)) for model in (fitted, ridge))
    assert other > 0.3
    assert tau > other + 0.05


def test_the_ladder_climbs_to_it(view: DecisionGraph, encoder: GraphAutoencoder):
    def ladder() -> Ladder:
        rung = Rung(name="graph", make=lambda: GraphPredictor(view, encoder=lambda: encoder))
        return Ladder([*ridge_rungs([4] * 6), rung], num_candidates=[4] * 6, num_repeats=1)

    choices = drawn(200, 1)
    one, resumed = ladder(), ladder()
    one.fit(choices, true_losses(choices), no_steps(choices))
    assert one.choice.rung == "graph"
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    np.testing.assert_array_equal(resumed.predict(choices), one.predict(choices))


def test_a_drift_of_the_weights_is_not_taken_for_a_merit(view: DecisionGraph, encoder: GraphAutoencoder):
    """Late samples are of another kind, and their losses are lower since the weights improved."""
    choices = drawn(300, 6)
    steps = np.arange(300)
    choices[150:, 0] = np.maximum(choices[150:, 0], 1)
    choices[:150, 0] = np.minimum(choices[:150, 0], 1)
    losses = true_losses(choices) + 0.4 * (1.0 - steps / 300)
    others = drawn(500, 8)
    taus = []
    for known in (steps, np.zeros_like(steps)):
        model = GraphPredictor(view, encoder=lambda: encoder)
        model.fit(choices, losses, known)
        taus.append(kendall_tau(model.predict(others), true_losses(others)))
    assert taus[0] > taus[1] + 0.05


def test_the_posterior_knows_how_wrong_it_is(view: DecisionGraph, encoder: GraphAutoencoder):
    noise = np.random.default_rng(0).normal(0.0, 0.05, size=600)
    choices = drawn(600, 9)
    losses = true_losses(choices) + noise
    model = GraphPredictor(view, encoder=lambda: encoder)
    model.fit(choices[:200], losses[:200], no_steps(choices[:200]))
    posterior = model.posterior(choices[200:])
    np.testing.assert_allclose(posterior.mean, model.predict(choices[200:]))
    assert np.linalg.eigvalsh(posterior.covariance).min() > 0.0
    error = ((posterior.mean - losses[200:]) ** 2).mean()
    assert 0.5 < (posterior.variance.mean() + posterior.noise) / error < 2.0
    surer = model.posterior(drawn(1, 0)[[0, 0]])
    surer.condition(0)
    assert surer.variance[1] < model.posterior(drawn(1, 0)).variance[0]


def test_importance_is_that_of_the_gradients(fitted: GraphPredictor):
    importance = fitted.importance()
    assert importance.shape == (6, 4)
    assert ((importance >= 0.0) & (importance < 1.0)).all()
    assert importance.max() > 0.5


def test_a_stored_state_predicts_the_same_to_the_bit(view: DecisionGraph, fitted: GraphPredictor):
    def never() -> GraphAutoencoder:
        raise AssertionError("a stored predictor needs no pretraining")

    again = GraphPredictor(view, encoder=never)
    again.load_state_dict(json.loads(json.dumps(fitted.state_dict())))
    choices = drawn(50, 3)
    np.testing.assert_array_equal(again.predict(choices), fitted.predict(choices))
    np.testing.assert_array_equal(again.posterior(choices).covariance, fitted.posterior(choices).covariance)
    np.testing.assert_array_equal(again.importance(), fitted.importance())
    assert again.state_dict() == fitted.state_dict()


def test_a_seed_gives_the_same_bits_and_leaves_global_generators_alone(view: DecisionGraph):
    choices = drawn(60, 1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - that is what is looked at

    def predicted(seed: int) -> np.ndarray:
        pretraining = PretrainingSettings(num_steps=12, batch_size=16)
        make = GraphPredictors(view, seed=seed, size=SIZE, pretraining=pretraining, heads=SMALL_HEADS)
        model = make()
        model.fit(choices, true_losses(choices), no_steps(choices))
        return model.predict(choices)

    one = predicted(0)
    np.testing.assert_array_equal(one, predicted(0))
    assert not np.array_equal(one, predicted(1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_an_encoder_is_pretrained_once_and_only_when_needed(view: DecisionGraph):
    make = GraphPredictors(view, size=SIZE, pretraining=PretrainingSettings(num_steps=2), heads=SMALL_HEADS)
    choices = drawn(10, 1)
    one, other = make(), make()
    assert make._encoder is None
    one.fit(choices, true_losses(choices), no_steps(choices))
    other.fit(choices[:1], true_losses(choices[:1]), no_steps(choices[:1]))
    assert one._encoder is other._encoder
    assert np.isfinite(other.predict(choices)).all()
    assert np.isfinite(other.posterior(choices).covariance).all()


def test_all_rungs_of_a_job_share_one_encoder():
    space = make_space("mobile", (1, 28, 28), 10)
    one, again, other = graph_rung(space, seed=1), graph_rung(space, seed=1), graph_rung(space, seed=2)
    assert one.make is again.make
    assert one.make is not other.make


def test_views_that_cannot_be_written_to_are_embedded(view: DecisionGraph, encoder: GraphAutoencoder):
    """Warnings are errors here: torch warns of tensors that share memory which is read-only."""
    graphs = view.of(drawn(1, 0))
    rows = [
        np.broadcast_to(values, (3, *values.shape[1:]))
        for values in (graphs.operations, graphs.roles, graphs.adjacency)
    ]
    for values in (*rows, graphs.operations):
        values.flags.writeable = False
    operations, roles, adjacency = rows
    repeated = Graphs(operations=operations, roles=roles, adjacency=adjacency)
    alone = Graphs(operations=graphs.operations, roles=graphs.roles, adjacency=graphs.adjacency)
    one, three = (encoder.embed(encoder.batch(given)) for given in (alone, repeated))
    torch.testing.assert_close(three, one.expand(3, -1))


def test_a_loaded_encoder_goes_to_the_device_of_the_predictor(view: DecisionGraph, fitted: GraphPredictor):
    make = GraphPredictors(view, device="meta")  # no other device is everywhere
    model = make()
    model.load_state_dict(fitted.state_dict())
    assert model._embedder().edge_offset.device.type == "meta"
    assert {tensor.device.type for tensor in model._heads._tensors.values()} == {"meta"}


def test_losses_of_any_unit_are_fitted_as_they_are(view: DecisionGraph, encoder: GraphAutoencoder):
    choices = drawn(80, 1)
    losses = true_losses(choices)
    losses[:2] += 40.0 * losses.std()  # a ladder has compressed what is to be compressed
    found = []
    for given in (losses, 0.01 * losses + 5.0):
        model = GraphPredictor(view, encoder=lambda: encoder, heads=SMALL_HEADS)
        model.fit(choices, given, no_steps(choices))
        assert model._fitted().spread == pytest.approx(given.std())
        found.append(model.importance())
    np.testing.assert_allclose(found[1], found[0], atol=0.02)
    constant = GraphPredictor(view, encoder=lambda: encoder, heads=SMALL_HEADS)
    constant.fit(choices[:1], np.ones(1), no_steps(choices[:1]))
    assert np.isfinite(constant.posterior(choices[:3]).moves()).all()


def test_bad_calls_are_refused(view: DecisionGraph, fitted: GraphPredictor):
    model = GraphPredictors(view, size=SIZE)()
    with pytest.raises(ValueError, match="predict before fit"):
        model.predict(drawn(1, 0))
    with pytest.raises(ValueError, match="no samples to fit"):
        model.fit(drawn(0, 0), np.empty(0), np.empty(0, dtype=np.int64))
    chain = graph_rung(make_space("mobile", (1, 28, 28), 10)).make()
    with pytest.raises(ValueError, match="state is of graphs with the operations value, none"):
        chain.load_state_dict(fitted.state_dict())
