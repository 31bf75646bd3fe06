"""Phase 4: a selected architecture becomes a trained network and a verified ONNX file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasdeploy.errors import ConfigError, GateError
from nasdeploy.exporters import ExportedModel, make_exporter
from nasdeploy.exporters.quantization_errors import OperatorError, operator_errors
from nasdeploy.exporters.runtime import first_line
from nasdeploy.exporters.verification import Verification, VerifyLimits, verify_export, verify_file
from nasdeploy.files import write_json
from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.gates import AccuracyGate, Gates, Reason
from nasdeploy.pipeline.reducing import (
    NUM_EXPLAINED_IMAGES,
    accuracy_gate,
    accuracy_limit,
    calibration_batches,
    in_fp32,
    num_calibration_images,
    reduce_model,
    unconverted,
)
from nasdeploy.pipeline.resuming import Checkpoint, carry_out
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.pipeline.steps import StepReports
from nasdeploy.pipeline.tables import metadata_of
from nasdeploy.profiles import HardwareProfile
from nasdeploy.runs import ModelFolder, read_json
from nasdeploy.searchers.seats import SearchOutcome
from nasdeploy.spaces.base import RESOLUTION, Architecture, SearchSpace
from nasdeploy.training.evaluation import loss_and_accuracy
from nasdeploy.training.retraining import Retraining, Teacher

TRAINING_SCHEMA = "nasdeploy/training/1"
CHECKPOINT_SCHEMA = "nasdeploy/retraining-checkpoint/1"
PARITY_IMAGES = 1_000  # latency.md, Export gate
MAX_PARITY_IMAGES = 5_000


class Builder:
    """Retrains, exports and verifies; the teacher and its outputs are shared by all profiles.

    outcome: of the search; where it trained no weights, networks start from random ones, without a teacher.
    """

    def __init__(self, job: Job, outcome: SearchOutcome) -> None:
        self._job = job
        self._outcome = outcome
        self._teachers: dict[Architecture, Teacher] = {}

    def build(self, profile: HardwareProfile) -> Gates | None:
        """Make ``model.onnx`` of ``profile`` from its stored architecture, and check that it computes the same.

        What the folder holds already is used. For a profile in a smaller number format that file is made too, and
        kept if it passed the gate of its accuracy, which is returned; None for fp32, and where ``model.onnx`` failed.
        """
        folder = self._job.folder.model(profile.name)
        folder.discard_reduced()
        architecture = stored_architecture(self._job, profile.name)
        network = self.trained(profile.name, architecture, folder)
        plain = make_exporter(self._job.settings.exporter).export(
            network,
            image_shape=self._job.space.input_shape(architecture),
            path=folder.model,
            opset=profile.runtime.opset,
            batch_size=file_batch(self._job, profile),
            metadata=metadata_of(self._job, in_fp32(profile), architecture),
        )
        verification = verify_network(self._job.at(architecture), network, folder.model, profile)
        write_json(folder.verify, verification.to_json())
        if profile.runtime.precision == "fp32" or not verification.passed:
            return None
        return self._reduce(profile, architecture, network, plain)

    def _reduce(
        self, profile: HardwareProfile, architecture: Architecture, network: nn.Module, plain: ExportedModel
    ) -> Gates:
        """Make the file in the profile's number format, and delete it again where it fails the gate of its accuracy."""
        job, precision = self._job.at(architecture), profile.runtime.precision
        phase = f"convert {profile.name}"
        job.observer.start(phase)
        batch_size = file_batch(job, profile)
        calibrated = num_calibration_images(job, precision)
        try:
            made = reduce_model(
                job,
                plain,
                precision=precision,
                path=job.folder.model(profile.name).file(precision),
                batch_size=batch_size,
                metadata=metadata_of(job, profile, architecture),
            )
        except GateError as error:  # the float32 file is good all the same
            job.observer.finish(phase, {"precision": precision})
            job.observer.note(f"{profile.name}: {error}")
            accuracy = unconverted(job, network, str(error))
            return Gates(precision=precision, accuracy=accuracy, calibration_images=calibrated)
        gates = Gates(
            precision=precision,
            accuracy=reduced_accuracy(job, profile, network, made.path),
            calibration_images=calibrated,
        )
        job.observer.finish(phase, {"precision": precision, "file_size": made.file_size})
        job.observer.note(f"{profile.name}: {gates.accuracy.describe()}")
        if gates.accuracy.passed:
            return gates
        errors = self._explained(job, plain, made, batch_size) if gates.accuracy.accuracy is not None else ()
        made.path.unlink()
        return replace(gates, reason=Reason(gate="accuracy", errors=errors))

    def _explained(
        self, job: Job, plain: ExportedModel, made: ExportedModel, batch_size: int | None
    ) -> tuple[OperatorError, ...]:
        """Return what each operator adds to the error of a reduced file; nothing where that cannot be told."""
        images = calibration_batches(job, batch_size, num_images=NUM_EXPLAINED_IMAGES)
        try:
            return operator_errors(plain.path, made.path, images)
        except (
            Exception
        ) as error:  # of onnxruntime's tools, with no common class: no reason to lose the build
            job.observer.note(f"the errors of single operators are not known ({first_line(error)})")
            return ()

    def trained(self, name: str, architecture: Architecture, folder: ModelFolder) -> nn.Module:
        """Return the trained network on the CPU, in evaluation mode: from the run folder, or trained now."""
        if folder.training.exists() and folder.weights.exists():
            folder.checkpoint.unlink(missing_ok=True)  # a kill may have left it
            network: nn.Module = build_network(self._job.space, architecture, self._job.normalise())
            network.load_state_dict(self._job.folder.load_tensors(folder.weights))
            return network.eval()
        network, facts = self.retrain(name, architecture, checkpoint=folder.checkpoint)
        self._job.folder.save_tensors(folder.weights, network.state_dict())
        write_json(folder.training, {"schema": TRAINING_SCHEMA, "profile": name, **facts})
        folder.checkpoint.unlink(missing_ok=True)
        return network

    def retrain(
        self, name: str, architecture: Architecture, *, checkpoint: Path
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train ``architecture`` by the recipe of the settings; return it on the CPU with the facts of its training.

        checkpoint: the file that holds the state of the training meanwhile; the caller deletes it.
        """
        job, settings = self._job.at(architecture), self._job.settings.retrain
        phase = f"retrain {name}"
        job.observer.start(phase, settings.num_steps)
        inherited = self._outcome.trained(architecture) if settings.start == "supernet" else None
        loop = Retraining(
            self._random(architecture) if inherited is None else inherited,
            job.batches(job.train, purpose="retrain", batch_size=settings.batch_size, augment=True),
            settings,
            teacher=self._teacher(architecture) if settings.distillation_weight > 0.0 else None,
            class_weights=job.class_weights,
        )
        reports = StepReports(job.observer, phase)
        owner = f"{job.fingerprint()}/{job.space.to_names(architecture)}"
        seconds = carry_out(
            loop,
            Checkpoint(checkpoint, schema=CHECKPOINT_SCHEMA, owner=owner),
            after_step=lambda loss: reports.add(loop.num_done, loss),
            before_save=reports.flush,
        )
        reports.flush()
        network = loop.result()
        facts = _facts(
            job, name, network, start="scratch" if inherited is None else "supernet", seconds=seconds
        )
        return network.cpu().to(memory_format=torch.contiguous_format), facts

    def _random(self, architecture: Architecture) -> nn.Module:
        generator = self._job.generator("retrain/weights")
        network = build_network(self._job.space, architecture, self._job.normalise(), generator)
        return network.to(self._job.device).to(memory_format=torch.channels_last)

    def _teacher(self, architecture: Architecture) -> Teacher | None:
        """Return the largest network that takes the images of ``architecture``; None where the search trained none."""
        largest = _largest_like(self._job.space, architecture)
        if largest not in self._teachers:
            network = self._outcome.trained(largest)
            if network is None:
                return None
            self._teachers[largest] = Teacher(network)
        return self._teachers[largest]


def _largest_like(space: SearchSpace, architecture: Architecture) -> Architecture:
    """Return the largest architecture of the same resolution."""
    choices = [
        kept if decision.name == RESOLUTION else largest
        for decision, kept, largest in zip(
            space.decisions, architecture.choices, space.largest().choices, strict=True
        )
    ]
    return Architecture(tuple(choices))


def verify_network(job: Job, network: nn.Module, path: Path, profile: HardwareProfile) -> Verification:
    """Return the checks of the exported file at ``path`` against its network, on the images of ``job``."""
    images = parity_images(job)
    return verify_export(
        path,
        network,
        images,
        limits=VerifyLimits(min_images=min(PARITY_IMAGES, len(images))),
        opset=profile.runtime.opset,
    )


def file_batch(job: Job, profile: HardwareProfile) -> int | None:
    """Return the batch size of the files of ``profile``, None for any."""
    return None if job.settings.dynamic_batch else profile.runtime.batch_size


def reduced_accuracy(job: Job, profile: HardwareProfile, network: nn.Module, path: Path) -> AccuracyGate:
    """Return the accuracy gate of the file in the profile's number format, on the images of ``job``."""
    limit = accuracy_limit(profile, profile.runtime.precision)
    return accuracy_gate(job, network, path, checks=verify_file(path).checks, limit=limit)


def _facts(job: Job, name: str, network: nn.Module, *, start: str, seconds: float) -> dict[str, Any]:
    """Return what is to be stored of a training; start: from which weights. Raises ConfigError where it diverged."""
    settings = job.settings.retrain
    loss, accuracy = loss_and_accuracy(
        network, job.valid.images, job.valid.labels, class_weights=job.class_weights
    )
    if not math.isfinite(loss):
        raise ConfigError(
            f"retrain.learning_rate = {settings.learning_rate}: the training of {name} diverged (its loss is not "
            "finite); expected a lower rate, such as 0.05"
        )
    found = {"seconds": round(seconds, 1), "validation accuracy": round(accuracy, 4)}
    job.observer.finish(f"retrain {name}", found)
    return {
        "validation": {"loss": loss, "accuracy": accuracy},
        "retraining": {
            "start": start,
            "num_steps": settings.num_steps,
            "seconds": seconds,
            "images_per_second": settings.num_steps * settings.batch_size / seconds,
        },
    }


def parity_images(job: Job) -> Tensor:
    """Return the real images that outputs are compared on: of the validation split, then training images."""
    valid, train = job.dataset.valid.images, job.dataset.train.images
    # drawn at random where there are more: splits are sorted by class
    order = torch.randperm(len(valid), generator=job.generator("parity"))[:MAX_PARITY_IMAGES]
    images = valid[order.sort().values]
    if len(images) < PARITY_IMAGES:
        images = torch.cat([images, train[: PARITY_IMAGES - len(images)]])
    return images


def training_facts(folder: ModelFolder) -> dict[str, Any]:
    """Return what was stored of the training of a model."""
    return read_json(folder.training, schema=TRAINING_SCHEMA)
