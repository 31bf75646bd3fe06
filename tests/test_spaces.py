"""Search spaces as data: what is decoded, what a channel grid forbids, names, ends and fingerprints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np
import pytest

from nasdeploy.errors import ConfigError
from nasdeploy.spaces import Architecture, SearchSpace, make_space, mobile_space, space_names
from nasdeploy.spaces.base import LayerSpec
from nasdeploy.spaces.mobile import default_config

GREY = (1, 28, 28)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The space of the main job."""
    return make_space("mobile", GREY, 10)


def draw(space: SearchSpace, rng: np.random.Generator, *, channel_multiple: int = 1) -> Architecture:
    """Return a random architecture that a device with this channel grid may use."""
    mask = space.candidate_mask(channel_multiple)
    return Architecture(tuple(int(rng.choice(np.flatnonzero(row))) for row in mask))


@pytest.mark.parametrize(
    ("size", "inputs"),
    [
        (28, [28, 14, 14, 7, 4]),
        (32, [32, 16, 16, 8, 4]),
        (64, [64, 32, 16, 8, 4]),
        (95, [95, 48, 24, 12, 6]),
        (96, [96, 48, 24, 12, 6, 6, 3]),
        (160, [160, 80, 40, 20, 10, 10, 5]),
        (224, [224, 112, 56, 28, 14, 14, 7]),
    ],
)
def test_pixels_at_the_input_of_stem_stages_and_head(size: int, inputs: list[int]) -> None:
    space = make_space("mobile", (3, size, size), 10)
    layers = dict(space.named_layers(space.smallest()))
    stages = [f"stage{s}.block1" for s in range(1, len(inputs) - 1)]
    assert [layers[slot].size for slot in ("stem", *stages, "head")] == inputs
    assert layers["classifier"].size == inputs[-1]


def test_few_pixels_are_left_at_the_end_of_every_size() -> None:
    for size in range(28, 225):
        space = make_space("mobile", (3, size, size), 2)
        assert 3 <= space.decode(space.smallest())[-1].size <= 7, size


@pytest.mark.parametrize(
    ("image_shape", "num_classes", "fingerprint"),
    [
        ((1, 28, 28), 10, "8898c88050f0d1e1"),
        ((3, 28, 28), 10, "2b4a40af531ab1b1"),
        ((1, 40, 40), 10, "8b41c17d0f6b4bab"),
        ((1, 41, 41), 10, "b0bf4feca5f171c6"),
        ((3, 48, 48), 7, "e7a7c17bbb783fa3"),
        ((3, 64, 64), 10, "a72c07ebada1adea"),
    ],
)
def test_stored_runs_of_small_images_stay_valid(
    image_shape: tuple[int, int, int], num_classes: int, fingerprint: str
) -> None:
    """The fingerprints of version 0.1: a change of the space would make every stored table and search useless."""
    assert make_space("mobile", image_shape, num_classes).fingerprint() == fingerprint


def test_larger_images_get_more_stages() -> None:
    assert default_config(65) == default_config(95) == default_config(64) != default_config(96)
    assert default_config(96) == default_config(224)
    assert (len(default_config(95).stages), len(default_config(96).stages)) == (3, 5)
    space = make_space("mobile", (3, 96, 96), 10)
    stages = [(3, 4, 5), *[(3, 4, 5, 5)] * 4]
    assert space.num_candidates() == (3, *(count for stage in stages for count in stage), 3)


def test_larger_images_keep_to_the_same_channel_grids() -> None:
    space = make_space("mobile", (3, 224, 224), 10)
    assert space.candidate_mask(8) == space.full_mask()
    assert all(map(any, space.candidate_mask(16)))
    with pytest.raises(ConfigError, match=r"channel_multiple = 32: no candidate of 'stem\.width'.*8, 16, 24"):
        space.candidate_mask(32)
    later = [d for d in space.decisions if d.channels and d.name not in ("stem.width", "stage1.width")]
    assert len(later) == 5
    assert all(any(count % 32 == 0 for count in decision.channels) for decision in later)


