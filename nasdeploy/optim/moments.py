"""Weighted first and second moments of sparse 0/1 rows, of a time and of a target, exponentially forgotten."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray

MAX_PENDING_ROWS = 1024
"""Rows are added to the sums in blocks, since one large matrix product is faster than many small ones."""
MAX_EXPONENT = 64
"""Sums are scaled down once a new sample would weigh 2**64, by a power of 2, which rounds nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Centred:
    """Sums over samples minus their weighted means; the newest sample weighs 1.

    gram: (P + 1, P + 1) of the features and, last, the time. cross: (P + 1,) with the target. means: (P + 1,) of
    features and time. time_scale: standard deviation of the time, 1 where it does not vary.
    """

    gram: FloatArray
    cross: FloatArray
    means: FloatArray
    mean_target: float
    time_scale: float
    latest_time: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """Samples of one step that are not in the sums yet: features (n, F) that are 1, targets (n,)."""

    places: IntArray
    targets: FloatArray
    weight: float
    time: float


class Moments:
    """Sums over samples with ``size`` features (P); a sample that is ``half_life`` steps old counts half.

    The decay is in the weights of new samples, which grow, not in the sums: a step costs what its own samples cost.
    """

    def __init__(self, size: int, *, half_life: float) -> None:
        self._size = size
        self._half_life = half_life
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        width = self._size + 2  # features, time, target
        self._second: FloatArray = np.zeros((width, width))  # Σ w x x'
        self._first: FloatArray = np.zeros(width)  # Σ w x
        self._total = 0.0  # Σ w
        self._pending: list[_Block] = []
        self._num_pending, self._pending_weight = 0, 0.0
        self._origin: float | None = None  # the step at which a sample weighs 1
        self._target_origin = 0.0  # taken off every target: differences of squares keep their digits
        self._latest_step, self._latest_time = 0, 0.0

    @property
    def weight(self) -> float:
        """How many samples are remembered; the newest counts 1."""
        return (self._total + self._pending_weight) / self._growth()

    def add(self, places: IntArray, targets: FloatArray, *, step: int, time: float) -> None:
        """Add samples of one step, not before the latest: the features (n, F) of each that are 1, targets (n,)."""
        if len(targets) == 0:
            return
        if self._origin is None:
            self._origin, self._target_origin = float(step), float(targets.mean())
        self._latest_step, self._latest_time = step, time
        self._rebase()
        weight = self._growth()
        shifted = targets - self._target_origin
        self._pending.append(_Block(places=places, targets=shifted, weight=weight, time=time))
        self._num_pending += len(targets)
        self._pending_weight += weight * len(targets)
        if self._num_pending >= MAX_PENDING_ROWS:
            self._flush()

    def centred(self) -> Centred:
        """Return the sums around the means. Raises ValueError without a sample."""
        self._flush()
        if self._total == 0.0:
            raise ValueError("moments: no samples; expected at least 1")
        means = self._first / self._total
        around = (self._second - np.outer(means, self._first)) / self._growth()
        time, target = self._size, self._size + 1
        time_scale = float(np.sqrt(max(around[time, time] / self.weight, 0.0)))
        if time_scale <= 1e-6 * abs(float(means[time])):  # less is rounding of a difference of squares
            time_scale = 1.0
            around[time, :] = around[:, time] = 0.0
        return Centred(
            gram=around[:target, :target],
            cross=around[:target, target],
            means=means[:target],
            mean_target=float(means[target]) + self._target_origin,
            time_scale=time_scale,
            latest_time=self._latest_time,
        )

    def _growth(self) -> float:
        """Return the weight of a sample of the latest step: 2 to the number of half-lives since the origin."""
        return 1.0 if self._origin is None else 2.0 ** ((self._latest_step - self._origin) / self._half_life)

    def _rebase(self) -> None:
        """Move the origin to where the weight of a sample of the latest step is below 2**64."""
        assert self._origin is not None
        blocks = int((self._latest_step - self._origin) / self._half_life) // MAX_EXPONENT
        if blocks > 0:
            self._flush()
            shift = -blocks * MAX_EXPONENT
            self._second, self._first = np.ldexp(self._second, shift), np.ldexp(self._first, shift)
            self._total = float(np.ldexp(self._total, shift))
            self._origin += blocks * MAX_EXPONENT * self._half_life

    def _flush(self) -> None:
        """Add the pending samples to the sums."""
        if not self._pending:
            return
        counts = [len(block.targets) for block in self._pending]
        weights = np.repeat([block.weight for block in self._pending], counts)  # (N,)
        rows = np.zeros((self._num_pending, self._size + 2))
        np.put_along_axis(rows, np.concatenate([block.places for block in self._pending]), 1.0, axis=1)
        rows[:, -2] = np.repeat([block.time for block in self._pending], counts)
        rows[:, -1] = np.concatenate([block.targets for block in self._pending])
        self._first += weights @ rows
        self._total += float(weights.sum())
        rows *= np.sqrt(weights)[:, None]
        self._second += rows.T @ rows
        self._pending, self._num_pending, self._pending_weight = [], 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as text, since they are many numbers, and what is pending as plain lists."""
        return {
            "second": _to_text(self._second[np.triu_indices(len(self._second))]),
            "first": _to_text(self._first),
            "total": self._total,
            "origin": self._origin,
            "target_origin": self._target_origin,
            "latest": [self._latest_step, self._latest_time],
            "pending": [
                {
                    "places": b.places.tolist(),
                    "targets": b.targets.tolist(),
                    "weight": b.weight,
                    "time": b.time,
                }
                for b in self._pending
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Raises ValueError when it has another number of features."""
        self.clear()
        first, upper = _from_text(state["first"]), _from_text(state["second"])
        if len(first) != len(self._first):
            raise ValueError(f"state holds {len(first) - 2} features; expected {self._size}")
        self._first = first
        self._second[np.triu_indices(len(first))] = upper
        self._second.T[np.triu_indices(len(first))] = upper  # rows.T @ rows is symmetric to the bit
        self._total = float(state["total"])
        self._origin = None if state["origin"] is None else float(state["origin"])
        self._target_origin = float(state["target_origin"])
        self._latest_step, self._latest_time = int(state["latest"][0]), float(state["latest"][1])
        for row in state["pending"]:
            block = _Block(
                places=np.array(row["places"], dtype=np.int64),
                targets=np.array(row["targets"], dtype=np.float64),
                weight=float(row["weight"]),
                time=float(row["time"]),
            )
            self._pending.append(block)
            self._num_pending += len(block.targets)
            self._pending_weight += block.weight * len(block.targets)


def _to_text(values: FloatArray) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode("ascii")


def _from_text(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)
