"""Profiles by name or path: built in, from plug-ins (entry points), or from a TOML file."""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import EntryPoint
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from nasdeploy.errors import ConfigError
from nasdeploy.plugins import entry_points_of, load_entry_point
from nasdeploy.profiles.messages import suggest
from nasdeploy.profiles.model import HardwareProfile
from nasdeploy.profiles.units import show_value

DEFAULT_PROFILES = ("cpu-tight", "cpu-middle", "cpu-roomy")

BUILTIN_PROFILES = (
    *DEFAULT_PROFILES,
    "cpu-int8",
    "edge-cpu-1t",
    "gateway-cpu-2t",
    "server-cpu-batch",
    "tiny-flash",
    "cuda-gpu",
)
"""One file each in builtin/."""

ENTRY_POINT_GROUP = "nasdeploy.profiles"


def load_profile(name_or_path: str | os.PathLike[str]) -> HardwareProfile:
    """Return the profile of a known name, or the one in a TOML file.

    Text that ends in .toml or holds a path separator is a path; otherwise known names go before files.
    Raises ConfigError for an unknown name, an unreadable file and a wrong key or value.
    """
    path = Path(name_or_path)
    if not isinstance(name_or_path, str) or path.suffix == ".toml" or os.sep in name_or_path:
        return _load_file(path, source=str(path))
    if name_or_path in BUILTIN_PROFILES:
        return _load_builtin(name_or_path)
    plugins = _plugins()
    if name_or_path in plugins:
        return _load_plugin(plugins[name_or_path])
    if path.is_file():
        return _load_file(path, source=str(path))
    known = [*BUILTIN_PROFILES, *plugins]
    raise ConfigError(
        f"profile {show_value(name_or_path)}: not known;{suggest(name_or_path, known)} "
        f'expected one of {", ".join(known)}, or a file such as "./my-device.toml"'
    )


def builtin_profiles() -> dict[str, HardwareProfile]:
    """Return {name: profile} of the built-in profiles."""
    return {name: _load_builtin(name) for name in BUILTIN_PROFILES}


def profile_names() -> list[str]:
    """Return the names that :func:`load_profile` knows, built-ins first.

    Raises ConfigError where a plug-in takes a name that is taken.
    """
    return [*BUILTIN_PROFILES, *_plugins()]


def _plugins() -> dict[str, EntryPoint]:
    return entry_points_of(ENTRY_POINT_GROUP, builtin_names=BUILTIN_PROFILES, what="profile")


def _load_plugin(point: EntryPoint) -> HardwareProfile:
    source = f"profile {show_value(point.name)} of the plug-in {point.value}"
    loaded = load_entry_point(point, what="profile")
    if isinstance(loaded, str | os.PathLike):
        loaded = _load_file(Path(loaded), source=os.fspath(loaded))
    if not isinstance(loaded, HardwareProfile):
        kind = type(loaded).__name__
        raise ConfigError(f"{source}: is a {kind}; expected a HardwareProfile or the path of a TOML file")
    if loaded.name != point.name:
        raise ConfigError(
            f"{source}: name = {show_value(loaded.name)}; "
            f"expected the entry point's own name {show_value(point.name)}"
        )
    return loaded


def _load_builtin(name: str) -> HardwareProfile:
    file = files("nasdeploy.profiles.builtin") / f"{name}.toml"
    return _load_file(file, source=file.name)


def _load_file(file: Traversable, *, source: str) -> HardwareProfile:
    try:
        text = file.read_text(
            encoding="utf-8-sig"
        )  # some editors put a byte-order mark first; TOML knows none
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"{source}: {error.strerror}; expected a profile such as 'nasdeploy profiles new' writes"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: is not UTF-8 text; expected TOML lines such as threads = 1") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise ConfigError(f"{source}: {error}; expected TOML lines such as threads = 1") from None
    return HardwareProfile.from_dict(data, source=source)
