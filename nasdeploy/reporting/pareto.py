"""pareto.csv: every network of the run that has an accuracy, a row each, for a spreadsheet."""

from __future__ import annotations

import csv
import io
from typing import Any

from nasdeploy.reporting.views import Report

__all__ = ["COLUMNS", "render_pareto"]

COLUMNS = (
    "profile",
    "kind",
    "status",
    "precision",
    "top1",
    "num_images",
    "latency_p50_ms",
    "latency_cpu_p50_ms",
    "latency_predicted_ms",
    "params",
    "flops",
    "macs",
    "file_size_bytes",
)


def render_pareto(report: Report) -> str:
    """Return the table as CSV; an empty cell is what was not measured."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for profile in report["profiles"]:
        if profile["accuracy"] is not None:
            writer.writerow(_selected(profile))
        for baseline in profile["baselines"]:
            writer.writerow(_baseline(profile, baseline))
    return buffer.getvalue()


def _selected(profile: dict[str, Any]) -> dict[str, Any]:
    summary = profile["latency"]["summary"] if profile["latency"] else {}
    prediction = profile["latency_prediction"] or {}
    return {
        "profile": profile["name"],
        "kind": "searched",
        "status": profile["status"],
        "precision": profile["precision"],
        "top1": profile["accuracy"]["top1"],
        "num_images": profile["accuracy"]["num_images"],
        "latency_p50_ms": summary.get("p50_ms"),
        "latency_cpu_p50_ms": summary.get("cpu_p50_ms"),
        "latency_predicted_ms": prediction.get("predicted_ms"),
        **{key: profile[key] for key in ("params", "flops", "macs")},
        "file_size_bytes": profile["file_size"],
    }


def _baseline(profile: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a network that was trained for comparison; its costs are those of the tables."""
    predicted = baseline["predicted"]
    return {
        "profile": profile["name"],
        "kind": baseline["kind"],
        "top1": baseline["top1"],
        "latency_predicted_ms": predicted.get("latency"),
        **{key: predicted.get(key) for key in ("params", "flops")},
        "file_size_bytes": predicted.get("file_size"),
    }
