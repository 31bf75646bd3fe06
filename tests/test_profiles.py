"""Profiles: the built-ins, what a file may say, plug-ins, the canonical form, schema and template."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import ValidationError

from nasdeploy.errors import ConfigError
from nasdeploy.profiles import (
    BUILTIN_PROFILES,
    DEFAULT_PROFILES,
    METRICS,
    Budget,
    HardwareProfile,
    MetricBudget,
    Percent,
    Quantity,
    Runtime,
    builtin_profiles,
    load_profile,
    profile_json_schema,
    profile_names,
    profile_template,
)

LATENCY = {"max": "15ms"}


def _write(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _with_budget(budget: object) -> dict[str, object]:
    return {"name": "a", "budget": budget}


def _load_message(name_or_path: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_profile(name_or_path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_each_builtin_is_one_file_of_its_name() -> None:
    names = {file.name.removesuffix(".toml") for file in files("nasdeploy.profiles.builtin").iterdir()}
    assert names - {"__init__.py", "__pycache__"} == set(BUILTIN_PROFILES)
    assert [profile.name for profile in builtin_profiles().values()] == list(BUILTIN_PROFILES)
    assert all(len(profile.description) > 20 for profile in builtin_profiles().values())


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("cpu-tight", {metric: MetricBudget(max=Percent(0.15)) for metric in ("latency", "params", "flops")}),
        (
            "cpu-middle",
            {metric: MetricBudget(max=Percent(0.4)) for metric in ("latency", "params")}
            | {"flops": MetricBudget(coefficient=0.05)},
        ),
        ("cpu-roomy", {metric: MetricBudget(max=Percent(0.85)) for metric in ("latency", "params")}),
        (
            "edge-cpu-1t",
            {
                "latency": MetricBudget(max=Quantity(2.0)),
                "params": MetricBudget(max=Quantity(1.5e6)),
                "file_size": MetricBudget(max=Quantity(4e6)),
            },
        ),
        (
            "gateway-cpu-2t",
            {
                "latency": MetricBudget(max=Quantity(1.0), percentile=90),
                "flops": MetricBudget(max=Quantity(30e6)),
            },
        ),
        (
            "tiny-flash",
            {
                "params": MetricBudget(max=Quantity(60e3)),
                "file_size": MetricBudget(max=Quantity(300e3)),
                "latency": MetricBudget(max=Quantity(5.0)),
            },
        ),
        ("cuda-gpu", {"latency": MetricBudget(max=Quantity(5.0))}),
    ],
)
def test_builtin_budgets(name: str, budget: dict[str, MetricBudget]) -> None:
    assert dict(load_profile(name).budget.items()) == budget


def test_builtin_runtimes() -> None:
    for name in DEFAULT_PROFILES:
        assert load_profile(name).runtime == Runtime(threads=1, batch_size=1, channel_multiple=8)
    assert load_profile("gateway-cpu-2t").runtime == Runtime(threads=2)
    assert load_profile("server-cpu-batch").runtime == Runtime(threads=2, batch_size=16)
    assert load_profile("tiny-flash").runtime == Runtime(channel_multiple=16)
    assert load_profile("cuda-gpu").runtime == Runtime(provider="CUDAExecutionProvider", batch_size=32)


def test_every_key_of_a_file_is_read(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        """
        name = "edge"
        description = "a box"
        [runtime]
        engine = "onnxruntime"
        provider = "CPUExecutionProvider"
        threads = 4
        batch_size = 2
        precision = "int8"
        channel_multiple = 4
        opset = 20
        [budget]
        latency = { max = "2.0ms", percentile = 95 }
        flops = { coefficient = 0.3, reference = "60M" }
        params = { max = 1_500_000 }
        file_size = { max = "10%", coefficient = 1, reference = "50%" }
        """,
    )
    assert load_profile(path) == HardwareProfile(
        name="edge",
        description="a box",
        runtime=Runtime(threads=4, batch_size=2, precision="int8", channel_multiple=4, opset=20),
        budget=Budget(
            latency=MetricBudget(max=Quantity(2.0), percentile=95),
            flops=MetricBudget(coefficient=0.3, reference=Quantity(60e6)),
            params=MetricBudget(max=Quantity(1.5e6)),
            file_size=MetricBudget(max=Percent(0.1), coefficient=1.0, reference=Percent(0.5)),
        ),
    )


@pytest.mark.parametrize(
    "device",
    [
        {"by_hand": True},
        {"host": "user@board"},
        {"host": "::1", "python": "~/my venv/bin/python3.8"},
        {"host": "my-board_2"},
    ],
)
def test_device_is_read_written_and_meets_the_schema(device: dict[str, object]) -> None:
    data = {"name": "edge", "device": device, "budget": {"latency": {"max": "2ms"}}}
    profile = HardwareProfile.from_dict(data)
    assert profile.to_dict()["device"] == device
    assert HardwareProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    assert _is_valid(data)
    assert _is_valid(profile.to_dict())
    assert not _is_valid(data | {"device": device | {"by_hand": True, "host": "board"}})


def test_profile_without_a_device_is_that_of_this_machine() -> None:
    profile = load_profile("cpu-tight")
    assert profile.device is None
    assert "device" not in profile.to_dict()


def test_budget_items_come_in_the_order_of_the_metrics() -> None:
    budget = Budget(**{metric: MetricBudget(max=Percent(0.5)) for metric in reversed(METRICS)})
    assert [metric for metric, _ in budget.items()] == list(METRICS)
    assert [m for m, _ in Budget(latency=MetricBudget(coefficient=1.0)).items()] == ["latency"]


def test_profiles_cannot_be_changed() -> None:
    profile = load_profile("cpu-tight")
    with pytest.raises(ValidationError, match="frozen"):
        profile.name = "other"


class PluginFolder:
    """Writes installed distributions, as importlib.metadata sees them, into a folder on sys.path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, distribution: str, point: str, *, code: str = "") -> None:
        info = self.folder / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nasdeploy.profiles]\n{point}\n")
        (self.folder / f"{distribution}.py").write_text(code)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginFolder:
    monkeypatch.syspath_prepend(str(tmp_path))
    return PluginFolder(tmp_path)


