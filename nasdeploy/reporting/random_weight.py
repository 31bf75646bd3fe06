"""What random weights say of the networks of a run, where it asked them: a check of plausibility, not a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nasdeploy.reporting.records import Record, read_optional
from nasdeploy.runs import RunFolder

__all__ = ["MAX_SHOWN", "collect_random_weight", "shown_networks"]

MAX_SHOWN = 10
NETWORK_KEYS = ("error", "standard_error", "costs")


def collect_random_weight(run: RunFolder, profiles: Sequence[str]) -> dict[str, Any] | None:
    """Return what was scored, and the table of each profile, null where it has none yet; None without a score.

    Raises RunFolderError when a file is damaged.
    """
    stored = read_optional(run.random_weight, "nasdeploy/random-weight/1")
    if stored is None:
        return None
    return {
        "num_evaluations": len(stored["losses"]),
        **{key: stored[key] for key in ("num_seeds", "head", "seconds", "limits")},
        "profiles": {name: _table(run, name) for name in profiles},
    }


def _table(run: RunFolder, name: str) -> dict[str, Any] | None:
    stored = read_optional(run.random_weight_table(name), "nasdeploy/random-weight-table/1")
    if stored is None:
        return None
    chosen = stored["chosen"]
    return {
        "num_feasible": stored["num_feasible"],
        "networks": [
            _network(row) | {"chosen": row["architecture"] == chosen["architecture"]}
            for row in stored["networks"]
        ],
        "chosen": _network(chosen),
    }


def _network(row: Record) -> dict[str, Any]:
    return {key: row[key] for key in NETWORK_KEYS}


def shown_networks(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of a table that a page has room for, by error, and the chosen network among or behind them."""
    shown: list[Mapping[str, Any]] = list(table["networks"][:MAX_SHOWN])
    if not any(row["chosen"] for row in shown):
        shown.append({**table["chosen"], "chosen": True})
    return shown
