"""What a file in a smaller number format must keep to be shipped, and why it is not where it fails.

Two gates: accuracy on validation images, and speed against the float32 file measured in the same blocks. The test
split decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nasdeploy.costs.comparison import Relative, relative
from nasdeploy.costs.latency import ModelLatency, noise_floor
from nasdeploy.exporters.quantization import CALIBRATION_METHOD
from nasdeploy.exporters.quantization_errors import OperatorError
from nasdeploy.exporters.structure import Check
from nasdeploy.profiles import format_quantity

MAX_NAMED = 5
"""How many operators a sentence names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyGate:
    """The checks of a file, that of its accuracy last.

    Accuracies in [0, 1] on ``num_images`` validation images: ``before`` of the network, ``accuracy`` of the file, None
    where it does not run.
    """

    checks: tuple[Check, ...]
    before: float
    accuracy: float | None
    num_images: int

    @property
    def failures(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return not self.failures

    def describe(self) -> str:
        """Return the gate in one line."""
        if self.accuracy is None:
            return f"accuracy: {self.failures[0].describe()}"
        check = self.failures[0] if self.failures else self.checks[-1]
        return (
            f"accuracy: {100 * self.before:.2f} % of the network, {100 * self.accuracy:.2f} % of the file on "
            f"{self.num_images} validation images: {check.describe()}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the gate as plain data."""
        return {
            "passed": self.passed,
            "num_images": self.num_images,
            "accuracy_before": self.before,
            "accuracy": self.accuracy,
            "checks": [check.to_json() for check in self.checks],
            "text": self.describe(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedGate:
    """A file against the float32 file by the same blocks; ms of the wall clock, the ratio of CPU time.

    noise_floor: how far two measurements of the float32 file lie apart.
    """

    relative: Relative
    noise_floor: float
    fp32_p50_ms: float
    p50_ms: float

    @classmethod
    def of(cls, reduced: ModelLatency, fp32: ModelLatency, again: ModelLatency) -> SpeedGate:
        """Compare what was measured together; again: the float32 file a second time."""
        floor = noise_floor(fp32, again)
        return cls(
            relative=relative(reduced, fp32, floor=floor),
            noise_floor=floor,
            fp32_p50_ms=fp32.p50_ms,
            p50_ms=reduced.p50_ms,
        )

    @property
    def passed(self) -> bool:
        """Whether the file is faster by more than twice the noise floor."""
        return self.relative.verdict == "faster"

    def describe(self) -> str:
        """Return the gate in one line."""
        found, show = self.relative, _milliseconds
        return (
            f"speed: x{found.ratio:.3f} of fp32 (blocks x{found.smallest_ratio:.3f} to x{found.largest_ratio:.3f}; "
            f"{show(self.p50_ms)} against {show(self.fp32_p50_ms)}; noise floor {100 * self.noise_floor:.2f} %): "
            f"{found.verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the gate as plain data."""
        return {
            "passed": self.passed,
            **self.relative.to_json(),
            "noise_floor": self.noise_floor,
            "fp32_p50_ms": self.fp32_p50_ms,
            "p50_ms": self.p50_ms,
            "text": self.describe(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTime:
    """The time of all operators of one type in a run, in ms; 0.0 where a file has none."""

    operator: str
    fp32_ms: float
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a gate failed, per operator. in_float: {operator: number of nodes} that stayed in float."""

    gate: str
    errors: tuple[OperatorError, ...] = ()
    times: tuple[OperatorTime, ...] = ()
    in_float: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the reason in one line."""
        parts = []
        if self.errors:
            named = [
                f"{error.name} ({error.operator}) {100 * error.added_noise:.2g} %"
                for error in self.errors[:MAX_NAMED]
            ]
            parts.append(f"noise added by operator, relative to its output: {', '.join(named)}")
        if self.times:
            named = [
                f"{time.operator} {_milliseconds(time.fp32_ms)} -> {_milliseconds(time.ms)}"
                for time in self.times[:MAX_NAMED]
            ]
            parts.append(f"time by operator, fp32 -> this file: {', '.join(named)}")
        if self.in_float:
            named = [f"{count} {operator}" for operator, count in self.in_float.items()]
            parts.append(f"still in float: {', '.join(named)}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the reason as plain data."""
        return {
            "gate": self.gate,
            "errors": [asdict(error) for error in self.errors],
            "times": [asdict(time) for time in self.times],
            "in_float": dict(self.in_float),
            "text": self.describe(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Both gates of a file in a smaller number format. speed: None where the file was not measured.

    calibration_images: how many an INT8 file was calibrated on. reason: of the gate that failed, None where none did.
    """

    precision: str
    accuracy: AccuracyGate
    calibration_images: int
    speed: SpeedGate | None = None
    reason: Reason | None = None

    @property
    def passed(self) -> bool:
        """Whether the file ships."""
        return self.accuracy.passed and self.speed is not None and self.speed.passed

    def describe(self) -> str:
        """Return both gates in one line, and why one failed."""
        outcome = "ships" if self.passed else "does not ship, fp32 does"
        gates = [gate.describe() for gate in (self.accuracy, self.speed) if gate is not None]
        reason = [] if self.reason is None else [self.reason.describe()]
        return f"the {self.precision} file {outcome}: {'; '.join(filter(None, [*gates, *reason]))}"

    def to_json(self) -> dict[str, Any]:
        """Return both gates as plain data, a part of ``schemas/metrics.schema.json``."""
        calibration = {"method": CALIBRATION_METHOD, "num_images": self.calibration_images}
        return {
            "precision": self.precision,
            "passed": self.passed,
            "text": self.describe(),
            "calibration": calibration if self.calibration_images else None,
            "accuracy": self.accuracy.to_json(),
            "speed": None if self.speed is None else self.speed.to_json(),
            "reason": None if self.reason is None else self.reason.to_json(),
        }


def times_by_operator(fp32_ms: Mapping[str, float], ms: Mapping[str, float]) -> tuple[OperatorTime, ...]:
    """Return the operators of two files, {operator: ms of a run}, by their time in both, the largest first."""
    rows = [
        OperatorTime(operator=name, fp32_ms=fp32_ms.get(name, 0.0), ms=ms.get(name, 0.0))
        for name in {**fp32_ms, **ms}
    ]
    return tuple(sorted(rows, key=lambda row: row.fp32_ms + row.ms, reverse=True))


def _milliseconds(value: float) -> str:
    return format_quantity(value, "latency", digits=3) if value else "0"
