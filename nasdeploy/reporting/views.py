"""What the templates show: the report's facts grouped as they stand on the page. Plain data, no markup."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from nasdeploy.reporting import text
from nasdeploy.reporting.layers import layer_text
from nasdeploy.reporting.text import TIMES
from nasdeploy.spaces import CLASSIFIERS, RESOLUTION

__all__ = [
    "GLOSSARY",
    "Report",
    "command_line",
    "input_shape",
    "is_untrained",
    "leading_decisions",
    "model_name",
    "stages",
    "table_cells",
    "worst_classes",
]

Report = Mapping[str, Any]
"""What :func:`nasdeploy.reporting.collect.collect_report` returns."""

TABLE_METRICS = ("latency", "params", "flops", "file_size", "peak_memory")
MAX_CLASSES = 12
MAX_OPERATORS = 8
MAX_DECISIONS = 8
MODEL_NAMES = {
    "gaussian-process": "a Gaussian process",
    "ridge": "a ridge regression on single decisions",
    "pairs": "a ridge regression on decisions and pairs of neighbours",
    "graph": "a graph network",
}

GLOSSARY = (
    (
        "FLOPs",
        "Multiply-adds of one image as fvcore counts them: one multiply-add is one FLOP, and batch norm is counted "
        "on the network before it is folded; many other tools count two per multiply-add.",
    ),
    ("MACs", "Multiply-adds of convolution and linear layers alone, which is what papers usually compare."),
    (
        "Block",
        "One fresh process that measures every model of the comparison in turns; timings inside one process are not "
        "independent, so statements rest on blocks.",
    ),
    (
        "Bound",
        "The largest of the block percentiles: with five blocks, a 96.9 % upper bound on the median block; a latency "
        "cap holds when the bound, not the average, is below it.",
    ),
    (
        "Range",
        "The way from the smallest network of the search space (0 %) to the largest (100 %) under the same profile; "
        "a cap of 40 % lies at 40 % of that way.",
    ),
    (
        "Peak memory",
        "What the file adds to a process that has loaded ONNX Runtime: its peak resident size while the file is loaded "
        "and run, less that before; the median of several fresh processes, and as bound the largest of them.",
    ),
    (
        "p50, p90, p99",
        "The time that 50, 90 or 99 of 100 runs stay below; a percentile that the number of runs cannot support is "
        "shown as a dash.",
    ),
    (
        "CPU time",
        "Time that the processor spent on the model, without waiting for other programs; wall time is what a clock on "
        "the wall shows, and a block is contended where it is over 5 % more.",
    ),
    (
        "ESS",
        "Effective sample size: how many of the networks evaluated in a step count for a profile's update, since all "
        "profiles share the evaluations with different weights.",
    ),
)


def command_line(report: Report) -> str:
    """Return the command that made the run, quoted for a shell."""
    return shlex.join(report["run"]["command"])


def table_cells(profile: Mapping[str, Any], beside: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return for every metric what was measured and the cap on it, if there is one.

    beside: the profiles of the same table. Memory has a place where one of them budgets it; it is not measured
    otherwise.
    """
    caps = {cap["metric"]: cap for cap in profile["caps"]}
    with_memory = any("peak_memory" in one["budget"] for one in (profile, *beside))
    return [
        {"metric": metric, "value": _value(profile, metric), "cap": caps.get(metric)}
        for metric in TABLE_METRICS
        if metric != "peak_memory" or with_memory
    ]


def _value(profile: Mapping[str, Any], metric: str) -> str:
    if metric != "latency":
        return text.quantity(profile[metric], metric)
    return text.milliseconds(profile["latency"] and profile["latency"]["summary"]["p50_ms"])


