"""Settings from defaults, a file, options and --set: which of them counts, and whom a message blames."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner

from nasdeploy.cli.building import build, search
from nasdeploy.cli.merging import Layer, assignment_layer, file_layer, merge_layers, parse_value
from nasdeploy.cli.options import (
    AUGMENTATIONS,
    CLASS_WEIGHTS,
    DEVICES,
    ESTIMATORS,
    EVALUATORS,
    PREDICTORS,
    PROPOSERS,
    WARM_STARTS,
    SettingOption,
    read_settings,
    settings_options,
)
from nasdeploy.errors import ConfigError
from nasdeploy.runs import RunFolder
from nasdeploy.settings import BuildSettings, SearchSettings


def settings_of(*arguments: str) -> BuildSettings:
    """Return the settings that a command line means. Raises ConfigError."""
    found: list[BuildSettings] = []

    @click.command()
    @settings_options
    @click.pass_context
    def command(context: click.Context, /, **_: Any) -> None:
        found.append(read_settings(context))

    result = CliRunner().invoke(command, list(arguments))
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "build.toml"
    file.write_text(
        'seed = 1\nspace = "mobile"\nprofiles = ["tiny-flash"]\nbaselines = true\n[search]\nnum_steps = 10\n'
    )
    return file


def test_nothing_given_means_the_defaults():
    assert settings_of() == BuildSettings()


def test_file_options_and_assignments_count_in_this_order(config: Path):
    settings = settings_of(
        "-c", str(config), "--seed", "2", "--set", "seed=3", "--set", "search.batch_size=32"
    )
    assert settings.seed == 3
    assert settings.search == SearchSettings(num_steps=10, batch_size=32)
    assert settings_of("-c", str(config), "--seed", "2").seed == 2
    assert settings_of("-c", str(config)).profiles == ("tiny-flash",)


def test_options_replace_lists_and_switches_of_the_file(config: Path):
    settings = settings_of("-c", str(config), "-p", "a", "-p", "b.toml", "--no-baselines")
    assert settings.profiles == ("a", "b.toml")
    assert settings.baselines is False


def test_every_option_reaches_its_setting():
    settings = settings_of(
        *("--data", "photos", "--image-size", "32", "--space", "s", "--device", "cpu", "--threads", "2"),
        *(
            "--seed",
            "0",
            "--augment",
            "none",
            "--estimator",
            "independent",
            "--exporter",
            "torch",
            "--baselines",
        ),
        *("--time-budget", "10min", "--latency-from", "runs/old", "--profile", "p"),
        *("--class-weights", "balanced"),
    )
    assert settings == BuildSettings(
        data="photos",
        image_size=32,
        space="s",
        device="cpu",
        threads=2,
        seed=0,
        augment="none",
        class_weights="balanced",
        exporter="torch",
        baselines=True,
        time_budget="10min",
        latency_from="runs/old",
        profiles=("p",),
        search=SearchSettings(estimator="independent"),
    )


def test_options_of_the_search_method_reach_their_settings():
    found = settings_of(
        *("--predictor", "proxy", "--proposer", "evolution", "--estimator", "doubly_robust"),
        *("--warm-start", "random-weight"),
    ).search
    assert (found.predictor, found.proposer, found.warm_start) == ("proxy", "evolution", "random-weight")
    assert settings_of("--evaluator", "random-weight").search.evaluator == "random-weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--evaluator", "random-weight", "--warm-start", "random-weight"),
            "warm_start = random-weight with evaluator = random-weight",
        ),
        (("--proposer", "evolution"), "proposer = evolution with estimator = importance"),
    ],
)
def test_options_that_mean_nothing_together_are_one_line(arguments: tuple[str, ...], message: str):
    with pytest.raises(ConfigError) as refused:
        settings_of(*arguments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("command", [build, search])
def test_setting_options_name_keys_that_exist(command: click.Command):
    keys = [option.key for option in command.params if isinstance(option, SettingOption)]
    assert keys
    for key in keys:
        value: Any = BuildSettings()
        for part in key.split("."):
            value = getattr(value, part)


def test_choices_are_those_of_the_settings():
    assert get_args(BuildSettings.model_fields["device"].annotation) == DEVICES
    for name, choices in {
        "estimator": ESTIMATORS,
        "evaluator": EVALUATORS,
        "warm_start": WARM_STARTS,
        "predictor": PREDICTORS,
        "proposer": PROPOSERS,
    }.items():
        assert get_args(SearchSettings.model_fields[name].annotation) == choices
    augment, _ = get_args(BuildSettings.model_fields["augment"].annotation)
    assert get_args(augment) == AUGMENTATIONS
    assert get_args(BuildSettings.model_fields["class_weights"].annotation) == CLASS_WEIGHTS


def test_several_image_sizes_are_several_options():
    assert settings_of("--image-size", "128", "--image-size", "96").image_size == (96, 128)


def test_a_run_that_is_continued_brings_its_settings(tmp_path: Path):
    stored = BuildSettings(seed=7, data="photos", profiles=("a",))
    RunFolder(tmp_path).claim(
        settings=stored.model_dump(mode="json"), fingerprint="0" * 16, facts=lambda: {"profiles": {"a": {}}}
    )
    folder = ("-o", str(tmp_path))
    assert settings_of(*folder) == stored
    assert settings_of(*folder, "-p", "b") == stored.model_copy(update={"profiles": ("b",)})
    assert settings_of(*folder, "--seed", "8").seed == 8
    assert settings_of(*folder, "--no-resume") == BuildSettings()
    assert settings_of("-o", str(tmp_path / "other")) == BuildSettings()


def test_help_shows_the_defaults_of_the_settings():
    text = CliRunner().invoke(build, ["--help"], terminal_width=200).stdout
    assert "[default: cpu-tight, cpu-middle, cpu-roomy]" in text
    assert "[default: importance]" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ('["a"]', ["a"]),
        ("runs/a b", "runs/a b"),
        ("a=b", "a=b"),
        ("", ""),
        ("2024-01-01", "2024-01-01"),
        ("1\nseed = 2", "1\nseed = 2"),
    ],
)
def test_values_are_toml_or_text(text: str, expected: object):
    assert parse_value(text) == expected


def test_assignment_keeps_equal_signs_of_the_value():
    assert assignment_layer("data = a=b") == Layer(source="--set data", data={"data": "a=b"})


@pytest.mark.parametrize("text", ["seed", "=3", "search..num_steps=3", ".seed=1", ""])
def test_assignment_of_another_form_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"expected key\.path=value, such as search\.num_steps=200"):
        assignment_layer(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--set", "search.num_stepz=3"],
            '--set search.num_stepz: search.num_stepz: unknown key; did you mean "num_steps"?',
        ),
        (
            ["--set", "search.num_steps=0"],
            "--set search.num_steps: search.num_steps = 0: expected a whole number",
        ),
        (["--set", "seed.x=1"], '--set seed.x: seed = {"x": 1}: expected a whole number'),
        (["--set", "search=3"], "--set search: search = 3: expected "),
        (["--seed", "-1"], "--seed: seed = -1: expected a whole number from 0"),
        (["--seed", "-1", "--set", "search.nonsense=1"], "--seed: "),
    ],
)
def test_message_names_the_option_that_is_wrong(arguments: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        settings_of(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sede = 1\n", 'sede: unknown key; did you mean "seed"?'),
        (b"seed = -1\n", "seed = -1: expected a whole number"),
        (b"seed = \n", "Invalid value"),
        (b"data = \xff\n", "is not UTF-8 text"),
        (None, "No such file or directory; expected a TOML file"),
    ],
)
def test_message_names_the_file_that_is_wrong(content: bytes | None, message: str, tmp_path: Path):
    file = tmp_path / "build.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        settings_of("-c", str(file), "--seed", "3")
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_config_of_a_run_folder_is_a_config_again(tmp_path: Path):
    import tomli_w

    settings = BuildSettings(seed=5, search=SearchSettings(num_steps=7))
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
    assert merge_layers([file_layer(file)]) == settings
