"""One event for every step of a training loop, without waiting for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nasdeploy.progress import Observer, Value

READ_INTERVAL = 10
"""Steps whose losses are read in one transfer: reading one waits for the device."""


class StepReports:
    """Tells an observer of every step of ``phase`` with its own loss, ten steps together."""

    def __init__(self, observer: Observer, phase: str) -> None:
        self._observer, self._phase = observer, phase
        self._pending: list[tuple[int, Mapping[str, Value]]] = []
        self._losses: list[Tensor] = []

    def add(self, step: int, loss: Tensor, values: Mapping[str, Value] | None = None) -> None:
        """Take the step number ``step``, its loss, a scalar still on the device, and what else there is to tell."""
        self._pending.append((step, values or {}))
        self._losses.append(loss)
        if len(self._pending) == READ_INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Tell what was not told yet: at the end of a phase, and before its state is stored."""
        if not self._pending:
            return
        losses = torch.stack(self._losses).tolist()
        for (step, values), loss in zip(self._pending, losses, strict=True):
            shown = round(loss, 6) if math.isfinite(loss) else "not finite"
            self._observer.advance(self._phase, step, {**values, "loss": shown})
        self._pending, self._losses = [], []
