"""Settings: valid defaults, one line for every mistake, and a fingerprint that sees every field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from nasdeploy.errors import ConfigError
from nasdeploy.profiles.messages import read_model
from nasdeploy.schemas import load_schema
from nasdeploy.settings import EXPECTED, RUNGS, BuildSettings, SearchSettings, settings_json_schema


def read(data: dict[str, Any]) -> BuildSettings:
    """Return ``data`` as settings, read as a file would be."""
    return read_model(BuildSettings, data, source="build.toml", expected=EXPECTED)


def leaves(model: BaseModel, prefix: str = "") -> list[str]:
    """Return the dotted keys of all values of ``model``."""
    keys = []
    for name, value in model:
        keys += leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]
    return keys


def changed(settings: BuildSettings, key: str, value: object) -> BuildSettings:
    """Return valid settings with another value under the dotted ``key``."""
    data = settings.model_dump()
    *parents, name = key.split(".")
    table = data
    for parent in parents:
        table = table[parent]
    table[name] = value
    return read(data)


def other_value(value: object) -> object:
    """Return a valid value that is not ``value``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    return "other"


SPECIAL = {
    "profiles": ("cpu-tight",),
    "image_size": 32,
    "augment": "light",
    "device": "cpu",
    "threads": 1,
    "search.estimator": "independent",
    "retrain.start": "scratch",
    "class_weights": "balanced",
    "search.evaluator": "random-weight",
    "search.warm_start": "random-weight",
    "search.predictor": "proxy",
    "search.random_weight.head": "softmax",
    "search.proxy.rungs": ("ridge",),
}


def test_defaults_are_valid_and_fit_their_schema() -> None:
    data = BuildSettings().model_dump(mode="json")
    assert read(data) == BuildSettings()
    for schema in (load_schema("settings"), settings_json_schema()):
        Draft202012Validator(schema).validate(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"serach": {}}, 'serach: unknown key; did you mean "search"?'),
        ({"search": {"num_step": 3}}, 'search.num_step: unknown key; did you mean "num_steps"?'),
        ({"ema_decay": 0.9}, 'ema_decay: unknown key; did you mean "retrain.ema_decay"?'),
        ({"search": {"num_steps": 0}}, "search.num_steps = 0: expected a whole number from 1, such as 900"),
        ({"seed": -1}, "seed = -1: expected a whole number from 0, such as 0"),
        ({"profiles": []}, 'profiles = []: expected names or paths of profiles, such as ["cpu-tight"]'),
        ({"retrain": {"start": "zero"}}, 'retrain.start = "zero": expected'),
        ({"search": {"uniform_share": 1.5}}, "search.uniform_share = 1.5: expected"),
        ({"measure": {"blocks": 4}}, "measure.blocks = 4: expected"),
        (
            {"search": {"random_weight": {"num_images": 49}}},
            "search.random_weight.num_images = 49: expected a whole number from 50, such as 5000",
        ),
        ({"retrain": {"learning_rate": 0.0}}, "retrain.learning_rate = 0.0: expected"),
    ],
)
def test_a_mistake_is_one_line(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(data)
    line = str(refused.value)
    assert line.startswith("build.toml: ")
    assert message in line
    assert "\n" not in line


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        BuildSettings().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "kept", "sizes"),
    [
        (None, None, ()),
        (64, 64, (64,)),
        ([64], 64, (64,)),
        ([128, 96, 128], (96, 128), (96, 128)),
    ],
)
def test_image_sizes_are_sorted(value: Any, kept: Any, sizes: tuple[int, ...]) -> None:
    settings = BuildSettings(image_size=value)
    assert (settings.image_size, settings.image_sizes) == (kept, sizes)
    assert BuildSettings.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("value", [0, "large", [], [96, 0], [96, "x"], 2.5])
