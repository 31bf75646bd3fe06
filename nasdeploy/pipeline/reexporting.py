"""One trained network as a file again: export, convert, check, measure, store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nasdeploy.costs.comparison import Comparison, compare
from nasdeploy.costs.sessions import check_runtime_available
from nasdeploy.data.stored import image_chunks
from nasdeploy.data.types import Split
from nasdeploy.errors import NasdeployError
from nasdeploy.exporters import ExportedModel, make_exporter
from nasdeploy.exporters.quantization import halve_model, quantize_model
from nasdeploy.exporters.runtime import DEFAULT_BATCH, OnnxClassifier, onnx_accuracy, top1
from nasdeploy.exporters.verification import Check, network_logits, verify_file
from nasdeploy.files import write_json, write_whole
from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.export_results import ExportOptions, MeasuredLatency, ProfileExport
from nasdeploy.pipeline.models import verify_network
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.pipeline.tables import metadata_of
from nasdeploy.profiles import HardwareProfile

NUM_CALIBRATION_IMAGES = 512
CALIBRATION_BATCH = 32
EXPORTED = "the exported file"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gate:
    """The checks of a file and its accuracy on validation images; None where it does not run."""

    checks: tuple[Check, ...]
    before: float
    accuracy: float | None

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


class ProfileExporter:
    """Exports the network of one profile of a run into the folder ``target``."""

    def __init__(self, job: Job, profile: HardwareProfile, options: ExportOptions, target: Path) -> None:
        runtime = profile.runtime.model_copy(update={"opset": options.opset or profile.runtime.opset})
        self._architecture = stored_architecture(job, profile.name)
        self._job = job.at(self._architecture)
        self._profile = profile.model_copy(
            update={"runtime": runtime.model_copy(update={"precision": "fp32"})}
        )
        self._options = options
        self._exporter = options.exporter or job.settings.exporter
        self._batch_size = _batch_size(job, profile, options)
        self._num_calibration = 0
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
        runtime = self._profile.runtime.model_copy(update={"precision": precision})
        profile = self._profile.model_copy(update={"runtime": runtime})
        return metadata_of(self._job, profile, self._architecture)

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
        precision = self._options.precision
        metadata = self._metadata(precision)
        if precision == "int8":
            return quantize_model(
                plain.path,
                path=path,
                batches=self._calibration_batches(),
                exporter=plain.exporter,
                metadata=metadata,
            )
        if precision == "fp16":
            return halve_model(plain.path, path=path, exporter=plain.exporter, metadata=metadata)
        return plain

    def _calibration_batches(self) -> Iterator[NDArray[np.float32]]:
        """Yield training images drawn at random, in batches that the file takes: splits may be sorted by class."""
        train = self._job.dataset.train
        order = torch.randperm(len(train), generator=self._job.generator("export/calibration"))
        chosen = order[:NUM_CALIBRATION_IMAGES]
        self._num_calibration = len(chosen)
        # A fixed batch is filled up: the same images again change no range.
        missing = -len(chosen) % (self._batch_size or 1)
        chosen = torch.cat([chosen, chosen[torch.arange(missing) % len(chosen)]])
        for indices in torch.split(chosen, self._batch_size or CALIBRATION_BATCH):
            yield train.images[indices].numpy().astype(np.float32)

    def _check(self, network: nn.Module, plain: ExportedModel, made: ExportedModel) -> _Gate:
        valid = self._job.dataset.valid
        parity = verify_network(self._job, network, plain.path, self._profile)
        right_before = _num_right(valid, lambda images: network_logits(network, images, DEFAULT_BATCH))
        before = right_before / len(valid)
        checks = parity.checks
        if self._options.precision != "fp32" and parity.passed:
            checks = verify_file(made.path).checks
        if not all(check.passed for check in checks):
            return _Gate(checks=checks, before=before, accuracy=None)
        right = _num_right(valid, OnnxClassifier(made.path).logits)
        if (limit := self._options.max_accuracy_drop) is not None:
            # By counts: 0.9 - 0.89 > 0.01 in floating point.
            drop = (right_before - right) / len(valid)
            checks += (Check(name="accuracy_drop", value=drop, relation="<=", limit=limit),)
        return _Gate(checks=checks, before=before, accuracy=right / len(valid))

    def _measure(self, plain: ExportedModel, made: ExportedModel) -> tuple[MeasuredLatency | None, str]:
        """Return the latency, or None and why there is none: the file is good all the same."""
        size = self._batch_size or self._profile.runtime.batch_size
        runtime = self._profile.runtime.model_copy(update={"batch_size": size})
        baseline = self._baseline(plain, size)
        try:
            check_runtime_available(runtime)
            comparison = compare(
                {**baseline, EXPORTED: made.path},
                runtime,
                protocol=self._options.protocol,
                seed=self._job.settings.seed,
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
        self, gate: _Gate, made: ExportedModel | None, latency: MeasuredLatency | None, remark: str
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
            num_validation=len(self._job.dataset.valid),
            test_accuracy=None
            if made is None
            else onnx_accuracy(made.path, test.images, test.labels).accuracy,
            num_test=len(test),
            calibration_images=self._num_calibration,
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


def _num_right(split: Split, logits_of: Callable[[NDArray[Any]], NDArray[np.float32]]) -> int:
    """Return how many images get their class; the images are read part by part."""
    right = start = 0
    for images in image_chunks(split.images):
        labels = split.labels[start : start + len(images)].numpy()
        right += int((top1(logits_of(images.numpy())) == labels).sum())
        start += len(images)
    return right


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


def _message(gate: _Gate, precision: str, latency: MeasuredLatency | None, remark: str) -> str:
    if gate.failures:
        others = f"; {len(gate.failures) - 1} more checks failed" if len(gate.failures) > 1 else ""
        return f"{precision}: {gate.failures[0].describe()}{others}; no file is written"
    relative = latency.relative if latency is not None else None
    if precision != "fp32" and relative is not None and relative.verdict != "faster":
        remark = "; ".join(filter(None, [f"{precision} is not faster than fp32 on this machine", remark]))
    return remark