def test_plugin_gives_a_profile_or_a_path(plugins: PluginFolder) -> None:
    code = (
        "from nasdeploy.profiles import *\n"
        "npu = HardwareProfile(name='npu', budget=Budget(params=MetricBudget(max=Quantity(7.0))))\n"
    )
    plugins.add("plugin_object", "npu = plugin_object:npu", code=code)
    path = plugins.folder / "dsp.toml"
    path.write_text(profile_template("dsp"))
    plugins.add("plugin_path", "dsp = plugin_path:path", code=f"path = {str(path)!r}")
    assert profile_names()[: len(BUILTIN_PROFILES)] == list(BUILTIN_PROFILES)
    assert set(profile_names()[len(BUILTIN_PROFILES) :]) == {"npu", "dsp"}
    params = load_profile("npu").budget.params
    assert params is not None
    assert params.max == Quantity(7.0)
    assert load_profile("dsp").name == "dsp"
    assert "npu" in _load_message("nqu")


def test_plugin_with_the_name_of_a_builtin_raises_and_shows_both(plugins: PluginFolder) -> None:
    plugins.add("plugin_clash", "cpu-tight = plugin_clash:npu")
    with pytest.raises(
        ConfigError, match=r"'cpu-tight' is defined twice: by nasdeploy itself and .*plugin_clash:npu"
    ):
        profile_names()


def test_two_plugins_of_one_name_raise_and_show_both(plugins: PluginFolder) -> None:
    plugins.add("plugin_one", "npu = plugin_one:npu")
    plugins.add("plugin_two", "npu = plugin_two:npu")
    with pytest.raises(ConfigError, match=r"'npu' is defined twice") as caught:
        load_profile("npu")
    assert "plugin_one:npu" in str(caught.value)
    assert "plugin_two:npu" in str(caught.value)


@pytest.mark.parametrize(
    ("distribution", "code", "wanted"),
    [
        ("plugin_missing", "", "cannot be loaded"),
        ("plugin_import", "import no_such_module_here", "cannot be loaded"),
        ("plugin_kind", "npu = 3", "is a int; expected a HardwareProfile or the path of a TOML file"),
        ("plugin_no_file", "npu = 'no/such.toml'", "No such file"),
    ],
)
def test_broken_plugin_is_named(plugins: PluginFolder, distribution: str, code: str, wanted: str) -> None:
    plugins.add(distribution, f"npu = {distribution}:npu", code=code)
    message = _load_message("npu")
    assert wanted in message


def test_plugin_whose_profile_has_another_name_is_refused(plugins: PluginFolder) -> None:
    path = plugins.folder / "dsp.toml"
    path.write_text(profile_template("dsp"))
    plugins.add("plugin_other", "npu = plugin_other:path", code=f"path = {str(path)!r}")
    assert 'name = "dsp"; expected the entry point\'s own name "npu"' in _load_message("npu")


@pytest.mark.parametrize("name", BUILTIN_PROFILES)
def test_canonical_form_round_trips_through_json(name: str) -> None:
    profile = load_profile(name)
    again = HardwareProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again == profile
    assert hash(again) == hash(profile)
    assert again.to_dict() == profile.to_dict()


