"""``config.toml`` of a run folder: what was resolved, and the same settings again when it is given with ``-c``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from nasdeploy.cli.merging import Layer, assignment_layer, file_layer, merge_layers, nested
from nasdeploy.runs import RunFolder
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings

TEXT = 'my "odd"\\ text of 2024/ü'
SPECIAL: dict[str, Any] = {
    "image_size": [96, 128],
    "time_budget": "1.5h",
    "search.evaluator": "supernet",
    "search.proxy.rungs": ["pairs", "graph"],
}
"""Values that their type alone does not give."""
ALONE = {"search.evaluator": "random-weight"}
"""Means nothing beside other settings that are changed: not changed with them."""
NEEDED = {"search.proposer": {"search": {"estimator": "doubly_robust"}}}
"""What a setting means nothing without."""


def other_value(annotation: Any, value: Any) -> Any:
    """Return a valid value of a field that is not ``value``; numbers with many digits."""
    arms = [arm for arm in get_args(annotation) if arm is not NoneType]
    if get_origin(annotation) is Literal:
        return next(arm for arm in arms if arm != value)
    if get_origin(annotation) is tuple:
        return [TEXT, "b"]
    if arms:  # Annotated[int, …] or int | None
        return other_value(arms[0], value)
    if annotation is bool:
        return not value
    if annotation is int:
        return (value or 2**40) + 1
    return TEXT if annotation is str else (value or 0.5) / 3


def all_changed(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return valid data for ``model`` in which every value is another than its own."""
    return {
        name: all_changed(value, f"{prefix}{name}.")
        if isinstance(value, BaseModel)
        else SPECIAL.get(prefix + name, other_value(type(model).model_fields[name].annotation, value))
        for name, value in model
    }


CHANGED = all_changed(BuildSettings())


def resolved(settings: BuildSettings, folder: Path) -> Path:
    """Return the config.toml that a run of ``settings`` in ``folder`` writes."""
    run = RunFolder(folder)
    run.claim(settings=settings.model_dump(mode="json"), fingerprint=settings.fingerprint(), facts=dict)
    return run.config


def leaves(model: BaseModel, prefix: str = "") -> dict[str, object]:
    """Return {dotted key: value} of all values of ``model``."""
    found: dict[str, object] = {}
    for name, value in model:
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return found


def test_every_setting_is_changed_here() -> None:
    """What the next tests rest on."""
    defaults, changed = leaves(BuildSettings()), leaves(BuildSettings(**CHANGED))
    assert [key for key, value in changed.items() if value == defaults[key]] == [*ALONE]


@pytest.mark.parametrize("data", [{}, CHANGED], ids=["defaults", "everything"])
def test_a_stored_configuration_gives_the_same_settings(data: dict[str, Any], tmp_path: Path) -> None:
    settings = BuildSettings(**data)
    again = merge_layers([file_layer(resolved(settings, tmp_path))])
    assert again == settings
    assert again.fingerprint() == settings.fingerprint()


@pytest.mark.parametrize("key", leaves(BuildSettings()))
def test_a_stored_configuration_keeps_a_setting_that_alone_was_changed(key: str, tmp_path: Path) -> None:
    value: Any = CHANGED
    for name in key.split("."):
        value = value[name]
    needed = [Layer(source="", data=NEEDED[key])] if key in NEEDED else []
    settings = merge_layers([*needed, Layer(source="", data=nested(key, ALONE.get(key, value)))])
    assert leaves(settings)[key] != leaves(BuildSettings())[key]
    assert merge_layers([file_layer(resolved(settings, tmp_path))]) == settings


def test_what_a_file_cannot_unset_is_unset_by_default() -> None:
    """TOML has no null: a stored None would come back as the default."""
    for model in (BuildSettings, *(type(part) for _, part in BuildSettings() if isinstance(part, BaseModel))):
        for name, field in model.model_fields.items():
            if NoneType in get_args(field.annotation):
                assert field.default is None, name


def test_a_stored_configuration_says_what_was_not_asked_for_too(tmp_path: Path) -> None:
    stored = tomllib.loads(resolved(BuildSettings(seed=3), tmp_path).read_text(encoding="utf-8"))
    assert stored["search"] == BuildSettings().search.model_dump(mode="json")
    assert (stored["seed"], stored["profiles"]) == (3, list(BuildSettings().profiles))


@pytest.mark.parametrize("data", [{}, CHANGED], ids=["defaults", "everything"])
def test_a_stored_configuration_follows_the_schema(data: dict[str, Any], tmp_path: Path) -> None:
    stored = tomllib.loads(resolved(BuildSettings(**data), tmp_path).read_text(encoding="utf-8"))
    assert [e.message for e in Draft202012Validator(load_schema("settings")).iter_errors(stored)] == []


def test_an_assignment_counts_over_a_stored_configuration(tmp_path: Path) -> None:
    stored = file_layer(resolved(BuildSettings(**CHANGED), tmp_path))
    settings = merge_layers([stored, *map(assignment_layer, ("search.num_steps=9", "image_size=64"))])
    assert settings.search == BuildSettings(**CHANGED).search.model_copy(update={"num_steps": 9})
    assert settings.image_size == 64
