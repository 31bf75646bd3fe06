"""Everything that a run folder knows, as the one object that report.json holds.

What a run has not produced, because it is unfinished or a profile failed, is null; nothing is filled in.
"""

from __future__ import annotations

import math
from typing import Any

from nasdeploy.errors import ConfigError, RunFolderError
from nasdeploy.profiles import METRICS
from nasdeploy.reporting.checksums import read_checksums
from nasdeploy.reporting.history import collect_search, collect_totals
from nasdeploy.reporting.layers import chain_of, space_of
from nasdeploy.reporting.random_weight import collect_random_weight
from nasdeploy.reporting.records import Record, read_optional, read_record
from nasdeploy.runs import ModelFolder, RunFolder
from nasdeploy.spaces import SearchSpace

__all__ = ["BASELINE_KINDS", "SCHEMA", "collect_profile", "collect_report", "read_identity"]

SCHEMA = "nasdeploy/report/1"
BASELINE_KINDS = ("random", "uniform")
UNFINISHED = "unfinished"
NORMAL_975 = 1.959963984540054  # quantile of the normal distribution, for an interval at 95 %


def collect_report(run: RunFolder) -> dict[str, Any]:
    """Return the content of report.json. Raises RunFolderError when there is no run, or a file is damaged."""
    identity = read_identity(run)
    profiles = [collect_profile(run, identity, name) for name in identity["profiles"]]
    return {
        "schema": SCHEMA,
        "name": run.path.resolve().name,
        "complete": all(profile["status"] != UNFINISHED for profile in profiles),
        "run": {key: value for key, value in identity.items() if key not in ("schema", "profiles")},
        "profiles": profiles,
        "search": collect_search(run, list(identity["searched"])),
        "random_weight": collect_random_weight(run, list(identity["profiles"])),
        "totals": collect_totals(run),
    }


def read_identity(run: RunFolder) -> Record:
    """Return run.json. Raises RunFolderError when it is missing or damaged."""
    return read_record(run.run, "nasdeploy/run/2")


def collect_profile(run: RunFolder, identity: Record, name: str) -> dict[str, Any]:
    """Return the section of profile ``name``. Raises RunFolderError when a file is damaged."""
    profile = identity["profiles"][name]
    folder = run.model(name)
    metrics = read_optional(folder.metrics, "nasdeploy/metrics/2")
    architecture = read_optional(folder.architecture, "nasdeploy/architecture/1")
    latency = read_optional(folder.latency, "nasdeploy/latency/1")
    stored_table = read_optional(run.latency(name), "nasdeploy/profile-latency/2")
    table = None if stored_table is None else stored_table["table"]
    origin = None if stored_table is None else stored_table["origin"]
    return {
        "name": name,
        "description": profile["description"],
        "runtime": profile["runtime"],
        "budget": profile["budget"],
        **_result(metrics, identity["dataset"]),
        "caps": _caps(profile["budget"], metrics, table),
        "latency": None if latency is None else _latency(latency),
        "latency_prediction": _prediction(architecture, latency if _as_predicted(metrics, profile) else None),
        "architecture": None if architecture is None else _architecture(architecture, space_of(identity)),
        "verification": _verification(folder),
        "checksums": read_checksums(folder.path),
        "latency_table": None if table is None else _table(table, origin),
        "memory_table": _memory_table(read_optional(run.memory(name), "nasdeploy/profile-memory/1")),
        "baselines": _baselines(run, name),
    }


RESULT_KEYS = (
    "shipped",
    "precision",
    "gates",
    "validation_accuracy",
    "params",
    "flops",
    "macs",
    "file_size",
    "peak_memory",
    "retraining",
    "exporter",
    "opset",
    "sha256",
)


def _result(metrics: Record | None, dataset: Record) -> dict[str, Any]:
    if metrics is None:
        blank = dict.fromkeys(("exit_code", "message", "accuracy", *RESULT_KEYS))
        return {"status": UNFINISHED, **blank}
    accuracy = metrics["accuracy"]
    return {
        "status": metrics["status"],
        "exit_code": metrics["exit_code"],
        "message": metrics["message"] or None,
        "accuracy": None if accuracy is None else _accuracy(accuracy, balanced=dataset["balanced"]),
        **{key: metrics[key] for key in RESULT_KEYS},
    }


def _accuracy(accuracy: Record, *, balanced: bool) -> dict[str, Any]:
    """Return the accuracy on the test split; macro (mean over classes) only where it says something else."""
    top1, count = float(accuracy["top1"]), int(accuracy["num_images"])
    per_class = [
        {"label": label, "accuracy": share} for label, share in (accuracy["per_class"] or {}).items()
    ]
    return {
        "top1": top1,
        "interval95": _wilson(top1, count),
        "num_images": count,
        "macro": None if balanced else accuracy["macro"],
        "per_class": per_class or None,
    }


