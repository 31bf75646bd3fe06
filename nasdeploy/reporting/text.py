"""Numbers as people read them. None is a dash everywhere: a report never fills in what was not measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nasdeploy.profiles import format_quantity

__all__ = ["FILTERS", "Verbatim", "escape_markdown", "indent_code", "literal"]

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
METRIC_NAMES = {
    "latency": "latency",
    "params": "parameters",
    "flops": "FLOPs",
    "file_size": "file size",
    "peak_memory": "peak memory",
}
SIZES = ("file_size", "peak_memory")
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
CHECK_HELP = {
    "onnx_checker": "the file is valid by ONNX's own checker",
    "shape_inference": "every shape in the file follows from the input's",
    "opset": "version of the operator set",
    "foreign_domains": "operators from outside the standard",
    "batch_norm_nodes": "batch norm layers that were not folded into convolutions",
    "initializers_among_inputs": "weights that could be overwritten from outside",
    "external_tensors": "weights outside the file",
    "machine_paths": "paths of the machine that made the file",
    "runs_alone": "the file runs in a fresh process without PyTorch",
    "real_images": "images that the comparison rests on",
    "output_variation": "how much the outputs depend on the image, relative to their range",
    "max_difference": "largest difference of an output from the PyTorch network's, relative to their range",
    "top1_agreement": "share of the images that get the same class as from the PyTorch network",
    "batch_size_difference": "largest difference between images run together and one by one",
    "accuracy_drop": "accuracy of the PyTorch network minus that of the file",
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
    if metric == "latency":
        return milliseconds(value)
    written = format_quantity(value, metric, digits=4)
    # A space that does not break before the unit of a size; "31.4k" is one word.
    return re.sub(r"([A-Za-z]+)$", "\N{NO-BREAK SPACE}\\1", written) if metric in SIZES else written


def short_percent(share: float) -> str:
    """Return a share that a person chose in per cent, without zeros at the end: "15 %"."""
    return f"{100 * share:.4g} %"


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
    """Return a cap with what it came to: "15 % of the range (about 0.138 ms)"."""
    written = str(cap["written"])
    if cap["cap"] is None:
        return f"{written.removesuffix('%')} % of the range" if written.endswith("%") else written
    if cap["unit"] == "fraction":
        about = f" (about {milliseconds(cap['cap_ms'])})" if cap["cap_ms"] is not None else ""
        return f"{short_percent(cap['cap'])} of the range{about}"
    resolved = in_unit(cap["cap"], cap["unit"], cap["metric"])
    return f"{resolved} ({written.removesuffix('%')} % of the range)" if written.endswith("%") else resolved


def found(cap: Mapping[str, Any]) -> str:
    """Return what a cap was compared with, where the measured value does not say it already."""
    parts = []
    if cap["unit"] == "fraction" and cap["value"] is not None:
        parts.append(f"at {percent(cap['value'])}")
    if cap["bound"] is not None:
        parts.append(f"bound {in_unit(cap['bound'], cap['unit'], cap['metric'])}")
    return ", ".join(parts)


def shape(image_shape: list[int]) -> str:
    """Return (channels, height, width) as people write it."""
    channels, height, width = image_shape
    return f"{width}{TIMES}{height} pixels, {channels} channel{'s' if channels != 1 else ''}"


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


def literal(value: object) -> Verbatim:
    """Return ``value`` as a literal of a program, on one line."""
    return Verbatim(json.dumps(value))


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
    "found": found,
    "shape": shape,
    "metric_name": metric_name,
    "status_name": status_name,
}
