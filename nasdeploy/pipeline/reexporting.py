"""One trained network as a file again: export, convert, check, measure, store."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

from torch import nn

from nasdeploy.costs.comparison import Comparison, compare
from nasdeploy.costs.sessions import check_runtime_available
from nasdeploy.errors import NasdeployError
from nasdeploy.exporters import ExportedModel, make_exporter
from nasdeploy.exporters.runtime import OnnxClassifier, onnx_accuracy
from nasdeploy.exporters.verification import verify_file
from nasdeploy.files import write_json, write_whole
from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.devices import device_of
from nasdeploy.pipeline.export_results import ExportOptions, MeasuredLatency, ProfileExport
from nasdeploy.pipeline.gates import AccuracyGate
from nasdeploy.pipeline.models import verify_network
from nasdeploy.pipeline.reducing import (
    accuracy_gate,
    accuracy_limit,
    in_fp32,
    num_calibration_images,
    reduce_model,
    with_precision,
)
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.pipeline.tables import metadata_of
from nasdeploy.profiles import HardwareProfile

EXPORTED = "the exported file"


class ProfileExporter:
    """Exports the network of one profile of a run into the folder ``target``."""

    def __init__(self, job: Job, profile: HardwareProfile, options: ExportOptions, target: Path) -> None:
        runtime = profile.runtime.model_copy(update={"opset": options.opset or profile.runtime.opset})
        self._architecture = stored_architecture(job, profile.name)
        self._job = job.at(self._architecture)
        self._profile = in_fp32(profile.model_copy(update={"runtime": runtime}))
        if options.max_accuracy_drop is None:
            options = replace(options, max_accuracy_drop=accuracy_limit(profile, options.precision))
        self._options = options
        self._exporter = options.exporter or job.settings.exporter
        self._batch_size = _batch_size(job, profile, options)
        name = f"{profile.name}.{options.precision}"
        self._path, self._record = target / f"{name}.onnx", target / f"{name}.json"

    def carry_out(self) -> ProfileExport:
        """Export, convert, check and measure; write the file, unless it failed a check, and the JSON file beside it."""
        phase = f"export {self._profile.name}"
        self._job.observer.start(phase)
        network = self._network()
        with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
            plain = self._export(network, Path(folder, "fp32.onnx"))
            made = self._converted(plain, Path(folder, f"{self._options.precision}.onnx"))
            gate = self._check(network, plain, made)
            passed = not gate.failures
            latency, remark = self._measure(plain, made) if passed else (None, "")
            result = self._result(gate, made if passed else None, latency, remark)
            self._store(result, made.path)
        self._job.observer.finish(phase, {"file": str(self._path) if passed else "none: it failed a check"})
        return result

    def _network(self) -> nn.Module:
        network = build_network(self._job.space, self._architecture, self._job.normalise())
        weights = self._job.folder.model(self._profile.name).weights
        network.load_state_dict(self._job.folder.load_tensors(weights))
        return network.eval()

    def _metadata(self, precision: str) -> dict[str, str]:
        return metadata_of(self._job, with_precision(self._profile, precision), self._architecture)

    def _export(self, network: nn.Module, path: Path) -> ExportedModel:
        return make_exporter(self._exporter).export(
            network,
            image_shape=self._job.dataset.image_shape,
            path=path,
            opset=self._profile.runtime.opset,
            batch_size=self._batch_size,
            metadata=self._metadata("fp32"),
        )

    def _converted(self, plain: ExportedModel, path: Path) -> ExportedModel:
        if self._options.precision == "fp32":
            return plain
        return reduce_model(
            self._job,
            plain,
            precision=self._options.precision,
            path=path,
            batch_size=self._batch_size,
            metadata=self._metadata(self._options.precision),
        )

    def _check(self, network: nn.Module, plain: ExportedModel, made: ExportedModel) -> AccuracyGate:
        parity = verify_network(self._job, network, plain.path, self._profile)
        checks = parity.checks
        if self._options.precision != "fp32" and parity.passed:
            checks = verify_file(made.path).checks
        limit = self._options.max_accuracy_drop
        return accuracy_gate(self._job, network, made.path, checks=checks, limit=limit)

    def _measure(self, plain: ExportedModel, made: ExportedModel) -> tuple[MeasuredLatency | None, str]:
        """Return the latency, or None and why there is none: the file is good all the same."""
        size = self._batch_size or self._profile.runtime.batch_size
        runtime = self._profile.runtime.model_copy(update={"batch_size": size})
        baseline = self._baseline(plain, size)
        try:
            if self._profile.device is None:
                check_runtime_available(runtime)
            comparison = compare(
                {**baseline, EXPORTED: made.path},
                runtime,
                protocol=self._options.protocol,
                seed=self._job.settings.seed,
                device=device_of(
                    self._profile,
                    remedy=f"nasdeploy bench {shlex.quote(str(self._path))} -p {self._profile.name} --pack bench.zip "
                    "measures it",
                ),
            )
        except NasdeployError as error:  # a process that died, too
            return None, f"latency not measured: {error}"
        return _measured(comparison, next(iter(baseline), None)), comparison.instability

    def _baseline(self, plain: ExportedModel, batch_size: int) -> dict[str, Path]:
        """Return the file to compare with: fp32, and for an fp32 file that of the run, if it takes such batches."""
        if self._options.precision != "fp32":
            return {"fp32": plain.path}
        stored = self._job.folder.model(self._profile.name).model
        fits = stored.exists() and OnnxClassifier(stored).fixed_batch in (None, batch_size)
        return {str(stored.relative_to(self._job.folder.path)): stored} if fits else {}

    def _result(
        self, gate: AccuracyGate, made: ExportedModel | None, latency: MeasuredLatency | None, remark: str
    ) -> ProfileExport:
        test = self._job.dataset.test
        return ProfileExport(
            profile=self._profile.name,
            message=_message(gate, self._options.precision, latency, remark),
            precision=self._options.precision,
            options=self._options,
            opset=self._profile.runtime.opset,
            exporter=self._exporter,
            batch_size=self._batch_size,
            model=None if made is None else replace(made, path=self._path),
            record=self._record,
            checks=gate.checks,
            validation_before=gate.before,
            validation_accuracy=gate.accuracy,
            num_validation=gate.num_images,
            test_accuracy=None
            if made is None
            else onnx_accuracy(made.path, test.images, test.labels).accuracy,
            num_test=len(test),
            calibration_images=num_calibration_images(self._job, self._options.precision),
            latency=latency,
        )

    def _store(self, result: ProfileExport, made: Path) -> None:
        """Write both files. In this order no JSON file ever stands beside a file that it does not describe."""
        self._record.unlink(missing_ok=True)
        if result.model is None:
            self._path.unlink(missing_ok=True)
        else:
            write_whole(self._path, made.read_bytes())
        write_json(self._record, result.to_json())


def _batch_size(job: Job, profile: HardwareProfile, options: ExportOptions) -> int | None:
    """Return the batch size of the file, None for any: as asked for, else as in the run."""
    if options.dynamic_batch or (options.batch_size is None and job.settings.dynamic_batch):
        return None
    return options.batch_size or profile.runtime.batch_size


def _measured(comparison: Comparison, baseline: str | None) -> MeasuredLatency:
    latency = comparison.models[EXPORTED]
    return MeasuredLatency(
        p50_ms=latency.p50_ms,
        num_runs=latency.n,
        provider=latency.conditions.provider,
        threads=latency.conditions.threads,
        batch_size=latency.conditions.batch_size,
        baseline=baseline,
        baseline_p50_ms=None if baseline is None else comparison.models[baseline].p50_ms,
        relative=None if baseline is None else comparison.relative(EXPORTED),
        noise_floor=comparison.noise_floor,
        stable=comparison.stable,
        contended_blocks=latency.contended_blocks,
    )


def _message(gate: AccuracyGate, precision: str, latency: MeasuredLatency | None, remark: str) -> str:
    if gate.failures:
        others = f"; {len(gate.failures) - 1} more checks failed" if len(gate.failures) > 1 else ""
        return f"{precision}: {gate.failures[0].describe()}{others}; no file is written"
    relative = latency.relative if latency is not None else None
    if precision != "fp32" and relative is not None and relative.verdict != "faster":
        remark = "; ".join(filter(None, [f"{precision} is not faster than fp32 on this machine", remark]))
    return remark