def _wilson(share: float, n: int) -> list[float] | None:
    """Return the 95 % interval of a share of n draws (Wilson, JASA 22, 1927): what other test images could give."""
    if n < 1:
        return None
    z2 = NORMAL_975**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL_975 * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _caps(budget: Record, metrics: Record | None, table: Record | None) -> list[dict[str, Any]]:
    """Return a row for every hard cap: as written, as resolved, and what was found."""
    found = {} if metrics is None else {row["metric"]: row for row in metrics["caps"]}
    metrics_with_cap = [metric for metric in METRICS if (budget.get(metric) or {}).get("max") is not None]
    return [_cap(metric, budget[metric], found.get(metric), table) for metric in metrics_with_cap]


def _cap(metric: str, written: Record, found: Record | None, table: Record | None) -> dict[str, Any]:
    keys = ("cap", "value", "bound", "unit", "status", "text")
    row: dict[str, Any] = dict.fromkeys(keys) if found is None else {key: found[key] for key in keys}
    cap, tested = row["cap"], row["value"] if row["bound"] is None else row["bound"]
    margin = None if cap is None or tested is None else cap - tested
    return {
        "metric": metric,
        "written": str(written["max"]),
        **row,
        "percentile": written.get("percentile"),
        "margin": margin,
        "relative_margin": margin / cap if margin is not None and cap else None,
        "cap_ms": _cap_ms(row["unit"], cap, table) if metric == "latency" else None,
    }


def _cap_ms(unit: str | None, cap: float | None, table: Record | None) -> float | None:
    """Return about what a percentage cap on the latency is in ms, from the networks at both ends of the space."""
    if unit != "fraction" or cap is None or table is None:
        return None
    smallest, largest = float(table["smallest_ms"]), float(table["largest_ms"])
    return smallest + cap * (largest - smallest)


def _latency(latency: Record) -> dict[str, Any]:
    medians = [float(block["wall_ms"]["p50"]) for block in latency["blocks"]]
    return {
        "conditions": latency["conditions"],
        "summary": latency["summary"],
        "block_p50_ms": medians,
        "block_cpu_p50_ms": [float(block["cpu_ms"]["p50"]) for block in latency["blocks"]],
    }


def _as_predicted(metrics: Record | None, profile: Record) -> bool:
    """Return whether the file that was measured is in the number format of the table."""
    return metrics is None or metrics["precision"] == profile["runtime"]["precision"]


def _prediction(architecture: Record | None, latency: Record | None) -> dict[str, Any] | None:
    """Compare the table with the clock: both are CPU time, which the table is calibrated on."""
    predicted = None if architecture is None else architecture["predicted"].get("latency")
    if predicted is None:
        return None
    measured = None if latency is None else float(latency["summary"]["cpu_p50_ms"])
    return {
        "predicted_ms": predicted,
        "measured_ms": measured,
        "relative_error": None if measured is None else predicted / measured - 1.0,
    }


def _architecture(stored: Record, space: SearchSpace | None) -> dict[str, Any]:
    keys = (
        "hash",
        "predicted",
        "validation",
        "objective",
        "num_candidates",
        "num_evaluated",
        "attempt",
        "tightened",
    )
    names = stored["architecture"]
    try:
        layers = chain_of(space, names)
    except ConfigError as error:
        raise RunFolderError(f"{stored.path}: {error}; delete it and build again") from error
    return {"names": names, "layers": layers, **{key: stored[key] for key in keys}}


def _verification(folder: ModelFolder) -> dict[str, Any] | None:
    stored = read_optional(folder.verify, "nasdeploy/verify/1")
    return None if stored is None else {key: value for key, value in stored.items() if key != "schema"}


def _table(table: Record, origin: str | None) -> dict[str, Any]:
    """Return how well the table predicts, and what it rests on, without its entries."""
    keys = ("runtime_key", "measured_at", "seconds", "smallest_ms", "largest_ms", "machine", "accuracy")
    held_out = [
        {"predicted_ms": row["predicted_ms"], "measured_ms": row["measured_ms"]} for row in table["held_out"]
    ]
    return {
        **{key: table[key] for key in keys},
        "origin": origin,
        "num_layers": len(table["entries"]),
        "num_reused": sum(entry["reused"] for entry in table["entries"]),
        "held_out": held_out,
    }


def _memory_table(stored: Record | None) -> dict[str, Any] | None:
    """Return how well the memory table predicts; None where the budget names no memory."""
    if stored is None:
        return None
    table = stored["table"]
    keys = ("seconds", "smallest_bytes", "largest_bytes", "noise_bytes", "accuracy")
    return {**{key: table[key] for key in keys}, "num_networks": len(table["networks"])}


def _baselines(run: RunFolder, name: str) -> list[dict[str, Any]]:
    rows = (
        (kind, read_optional(run.baseline(name, kind), "nasdeploy/baseline/1")) for kind in BASELINE_KINDS
    )
    keys = ("kind", "architecture", "predicted", "top1", "macro")
    return [{key: row[key] for key in keys} for _, row in rows if row is not None]
