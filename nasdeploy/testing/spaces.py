"""The contract of a search space.

Shapes: B images, C channels, H = W pixels, K classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nasdeploy.costs.counting import count_network, counting_tables
from nasdeploy.costs.graphs import EMITTERS
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.networks import LAYER_KINDS, Supernet
from nasdeploy.networks.resizing import resize
from nasdeploy.spaces import CLASSIFIERS, IMAGES, Architecture, SearchSpace
from nasdeploy.testing.common import export, plain_network, plain_normalise

TOLERANCE = 1e-4
"""Largest difference of a logit between two ways to compute it, as a fraction of the range of the logits."""

NUM_DRAWS = 20_000
SUM_TOLERANCE = 1e-9


class SpaceContract:
    """A search space: implement :meth:`factory`. ``num_random``: how many random architectures are tried."""

    image_shape: tuple[int, int, int] = (1, 28, 28)
    num_classes: int = 10
    num_random: int = 4

    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
        """Return the space for images of ``image_shape`` (C, H, W)."""
        raise NotImplementedError

    def _make(self) -> SearchSpace:
        return self.factory(self.image_shape, self.num_classes)

    def test_it_is_for_the_images_and_classes_that_were_asked_for(self) -> None:
        space = self._make()
        made, asked = (space.image_shape, space.num_classes), (self.image_shape, self.num_classes)
        assert made == asked, f"the space is for (image shape, classes) {made}; expected {asked}"

    def test_decisions_have_names_of_their_own(self) -> None:
        names = [decision.name for decision in self._make().decisions]
        assert names, "expected at least one decision"
        assert not _twice(names), f"decisions of one name: {_twice(names)}"

    def test_candidates_are_there_and_differ(self) -> None:
        for decision in self._make().decisions:
            assert decision.candidates, f"{decision.name}: no candidates"
            assert not _twice(decision.candidates), f"{decision.name}: twice {_twice(decision.candidates)}"
            counts = (len(decision.channels), len(decision.candidates))
            assert counts[0] in (0, counts[1]), (
                f"{decision.name}: {counts[0]} channels, {counts[1]} candidates"
            )

    def test_slots_have_names_of_their_own_and_a_layer_for_every_choice(self) -> None:
        space = self._make()
        names = [slot.name.replace(".", "_") for slot in space.slots]  # as modules of torch are called
        assert not _twice(names), f"slots of one name: {_twice(names)}"
        counts = space.num_values()
        for slot in space.slots:
            sizes = [counts[d] for d in slot.decisions]
            missing = set(product(*map(range, sizes))) - set(slot.layers)
            assert not missing, f"slot {slot.name}: no entry for the candidates {min(missing)}"

    def test_derived_values_have_the_probabilities_of_their_draws(self) -> None:
        """Expected costs rest on them."""
        space = self._make()
        rng = np.random.default_rng(0)
        counts = space.num_candidates()
        theta = np.zeros((len(counts), max(counts)))
        for row, count in zip(theta, counts, strict=True):
            row[:count] = rng.dirichlet(np.ones(count))
        drawn = np.stack([rng.choice(theta.shape[1], size=NUM_DRAWS, p=row) for row in theta], axis=1)
        values = space.extended(drawn)[:, len(counts) :]
        for derived, column in zip(space.derived, values.T, strict=True):
            expected = derived.marginal(theta)
            found = np.bincount(column, minlength=derived.num_values) / NUM_DRAWS
            assert found.shape == expected.shape, f"{derived.name}: {len(expected)} probabilities"
            assert abs(expected.sum() - 1) < SUM_TOLERANCE, f"{derived.name}: they sum to {expected.sum()}"
            error = 5 * np.sqrt(expected / NUM_DRAWS) + 1 / NUM_DRAWS
            wrong = np.flatnonzero(np.abs(found - expected) > error)
            assert not wrong.size, (
                f"{derived.name}: value {wrong[:1]} has probability {expected[wrong[:1]]}; "
                f"drawn were {found[wrong[:1]]}"
            )

    def test_every_slot_holds_layers_of_one_known_kind(self) -> None:
        for slot in self._make().slots:
            kinds = {layer.kind for layer in slot.layers.values() if layer is not None}
            assert len(kinds) == 1, (
                f"slot {slot.name}: layers of the kinds {sorted(kinds)}; expected one kind"
            )
            known = LAYER_KINDS.keys() & EMITTERS.keys()
            assert kinds <= known, f"slot {slot.name}: kind {sorted(kinds)}; expected one of {sorted(known)}"

    def test_every_layer_takes_what_the_one_before_it_gives(self) -> None:
        space = self._make()
        for architecture in self._some(space):
            channels, size, _ = space.input_shape(architecture)
            values = {IMAGES: (channels, size)}
            placed = space.placed(architecture)
            for layer in placed:
                takes = (layer.spec.value_channels, layer.spec.size)
                assert len(layer.inputs) == layer.spec.num_inputs, f"{layer.name}: reads {layer.inputs}"
                for source in layer.inputs:
                    channels, size = values[source]
                    assert takes == (channels, size), (
                        f"{layer.name}: takes {takes}; given are {channels} channels, {size} pixels"
                    )
                values[layer.name] = (layer.spec.out_channels, layer.spec.out_size)
            last = placed[-1].spec
            assert last.kind in CLASSIFIERS, f"the last layer is {last}"
            assert last.out_channels == self.num_classes, f"the last layer is {last}"

    def test_every_layer_is_read(self) -> None:
        """What nobody reads costs time and learns nothing."""
        space = self._make()
        for architecture in self._some(space):
            placed = space.placed(architecture)
            read = {name for layer in placed for name in layer.inputs}
            unread = [layer.name for layer in placed[:-1] if layer.name not in read]
            assert not unread, f"{architecture}: nobody reads {', '.join(unread)}"

    def test_no_architecture_is_cheaper_than_the_smallest_or_dearer_than_the_largest(self) -> None:
        """Percentages of a budget lie between these two."""
        space = self._make()
        everything = space.full_mask()
        ends = np.array([space.smallest().choices, space.largest().choices])
        for metric, table in counting_tables(space).items():
            low, high = table.of(ends).tolist()
            least, most = table.minimum(everything), -table.scaled(0.0, -1.0).minimum(everything)
            found = f"{metric}: smallest {low:g}, largest {high:g}, but the space has {least:g} to {most:g}"
            assert (low, high) == (least, most), f"{found}; expected candidates in the order of their cost"

    def test_counting_tables_are_exact(self) -> None:
        space = self._make()
        tables = counting_tables(space)
        for architecture in self._some(space):
            network = plain_network(space, architecture)
            count = count_network(network, space.input_shape(architecture))
            choices = np.array([architecture.choices])
            told = tuple(float(tables[metric].of(choices)[0]) for metric in ("params", "flops"))
            assert told == (count.params, count.flops), (
                f"{architecture}: the tables say {told}; counted {count}"
            )

    def test_names_lead_back_to_the_architecture(self) -> None:
        space = self._make()
        for architecture in self._some(space):
            names = json.loads(json.dumps(space.to_names(architecture)))
            assert space.from_names(names) == architecture, f"{names} reads as {space.from_names(names)}"

    def test_the_fingerprint_is_that_of_the_content(self) -> None:
        first, second = self._make().fingerprint(), self._make().fingerprint()
        assert first == second, "the same call gave two different spaces"
        other = self.factory(self.image_shape, self.num_classes + 1).fingerprint()
        assert other != first, "the space is the same for another number of classes"

    def test_the_onnx_graph_computes_what_the_network_computes(self, tmp_path: Path) -> None:
        space = self._make()
        for number, architecture in enumerate(self._some(space)):
            images = _noise(space.input_shape(architecture))
            network, path = plain_network(space, architecture, images), tmp_path / f"{number}.onnx"
            export(make_exporter("graph"), network, path, image_shape=space.input_shape(architecture))
            with torch.no_grad():
                expected = network(images.float())
            found = _difference(torch.from_numpy(OnnxClassifier(path).logits(images.numpy())), expected)
            assert found <= TOLERANCE, f"{architecture}: outputs differ by {found:.2g} of their range"

    def test_the_supernet_computes_what_the_network_computes(self) -> None:
        space = self._make()
        images = _noise(space.image_shape).float()
        supernet = Supernet(space, plain_normalise(space), torch.Generator().manual_seed(0))
        for architecture in self._some(space):
            network = supernet.extract(architecture).train()  # by batch statistics, as the supernet
            with torch.no_grad():
                shared = supernet(images, architecture)
                expected = network(resize(images, space.input_shape(architecture)[1]))
            found = _difference(shared, expected)
            assert found <= TOLERANCE, f"{architecture}: outputs differ by {found:.2g} of their range"

    def _some(self, space: SearchSpace) -> list[Architecture]:
        """Return the smallest, the largest and some random architectures."""
        rng = np.random.default_rng(0)
        counts = space.num_candidates()
        drawn = [tuple(int(rng.integers(count)) for count in counts) for _ in range(self.num_random)]
        return [space.smallest(), space.largest(), *map(Architecture, drawn)]


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _noise(image_shape: tuple[int, int, int], count: int = 16) -> Tensor:
    """Return images (count, C, H, W) of uniform noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *image_shape), generator=generator, dtype=torch.uint8)


def _difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference between logits (B, K), as a fraction of the range of the expected ones."""
    shapes = tuple(got.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"outputs of shape {shapes[0]}; expected {shapes[1]}"
    return float((got - expected).abs().max() / (expected.max() - expected.min()))
