"""Results on standard output: text for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nasdeploy.pipeline import WrittenPack

NOTHING = "-"


def put_json(schema: str, content: Mapping[str, Any]) -> None:
    """Print one JSON object, its schema first."""
    click.echo(json.dumps({"schema": schema} | plain(content), indent=1, allow_nan=False))


def put_pack(pack: WrittenPack, *, as_json: bool) -> None:
    """Print where a pack is, and what to do with it."""
    if as_json:
        put_json("nasdeploy/written-pack/1", pack.to_json())
        return
    click.echo(
        f"{pack.path}: {pack.num_models} models in {quantity(pack.file_size, 'file_size')}; on the device, which needs "
        f"only numpy and onnxruntime: python3 {pack.path.name}; it writes latency.json, for --import here"
    )


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: dataclasses as objects, paths as text, no NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns under a header, each as wide as its widest cell, the last one open."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    """Return an accuracy in [0, 1] as people read it."""
    return NOTHING if fraction is None else f"{100 * fraction:.2f} %"


def quantity(value: float | None, metric: str) -> str:
    """Return ``value``, in the unit of ``metric``, with its unit."""
    from nasdeploy.profiles import format_quantity

    return NOTHING if value is None or not math.isfinite(value) else format_quantity(value, metric)


def duration(seconds: float) -> str:
    """Return a time as people read it: "45 s", "3 min 05 s", "1 h 02 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def kept_clean() -> Iterator[None]:
    """Send what libraries print to stderr meanwhile: stdout holds nothing but the result."""
    with redirect_stdout(sys.stderr):
        yield
