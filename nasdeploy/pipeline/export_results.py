"""What ``nasdeploy export`` was asked for and what came of it, as data and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nasdeploy.costs.comparison import BenchProtocol, Relative
from nasdeploy.errors import GateError, most_serious
from nasdeploy.exporters import ExportedModel
from nasdeploy.exporters.quantization import CALIBRATION_METHOD
from nasdeploy.exporters.verification import Check

SCHEMA, RESULT_SCHEMA = "nasdeploy/export/1", "nasdeploy/export-result/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What the files are to be; None: as in the run. max_accuracy_drop: in [0, 1]; None: no such limit.

    protocol: by which latency is measured.
    """

    precision: str
    opset: int | None
    exporter: str | None
    batch_size: int | None
    dynamic_batch: bool
    max_accuracy_drop: float | None
    protocol: BenchProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLatency:
    """Latency of num_runs runs. baseline: what was measured in the same blocks; None where nothing was."""

    p50_ms: float
    num_runs: int
    provider: str
    threads: int
    batch_size: int
    baseline: str | None
    baseline_p50_ms: float | None
    relative: Relative | None
    noise_floor: float
    stable: bool
    contended_blocks: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileExport:
    """What came of one profile. model: the file; None where it failed a check. record: the JSON file beside it.

    Accuracies in [0, 1]: validation_before of the network, validation_accuracy and test_accuracy of the file; None
    where it was not measured, latency too. calibration_images: how many an INT8 file was calibrated on.
    """

    profile: str
    message: str
    precision: str
    options: ExportOptions
    opset: int
    exporter: str
    batch_size: int | None
    model: ExportedModel | None
    record: Path
    checks: tuple[Check, ...]
    validation_before: float
    validation_accuracy: float | None
    num_validation: int
    test_accuracy: float | None
    num_test: int
    calibration_images: int
    latency: MeasuredLatency | None

    @property
    def exit_code(self) -> int:
        """0, or 4 where the file failed a check."""
        return GateError.exit_code if self.model is None else 0

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, after ``schemas/export.schema.json``."""
        calibration = {"method": CALIBRATION_METHOD, "num_images": self.calibration_images}
        return {
            "schema": SCHEMA,
            "profile": self.profile,
            "status": "gate-failed" if self.model is None else "exported",
            "exit_code": self.exit_code,
            "message": self.message,
            "precision": self.precision,
            "file": None if self.model is None else self.model.path.name,
            "sha256": None if self.model is None else self.model.sha256,
            "file_size": None if self.model is None else self.model.file_size,
            "opset": self.opset,
            "exporter": self.exporter,
            "batch_size": self.batch_size,
            "calibration": calibration if self.calibration_images else None,
            "max_accuracy_drop": self.options.max_accuracy_drop,
            "validation": {
                "num_images": self.num_validation,
                "accuracy_before": self.validation_before,
                "accuracy": self.validation_accuracy,
            },
            "test": None
            if self.test_accuracy is None
            else {"num_images": self.num_test, "accuracy": self.test_accuracy},
            "latency": None if self.latency is None else self.latency.to_json(),
            "checks": [check.to_json() for check in self.checks],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was exported, by profile."""

    run_dir: Path
    output_dir: Path
    exports: tuple[ProfileExport, ...]

    @property
    def exit_code(self) -> int:
        """The most serious code of the profiles."""
        return most_serious([export.exit_code for export in self.exports])

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, after ``schemas/export-result.schema.json``."""
        return {
            "schema": RESULT_SCHEMA,
            "run_dir": str(self.run_dir),
            "output_dir": str(self.output_dir),
            "exit_code": self.exit_code,
            "exports": [export.to_json() for export in self.exports],
        }