def test_wrong_image_sizes_are_named_on_one_line(value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        read({"image_size": value})
    message = str(refused.value)
    assert "image_size" in message
    assert "such as [96, 128]" in message
    assert "\n" not in message
    assert "more error" not in message


def test_fingerprint_sees_every_field_but_the_profiles_and_the_cache() -> None:
    settings = BuildSettings()
    values = {key: SPECIAL.get(key) for key in leaves(settings)}
    for key in values:
        if key not in SPECIAL:
            value: Any = settings
            for name in key.split("."):
                value = getattr(value, name)
            values[key] = other_value(value)
    profiles = changed(settings, "profiles", values.pop("profiles"))
    assert profiles.fingerprint() == settings.fingerprint()  # a run can be given more of them
    cache = changed(settings, "measure.cache", values.pop("measure.cache"))
    assert (
        cache.fingerprint() == settings.fingerprint()
    )  # where a table comes from does not change what is built
    share = changed(settings, "search.guided_share", values.pop("search.guided_share"))
    assert share.fingerprint() == settings.fingerprint()  # the estimator proposes nothing
    robust = changed(settings, "search.estimator", "doubly_robust")
    assert changed(robust, "search.guided_share", 0.25).fingerprint() != robust.fingerprint()
    values.pop("search.proposer")  # nobody is asked without doubly_robust; see below
    for part in ("random_weight", "proxy"):
        for key in [key for key in values if key.startswith(f"search.{part}.")]:
            unused = changed(settings, key, values.pop(key))
            assert unused.fingerprint() == settings.fingerprint()  # the method is not chosen
    added = changed(settings, "search.num_added_steps", values.pop("search.num_added_steps"))
    assert added.fingerprint() == settings.fingerprint()  # of a profile that joins later
    found = {changed(settings, key, value).fingerprint() for key, value in values.items()}
    assert len(found | {settings.fingerprint()}) == len(values) + 1
    assert len(values) > 30


def test_fingerprint_sees_what_a_chosen_method_depends_on() -> None:
    def of(**search: object) -> str:
        return read({"search": search}).fingerprint()

    robust = {"estimator": "doubly_robust"}
    assert of(**robust, proposer="evolution") != of(**robust)
    orders = (["ridge", "graph"], ["graph", "ridge", "graph"])
    assert len({of(predictor="proxy", proxy={"rungs": rungs}) for rungs in orders}) == 1
    proxy = [{"rungs": ["ridge"]}, {"num_repeats": 7}, {"num_folds": 3}]
    assert len({of(predictor="proxy", proxy=one) for one in [{}, *proxy]}) == 4
    scored = ["num_evaluations", "population_size", "num_images", "num_seeds", "ridge"]
    warm = {"warm_start": "random-weight"}
    alone = {"evaluator": "random-weight"}
    for method in (warm, alone):
        found = [of(**method, random_weight={name: 90}) for name in scored]
        found.append(of(**method, random_weight={"head": "softmax"}))
        assert len({of(**method), *found}) == 7
    for start in ({"num_elite": 3}, {"smoothing": 0.1}):
        assert of(**warm, random_weight=start) != of(**warm)
        assert of(**alone, random_weight=start) == of(**alone)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"warm_start": "random-weight"}, "warm_start = random-weight with evaluator = random-weight"),
        ({"predictor": "proxy"}, "predictor = proxy with evaluator = random-weight"),
        ({"proposer": "evolution"}, "proposer = evolution with evaluator = random-weight"),
        ({"estimator": "independent"}, "estimator = independent with evaluator = random-weight"),
        (
            {
                "evaluator": "supernet",
                "estimator": "doubly_robust",
                "proposer": "evolution",
                "guided_share": 0.0,
            },
            "proposer = evolution with guided_share = 0, which leaves it nothing to propose: expected a share above 0",
        ),
        (
            {"evaluator": "supernet", "proposer": "evolution"},
            "proposer = evolution with estimator = importance, which asks no proposer: expected estimator =",
        ),
    ],
)
def test_methods_that_would_do_nothing_are_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read({"search": {"evaluator": "random-weight", **search}})
    assert str(refused.value).startswith(f"build.toml: search: {message}")
    assert "expected" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "value", [["foo"], ["ridge", "foo", "bar"], [], "ridge", [["ridge"]], {"ridge": 1}, None]
)
def test_wrong_rungs_are_named_on_one_line(value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        read({"search": {"proxy": {"rungs": value}}})
    message = str(refused.value)
    assert message.startswith(
        f"build.toml: search.proxy.rungs = {json.dumps(value)}: expected one or more of"
    )
    assert all(f'"{rung}"' in message for rung in RUNGS)
    assert "\n" not in message
    assert "more error" not in message


def test_rungs_have_one_order() -> None:
    assert read({"search": {"proxy": {"rungs": ["graph", "ridge", "graph"]}}}).search.proxy.rungs == (
        "ridge",
        "graph",
    )


def test_a_step_of_doubly_robust_has_something_to_compare() -> None:
    with pytest.raises(
        ValueError, match="num_loss_samples = 1 with estimator = doubly_robust: expected at least 2"
    ):
        SearchSettings(estimator="doubly_robust", num_loss_samples=1)
    assert SearchSettings(estimator="importance", num_loss_samples=1).num_loss_samples == 1


def test_runs_from_before_a_setting_are_continued() -> None:
    """Of version 0.1 when it knew neither guided_share nor num_added_steps."""
    assert BuildSettings(data="x", profiles=("cpu-tight",)).fingerprint() == "cb277c754f199354"


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from nasdeploy.settings import BuildSettings; print(BuildSettings().fingerprint())"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == BuildSettings().fingerprint()