def soft_weights(profile: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every metric that the objective weighs."""
    sentences = []
    for metric, budget in profile["budget"].items():
        if budget.get("coefficient"):
            reference = budget.get("reference") or "the largest network"
            sentences.append(
                f"{text.metric_name(metric)} {TIMES} {budget['coefficient']:g}, relative to {reference}"
            )
    return sentences


def stages(architecture: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the network stage by stage: name, texts of its layers, output shape (None for a foreign space)."""
    if architecture["layers"] is None:
        return [
            {"name": name, "layers": [f"{key} {value}" for key, value in rows], "out": None}
            for name, rows in _grouped(list(architecture["names"].items()))
        ]
    rows = [(layer["slot"], layer) for layer in architecture["layers"]]
    return [
        {"name": name, "layers": [layer_text(layer) for _, layer in group], "out": _out([*group])}
        for name, group in _grouped(rows)
    ]


def _grouped(rows: Sequence[tuple[str, Any]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Group rows by what stands before the first dot of their name: stage1.block2 belongs to stage1."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, row in rows:
        stage, _, rest = name.partition(".")
        groups.setdefault(stage, []).append((rest, row))
    return list(groups.items())


def _out(group: list[tuple[str, Any]]) -> str | None:
    placed = [layer for _, layer in group if layer["kind"] != "skip"]
    if not placed:
        return None
    last = placed[-1]
    if last["kind"] in CLASSIFIERS:
        return f"{last['out_channels']} classes"
    return f"{last['out_size']}{TIMES}{last['out_size']}{TIMES}{last['out_channels']}"


def worst_classes(profile: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the classes with the lowest accuracy, lowest first: all of them where they are few."""
    accuracy = profile["accuracy"]
    if accuracy is None or accuracy["per_class"] is None:
        return []
    known = [row for row in accuracy["per_class"] if row["accuracy"] is not None]
    return sorted(known, key=lambda row: row["accuracy"])[:MAX_CLASSES]


def conditions(profile: Mapping[str, Any]) -> str:
    """Return in one line how the latency was measured; empty where it was not."""
    latency = profile["latency"]
    if latency is None:
        return ""
    how, summary = latency["conditions"], latency["summary"]
    threads = f"{how['threads']} thread{'s' if how['threads'] != 1 else ''}"
    parts = [
        f"ONNX Runtime {how['onnxruntime']}, {how['provider']}",
        threads + (", pinned to as many cores" if how["pinned"] else ", not pinned to cores"),
        f"idle threads {'spin' if how['spinning'] else 'sleep'}",
        f"batch of {how['batch_size']}",
        f"{profile['precision'] or profile['runtime']['precision']}",
        f"{len(latency['block_p50_ms'])} blocks, n = {summary['n']} runs",
    ]
    return "; ".join(parts)


def input_shape(profile: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[int]:
    """Return (channels, height, width) of what the network of ``profile`` takes: the search may choose the size."""
    channels, height, width = dataset["image_shape"]
    chosen = (profile["architecture"] or {"names": {}})["names"].get(RESOLUTION)
    return [channels, height, width] if chosen is None else [channels, int(chosen), int(chosen)]


def leading_decisions(importance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the decisions that matter most, first the one that matters most, with their best and worst candidate.

    told_apart: whether the best and the worst differ by more than two standard errors, None where that is not known.
    """
    order = sorted(importance["decisions"], key=lambda row: -row["range"])
    return [
        {
            "name": row["name"],
            "range": row["range"],
            "error": row["error"],
            "told_apart": None if row["error"] is None else row["range"] > 2 * row["error"],
            **_best_and_worst(row["candidates"]),
        }
        for row in order[:MAX_DECISIONS]
    ]


def _best_and_worst(candidates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    known = sorted(
        (one for one in candidates if one["effect"] is not None), key=lambda one: float(one["effect"])
    )
    return {"best": str(known[0]["name"]), "worst": str(known[-1]["name"])}


def model_name(importance: Mapping[str, Any]) -> str:
    """Return what kind of model the effects are of, in words."""
    return MODEL_NAMES.get(importance["model"], str(importance["model"]))


def is_untrained(run: Mapping[str, Any]) -> bool:
    """Return whether networks were chosen without trained weights. run: run.json; version 0.1 did not say."""
    return bool(run["settings"]["search"].get("evaluator", "supernet") == "random-weight")
