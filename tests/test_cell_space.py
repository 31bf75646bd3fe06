"""The space of cells: networks that are graphs, layers that depend on derived values, and weights for every source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nasdeploy.costs.counting import count_network, counting_tables
from nasdeploy.costs.graphs import graph_layers, network_graph, random_weights
from nasdeploy.errors import ConfigError
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.files import nodes_of, read_model
from nasdeploy.exporters.quantization import convert_untrained, quantize_model
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.networks import Normalise, Supernet
from nasdeploy.networks.evaluation import evaluate
from nasdeploy.reporting.layers import chain_of, layer_text
from nasdeploy.reporting.text import TIMES
from nasdeploy.spaces import (
    Architecture,
    CellConfig,
    LayerSlot,
    SearchSpace,
    cell_space,
    make_space,
    with_resolutions,
)
from nasdeploy.testing import SpaceContract
from nasdeploy.testing.common import export, plain_network

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 28, 28)
NORMALISE = Normalise((72.9,), (90.0,))
TYPES = ("normal", "reduction")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return make_space("cell", SHAPE, 10)


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    return Supernet(space, NORMALISE, torch.Generator().manual_seed(0))


def draw(space: SearchSpace, seed: int) -> Architecture:
    counts = space.num_candidates()
    return Architecture(tuple(np.random.default_rng(seed).integers(counts).tolist()))


def with_names(space: SearchSpace, architecture: Architecture, **changes: str) -> Architecture:
    """Return the architecture with other candidates: normal_node1_input1="previous"."""
    changed = {name.replace("_", "."): candidate for name, candidate in changes.items()}
    return space.from_names(space.to_names(architecture) | changed)


def images_of(count: int, size: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 1, size, size), generator=generator).float()


class TestCell(SpaceContract):
    """Counts are exact, PyTorch, ONNX and the supernet compute the same, every cell is alive."""

    num_random = 1

    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
        return cell_space(image_shape, num_classes)


class TestCellsOfTwoNodes(SpaceContract):
    """Another stack: images in colour, one reduction, two nodes a cell."""

    image_shape = (3, 20, 20)
    num_random = 1

    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
        config = CellConfig(channels=(8, 12), cells=("reduction", "normal"), num_nodes=2)
        return cell_space(image_shape, num_classes, config)


# ── what earlier spaces rely on ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((1, 28, 28), (), "8898c88050f0d1e1"),
        ((3, 32, 32), (), "8608956acbd8783d"),
        ((3, 224, 224), (), "f2a178552023b194"),
        ((1, 40, 40), (32, 40), "0f75cfa7aecee22b"),
    ],
)
def test_the_fingerprints_of_the_mobile_space_are_those_from_before_there_were_cells(
    shape: tuple[int, int, int], sizes: tuple[int, ...], expected: str
) -> None:
    assert make_space("mobile", shape, 10, sizes).fingerprint() == expected


# ── loose ends ───────────────────────────────────────────────────────────────────────────────────


def loose_ends_of(names: dict[str, str], cell_type: str, num_nodes: int) -> set[str]:
    """Return what no node reads, by looking at one input after the other."""
    values = ["before", "previous", *(f"node{i}" for i in range(num_nodes))]
    for i, side in product(range(num_nodes), (1, 2)):
        read = names[f"{cell_type}.node{i}.input{side}"]
        values = [value for value in values if value != read]
    return set(values)


def test_loose_ends_are_those_that_a_loop_finds(space: SearchSpace) -> None:
    values = ["before", "previous", *(f"node{i}" for i in range(5))]
    for seed in range(200):
        architecture = draw(space, seed)
        row = space.extended(np.array([architecture.choices]))[0, -2:]
        for cell_type, value in zip(TYPES, row, strict=True):
            found = {name for bit, name in enumerate(values) if bit == 6 or value >> bit & 1}
            assert found == loose_ends_of(space.to_names(architecture), cell_type, 5)


def test_the_layers_behind_a_cell_read_its_loose_ends(space: SearchSpace) -> None:
    architecture = draw(space, 3)
    names = space.to_names(architecture)
    placed = {layer.name: layer for layer in space.placed(architecture)}
    cells = {"cell1": "normal", "cell2": "reduction", "cell3": "normal", "cell4": "reduction"}
    for cell, follower in zip(cells, ("cell2", "cell3", "cell4", "cell5"), strict=True):
        read = {name.removesuffix(".end") for name in placed[f"{follower}.previous"].inputs}
        assert read == {f"{cell}.{value}" for value in loose_ends_of(names, cells[cell], 5)}
    for follower in ("cell3", "cell5"):  # the one before the last has twice the size
        assert placed[f"{follower}.before"].spec.stride == 2
    assert set(placed["classifier"].inputs) == {
        f"cell5.{value}" for value in loose_ends_of(names, "normal", 5)
    }


def test_probabilities_of_loose_ends_are_those_of_an_enumeration() -> None:
    space = cell_space(SHAPE, 10, CellConfig(num_nodes=2))
    (ends, _), rng = space.derived, np.random.default_rng(0)
    theta = np.zeros((len(space.decisions), 5))
    for row, count in zip(theta, space.num_candidates(), strict=True):
        row[:count] = rng.dirichlet(np.ones(count))
    expected = np.zeros(ends.num_values)
    for choice in product(*(range(space.num_candidates()[d]) for d in ends.decisions)):
        row = np.zeros((1, len(space.decisions)), dtype=np.int64)
        row[0, list(ends.decisions)] = choice
        expected[ends.of(row)[0]] += np.prod(
            [theta[d, c] for d, c in zip(ends.decisions, choice, strict=True)]
        )
    np.testing.assert_allclose(ends.marginal(theta), expected, rtol=0, atol=1e-14)


# ── costs ────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_of_the_smallest_network_by_hand(space: SearchSpace) -> None:
    """Identities alone: a stem, two joins a cell of one value each, a classifier; batch norm has two a channel."""
    joins = [(8, 8), (8, 8), (8, 16), (8, 16), (8, 16), (16, 16), (16, 32), (16, 32), (16, 32), (32, 32)]
    expected = 9 * 8 + 2 * 8 + sum(i * o + 2 * o for i, o in joins) + 32 * 10 + 10
    smallest = np.array([space.smallest().choices])
    assert counting_tables(space)["params"].of(smallest)[0] == expected


@pytest.mark.parametrize("metric", ["params", "flops"])
def test_costs_are_no_sum_over_decisions(space: SearchSpace, metric: str) -> None:
    """Node 0 is a loose end only if neither of the two inputs of node 1 reads it: the last change costs."""
    base = space.smallest()
    one = with_names(space, base, normal_node1_input1="previous")
    other = with_names(space, base, normal_node1_input2="previous")
    both = with_names(space, one, normal_node1_input2="previous")
    rows = np.array([architecture.choices for architecture in (base, one, other, both)])
    costs = counting_tables(space)[metric].of(rows)
    assert costs[0] == costs[1] == costs[2] < costs[3]


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


def test_the_gradient_reaches_every_weight_of_a_network_and_no_other(
    space: SearchSpace, supernet: Supernet
) -> None:
    architecture = draw(space, 5)
    supernet.zero_grad()
    F.cross_entropy(supernet(images_of(16), architecture), torch.arange(16) % 10).backward()
    slots = {layer.name for layer in space.placed(architecture)}
    for slot, layer in zip(space.slots, supernet.elastic_layers, strict=True):
        reached = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in layer.parameters()]
        assert any(reached) == (slot.name in slots and bool(reached)), slot.name
    network = supernet.extract(architecture).train()
    F.cross_entropy(network(images_of(16)), torch.arange(16) % 10).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_weights_of_a_source_are_its_own_whatever_stands_beside_it(
    space: SearchSpace, supernet: Supernet
) -> None:
    first = with_names(space, draw(space, 5), channels="16")
    second = with_names(space, space.largest(), channels="16")
    weights = []
    for architecture in (first, second):
        network = supernet.extract(architecture)
        (classifier,) = (layer for layer in network.placed if layer.name == "classifier")
        blocks = network.layer("classifier").get_submodule("linear").weight.detach().split(64, dim=1)
        weights.append(dict(zip(classifier.inputs, blocks, strict=True)))
    common = weights[0].keys() & weights[1].keys()
    assert weights[0].keys() != weights[1].keys()
    assert common
    for source in common:
        torch.testing.assert_close(weights[0][source], weights[1][source], rtol=0, atol=0)
    assert len({float(block.sum()) for block in weights[1].values()}) == len(weights[1])


def test_a_value_is_kept_until_its_last_reader_and_no_longer(space: SearchSpace) -> None:
    placed = space.placed(draw(space, 7))
    last = {name: layer.name for layer in placed for name in layer.inputs}
    alive: dict[str, str] = {}  # by the name of the value: who reads it last

    class Value(torch.Tensor):
        label = ""

        def __del__(self) -> None:
            alive.pop(self.label, None)

    def compute(layer: object, values: list[torch.Tensor]) -> torch.Tensor:
        value = torch.zeros(()).as_subclass(Value)
        value.label = getattr(layer, "name")  # noqa: B009
        done = {name for name, reader in last.items() if reader in finished}
        assert not done & alive.keys()
        alive[value.label] = last.get(value.label, "")
        finished.add(value.label)
        return value

    finished: set[str] = set()
    evaluate(placed, torch.zeros(()), compute)
    assert len(finished) == len(placed)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def test_eight_bits_keep_the_outputs_and_untrained_networks_have_the_same_operators(
    space: SearchSpace, tmp_path: Path
) -> None:
    """A network with concatenations, sums, and pooling of both kinds."""
    architecture, images = draw(space, 4), images_of(32)
    network = plain_network(space, architecture, images)
    source, path = tmp_path / "source.onnx", tmp_path / "int8.onnx"
    export(make_exporter("graph"), network, source, image_shape=SHAPE)
    quantize_model(source, path=path, batches=[images.numpy()], exporter="graph", metadata={})
    with torch.no_grad():
        expected = network(images).numpy()
    found = OnnxClassifier(path).logits(images.numpy())
    assert np.abs(found - expected).max() < 0.1 * np.ptp(expected)
    layers = graph_layers(
        space.placed(architecture), lambda spec: random_weights(spec, np.random.default_rng(0))
    )
    model = network_graph(layers, image_shape=SHAPE, mean=[0.0], scale=[1.0], batch_size=None)
    made = sorted(node.op_type for node in nodes_of(convert_untrained(model, "int8")))
    shipped = sorted(node.op_type for node in nodes_of(read_model(path)))
    assert made == shipped
    assert {"Concat", "Add", "MaxPool", "AveragePool", "QuantizeLinear"} <= set(shipped)


def test_what_several_layers_begin_with_is_computed_once(space: SearchSpace) -> None:
    architecture = space.largest()
    layers = graph_layers(
        space.placed(architecture), lambda spec: random_weights(spec, np.random.default_rng(0))
    )
    model = network_graph(layers, image_shape=SHAPE, mean=[0.0], scale=[1.0], batch_size=None)
    nodes = [(node.op_type, *node.input) for node in model.graph.node if node.op_type in ("Relu", "Concat")]
    assert len(nodes) == len(set(nodes))
    # Of a cell, its own output and all that its separable convolutions read: one input, in the first cell the stem too.
    assert sum(kind == "Concat" for kind, *_ in nodes) == 5


def test_a_layer_that_reads_what_is_not_there_is_refused(space: SearchSpace) -> None:
    layers = graph_layers(
        space.placed(space.smallest()), lambda spec: random_weights(spec, np.random.default_rng(0))
    )
    layers[2] = layers[2]._replace(inputs=("nothing",))
    with pytest.raises(
        ConfigError, match=r"cell1.previous: reads 'nothing'; expected a layer that comes before"
    ):
        network_graph(layers, image_shape=SHAPE, mean=[0.0], scale=[1.0], batch_size=None)


# ── several sizes ────────────────────────────────────────────────────────────────────────────────


def test_the_resolution_may_be_chosen_beside_the_cells() -> None:
    config = CellConfig(channels=(8, 16), cells=("normal", "reduction"), num_nodes=2)
    singles = [cell_space((1, size, size), 10, config) for size in (24, 32)]
    space = with_resolutions(singles)
    tables = counting_tables(space)
    for r, single in enumerate(singles):
        alone = draw(single, r)
        architecture = Architecture((r, *alone.choices))
        assert space.placed(architecture) == single.placed(alone)
        count = count_network(plain_network(space, architecture), single.image_shape)
        row = np.array([architecture.choices])
        assert (tables["params"].of(row)[0], tables["flops"].of(row)[0]) == (count.params, count.flops)
    theta = np.random.default_rng(0).random((len(space.decisions), 5))
    for ends, inner in zip(space.derived, single.derived, strict=True):
        np.testing.assert_array_equal(ends.marginal(theta), inner.marginal(theta[1:]))
    assert space.scaled_by == space.decisions[-1].name == "channels"
    assert space.fingerprint() != single.fingerprint()


def test_sizes_that_need_another_stem_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"image_size: 64 and 96 do not fit together.*'cell'"):
        make_space("cell", (1, 96, 96), 10, (64, 96))


@pytest.mark.parametrize(("size", "num_stems", "last"), [(16, 1, 2), (64, 1, 8), (65, 2, 5), (224, 3, 7)])
def test_larger_images_get_more_stems(size: int, num_stems: int, last: int) -> None:
    space = make_space("cell", (3, size, size), 2)
    assert [slot.name[:4] for slot in space.slots[:num_stems]] == ["stem"] * num_stems
    assert space.decode(space.smallest())[-1].size == last


@pytest.mark.parametrize(("shape", "remedy"), [((1, 15, 15), 16), ((3, 225, 225), 224), ((3, 32, 40), 32)])
def test_images_of_unsuitable_size_are_refused(shape: tuple[int, int, int], remedy: int) -> None:
    with pytest.raises(ConfigError, match=f"{shape[1]}x{shape[2]} pixels.*--image-size {remedy} "):
        make_space("cell", shape, 10)


# ── spaces that do not fit together ──────────────────────────────────────────────────────────────


def broken(space: SearchSpace) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (message, what is wrong with the space)."""
    *others, classifier = space.slots
    yield r"scaled_by = 'width'; expected the name of a decision", {"scaled_by": "width"}

    def with_last(slot: LayerSlot) -> dict[str, object]:
        return {"slots": (*others, slot)}

    ends, first = len(space.decisions), space.derived[0].decisions[0]
    twice = replace(classifier, decisions=(ends, first))
    yield r"slot 'classifier' depends on \[41, 0\], two of which share a decision", with_last(twice)
    later = replace(classifier, inputs=dict.fromkeys(classifier.layers, ("cell6.node0",)))
    layers = {key: layer and replace(layer, num_inputs=1) for key, layer in classifier.layers.items()}
    yield (
        r"slot 'classifier' reads 'cell6.node0'; expected a slot that comes before",
        with_last(replace(later, layers=layers)),
    )
    fewer = replace(classifier, inputs=dict.fromkeys(classifier.layers, ("cell5.node4",)))
    yield r"slot 'classifier' reads 1 values for a layer .* num_inputs = 2", with_last(fewer)