def test_canonical_form_in_full() -> None:
    data = _with_budget({"latency": {"max": "2000us"}, "flops": {"coefficient": 1, "reference": 1500}})
    assert HardwareProfile.from_dict(data).to_dict() == {
        "name": "a",
        "description": "",
        "runtime": {
            "engine": "onnxruntime",
            "provider": "CPUExecutionProvider",
            "threads": 1,
            "batch_size": 1,
            "precision": "fp32",
            "channel_multiple": 8,
            "opset": 18,
        },
        "budget": {
            "flops": {"coefficient": 1.0, "reference": "1.5k"},
            "latency": {"max": "2ms", "percentile": 50},
        },
    }


def _fingerprint(latency: Mapping[str, object]) -> str:
    return HardwareProfile.from_dict(_with_budget({"latency": latency})).fingerprint()


def test_fingerprint_follows_the_meaning_not_the_spelling() -> None:
    same: list[Mapping[str, object]] = [
        {"max": "2ms"},
        {"max": "2.0 ms"},
        {"max": "0.002s"},
        {"max": "2000us", "percentile": 50},
    ]
    assert len({_fingerprint(latency) for latency in same}) == 1
    other: list[Mapping[str, object]] = [
        {"max": "2ms"},
        {"max": "2.1ms"},
        {"max": "2%"},
        {"max": "2ms", "percentile": 90},
        {"coefficient": 1},
    ]
    assert len({_fingerprint(latency) for latency in other}) == len(other)
    assert len(_fingerprint(LATENCY)) == 16
    assert int(_fingerprint(LATENCY), 16) >= 0


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from nasdeploy.profiles import load_profile; print(load_profile('cpu-middle').fingerprint())"
    assert _run(code) == load_profile("cpu-middle").fingerprint()


def test_profiles_that_differ_only_in_budget_and_channels_share_a_latency_table() -> None:
    assert len({load_profile(name).runtime.key() for name in (*DEFAULT_PROFILES, "tiny-flash")}) == 1
    runtimes = [
        Runtime(),
        Runtime(provider="CUDAExecutionProvider"),
        Runtime(threads=2),
        Runtime(batch_size=2),
        Runtime(precision="int8"),
        Runtime(opset=19),
    ]
    assert len({runtime.key() for runtime in runtimes}) == len(runtimes)


def test_stored_schema_is_that_of_the_models() -> None:
    """Regenerate the file with:

    python -c "import json, nasdeploy.profiles as p; print(json.dumps(p.profile_json_schema(), indent=2))" \
        > nasdeploy/schemas/profile.schema.json
    """
    stored = (files("nasdeploy.schemas") / "profile.schema.json").read_text(encoding="utf-8")
    assert json.loads(stored) == profile_json_schema()


def _is_valid(data: object) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(profile_json_schema())
    return bool(jsonschema.Draft202012Validator(profile_json_schema()).is_valid(data))


@pytest.mark.parametrize("name", BUILTIN_PROFILES)
def test_builtin_files_and_canonical_forms_meet_the_schema(name: str) -> None:
    text = (files("nasdeploy.profiles.builtin") / f"{name}.toml").read_text(encoding="utf-8")
    assert _is_valid(tomllib.loads(text))
    assert _is_valid(load_profile(name).to_dict())


def test_schema_describes_every_key() -> None:
    schema = profile_json_schema()
    for name, definition in {"": schema, **schema["$defs"]}.items():
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{name}.{key}"
    assert "null" not in json.dumps(schema)


def test_template_loads_unchanged_and_meets_the_schema(tmp_path: Path) -> None:
    text = profile_template("my-device")
    profile = load_profile(_write(tmp_path, text))
    assert profile.name == "my-device"
    assert _is_valid(tomllib.loads(text))
    for key in (*METRICS, *Runtime.model_fields, *MetricBudget.model_fields):
        assert key in text


def test_commented_lines_of_the_template_are_valid_too() -> None:
    lines = profile_template("my-device").splitlines()
    options = [line.removeprefix("# ") for line in lines if line.startswith("# ") and " = { " in line]
    assert len(options) == 4
    for option in options:
        data = _with_budget(tomllib.loads(option))
        assert HardwareProfile.from_dict(data).budget.items()


@pytest.mark.parametrize("name", ["", "../x", "a b", "a\n", 'a"', "a" * 65, "_a"])
def test_template_refuses_names_that_are_no_folder_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r'^name = .*expected up to 64 letters.*such as "my-device"$'):
        profile_template(name)


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_importing_profiles_is_light() -> None:
    heavy = "{'torch', 'numpy', 'onnx', 'onnxruntime', 'click', 'rich'}"
    assert _run(f"import sys, nasdeploy.profiles; print(sorted({heavy} & set(sys.modules)))") == "[]"
