"""The contracts: our own parts keep to them, and each of them finds what it is there to find."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nasdeploy.data import Dataset, Preprocessing, Split, load_dataset
from nasdeploy.exporters import ExportedModel, Exporter, make_exporter
from nasdeploy.exporters.files import read_model, save_model
from nasdeploy.profiles import BUILTIN_PROFILES, HardwareProfile, load_profile, profile_template
from nasdeploy.spaces import LayerSlot, SearchSpace, make_space
from nasdeploy.testing import DatasetContract, ExporterContract, ProfileContract, SpaceContract

pytestmark = pytest.mark.usefixtures("one_thread")

# ── our own parts ────────────────────────────────────────────────────────────────────────────────


class TestBuiltinProfiles(ProfileContract):
    @pytest.fixture(autouse=True, params=BUILTIN_PROFILES)
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.profile = request.param  # one class, every profile


class TestProfileTemplate(ProfileContract):
    @pytest.fixture(autouse=True)
    def write(self, tmp_path: Path) -> None:
        self.profile = tmp_path / "mine.toml"
        self.profile.write_text(profile_template("mine"), encoding="utf-8")


class TestEmbeddedImages(DatasetContract):
    def load(self, *, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
        return load_dataset("fashion-mnist", image_size=image_size, seed=seed, valid_fraction=valid_fraction)


class TestFolder(DatasetContract):
    image_size = 24
    brings_test_split = False

    @pytest.fixture(autouse=True)
    def write(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        write_images(tmp_path)

    def load(self, *, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
        return load_dataset(str(self.folder), image_size=image_size, seed=seed, valid_fraction=valid_fraction)


class TestMobile(SpaceContract):
    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
        return make_space("mobile", image_shape, num_classes)


class TestMobileInColour(TestMobile):
    image_shape = (3, 48, 48)
    num_classes = 3
    num_random = 2


class TestMobileOfSeveralSizes(SpaceContract):
    image_shape = (1, 32, 32)

    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
        return make_space("mobile", image_shape, num_classes, image_sizes=(28, image_shape[1]))


class TestGraphExporter(ExporterContract):
    def make(self) -> Exporter:
        return make_exporter("graph")


class TestTorchExporter(ExporterContract):
    def make(self) -> Exporter:
        return make_exporter("torch")


def write_images(folder: Path) -> None:
    """Write a few images of two classes and three shapes, grey and in colour."""
    rng = np.random.default_rng(0)
    for label, number in itertools.product(("hot", "cold"), range(8)):
        shape = [(30, 24), (24, 40, 3), (33, 33)][number % 3]
        path = folder / label / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)


# ── each contract finds what it is there to find ─────────────────────────────────────────────────


def fails(contract: object, name: str, *arguments: object) -> str:
    """Return the message with which the test ``name`` of ``contract`` fails."""
    with pytest.raises(AssertionError) as caught:
        getattr(contract, name)(*arguments)
    return str(caught.value)


class StrayProfile(ProfileContract):
    """A profile that is made, not loaded."""

    profile = "cpu-tight"

    def __init__(self, made: HardwareProfile) -> None:
        self.made = made

    def load(self) -> HardwareProfile:
        return self.made


class ForgetfulProfile(HardwareProfile):
    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"description": ""}


BROKEN_PROFILES: Mapping[str, tuple[str, Callable[[HardwareProfile], HardwareProfile]]] = {
    "another name": (
        "test_a_profile_that_is_loaded_by_name_has_that_name",
        lambda good: good.model_copy(update={"name": "other"}),
    ),
    "a form that lacks something": (
        "test_its_canonical_form_leads_back_to_it",
        lambda good: ForgetfulProfile(**{key: getattr(good, key) for key in type(good).model_fields}),
    ),
    "no budget": (
        "test_it_limits_something",
        lambda good: good.model_copy(update={"budget": type(good.budget).model_construct()}),
    ),
    "an opset of the future": (
        "test_its_opset_can_be_written",
        lambda good: good.model_copy(update={"runtime": good.runtime.model_copy(update={"opset": 999})}),
    ),
}


@pytest.mark.parametrize("fault", BROKEN_PROFILES)
def test_the_contract_of_profiles_finds(fault: str) -> None:
    name, change = BROKEN_PROFILES[fault]
    good = load_profile("cpu-tight")
    assert getattr(StrayProfile(good), name)() is None
    assert fails(StrayProfile(change(good)), name)


class MadeDataset(DatasetContract):
    """A dataset that ``change`` makes of a good one."""

    def __init__(self, change: Callable[..., Dataset]) -> None:
        self.change = change

    def load(self, *, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
        rng = np.random.default_rng(0)
        size = image_size or 28

        def split(count: int) -> Split:
            images = rng.integers(0, 256, (count, 1, size, size), dtype=np.uint8)
            return Split(torch.from_numpy(images), torch.arange(count) % 3)

        good = Dataset(
            name="made",
            train=split(12),
            valid=split(6),
            test=split(6),
            class_names=("a", "b", "c"),
            source="made",
            preprocessing=Preprocessing(image_size=size, channels=1, colour="grey"),
        )
        return self.change(good, seed)


def with_images(split: Split, images: torch.Tensor) -> Split:
    return Split(images, split.labels)


def drawing(draw: Callable[[], object]) -> Callable[[Dataset, int], Dataset]:
    def change(good: Dataset, seed: int) -> Dataset:
        draw()
        return good

    return change


def cropped(good: Dataset, size: int) -> Dataset:
    """Return the images at ``size`` if they are larger."""
    parts = {
        name: with_images(split, split.images[..., :size, :size])
        for name, split in (("train", good.train), ("valid", good.valid), ("test", good.test))
    }
    return replace(good, **parts, preprocessing=replace(good.preprocessing, image_size=size))


def dividing_by_size(part: str) -> Callable[[Dataset, int], Dataset]:
    """Put the images of a part into another order at every size; there are as many of each class."""

    def change(good: Dataset, seed: int) -> Dataset:
        split = getattr(good, part)
        order = torch.arange(len(split)).roll(good.preprocessing.image_size // 4)
        return replace(good, **{part: Split(split.images[order], split.labels[order])})

    return change


COUNTER = itertools.count()

BROKEN_DATASETS: Mapping[str, tuple[str, Callable[[Dataset, int], Dataset]]] = {
    "not square": (
        "test_images_are_square_and_uint8",
        lambda good, seed: replace(good, valid=with_images(good.valid, good.valid.images[..., :20])),
    ),
    "two channels": (
        "test_images_are_square_and_uint8",
        lambda good, seed: replace(good, test=with_images(good.test, good.test.images.repeat(1, 2, 1, 1))),
    ),
    "splits of two shapes": (
        "test_splits_have_images_of_one_shape",
        lambda good, seed: replace(good, test=with_images(good.test, good.test.images.repeat(1, 3, 1, 1))),
    ),
    "an empty split": (
        "test_splits_have_images_of_one_shape",
        lambda good, seed: replace(good, valid=Split(good.valid.images[:0], good.valid.labels[:0])),
    ),
    "a label too many": (
        "test_labels_are_those_of_the_classes",
        lambda good, seed: replace(good, test=Split(good.test.images, good.test.labels + 1)),
    ),
    "a negative label": (
        "test_labels_are_those_of_the_classes",
        lambda good, seed: replace(good, test=Split(good.test.images, good.test.labels - 1)),
    ),
    "two classes of one name": (
        "test_labels_are_those_of_the_classes",
        lambda good, seed: replace(good, class_names=("a", "b", "a")),
    ),
    "a class without training images": (
        "test_every_class_has_training_images",
        lambda good, seed: replace(good, class_names=("a", "b", "c", "d")),
    ),
    "a test image that is trained on": (
        "test_splits_share_no_images",
        lambda good, seed: replace(
            good, test=with_images(good.test, torch.cat([good.test.images[1:], good.train.images[:1]]))
        ),
    ),
    "something else every time": (
        "test_one_seed_gives_one_dataset",
        lambda good, seed: replace(
            good, train=with_images(good.train, good.train.images + next(COUNTER) % 200)
        ),
    ),
    "test images by seed": (
        "test_another_seed_leaves_the_test_split_as_it_was",
        lambda good, seed: replace(good, test=with_images(good.test, good.test.images + seed)),
    ),
    "test labels by seed": (
        "test_another_seed_leaves_the_test_split_as_it_was",
        lambda good, seed: replace(good, test=Split(good.test.images, good.test.labels.roll(seed))),
    ),
    "a size of its own": (
        "test_images_have_the_size_that_was_asked_for",
        lambda good, seed: replace(good, valid=with_images(good.valid, good.valid.images[..., :28, :28])),
    ),
    "a size that is not told": (
        "test_images_have_the_size_that_was_asked_for",
        lambda good, seed: replace(good, preprocessing=replace(good.preprocessing, image_size=28)),
    ),
    "always the size that it has": (
        "test_images_have_the_size_that_was_asked_for",
        lambda good, seed: cropped(good, MadeDataset.other_size),
    ),
    "training labels by size": ("test_the_division_does_not_depend_on_the_size", dividing_by_size("train")),
    "validation labels by size": ("test_the_division_does_not_depend_on_the_size", dividing_by_size("valid")),
    "test labels by size": ("test_the_division_does_not_depend_on_the_size", dividing_by_size("test")),
    "draws from torch": (
        "test_loading_draws_from_no_global_generator",
        drawing(lambda: torch.rand(1)),
    ),
    "draws from NumPy": (
        "test_loading_draws_from_no_global_generator",
        drawing(np.random.rand),  # what a loader must not do
    ),
    "draws from random": (
        "test_loading_draws_from_no_global_generator",
        drawing(random.random),
    ),
}


@pytest.mark.parametrize("fault", BROKEN_DATASETS)
def test_the_contract_of_datasets_finds(fault: str) -> None:
    name, change = BROKEN_DATASETS[fault]
    assert getattr(MadeDataset(lambda good, seed: good), name)() is None
    assert fails(MadeDataset(change), name)


def test_duplicates_that_the_data_is_known_to_have_are_allowed() -> None:
    _, change = BROKEN_DATASETS["a test image that is trained on"]
    contract = MadeDataset(change)
    contract.max_shared_images = 1
    contract.test_splits_share_no_images()


class MadeSpace(SpaceContract):
    """A space that ``change`` makes of a good one."""

    num_random = 1

    def __init__(self, change: Callable[[SearchSpace], SearchSpace]) -> None:
        self.change = change

    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
        return self.change(make_space("mobile", image_shape, num_classes))


def with_decision(space: SearchSpace, index: int, **changes: Any) -> SearchSpace:
    decisions = list(space.decisions)
    decisions[index] = replace(decisions[index], **changes)
    return replace(space, decisions=tuple(decisions))


def with_slot(space: SearchSpace, index: int, change: Callable[[LayerSlot], LayerSlot]) -> SearchSpace:
    slots = list(space.slots)
    slots[index] = change(slots[index])
    return replace(space, slots=tuple(slots))


def with_layers(space: SearchSpace, index: int, *, first_only: bool = False, **changes: Any) -> SearchSpace:
    """Return the space with other layers in the slot ``index``."""

    def change(slot: LayerSlot) -> LayerSlot:
        chosen = list(slot.layers)[: 1 if first_only else None]
        layers = {
            key: replace(layer, **changes) if key in chosen and layer is not None else layer
            for key, layer in slot.layers.items()
        }
        return replace(slot, layers=layers)

    return with_slot(space, index, change)


def reversed_operations(slot: LayerSlot) -> LayerSlot:
    """Return the first block of a stage with its operations from the most expensive to the cheapest."""
    return replace(
        slot, layers={(before, after, 3 - op): layer for (before, after, op), layer in slot.layers.items()}
    )


class HidingSpace(SearchSpace):
    """A space whose networks have a block that its slots do not show."""

    def placed(self, architecture: Any) -> Any:
        first, second, third, *others = super().placed(architecture)
        block, name = second.spec, f"{second.name}.more"
        hidden = replace(block, in_channels=block.out_channels, size=block.out_size, stride=1)
        more = replace(second, name=name, spec=hidden, inputs=(second.name,))
        return (first, second, more, replace(third, inputs=(name,)), *others)


def hiding(space: SearchSpace) -> SearchSpace:
    return HidingSpace(**{name: getattr(space, name) for name in space.__dataclass_fields__})


@dataclass(frozen=True)
class WrongDerived:
    """The first decision once more, said to have all of its values equally often."""

    name: str = "first"
    decisions: tuple[int, ...] = (0,)
    num_values: int = 3

    def of(self, choices: Any) -> Any:
        return choices[:, 0]

    def marginal(self, theta: Any) -> Any:
        return np.full(self.num_values, 1 / self.num_values)

    def row(self) -> list[Any]:
        return ["wrong"]


def reading(slot: LayerSlot, name: str) -> LayerSlot:
    """Return the slot with layers that read the slot ``name``."""
    return replace(slot, inputs=dict.fromkeys(slot.layers, (name,)))


BROKEN_SPACES: Mapping[str, tuple[str, Callable[[SearchSpace], SearchSpace]]] = {
    "classes of its own": (
        "test_it_is_for_the_images_and_classes_that_were_asked_for",
        lambda good: make_space("mobile", good.image_shape, 3),
    ),
    "images of its own": (
        "test_it_is_for_the_images_and_classes_that_were_asked_for",
        lambda good: make_space("mobile", (3, 32, 32), good.num_classes),
    ),
    "no decisions": (
        "test_decisions_have_names_of_their_own",
        lambda good: replace(good, decisions=(), slots=()),
    ),
    "decisions of one name": (
        "test_decisions_have_names_of_their_own",
        lambda good: with_decision(good, 1, name="stem.width"),
    ),
    "a decision without candidates": (
        "test_candidates_are_there_and_differ",
        lambda good: with_decision(good, 2, candidates=()),
    ),
    "a candidate twice": (
        "test_candidates_are_there_and_differ",
        lambda good: with_decision(good, 0, candidates=("8", "8", "24")),
    ),
    "a channel count too few": (
        "test_candidates_are_there_and_differ",
        lambda good: with_decision(good, 0, channels=(8, 16)),
    ),
    "slots of one name": (
        "test_slots_have_names_of_their_own_and_a_layer_for_every_choice",
        lambda good: with_slot(good, 2, lambda slot: replace(slot, name="stage1_block1")),
    ),
    "a choice without an entry": (
        "test_slots_have_names_of_their_own_and_a_layer_for_every_choice",
        lambda good: with_slot(
            good, 3, lambda slot: replace(slot, layers=dict(list(slot.layers.items())[:-1]))
        ),
    ),
    "an unknown kind": (
        "test_every_slot_holds_layers_of_one_known_kind",
        lambda good: with_layers(good, 1, kind="transformer"),
    ),
    "two kinds in a slot": (
        "test_every_slot_holds_layers_of_one_known_kind",
        lambda good: with_layers(good, 1, kind="head", first_only=True),
    ),
    "a slot that is always skipped": (
        "test_every_slot_holds_layers_of_one_known_kind",
        lambda good: with_slot(good, 2, lambda slot: replace(slot, layers=dict.fromkeys(slot.layers))),
    ),
    "a layer for other pixels": (
        "test_every_layer_takes_what_the_one_before_it_gives",
        lambda good: with_layers(good, -2, size=7),
    ),
    "a first layer for other images": (
        "test_every_layer_takes_what_the_one_before_it_gives",
        lambda good: with_layers(good, 0, in_channels=3),
    ),
    "too many outputs": (
        "test_every_layer_takes_what_the_one_before_it_gives",
        lambda good: with_layers(good, -1, out_channels=11),
    ),
    "probabilities that are not those of the draws": (
        "test_derived_values_have_the_probabilities_of_their_draws",
        lambda good: replace(good, derived=(WrongDerived(),)),
    ),
    "a block that nobody reads": (
        "test_every_layer_is_read",
        lambda good: with_slot(good, 2, lambda slot: reading(slot, "stem")),
    ),
    "candidates out of order": (
        "test_no_architecture_is_cheaper_than_the_smallest_or_dearer_than_the_largest",
        lambda good: with_slot(good, 1, reversed_operations),
    ),
    "a block that is not counted": ("test_counting_tables_are_exact", hiding),
    "names that mean two candidates": (
        "test_names_lead_back_to_the_architecture",
        lambda good: with_decision(good, 0, candidates=("8", "16", "8")),
    ),
    "another space every time": (
        "test_the_fingerprint_is_that_of_the_content",
        lambda good: replace(good, name=f"mobile{next(COUNTER)}"),
    ),
    "one space for all classes": (
        "test_the_fingerprint_is_that_of_the_content",
        lambda good: make_space("mobile", good.image_shape, 3),
    ),
}


@pytest.mark.parametrize("fault", BROKEN_SPACES)
def test_the_contract_of_spaces_finds(fault: str) -> None:
    name, change = BROKEN_SPACES[fault]
    assert getattr(MadeSpace(lambda good: good), name)() is None
    assert fails(MadeSpace(change), name)


ONNX_TEST = "test_the_onnx_graph_computes_what_the_network_computes"
SUPERNET_TEST = "test_the_supernet_computes_what_the_network_computes"


def test_the_contract_of_spaces_finds_a_graph_that_is_not_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind of layer that a third party added, its ReLU6 forgotten in the graph."""
    from nasdeploy.costs.graphs import EMITTERS

    monkeypatch.setitem(
        EMITTERS,
        "head",
        lambda graph, inputs, name, spec, weights: graph.conv(inputs[0], name, weights, stride=spec.stride),
    )
    assert "differ by" in fails(TestMobile(), ONNX_TEST, tmp_path)


