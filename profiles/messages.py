"""One line for everything that pydantic found wrong with data that people wrote.

Knows nothing of profiles: any pydantic model with ``extra="forbid"`` can be read with it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from nasdeploy.errors import ConfigError
from nasdeploy.profiles.units import show_value

Key = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class FieldError(ValueError):
    """A contradiction that a model's validator found; ``under``: the dotted key of the guilty field below."""

    def __init__(self, message: str, *, under: str) -> None:
        super().__init__(message)
        self.under = under


def read_model(model: type[Model], data: object, *, source: str, expected: Mapping[str, str]) -> Model:
    """Return ``data`` as ``model``.

    source: the file or whatever else the data came from.
    expected: by dotted key what belongs there, with an example.
    Raises ConfigError, one line: the first mistake and how many more there are.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_line(error, model, data, source=source, expected=expected)) from None


def dotted(key: Key) -> str:
    """Return ``key`` as TOML writes it, on one line."""
    return ".".join(part if _BARE_KEY.fullmatch(part) else show_value(part) for part in map(str, key))


def suggest(word: str, known: Sequence[str]) -> str:
    """Return ' did you mean "…"?' for the nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f' did you mean "{near[0]}"?' if near else ""


def _line(
    error: ValidationError, model: type[BaseModel], data: object, *, source: str, expected: Mapping[str, str]
) -> str:
    # Unknown keys first: a misspelt key is the cause of the key that is then missing.
    problems = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    first = _problem(problems[0], model, data, expected)
    more = len(problems) - 1
    return f"{source}: {first}" + (f" (and {more} more error{'s' if more > 1 else ''})" if more else "")


def _problem(problem: Any, model: type[BaseModel], data: object, expected: Mapping[str, str]) -> str:
    key: Key = problem["loc"]
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key, model)
    cause = (problem.get("ctx") or {}).get("error")
    if isinstance(cause, FieldError):
        key = (*key, *filter(None, cause.under.split(".")))
    wanted = (
        str(cause) if isinstance(cause, ValueError) else f"expected {_expectation(key, problem, expected)}"
    )
    if problem["type"] == "missing":
        return f"{dotted(key)}: missing; {wanted}"
    if not key:
        return wanted
    value = _value_at(data, key)
    contradiction = isinstance(cause, ValueError) and not isinstance(cause, FieldError)
    if contradiction and isinstance(value, Mapping) and _is_model(model, key):
        return f"{dotted(key)}: {wanted}"  # between fields, which the message itself names with their values
    return f"{dotted(key)} = {show_value(value)}: {wanted}"


def _expectation(key: Key, problem: Any, expected: Mapping[str, str]) -> str:
    message: str = problem["msg"]
    return expected.get(dotted(key), message.removeprefix("Input should be ").lower())


def _unknown_key(key: Key, model: type[BaseModel]) -> str:
    *parents, name = map(str, key)
    siblings = list(_model_at(model, parents).model_fields)
    hint = suggest(name, siblings)
    if not hint:
        elsewhere = [path for path in _all_keys(model) if path.rpartition(".")[2] == name]
        hint = f' did you mean "{elsewhere[0]}"?' if elsewhere else ""
    return f"{dotted(key)}: unknown key;{hint} expected one of {', '.join(siblings)}"


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for name in path:
        model = _submodel(model.model_fields[name].annotation) or model
    return model


def _is_model(model: type[BaseModel], key: Key) -> bool:
    """Return whether what stands under ``key`` is a model of its own, with fields."""
    *parents, name = map(str, key)
    field = _model_at(model, parents).model_fields.get(name)
    return field is not None and _submodel(field.annotation) is not None


def _submodel(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if (inner := _submodel(field.annotation)) is not None:
            yield from _all_keys(inner, f"{prefix}{name}.")


def _value_at(data: object, key: Key) -> object:
    for part in key:
        data = data.get(part) if isinstance(data, Mapping) else data
    return data
