"""Parts that others wrote: named in a Python file ("my_space.py:space"), or by an installed package's entry point.

Their mistakes are told in one line, like any other wrong setting, with the line of their file that went wrong.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from nasdeploy.errors import ConfigError, NasdeployError

__all__ = [
    "call_plugin",
    "entry_points_of",
    "find_plugin",
    "is_reference",
    "load_entry_point",
    "load_reference",
]

_REFERENCE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
_MAX_MESSAGE = 200
_MAX_LISTED = 8


def is_reference(text: str) -> bool:
    """Whether ``text`` names something in a Python file, such as "my_space.py:space"."""
    return _REFERENCE.fullmatch(text) is not None


def load_reference(text: str, *, what: str) -> object:
    """Return the object that ``text``, such as "my_space.py:space", names.

    The file is imported once a process, under a module name of its own; it can import what is installed, but not
    the files beside it. what: the kind of part, named first in errors. Raises ConfigError where the file is missing
    or cannot be imported, and where it does not define the name.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{what}: '{text}'; expected a Python file and a name in it, such as {_example(what)}"
        )
    path = Path(match["file"]).expanduser()
    if not path.is_file():
        raise ConfigError(f"{what}: {path}: not found; expected a Python file, as in {_example(what)}")
    defined = vars(_import(path.resolve(), what=what, shown=match["file"]))
    if match["name"] not in defined:
        raise ConfigError(f"{what}: {path} defines no '{match['name']}'; expected {_own_names(defined)}")
    return defined[match["name"]]


def entry_points_of(group: str, *, builtin_names: Iterable[str], what: str) -> dict[str, EntryPoint]:
    """Return the entry points of ``group`` by name. Raises ConfigError for a name that is taken, and shows both."""
    homes = dict.fromkeys(builtin_names, "nasdeploy itself")
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in homes:
            raise ConfigError(
                f"{what} '{point.name}' is defined twice: by {homes[point.name]} and by {_home(point)}; "
                "expected one of each name: uninstall or rename one"
            )
        found[point.name] = point
        homes[point.name] = _home(point)
    return found


def load_entry_point(point: EntryPoint, *, what: str) -> object:
    """Return what ``point`` names. Raises ConfigError where its package cannot be imported or lacks the name."""
    try:
        loaded: object = point.load()
    except Exception as error:
        raise ConfigError(
            f"{what} '{point.name}': {_home(point)} cannot be loaded ({_describe(error)}); expected an importable "
            "package:attribute"
        ) from error
    return loaded


def find_plugin(
    text: str, points: Mapping[str, EntryPoint], *, builtin_names: Iterable[str], what: str
) -> object:
    """Return what ``text`` names: something in a Python file, or one of the entry points ``points``.

    Raises ConfigError where there is no such thing, or where it cannot be loaded.
    """
    if is_reference(text):
        return load_reference(text, what=what)
    if text not in points:
        raise ConfigError(
            f"{what}: '{text}' is not known; expected one of {', '.join([*builtin_names, *points])}, "
            f"or a Python file and a name in it, such as {_example(what)}"
        )
    return load_entry_point(points[text], what=what)


def call_plugin(plugin: object, *arguments: object, what: str, source: str) -> object:
    """Return ``plugin(*arguments)``. source: what the user called it by.

    Raises ConfigError where it cannot be called, and for whatever it raises that is no error of nasdeploy.
    """
    if not callable(plugin):
        raise ConfigError(f"{what}: {source} is a {type(plugin).__name__}; expected a function or a class")
    try:
        return plugin(*arguments)
    except NasdeployError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {source} failed: {_describe(error, _file_of(plugin))}") from error


def _import(path: Path, *, what: str, shown: str) -> ModuleType:
    # A name of its own: two files may share theirs, and neither may take the place of an installed module.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"nasdeploy_file_{stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{what}: {shown} cannot be imported: {_describe(error, path)}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _describe(error: BaseException, path: Path | None = None) -> str:
    """Return type and message of ``error`` on one line, and the last line of ``path`` that it passed through."""
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    if len(message) > _MAX_MESSAGE:
        message = message[: _MAX_MESSAGE - 1] + "…"
    line = _line_in(error, path)
    where = f" ({path.name}, line {line})" if path is not None and line is not None else ""
    return f"{type(error).__name__}: {message}{where}" if message else f"{type(error).__name__}{where}"


def _line_in(error: BaseException, path: Path | None) -> int | None:
    if isinstance(error, SyntaxError) and path is not None and error.filename == str(path):
        return error.lineno
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    return lines[-1] if lines else None


def _file_of(plugin: object) -> Path | None:
    while isinstance(plugin, partial):
        plugin = plugin.func
    try:
        return Path(inspect.getfile(plugin))  # type: ignore[arg-type]  # what it cannot take is a TypeError
    except (TypeError, OSError):  # an object with __call__, or something built in
        return None


def _own_names(defined: dict[str, object]) -> str:
    """Return the public functions and classes of a module, for a message."""
    names = [
        name
        for name, value in defined.items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == defined["__name__"]
    ]
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (
        f"one of {', '.join(names[:_MAX_LISTED])}{more}"
        if names
        else "a function or a class; it defines none"
    )


def _home(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else None
    return f"{point.value} (package {package})" if package else point.value


def _example(what: str) -> str:
    return f"my_{what.replace(' ', '_')}.py:make"
