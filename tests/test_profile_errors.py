"""The one line that every mistake in a profile gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from nasdeploy.errors import ConfigError
from nasdeploy.profiles import (
    BUILTIN_PROFILES,
    METRICS,
    HardwareProfile,
    Runtime,
    load_profile,
    profile_json_schema,
    profile_template,
)
from nasdeploy.profiles.messages import read_model
from nasdeploy.profiles.model import EXPECTED

LATENCY = {"max": "15ms"}


def _write(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _with_budget(budget: object) -> dict[str, object]:
    return {"name": "a", "budget": budget}


def _message(data: object) -> str:
    with pytest.raises(ConfigError) as caught:
        HardwareProfile.from_dict(data, source="my.toml")
    return str(caught.value)


def _load_message(name_or_path: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_profile(name_or_path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


WRONG_DATA = [
    ({"name": "-a", "budget": {"latency": LATENCY}}, "name", '"my-device"'),
    ({"name": "a/b", "budget": {"latency": LATENCY}}, "name", '"my-device"'),
    ({"name": "a" * 65, "budget": {"latency": LATENCY}}, "name", '"my-device"'),
    ({"name": "a\n", "budget": {"latency": LATENCY}}, "name", '"my-device"'),
    ({"name": 3, "budget": {"latency": LATENCY}}, "name", '"my-device"'),
    ({"budget": {"latency": LATENCY}}, "name", '"my-device"'),
    ({"name": "a", "description": 3, "budget": {"latency": LATENCY}}, "description", '"one core'),
    ({"name": "a"}, "budget", 'latency = { max = "15ms" }'),
    ({"name": "a", "runtime": 3, "budget": {"latency": LATENCY}}, "runtime", "threads = 1"),
    *(
        ({"name": "a", "runtime": {key: value}, "budget": {"latency": LATENCY}}, f"runtime.{key}", example)
        for key, value, example in [
            ("engine", "tensorrt", '"onnxruntime"'),
            ("provider", "CPU", '"CPUExecutionProvider"'),
            ("provider", 1, '"CPUExecutionProvider"'),
            ("threads", 0, "such as 1"),
            ("threads", -1, "such as 1"),
            ("threads", True, "such as 1"),
            ("threads", "2", "such as 1"),
            ("threads", 1.0, "such as 1"),
            ("batch_size", 0, "such as 1"),
            ("precision", "fp8", '"int8"'),
            ("channel_multiple", 0, "such as 8"),
            ("opset", 17, "such as 18"),
        ]
    ),
    *(
        ({"name": "a", "device": value, "budget": {"latency": LATENCY}}, key, example)
        for value, key, example in [
            (3, "device", '[device] with the line host = "user@board"'),
            ({}, "device", "by_hand = true"),
            ({"by_hand": False}, "device.by_hand", "expected true"),
            ({"by_hand": "yes"}, "device.by_hand", "expected true"),
            ({"host": "board", "by_hand": True}, "device.host", "one or the other"),
            ({"by_hand": True, "python": "python3"}, "device.python", "a host beside it"),
            ({"host": 3}, "device.host", '"user@board"'),
            *(
                ({"host": host}, "device.host", '"user@board"')
                for host in ["", "-oProxyCommand=x", "user@-x", "a b", "a;b", "a\n", "$(x)", "user@", "'a'"]
            ),
            *(
                ({"host": "board", "python": python}, "device.python", '"~/venv/bin/python"')
                for python in ["", "-c", "python3; rm", "py\nthon", "$HOME/python", "python'"]
            ),
        ]
    ),
    (_with_budget({}), "budget", 'latency = { max = "15ms" }'),
    (_with_budget(3), "budget", 'latency = { max = "15ms" }'),
    (_with_budget({"latency": "15ms"}), "budget.latency", '{ max = "15ms" }'),
    (_with_budget({"file_size": 3}), "budget.file_size", '{ max = "4MB" }'),
    (_with_budget({"peak_memory": 3}), "budget.peak_memory", '{ max = "40MB" }'),
    (_with_budget({"latency": {}}), "budget.latency", 'max = "40%"'),
    *(
        (_with_budget({metric: {field: value}}), f"budget.{metric}.{field}", example)
        for metric, field, value, example in [
            ("latency", "max", "15MB", '"15ms"'),
            ("latency", "max", 15, '"15ms"'),
            ("latency", "max", "-5ms", '"15ms"'),
            ("latency", "max", "0ms", '"15ms"'),
            ("latency", "max", "120%", '"100%"'),
            ("latency", "max", "-1%", '"100%"'),
            ("latency", "max", {"value": 3}, '"15ms"'),
            ("params", "max", "60MB", '"60M"'),
            ("params", "max", 0, '"60M"'),
            ("params", "max", -60000, '"60M"'),
            ("flops", "max", float("nan"), '"60M"'),
            ("file_size", "max", "4M", '"4MB"'),
            ("peak_memory", "max", "40M", '"40MB"'),
            ("flops", "coefficient", -0.1, "such as 0.3"),
            ("flops", "coefficient", float("inf"), "such as 0.3"),
            ("flops", "coefficient", "0.1", "such as 0.3"),
            ("flops", "coefficient", True, "such as 0.3"),
            ("flops", "coefficient", 0.0, "such as 0.3"),
        ]
    ),
    (_with_budget({"flops": LATENCY | {"coefficient": 1}}), "budget.flops.max", '"60M"'),
    (
        _with_budget({"flops": {"max": "1M", "reference": "1M"}}),
        "budget.flops.reference",
        "coefficient = 0.3",
    ),
    (
        _with_budget({"flops": {"coefficient": 1, "reference": "1ms"}}),
        "budget.flops.reference",
        '"60M"',
    ),
    (_with_budget({"latency": LATENCY | {"percentile": 42}}), "budget.latency.percentile", "such as 90"),
    (_with_budget({"latency": LATENCY | {"percentile": "90"}}), "budget.latency.percentile", "such as 90"),
    (
        _with_budget({"latency": {"coefficient": 1, "percentile": 90}}),
        "budget.latency.percentile",
        'max = "15ms"',
    ),
    (
        _with_budget({"params": {"max": "1M", "percentile": 50}}),
        "budget.params.percentile",
        '{ max = "15ms", percentile = 90 }',
    ),
]


@pytest.mark.parametrize(("data", "key", "example"), WRONG_DATA)
def test_wrong_value_gets_one_line_with_file_key_and_example(
    data: dict[str, object], key: str, example: str
) -> None:
    message = _message(data)
    assert len(message.splitlines()) == 1
    assert message.startswith((f"my.toml: {key} = ", f"my.toml: {key}: missing; "))
    assert "expected " in message
    assert example in message
    assert "more error" not in message


def test_message_in_full(tmp_path: Path) -> None:
    path = _write(tmp_path, 'name = "a"\nbudget.latency.max = "15MB"')
    assert _load_message(path) == (
        f'{path}: budget.latency.max = "15MB": expected a time such as "15ms", "800us" or "1.2s", '
        'or a share such as "40%"'
    )


def test_several_mistakes_are_counted() -> None:
    budget = {"latency": {"max": "15MB", "coefficient": -1}, "flops": {"max": "3ms"}}
    message = _message({"name": "a", "runtime": {"threads": 0}, "budget": budget})
    assert message.startswith("my.toml: runtime.threads = 0: ")
    assert message.endswith(" (and 3 more errors)")
    assert _message(
        {"name": "a", "runtime": {"threads": 0, "opset": 1}, "budget": {"latency": LATENCY}}
    ).endswith(" (and 1 more error)")


def test_profile_must_be_a_table() -> None:
    assert _message([1]) == "my.toml = [1]: expected a table with the keys name, runtime and budget"


def test_every_key_has_an_expectation() -> None:
    runtime = {f"runtime.{key}" for key in Runtime.model_fields}
    metrics = {f"budget.{metric}" for metric in METRICS}
    assert set(EXPECTED) >= runtime | metrics | set(HardwareProfile.model_fields)


@pytest.mark.parametrize(
    ("data", "start"),
    [
        (
            {"nmae": "a", "budget": {"latency": LATENCY}},
            'nmae: unknown key; did you mean "name"? expected one of name,',
        ),
        ({"name": "a", "budgets": {"latency": LATENCY}}, 'budgets: unknown key; did you mean "budget"?'),
        (
            {"name": "a", "threads": 2, "budget": {"latency": LATENCY}},
            'threads: unknown key; did you mean "runtime.threads"?',
        ),
        (
            {"name": "a", "runtime": {"thread": 2}, "budget": {"latency": LATENCY}},
            'runtime.thread: unknown key; did you mean "threads"?',
        ),
        (
            _with_budget({"lateny": LATENCY}),
            'budget.lateny: unknown key; did you mean "latency"? expected one of params, flops, latency,',
        ),
        (
            _with_budget({"energy": LATENCY}),
            "budget.energy: unknown key; expected one of params, flops, latency, file_size, peak_memory",
        ),
        (
            _with_budget({"latency": LATENCY | {"percentil": 90}}),
            'budget.latency.percentil: unknown key; did you mean "percentile"?',
        ),
        ({"name": "a", "x\ny": 1, "budget": {"latency": LATENCY}}, '"x\\ny": unknown key; expected one of'),
    ],
)
def test_unknown_key_comes_with_the_nearest_known_one(data: dict[str, object], start: str) -> None:
    message = _message(data)
    assert message.startswith(f"my.toml: {start}")
    assert len(message.splitlines()) == 1


def test_messages_serve_other_models_too() -> None:
    with pytest.raises(ConfigError, match=r"^here: threads = 0: expected greater than or equal to 1$"):
        read_model(Runtime, {"threads": 0}, source="here", expected={})


def test_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = _write(tmp_path, 'name = "a"\nthreads 1\n')
    message = _load_message(path)
    assert message.startswith(f"{path}: ")
    assert "line 2" in message
    assert "such as threads = 1" in message


@pytest.mark.parametrize("content", [b"name = '\xff'", b"name = " + b"9" * 5000])
def test_unreadable_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    assert _load_message(path).startswith(f"{path}: ")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert _load_message(tmp_path / "no.toml").startswith(
        f"{tmp_path / 'no.toml'}: No such file or directory; "
    )
    assert _load_message(tmp_path).startswith(f"{tmp_path}: Is a directory; expected a profile")


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(profile_template("bom"), encoding="utf-8-sig")
    assert load_profile(str(path)).name == "bom"


def test_file_without_suffix_is_found_but_known_names_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("device", "cpu-tight"):
        Path(name).write_text(profile_template("mine"))
    assert load_profile("device").name == "mine"
    assert load_profile("cpu-tight").name == "cpu-tight"
    assert load_profile("./cpu-tight").name == "mine"


def test_unknown_name_lists_the_known_and_suggests() -> None:
    message = _load_message("cpu-tigt")
    assert message.startswith(
        'profile "cpu-tigt": not known; did you mean "cpu-tight"? expected one of cpu-tight,'
    )
    assert all(name in message for name in BUILTIN_PROFILES)
    assert "./my-device.toml" in message
    assert "did you mean" not in _load_message("zzz")


# What a schema cannot tell: 0 inside a text, a weight of 0 without a cap, 1.0 from 1, a last line end, inf.
BEYOND_A_SCHEMA = ("0ms", 0.0, 1.0, "a\n", float("inf"))


@pytest.mark.parametrize(("data", "key", "example"), WRONG_DATA)
def test_schema_refuses_wrong_values_too(data: dict[str, object], key: str, example: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    value: object = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    is_nan = value != value
    is_subtle = any((type(value), value) == (type(subtle), subtle) for subtle in BEYOND_A_SCHEMA)
    is_valid = jsonschema.Draft202012Validator(profile_json_schema()).is_valid(data)
    assert is_valid == (is_subtle or is_nan), example
