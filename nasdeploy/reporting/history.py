"""What the search did over its steps, and how long every phase took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nasdeploy.reporting.records import Record, read_lines, read_number, read_optional, read_table
from nasdeploy.runs import RunFolder

__all__ = ["MAX_HISTORY_ROWS", "collect_search", "collect_totals"]

MAX_HISTORY_ROWS = 200
PER_PROFILE = ("ess", "stepped", "entropy", "latency", "flops", "params")


def collect_search(run: RunFolder, profiles: Sequence[str]) -> dict[str, Any]:
    """Return the summary of the search, None while it runs, and its history, None where it has not begun.

    And which decisions matter, None where no model of the losses has said so.
    """
    result = read_optional(run.search_result, "nasdeploy/search/1")
    importance = read_optional(run.importance, "nasdeploy/importance/1")
    return {
        "summary": None if result is None else _summary(result),
        "history": _history(run, profiles),
        "importance": None if importance is None else _importance(importance),
    }


def _summary(result: Record) -> dict[str, Any]:
    keys = ("num_steps", "seconds", "images_per_second", "num_evaluations", "estimator")
    row_keys = ("mode", "entropy", "ess", "expected_costs")
    rows = {name: {key: row[key] for key in row_keys} for name, row in result["profiles"].items()}
    return {key: result[key] for key in keys} | {"profiles": rows}


def _importance(stored: Record) -> dict[str, Any]:
    keys = ("model", "num_evaluations", "num_architectures")
    candidate_keys = ("name", "effect", "weight")
    return {key: stored[key] for key in keys} | {
        "rungs": [{key: row[key] for key in ("name", "tau", "error", "chosen")} for row in stored["rungs"]],
        "decisions": [
            {key: row[key] for key in ("name", "range", "error")}
            | {"candidates": [{key: one[key] for key in candidate_keys} for one in row["candidates"]]}
            for row in stored["decisions"]
        ],
    }


def _history(run: RunFolder, profiles: Sequence[str]) -> dict[str, Any] | None:
    rows = read_table(run.search_history)
    if not rows:
        return None
    shown = [rows[i] for i in _spread(len(rows))]

    def column(name: str) -> list[float | None]:
        return [read_number(row, name, run.search_history) for row in shown]

    return {
        "num_rows": len(rows),
        "step": column("step"),
        "stage": [row["stage"] for row in shown],
        "seconds": column("seconds"),
        "loss": column("loss"),
        "profiles": {name: {key: column(f"{key}.{name}") for key in PER_PROFILE} for name in profiles},
    }


def _spread(count: int) -> list[int]:
    """Return at most MAX_HISTORY_ROWS indices below ``count``, evenly spread, first and last among them."""
    if count <= MAX_HISTORY_ROWS:
        return list(range(count))
    return [round(i * (count - 1) / (MAX_HISTORY_ROWS - 1)) for i in range(MAX_HISTORY_ROWS)]


def collect_totals(run: RunFolder) -> dict[str, Any]:
    """Return the seconds of every phase and of all together, without the pauses between two starts."""
    spans = _spans(read_lines(run.events))
    names = dict.fromkeys(phase for phase, _, _, _ in spans)
    phases = [
        {
            "phase": name,
            "seconds": _covered([(start, end) for phase, start, end, _ in spans if phase == name]),
            "starts": sum(phase == name for phase, _, _, _ in spans),
            "finished": any(done for phase, _, _, done in spans if phase == name),
        }
        for name in names
    ]
    return {
        "seconds": _covered([(start, end) for _, start, end, _ in spans]) if spans else None,
        "phases": phases,
    }


Span = tuple[str, float, float, bool]
"""(phase, start, end, whether it was finished), seconds since the epoch."""


def _spans(events: Sequence[Record]) -> list[Span]:
    """Return one span a start. A phase that was interrupted ends with its last event."""
    spans: list[Span] = []
    open_spans: dict[str, tuple[float, float]] = {}
    for event in events:
        if event["event"] == "note":
            continue
        phase, now = str(event["phase"]), float(event["time"])
        if event["event"] == "start" and phase in open_spans:
            spans.append((phase, *open_spans.pop(phase), False))
        start = open_spans.get(phase, (now, now))[0]
        open_spans[phase] = (start, max(start, now))
        if event["event"] == "finish":
            spans.append((phase, *open_spans.pop(phase), True))
    spans += [(phase, start, end, False) for phase, (start, end) in open_spans.items()]
    return sorted(spans, key=lambda span: span[1:3])


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union: a phase inside another one is not counted twice."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return round(total, 3)