def test_the_contract_of_spaces_finds_a_supernet_that_is_not_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kind of layer whose shared weights compute something else than its plain module."""
    from nasdeploy.networks import operations

    class Elastic(operations.ElasticConv):
        def forward(self, *values: torch.Tensor, **options: Any) -> torch.Tensor:
            return 2 * super().forward(*values, **options)

    plain, _ = operations.LAYER_KINDS["stem"]
    monkeypatch.setitem(operations.LAYER_KINDS, "stem", (plain, Elastic))
    assert "differ by" in fails(TestMobile(), SUPERNET_TEST)


class MadeExporter(ExporterContract):
    """An exporter that does what ``wrong`` does around a good one."""

    name = "mine"

    def __init__(self, wrong: Callable[..., ExportedModel]) -> None:
        self.wrong = wrong

    def make(self) -> Exporter:
        return self

    def export(self, network: nn.Module, **options: Any) -> ExportedModel:
        return replace(self.wrong(network, options), exporter=self.name)


def write(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    """Export as the exporter ``graph`` does."""
    return make_exporter("graph").export(network, **options)


def with_other(key: str, value: object) -> Callable[..., ExportedModel]:
    """Export with another value of an option than the one that was asked for."""
    return lambda network, options: write(network, options | {key: value})


def leaving_a_file(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    (options["path"].parent / "weights.bin").write_bytes(b"")
    return write(network, options)


def stamped(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    return write(network, options | {"metadata": {**options["metadata"], "time": str(next(COUNTER))}})


def inexact(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    import copy

    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    return write(other, options)


def switching(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    network.eval()
    return write(network, options)


def changing(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    with torch.no_grad():
        next(network.parameters()).round_()
    return write(network, options)


def drawing_exporter(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    torch.rand(1)
    return write(network, options)


def lenient(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    return write(network, options | {"opset": max(18, options["opset"])})


def renamed(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
    path = write(network, options).path
    model = read_model(path)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    return save_model(model, path=path, opset=options["opset"], exporter="mine", metadata=options["metadata"])


BROKEN_EXPORTERS: Mapping[str, tuple[str, Callable[..., ExportedModel]]] = {
    "a second file": ("test_it_writes_one_file_and_says_what_it_wrote", leaving_a_file),
    "a wrong size": (
        "test_it_writes_one_file_and_says_what_it_wrote",
        lambda network, options: replace(write(network, options), file_size=1),
    ),
    "a wrong digest": (
        "test_it_writes_one_file_and_says_what_it_wrote",
        lambda network, options: replace(write(network, options), sha256="0" * 64),
    ),
    "an output of another name": ("test_it_writes_one_file_and_says_what_it_wrote", renamed),
    "the time in the file": ("test_the_same_network_gives_the_same_bytes", stamped),
    "other weights": ("test_the_file_passes_the_gate", inexact),
    "a network that is switched": ("test_the_network_is_left_as_it_was", switching),
    "a network that is changed": ("test_the_network_is_left_as_it_was", changing),
    "draws from torch": ("test_the_network_is_left_as_it_was", drawing_exporter),
    "no metadata": ("test_metadata_is_in_the_file", with_other("metadata", {})),
    "one batch size": ("test_the_file_takes_the_batches_that_were_asked_for", with_other("batch_size", 1)),
    "any batch size": ("test_the_file_takes_the_batches_that_were_asked_for", with_other("batch_size", None)),
    "one opset": ("test_another_opset_is_written_or_refused", with_other("opset", 18)),
    "every opset": ("test_a_lower_opset_is_refused", lenient),
}


@pytest.mark.parametrize("fault", BROKEN_EXPORTERS)
def test_the_contract_of_exporters_finds(fault: str, tmp_path: Path) -> None:
    name, wrong = BROKEN_EXPORTERS[fault]
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
    assert getattr(MadeExporter(write), name)(tmp_path / "good") is None
    assert fails(MadeExporter(wrong), name, tmp_path / "bad")


def test_a_file_that_is_left_of_a_refused_opset_is_found(tmp_path: Path) -> None:
    def late(network: nn.Module, options: dict[str, Any]) -> ExportedModel:
        options["path"].touch()
        return write(network, options)

    assert "before the opset was refused" in fails(
        MadeExporter(late), "test_a_lower_opset_is_refused", tmp_path
    )


# ── the classes themselves ───────────────────────────────────────────────────────────────────────

CONTRACTS = (DatasetContract, ExporterContract, ProfileContract, SpaceContract)
FAULTS = (BROKEN_PROFILES, BROKEN_DATASETS, BROKEN_SPACES, BROKEN_EXPORTERS)


def test_every_test_of_a_contract_is_shown_to_fail() -> None:
    """A new test needs a part that it finds."""
    shown = {name for table in FAULTS for name, _ in table.values()} | {ONNX_TEST, SUPERNET_TEST}
    assert {n for contract in CONTRACTS for n in vars(contract) if n.startswith("test_")} == shown


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_alone_is_collected_nowhere(contract: type) -> None:
    """Whoever imports it into a test file would otherwise run it without anything to test."""
    assert not contract.__name__.startswith("Test")