def test_slots_that_do_not_fit_together_are_refused(space: SearchSpace) -> None:
    for message, changes in broken(space):
        with pytest.raises(ConfigError, match=message):
            replace(space, **changes)


def test_a_layer_that_reads_a_slot_without_a_value_is_refused(space: SearchSpace) -> None:
    slots = [
        replace(slot, inputs=dict.fromkeys(slot.layers, ("cell1.node0.sep1", "cell1.node0.sep2")))
        if slot.name == "cell1.node0"
        else slot
        for slot in space.slots
    ]
    with pytest.raises(
        ConfigError, match=r"slot 'cell1\.node0' reads 'cell1.node0.sep1', which has no value"
    ):
        replace(space, slots=tuple(slots)).placed(space.smallest())


def test_choices_that_are_not_in_the_space_are_refused(space: SearchSpace) -> None:
    for row in ([0] * 40, [-1] + [0] * 40, [0] * 40 + [4]):
        with pytest.raises(
            ValueError, match="expected 41 decisions, with candidate indices inside the space"
        ):
            space.extended(np.array([row]))


def test_the_fingerprint_knows_what_layers_read_and_what_is_scaled(space: SearchSpace) -> None:
    *others, classifier = space.slots
    assert classifier.inputs is not None
    swapped = {key: names[::-1] for key, names in classifier.inputs.items()}
    changed = [
        replace(space, scaled_by=""),
        replace(space, slots=(*others, replace(classifier, inputs=swapped))),
        replace(space, derived=(space.derived[0], replace(space.derived[1], name="other"))),
    ]
    assert len({space.fingerprint(), *(one.fingerprint() for one in changed)}) == len(changed) + 1
    assert replace(space, graph=None).fingerprint() == space.fingerprint()


# ── reports ──────────────────────────────────────────────────────────────────────────────────────


def test_the_report_says_what_every_layer_does_and_reads(space: SearchSpace) -> None:
    architecture = with_names(space, space.smallest(), normal_node0_operation1="sep3")
    layers = chain_of(space, space.to_names(architecture))
    assert layers is not None
    assert [row["slot"] for row in layers] == [name for name, _ in space.named_layers(architecture)]
    texts = [layer_text(row) for row in layers]
    assert texts[:5] == [
        f"3{TIMES}3 conv, stride 2",
        f"before: 1{TIMES}1 conv of stem1",
        f"previous: 1{TIMES}1 conv of stem1",
        f"node0.sep1: 3{TIMES}3 separable of previous",
        "node0: sum of node0.sep1, before",
    ]
    assert texts[-1] == "pool + linear of cell5.node4"
