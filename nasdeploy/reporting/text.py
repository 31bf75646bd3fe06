"""Numbers as people read them. None is a dash everywhere: a report never fills in what was not measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nasdeploy.profiles import format_quantity

__all__ = ["FILTERS", "Verbatim", "escape_markdown", "indent_code"]

DASH = "–"
METRIC_NAMES = {"latency": "latency", "params": "parameters", "flops": "FLOPs", "file_size": "file size"}
STATUS_NAMES = {
    "certified": "certified",
    "infeasible": "infeasible",
    "violated": "cap violated",
    "gate-failed": "gate failed",
    "noisy": "too noisy",
    "unfinished": "unfinished",
}
STATUS_HELP = {
    "certified": "every cap holds with its bound, and every check of the file passed",
    "infeasible": "no network of the search space meets the caps",
    "violated": "the exported file breaks a cap",
    "gate-failed": "the exported file does not compute what the network computes, or a check failed",
    "noisy": "the machine was too busy or unstable to certify a cap",
    "unfinished": "the build has not come to its end for this profile",
}
BASELINE_NAMES = {"random": "random network within the caps", "uniform": "uniformly narrowed network"}


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in [0, 1] in per cent."""
    return DASH if share is None else f"{100 * share:.{digits}f} %"


def signed_percent(share: float | None) -> str:
    """Return a relative difference in per cent, with its sign."""
    return DASH if share is None else f"{100 * share:+.1f} %"


def milliseconds(value: float | None) -> str:
    """Return a time in ms with three significant digits: one unit, so that rows can be compared."""
    return DASH if value is None else f"{_significant(value)} ms"


def _significant(value: float) -> str:
    text = f"{value:#.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.removesuffix(".") if "e" not in text else f"{value:.3g}"


def quantity(value: float | None, metric: str) -> str:
    """Return a value in the unit of ``metric``."""
    if value is None:
        return DASH
    return milliseconds(value) if metric == "latency" else format_quantity(value, metric, digits=4)


def in_unit(value: float | None, unit: str | None, metric: str) -> str:
    """Return a value of a cap: a share of the way from the smallest to the largest network, or a quantity."""
    return percent(value) if unit == "fraction" else quantity(value, metric)


def duration(seconds: float | None) -> str:
    """Return seconds as "1 h 02 min", "3 min 20 s" or "12.3 s"."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def number(value: Any) -> str:
    """Return a number with up to six significant digits, anything else as it is."""
    if value is None:
        return DASH
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def margin(cap: Mapping[str, Any]) -> str:
    """Return how far a cap's bound, or its value where there is no bound, lies below the cap."""
    if cap["margin"] is None or cap["relative_margin"] is None:
        return ""
    side = "below" if cap["margin"] >= 0 else "above"
    if cap["unit"] == "fraction":
        return f"{abs(100 * cap['margin']):.1f} points {side}"
    return f"{abs(100 * cap['relative_margin']):.1f} % {side}"


def limit(cap: Mapping[str, Any]) -> str:
    """Return a cap with what it came to: "15 % of the range (about 0.21 ms)"."""
    if cap["unit"] == "fraction":
        about = f" (about {milliseconds(cap['cap_ms'])})" if cap["cap_ms"] is not None else ""
        return f"{percent(cap['cap'])} of the range{about}"
    resolved = DASH if cap["cap"] is None else in_unit(cap["cap"], cap["unit"], cap["metric"])
    if cap["cap"] is None:
        return str(cap["written"])
    return f"{resolved} (written {cap['written']})" if str(cap["written"]).endswith("%") else resolved


def shape(image_shape: list[int]) -> str:
    """Return (channels, height, width) as people write it."""
    channels, height, width = image_shape
    return f"{width}×{height} pixels, {channels} channel{'s' if channels != 1 else ''}"


def metric_name(metric: str) -> str:
    """Return what a metric is called in a sentence."""
    return METRIC_NAMES.get(metric, metric)


def status_name(status: str) -> str:
    """Return a status in words."""
    return STATUS_NAMES.get(status, status)


class Verbatim(str):
    """Markdown that is written as it stands."""

    __slots__ = ()


_SPECIAL = re.compile(r"([\\`*_\[\]|~$#])")


def escape_markdown(text: object) -> str:
    """Return ``text`` so that no character of it is markup: table cells, emphasis, code, links and HTML."""
    if isinstance(text, Verbatim) or not isinstance(text, str):
        return str(text)
    plain = " ".join(text.split()) if "\n" in text or "\r" in text else text
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", plain)


def indent_code(text: str) -> Verbatim:
    """Return ``text`` as an indented code block, which no character of it can end."""
    lines = text.replace("\r", "\n").split("\n")
    return Verbatim("\n".join(f"    {line}" for line in lines))


FILTERS = {
    "percent": percent,
    "signed_percent": signed_percent,
    "ms": milliseconds,
    "quantity": quantity,
    "in_unit": in_unit,
    "duration": duration,
    "number": number,
    "margin": margin,
    "limit": limit,
    "shape": shape,
    "metric_name": metric_name,
    "status_name": status_name,
}