def test_every_layer_takes_what_the_layer_before_it_gives(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    for _ in range(50):
        layers = space.decode(draw(space, rng))
        assert (layers[0].in_channels, layers[0].size) == (1, 28)
        for before, after in pairwise(layers):
            assert (after.in_channels, after.size) == (before.out_channels, before.out_size)
        assert layers[-1].out_channels == 10


def test_decisions_and_candidates_are_those_of_the_configuration(space: SearchSpace) -> None:
    # stem; per stage a width, a first block of 4 operations, further blocks of 4 or skip; head
    assert space.num_candidates() == (3, 3, 4, 5, 3, 4, 5, 5, 3, 4, 5, 5, 3)
    assert [decision.name for decision in space.decisions[:4]] == [
        "stem.width",
        "stage1.width",
        "stage1.block1",
        "stage1.block2",
    ]
    assert prod(space.num_candidates()) == 3**5 * 4**3 * 5**5


def test_skipped_blocks_are_not_in_the_network(space: SearchSpace) -> None:
    names = [name for name, _ in space.named_layers(space.smallest())]
    assert names == ["stem", "stage1.block1", "stage2.block1", "stage3.block1", "head", "classifier"]
    assert len(space.decode(space.largest())) == 11


def test_operation_and_widths_of_a_block_come_from_its_decisions(space: SearchSpace) -> None:
    names = space.to_names(space.smallest())
    names |= {"stem.width": "16", "stage1.width": "24", "stage1.block1": "k5e4", "stage1.block2": "k3e2"}
    layers = dict(space.named_layers(space.from_names(names)))
    first = LayerSpec(
        kind="inverted_residual", in_channels=16, out_channels=24, size=14, kernel=5, stride=1, expand=4
    )
    assert layers["stage1.block1"] == first
    assert (first.hidden_channels, first.has_residual) == (64, False)
    assert layers["stage1.block2"].has_residual


def test_distinct_layers_hold_every_layer_of_every_architecture(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    distinct = space.distinct_layers()
    assert len(set(distinct)) == len(distinct)
    for _ in range(50):
        assert set(space.decode(draw(space, rng))) <= set(distinct)


def test_channel_multiple_16_removes_widths_8_and_24(space: SearchSpace) -> None:
    mask = dict(zip([d.name for d in space.decisions], space.candidate_mask(16), strict=True))
    assert mask["stem.width"] == mask["stage1.width"] == (False, True, False)  # 8, 16, 24
    assert mask["stage2.width"] == mask["head.width"] == (True, True, True)
    assert all(mask["stage3.block2"])


def test_networks_within_a_mask_keep_to_the_channel_grid(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    for _ in range(50):
        layers = space.decode(draw(space, rng, channel_multiple=16))
        assert all(layer.out_channels % 16 == 0 for layer in layers[:-1])


def test_channel_multiple_32_names_the_decision_that_it_empties(space: SearchSpace) -> None:
    with pytest.raises(ConfigError, match=r"channel_multiple = 32: no candidate of 'stem\.width'.*8, 16, 24"):
        space.candidate_mask(32)


def test_channel_multiple_8_and_1_allow_everything(space: SearchSpace) -> None:
    assert space.candidate_mask(8) == space.candidate_mask(1) == space.full_mask()


def test_ends_of_a_masked_space_are_its_first_and_last_allowed_candidates(space: SearchSpace) -> None:
    mask = space.candidate_mask(16)
    smallest, largest = (space.to_names(a) for a in (space.smallest(mask), space.largest(mask)))
    assert smallest["stem.width"] == largest["stem.width"] == "16"
    assert (smallest["stage2.width"], largest["stage2.width"]) == ("16", "48")
    assert (smallest["stage1.block2"], largest["stage1.block2"]) == ("skip", "k5e4")


def test_ends_of_the_whole_space(space: SearchSpace) -> None:
    assert space.smallest() == Architecture((0,) * 13)
    assert space.largest() == Architecture(tuple(count - 1 for count in space.num_candidates()))


def test_names_lead_back_to_the_architecture(space: SearchSpace, rng: np.random.Generator) -> None:
    for _ in range(50):
        architecture = draw(space, rng)
        names = json.loads(json.dumps(space.to_names(architecture)))
        assert space.from_names(names) == architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem.widht": "8"}, "unknown decision 'stem.widht' for space 'mobile'"),
        ({"stem.width": "9"}, "stem.width = '9'; expected one of 8, 16, 24"),
        ({"stage1.block1": "skip"}, "stage1.block1 = 'skip'; expected one of k3e2"),
        ({"head.width": None}, "head.width = None; expected one of 64, 128, 192"),
    ],
)
def test_wrong_names_are_refused(space: SearchSpace, change: dict[str, str], message: str) -> None:
    names = space.to_names(space.smallest()) | change
    with pytest.raises(ConfigError) as refused:
        space.from_names(names)
    assert message in str(refused.value)


def test_a_missing_name_is_refused(space: SearchSpace) -> None:
    names = space.to_names(space.smallest())
    del names["head.width"]
    with pytest.raises(ConfigError, match=r"head\.width"):
        space.from_names(names)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((0,) * 12, "has 12 choices; space 'mobile' has 13 decisions"),
        ((3, *(0,) * 12), r"stem\.width = 3; expected an index from 0 to 2"),
        ((-1, *(0,) * 12), r"stem\.width = -1"),
    ],
)
def test_wrong_choices_are_refused(space: SearchSpace, choices: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space.decode(Architecture(choices))


@pytest.mark.parametrize(
    ("shape", "remedy"), [((1, 27, 27), 28), ((3, 225, 225), 224), ((3, 32, 40), 32), ((1, 300, 200), 224)]
)
def test_images_of_unsuitable_size_are_refused(shape: tuple[int, int, int], remedy: int) -> None:
    with pytest.raises(ConfigError, match=f"{shape[1]}x{shape[2]} pixels.*--image-size {remedy} "):
        make_space("mobile", shape, 10)


@pytest.mark.parametrize("size", [28, 41, 64, 65, 95, 96, 97, 224])
def test_images_at_the_limits_are_taken(size: int) -> None:
    space = make_space("mobile", (3, size, size), 2)
    assert space.decode(space.smallest())[0].size == size
    assert space.input_shape(space.largest()) == space.image_shape == (3, size, size)


def test_an_unknown_space_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"space: 'moble' is not known; expected one of mobile"):
        make_space("moble", GREY, 10)
    assert "mobile" in space_names()


