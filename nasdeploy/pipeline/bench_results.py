"""What ``bench`` found: plain data, its exit code, and its chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasdeploy.costs.certification import CapCheck
from nasdeploy.costs.comparison import BenchProtocol, Comparison, Relative
from nasdeploy.costs.latency import ModelLatency
from nasdeploy.costs.operators import OperatorProfile
from nasdeploy.costs.sessions import HERE
from nasdeploy.costs.startup import StartUp
from nasdeploy.errors import BudgetViolatedError, NasdeployError, NoisyMeasurementError, most_serious
from nasdeploy.files import write_whole
from nasdeploy.pipeline.bench_files import ModelFile
from nasdeploy.profiles import Runtime, format_quantity
from nasdeploy.reporting.bench_chart import Bar, draw_bars

__all__ = ["SCHEMA", "BenchResult", "BenchedModel", "cap_text", "write_chart"]

SCHEMA = "nasdeploy/bench/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchedModel:
    """What was measured of a file. relative: against the first file; None for that one itself.

    cap: of the profile's absolute latency cap, where it has one. operators: where the time goes, where that was asked.
    """

    file: ModelFile
    latency: ModelLatency
    start_up: StartUp
    relative: Relative | None
    cap: CapCheck | None = None
    operators: OperatorProfile | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            **self.file.to_json(),
            "mean_ms": self.latency.mean_ms,
            "min_ms": self.latency.min_ms,
            "wall_over_cpu": self.latency.wall_over_cpu,
            "late_share": self.latency.late_share,
            "relative": None if self.relative is None else self.relative.to_json(),
            "cap": None if self.cap is None else self.cap.to_json(),
            "start_up": self.start_up.to_json(),
            "latency": self.latency.to_json(),
            "operators": None if self.operators is None else self.operators.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Files measured together, in the order in which they were given.

    profile: its name; None for the runtime alone. load: of the machine before and after; None where unknown.
    reference, again: see :class:`~nasdeploy.costs.comparison.Comparison`. device: where it was measured. check_cap:
    whether the profile's latency cap decides on the exit code.
    """

    profile: str | None
    runtime: Runtime
    protocol: BenchProtocol
    seed: int
    machine: Mapping[str, str | int | float | None]
    load: tuple[float | None, float | None]
    models: tuple[BenchedModel, ...]
    comparison: Comparison
    device: str = HERE.name
    check_cap: bool = False

    @property
    def failures(self) -> tuple[NasdeployError, ...]:
        """What speaks against the result, a line each: the machine, then the caps where they decide."""
        found: list[NasdeployError] = []
        if not self.comparison.stable:
            found.append(NoisyMeasurementError(self.comparison.instability))
        for model in self.models if self.check_cap else ():
            if model.cap is not None and model.cap.status == "violated":
                found.append(BudgetViolatedError(f"{model.file.label}: {cap_text(model.cap)}"))
            # An unstable machine is said once, not again for every file.
            elif model.cap is not None and model.cap.status == "undecided" and self.comparison.stable:
                found.append(NoisyMeasurementError(f"{model.file.label}: {cap_text(model.cap)}"))
        return tuple(found)

    @property
    def exit_code(self) -> int:
        """5 where the machine did not hold still or a cap stays undecided, 3 where one is violated, else 0."""
        return most_serious([failure.exit_code for failure in self.failures])

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, after ``schemas/bench.schema.json``."""
        comparison = self.comparison
        return {
            "schema": SCHEMA,
            "profile": self.profile,
            "runtime": self.runtime.model_dump(
                mode="json", include={"engine", "provider", "threads", "batch_size"}
            ),
            "protocol": {**self.protocol.to_json(), "seed": self.seed},
            "device": self.device,
            "machine": dict(self.machine),
            "load_before": self.load[0],
            "load_after": self.load[1],
            "stable": comparison.stable,
            "flagged": comparison.flagged,
            "attempts": [attempt.to_json() for attempt in comparison.attempts],
            "check_cap": self.check_cap,
            "noise_floor": comparison.noise_floor,
            "models": [model.to_json() for model in self.models],
            "first_again": comparison.again.to_json(),
            "reference": comparison.reference.to_json(),
            "reference_cpu_p50_ms": [block.cpu_ms[50] for block in comparison.reference.blocks],
        }


def write_chart(result: BenchResult, path: Path) -> None:
    """Draw the medians of all files to ``path``, which ends in .png or .svg."""
    bars = [
        Bar(
            label=model.file.label,
            precision=model.file.precision,
            p50_ms=model.latency.p50_ms,
            low_ms=model.latency.p50_range_ms[0],
            high_ms=model.latency.p50_range_ms[1],
            note="" if model.relative is None else f"x{model.relative.ratio:.3g}, {model.relative.verdict}",
        )
        for model in result.models
    ]
    how = result.models[0].latency.conditions
    pace = "" if how.interval_ms is None else f", a run every {format_quantity(how.interval_ms, 'latency')}"
    doubt = "" if result.comparison.stable else " - UNSTABLE MACHINE"
    picture = draw_bars(
        bars,
        title=f"latency under {result.profile or 'one runtime'}{doubt}",
        conditions=f"{how.provider}, {how.threads} thread{'s' if how.threads > 1 else ''}{pace}, on {result.device}",
        file_format="svg" if path.suffix.lower() == ".svg" else "png",
    )
    write_whole(path, picture)


def cap_text(check: CapCheck) -> str:
    """Return a latency cap and what was measured on one line."""
    estimate, bound = (
        "n/a" if value is None else format_quantity(value, "latency")
        for value in (check.estimate, check.bound)
    )
    relation = {"holds": "<=", "violated": ">", "undecided": "?"}[check.status]
    text = (
        f"latency p{check.percentile} {estimate} (largest block {bound}) {relation} "
        f"{format_quantity(check.cap, 'latency')}"
    )
    return f"{text}: {check.reason}" if check.reason else text
