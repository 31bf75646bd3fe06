"""From a file, options and ``--set`` to checked settings; every message names where the value came from."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasdeploy.errors import ConfigError
from nasdeploy.profiles.messages import read_model
from nasdeploy.settings import EXPECTED, BuildSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Some settings, nested by key; ``source``: the file or option that they came from."""

    source: str
    data: Mapping[str, Any]


def merge_layers(layers: Iterable[Layer]) -> BuildSettings:
    """Return the defaults with each layer over those before it.

    Each is checked as it is added, so that a mistake is that layer's own. Raises ConfigError, which names it.
    """
    data: dict[str, Any] = {}
    settings = BuildSettings()
    for layer in layers:
        data = merged(data, layer.data)
        settings = read_model(BuildSettings, data, source=layer.source, expected=EXPECTED)
    return settings


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the values of ``above``; tables are merged key by key."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]  # isinstance in a name
    return result


def file_layer(path: Path) -> Layer:
    """Return the settings in a TOML file. Raises ConfigError where it cannot be read."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; expected a TOML file such as the config.toml of a run folder"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; expected TOML lines such as seed = 0") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise ConfigError(f"{path}: {error}; expected TOML lines such as seed = 0") from None
    return Layer(source=str(path), data=data)


def assignment_layer(text: str) -> Layer:
    """Return ``key.path=value``, the argument of ``--set``, as a layer. Raises ConfigError."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f'--set "{text}": expected key.path=value, such as search.num_steps=200')
    return Layer(source=f"--set {key}", data=nested(key, parse_value(value.strip())))


def nested(key: str, value: object) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the dotted key "a.b"."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def parse_value(text: str) -> object:
    """Return ``text`` as the TOML value that it is, or as it stands: shells take the quotes of strings away."""
    try:
        table = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    # A line break in the text could have added keys; dates are no setting's type.
    is_value = table.keys() == {"value"} and isinstance(
        table["value"], bool | int | float | str | list | dict
    )
    return table["value"] if is_value else text
