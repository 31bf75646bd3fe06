"""Quantities with their unit inside the value: "15ms", "60M", "4MB", and shares such as "40%".

Each metric has one unit inside the program: params a count, flops fvcore's count (one multiply-add is one
FLOP), latency milliseconds, file_size and peak_memory bytes. Text is read and written by way of Decimal, so
that "0.1G" is exactly 100000000.0 and what is written reads back as the same float.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from nasdeploy.errors import ConfigError

METRICS = ("params", "flops", "latency", "file_size", "peak_memory")

_NUMBER = r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?"
_WRITTEN = re.compile(rf"(?P<number>-?{_NUMBER}) *(?P<unit>[^\s0-9.]*)")
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Quantity:
    """A limit in the metric's own unit, more than 0. Raises ValueError otherwise."""

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError("expected a finite value of more than 0")


@dataclass(frozen=True, slots=True)
class Percent:
    """A share of the way from the space's smallest network (0.0) to its largest (1.0). Raises ValueError."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(
                'expected a share from "0%" (the smallest network of the space) to "100%" (the largest)'
            )


Limit = Quantity | Percent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """How one kind of quantity is written. ``shown``: the units used for display, in ascending order."""

    noun: str
    examples: tuple[str, ...]
    units: Mapping[str, Decimal]
    shown: tuple[str, ...]

    @property
    def takes_bare_numbers(self) -> bool:
        return "" in self.units

    def expectation(self) -> str:
        return f"expected {self.noun} such as {', '.join(self.examples[:-1])} or {self.examples[-1]}"


def _units(**factors: str) -> dict[str, Decimal]:
    return {unit: Decimal(factor) for unit, factor in factors.items()}


_COUNT = _Kind(
    noun="a count",
    examples=('"60M"', '"1.5k"', "60000"),
    units=_units(k="1e3", K="1e3", M="1e6", G="1e9") | {"": Decimal(1)},
    shown=("", "k", "M", "G"),
)
_TIME = _Kind(
    noun="a time",
    examples=('"15ms"', '"800us"', '"1.2s"'),
    # Two code points look like a micro sign; keyboards write either.
    units=_units(us="1e-3", ms="1", s="1e3") | dict.fromkeys(("\u00b5s", "\u03bcs"), Decimal("1e-3")),
    shown=("us", "ms", "s"),
)
_SIZE = _Kind(
    noun="a size",
    examples=('"4MB"', '"200kB"', '"1MiB"'),
    units=_units(B="1", kB="1e3", KB="1e3", MB="1e6", GB="1e9", KiB="1024", MiB="1048576", GiB="1073741824"),
    shown=("B", "kB", "MB", "GB"),
)
# The runtime alone takes some 10 MB for any model, so the examples of a file's size would mislead here.
_MEMORY = replace(_SIZE, examples=('"40MB"', '"64MiB"', '"1GB"'))
_KINDS: dict[str, _Kind] = {
    "params": _COUNT,
    "flops": _COUNT,
    "latency": _TIME,
    "file_size": _SIZE,
    "peak_memory": _MEMORY,
}


def parse_quantity(text: object, *, metric: str, key: str) -> float:
    """Return ``text`` in the unit of ``metric``. Raises ConfigError, which names ``key``, for anything else.

    Bare numbers are taken for counts only: a bare 15 could be seconds or milliseconds.
    """
    try:
        return _read_quantity(text, _KINDS[metric]).value
    except ValueError as error:
        raise ConfigError(f"{key} = {show_value(text)}: {error}") from None


def parse_limit(text: object, *, metric: str, key: str) -> Limit:
    """Return ``text``, a quantity or a percentage, as a limit. Raises ConfigError, which names ``key``."""
    try:
        return read_limit(text, metric)
    except ValueError as error:
        raise ConfigError(f"{key} = {show_value(text)}: {error}") from None


def read_limit(text: object, metric: str) -> Limit:
    """Return ``text`` as a limit. Raises ValueError with what was expected, but without key and value."""
    if isinstance(text, str) and text.endswith("%"):
        return _read_percent(text)
    try:
        return _read_quantity(text, _KINDS[metric])
    except ValueError as error:
        raise ValueError(f'{error}, or a share such as "40%"') from None


def read_share(text: object) -> float:
    """Return a share of all, such as "1%" or 0.01, in [0, 1]. Raises ValueError with what was expected."""
    if isinstance(text, str) and text.endswith("%"):
        try:
            return _read_percent(text).fraction
        except ValueError:
            pass  # said below: a share of the way between two networks is not what is meant here
    elif isinstance(text, int | float) and not isinstance(text, bool) and 0 <= text <= 1:
        return float(text)
    raise ValueError('expected a share from "0%" to "100%", such as "1%" or 0.01')


def format_share(share: float) -> str:
    """Return ``share`` with all its digits, such as "1%": the inverse of :func:`read_share`."""
    return _plain(Decimal(repr(float(share))) * 100) + "%"


def share_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of what :func:`read_share` accepts."""
    text = {"type": "string", "pattern": r"^(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?) *%$"}
    return {"anyOf": [text, {"type": "number", "minimum": 0, "maximum": 1}], "examples": ["1%", 0.01]}


def format_quantity(value: float, metric: str, *, digits: int | None = 4) -> str:
    """Return a finite ``value``, in the unit of ``metric``, as people read it: 1500000 params are "1.5M".

    digits: significant digits, or None for all, so that :func:`parse_quantity` returns the same float.
    """
    kind = _KINDS[metric]
    number = Decimal(repr(float(value)) if digits is None else f"{value:.{digits - 1}e}")
    fitting = [unit for unit in kind.shown if abs(number) >= kind.units[unit]]
    unit = fitting[-1] if fitting else kind.shown[0]
    return _plain(number / kind.units[unit]) + unit


def format_limit(limit: Limit, metric: str) -> str:
    """Return ``limit`` with all its digits: the inverse of :func:`parse_limit`."""
    if isinstance(limit, Percent):
        return format_share(limit.fraction)
    return format_quantity(limit.value, metric, digits=None)


def limit_json_schema(metric: str) -> dict[str, Any]:
    """Return the JSON Schema of what :func:`parse_limit` accepts."""
    kind = _KINDS[metric]
    units = "|".join(re.escape(unit) for unit in kind.units if unit)
    optional = "?" if kind.takes_bare_numbers else ""
    text = {
        "type": "string",
        "pattern": rf"^({_NUMBER} *({units}){optional}|(100(\.0+)?|[0-9]{{1,2}}(\.[0-9]+)?) *%)$",
    }
    examples = [*map(json.loads, kind.examples), "40%"]
    if not kind.takes_bare_numbers:
        return text | {"examples": examples}
    return {"anyOf": [text, {"type": "number", "exclusiveMinimum": 0}], "examples": examples}


def show_value(value: object) -> str:
    """Return ``value`` on one line, about as TOML writes it, shortened where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _read_quantity(text: object, kind: _Kind) -> Quantity:
    if isinstance(text, int | float) and not isinstance(text, bool) and kind.takes_bare_numbers:
        text = str(text)
    match = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
    if match is None or match["unit"] not in kind.units:
        raise ValueError(kind.expectation())
    value = float(Decimal(match["number"]) * kind.units[match["unit"]])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected more than 0: {kind.expectation().removeprefix('expected ')}")
    return Quantity(value)


def _read_percent(text: str) -> Percent:
    match = _WRITTEN.fullmatch(text)
    if match is None or match["unit"] != "%":
        raise ValueError('expected a share such as "40%"')
    return Percent(float(Decimal(match["number"]) / 100))


def _plain(number: Decimal) -> str:
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
