"""The JSON Schemas: valid themselves, closed, complete, and at home in one place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings, settings_json_schema

NAMES = sorted(
    path.name.removesuffix(".schema.json")
    for path in files("nasdeploy.schemas").iterdir()
    if path.name.endswith(".schema.json")
)
FROM_MODELS = {"profile", "settings"}
WRITTEN = [name for name in NAMES if name not in FROM_MODELS]
LINES = {"event"}
"""Of lines in a file, not of files: their version is that of the run."""

CAP = {
    "metric": "latency",
    "cap": 2.0,
    "value": 1.7,
    "bound": 1.8,
    "status": "holds",
    "unit": "ms",
    "text": "1.7ms",
}
BUILD_RESULT: dict[str, Any] = {
    "schema": "nasdeploy/build-result/1",
    "run_dir": "runs/demo",
    "report": "runs/demo/report/index.html",
    "exit_code": 0,
    "profiles": [
        {
            "profile": "cpu-tight",
            "status": "certified",
            "exit_code": 0,
            "message": "",
            "model": "runs/demo/models/cpu-tight/model.onnx",
            "shipped": "model.onnx",
            "precision": "fp32",
            "accuracy": 0.91,
            "latency_ms": 0.2,
            "params": 31_000,
            "flops": 1_400_000,
            "macs": 1_300_000,
            "file_size": 130_000,
            "peak_memory": 11_000_000,
            "caps": [CAP],
        }
    ],
}


def subschemas(schema: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object) of every JSON object inside ``schema``."""
    if isinstance(schema, dict):
        yield path, schema
        for key, value in schema.items():
            yield from subschemas(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for i, value in enumerate(schema):
            yield from subschemas(value, f"{path}[{i}]")


def fields(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the subschemas that name the keys of an object."""
    return [
        (where, part)
        for where, part in subschemas(schema)
        if isinstance(part.get("properties"), dict) and "type" in part
    ]


def test_every_kind_of_file_has_a_schema() -> None:
    expected = {
        "adaptation",
        "architecture",
        "baseline",
        "bench",
        "build-result",
        "event",
        "export",
        "export-result",
        "importance",
        "latency",
        "latency-table",
        "measure",
        "metrics",
        "pack",
        "pack-result",
        "profile",
        "profile-latency",
        "profile-memory",
        "random-weight",
        "random-weight-table",
        "report",
        "run",
        "search",
        "settings",
        "training",
        "verify",
    }
    assert set(NAMES) == expected


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(load_schema(name))


VERSIONS = {"metrics": 2, "run": 2, "profile-latency": 2, "latency-table": 2}


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - LINES))
def test_schemas_know_their_name_and_version(name: str) -> None:
    schema = load_schema(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    version = VERSIONS.get(name, 1)
    assert schema["properties"]["schema"] == {"const": f"nasdeploy/{name}/{version}"}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_renamed_key_is_never_accepted(name: str) -> None:
    loose = [
        where for where, part in fields(load_schema(name)) if part.get("additionalProperties") is not False
    ]
    assert loose == []


# Objects that say less where there is less to say: {metric: value}, and the layer of a skipped slot.
OPTIONAL = {"params", "flops", "latency", "file_size"}
BUDGETED = {"peak_memory", "random_weight"}
"""Measured only where a budget names it; a part of the schedule only where random weights are asked."""

OPTIONAL_OF_LAYER = {
    "kernel",
    "stride",
    "expand",
    "in_channels",
    "out_channels",
    "size",
    "out_size",
    "residual",
    "inputs",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_missing_key_is_never_accepted(name: str) -> None:
    for where, part in fields(load_schema(name)):
        missing = set(part["properties"]) - set(part.get("required", []))
        assert missing - BUDGETED in (set(), OPTIONAL, OPTIONAL_OF_LAYER), where


@pytest.mark.parametrize("name", NAMES)
def test_references_lead_somewhere(name: str) -> None:
    schema = load_schema(name)
    references = [part["$ref"] for _, part in subschemas(schema) if isinstance(part.get("$ref"), str)]
    assert [r for r in references if r.removeprefix("#/$defs/") not in schema.get("$defs", {})] == []


def test_stored_settings_schema_is_that_of_the_models() -> None:
    """After a change of the settings write it again.

    python -c "import json, nasdeploy.settings as s; print(json.dumps(s.settings_json_schema(), indent=2))" \
        > nasdeploy/schemas/settings.schema.json
    """
    assert load_schema("settings") == settings_json_schema()


def test_settings_follow_their_schema() -> None:
    validator = Draft202012Validator(load_schema("settings"))
    assert validator.is_valid(BuildSettings().model_dump(mode="json"))
    assert not validator.is_valid({"sead": 0})


def test_the_report_and_the_gate_tell_a_verification_alike() -> None:
    verify, report = load_schema("verify"), load_schema("report")
    inside = report["properties"]["profiles"]["items"]["properties"]["verification"]["properties"]
    assert {"schema": {"const": "nasdeploy/verify/1"}, **inside} == verify["properties"]
    assert {name: report["$defs"][name] for name in verify["$defs"]} == verify["$defs"]


def test_a_latency_is_told_alike_alone_and_in_a_bench() -> None:
    alone, bench = load_schema("latency"), load_schema("bench")
    inside = {"$schema": alone["$schema"], "title": alone["title"], **bench["$defs"]["latency"]}
    assert inside | {"$defs": {"percentiles": bench["$defs"]["percentiles"]}} == alone


def test_an_export_is_told_alike_alone_and_in_a_result() -> None:
    alone, result = load_schema("export"), load_schema("export-result")
    inside = {"$schema": alone["$schema"], "title": alone["title"], **result["$defs"]["export"]}
    assert inside | {"$defs": {"check": result["$defs"]["check"]}} == alone
    assert alone["$defs"]["check"] == load_schema("verify")["$defs"]["check"]


@pytest.mark.parametrize("name", ["metrics", "build-result"])
def test_caps_are_told_alike(name: str) -> None:
    validator = Draft202012Validator(load_schema(name)["$defs"]["cap"])
    assert validator.is_valid(CAP)
    assert not validator.is_valid(CAP | {"unit": "s"})


def test_a_build_result_is_accepted_and_any_key_of_it_is_needed() -> None:
    validator = Draft202012Validator(load_schema("build-result"))
    assert list(validator.iter_errors(BUILD_RESULT)) == []
    for holder in (
        lambda data: data,
        lambda data: data["profiles"][0],
        lambda data: data["profiles"][0]["caps"][0],
    ):
        for key in holder(BUILD_RESULT):
            changed = copy.deepcopy(BUILD_RESULT)
            del holder(changed)[key]
            assert not validator.is_valid(changed), key


def test_a_failed_profile_is_accepted() -> None:
    nothing = dict.fromkeys(("model", "accuracy", "latency_ms", "params", "flops", "macs", "file_size"))
    row = BUILD_RESULT["profiles"][0] | nothing | {"status": "infeasible", "exit_code": 3, "caps": []}
    result = json.loads(json.dumps(BUILD_RESULT | {"profiles": [row], "exit_code": 3}))
    assert Draft202012Validator(load_schema("build-result")).is_valid(result)