def changed_layer(space: SearchSpace, **changes: int | str) -> SearchSpace:
    """Return the space with one layer of its last slot changed."""
    slot = space.slots[-1]
    choice, layer = next(iter(slot.layers.items()))
    assert layer is not None
    changed = replace(slot, layers={**slot.layers, choice: replace(layer, **changes)})
    return replace(space, slots=(*space.slots[:-1], changed))


def other_spaces(space: SearchSpace) -> list[SearchSpace]:
    """Return spaces that differ from ``space`` in one thing each."""
    first, *rest = space.decisions
    slot = space.slots[-1]
    config = default_config(28)
    layer_changes: list[dict[str, int | str]] = [
        {"kind": "head"},
        {"in_channels": 63},
        {"out_channels": 11},
        {"size": 5},
        {"kernel": 3},
        {"stride": 2},
        {"expand": 2},
    ]
    return [
        replace(space, name="other"),
        replace(space, num_classes=11),
        replace(space, image_shape=(3, 28, 28)),
        replace(space, decisions=(replace(first, name="stem"), *rest)),
        replace(space, decisions=(replace(first, candidates=("8", "16", "25")), *rest)),
        replace(space, decisions=(replace(first, channels=(8, 16, 25)), *rest)),
        replace(space, slots=(*space.slots[:-1], replace(slot, name="end"))),
        replace(space, slots=(*space.slots[:-1], replace(slot, decisions=(0,)))),
        replace(space, slots=space.slots[:-1]),
        *(changed_layer(space, **changes) for changes in layer_changes),
        mobile_space(GREY, 10, replace(config, stem_stride=1)),
        make_space("mobile", (1, 32, 32), 10),
    ]


def test_fingerprint_changes_when_anything_changes(space: SearchSpace) -> None:
    others = [other.fingerprint() for other in other_spaces(space)]
    assert len({space.fingerprint(), *others}) == len(others) + 1


def test_fingerprint_is_the_same_in_another_process(space: SearchSpace) -> None:
    code = (
        "from nasdeploy.spaces import make_space; print(make_space('mobile', (1, 28, 28), 10).fingerprint())"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == space.fingerprint()
