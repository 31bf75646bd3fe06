"""What every step of a search did: for progress, and for ``history.csv``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nasdeploy.optim.pooled import Diagnostics
from nasdeploy.optim.strategy import Strategy
from nasdeploy.pipeline.step_rows import Row, StepRows, csv_text
from nasdeploy.progress import Value
from nasdeploy.searchers.oneshot import SearchStep

SHOWN_METRICS = ("latency", "flops", "params")
HEADER = ("step", "stage", "seconds", "loss")


class History:
    """The rows of a search; the latest ones in memory, with their losses still on the device."""

    def __init__(self, path: Path, *, names: Sequence[str], optimizer: Strategy) -> None:
        self._part = StepRows(path, first=HEADER)
        self._names, self._optimizer = names, optimizer
        self._started: float | None = None
        self._pending: list[dict[str, Value]] = []
        self._losses: list[Tensor] = []
        self._moved: int | None = None
        self._distributions: dict[str, Value] = {}

    def add(self, step: SearchStep) -> Row:
        """Take one step; return its row, without its loss, which is still on the device."""
        diagnostics = step.diagnostics
        row: dict[str, Value] = {
            "step": step.step,
            "stage": "warm-up" if diagnostics is None else "search",
            "seconds": round(self._seconds(step.step), 3),
        }
        self._losses.append(step.loss)
        if self._moved != self._optimizer.num_steps:  # most steps train weights alone
            self._moved = self._optimizer.num_steps
            self._distributions = self._describe(diagnostics)
        row |= self._distributions
        self._pending.append(row)
        return row

    def _describe(self, diagnostics: Diagnostics | None) -> dict[str, Value]:
        """Return what the distributions are after they moved, by column."""
        columns: dict[str, Value] = {}
        for k, name in enumerate(self._names):
            columns[f"ess.{name}"] = round(diagnostics.ess[k], 3) if diagnostics else ""
            columns[f"stepped.{name}"] = int(diagnostics.stepped[k]) if diagnostics else ""
            columns[f"entropy.{name}"] = round(diagnostics.entropy[k], 4) if diagnostics else ""
            columns[f"own_share.{name}"] = round(diagnostics.own_share[k], 4) if diagnostics else ""
            r_squared = diagnostics.r_squared[k] if diagnostics else None
            columns[f"r_squared.{name}"] = round(r_squared, 4) if r_squared is not None else ""
            columns[f"gate_openings.{name}"] = diagnostics.gate_openings[k] if diagnostics else ""
            for metric in SHOWN_METRICS:
                columns[f"{metric}.{name}"] = float(f"{self._optimizer.expected_cost(k, metric):.6g}")
        return columns

    def _seconds(self, step: int) -> float:
        """Return the seconds since the first step, those before an interruption included."""
        if self._started is None:
            before = float(self._stored().get(step - 1, {"seconds": 0.0})["seconds"])
            self._started = time.perf_counter() - before
        return time.perf_counter() - self._started

    def flush(self) -> None:
        """Append the rows since the last call, with their losses: one transfer from the device."""
        if not self._pending:
            return
        losses = torch.stack(self._losses).tolist()
        rows = [{**row, "loss": round(loss, 6)} for row, loss in zip(self._pending, losses, strict=True)]
        self._part.append(rows)
        self._pending, self._losses = [], []

    def rows(self, num_steps: int) -> list[Row]:
        """Return the rows of steps 1 to ``num_steps``."""
        self.flush()
        found = self._stored()
        return [found[step] for step in range(1, num_steps + 1)]

    def _stored(self) -> dict[int, Row]:
        """Return the rows in the file by their steps."""
        return {int(row["step"]): row for row in self._part.stored()}

    def discard(self) -> None:
        """Delete the file: the history is stored whole."""
        self._part.discard()


def mean_ess(rows: Sequence[Row], name: str) -> float | None:
    """Return the mean effective sample size of a profile over the steps that have one."""
    values = [float(row[f"ess.{name}"]) for row in rows if row[f"ess.{name}"] != ""]
    return float(np.mean(values)) if values else None


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows under their header."""
    return csv_text(rows, first=HEADER)
