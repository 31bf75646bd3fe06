"""Phase 4: a selected architecture becomes a trained network and a verified ONNX file."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from nasdeploy.errors import ConfigError
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.verification import Verification, VerifyLimits, verify_export
from nasdeploy.files import write_json
from nasdeploy.networks import Supernet, build_network
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.pipeline.tables import metadata_of
from nasdeploy.profiles import HardwareProfile
from nasdeploy.runs import ModelFolder, read_json
from nasdeploy.spaces.base import Architecture
from nasdeploy.training.evaluation import loss_and_accuracy
from nasdeploy.training.recalibration import recalibrate
from nasdeploy.training.retraining import Teacher, retrain

TRAINING_SCHEMA = "nasdeploy/training/1"
PARITY_IMAGES = 1_000  # latency.md, Export gate


class Builder:
    """Retrains, exports and verifies; the teacher and its outputs are shared by all profiles."""

    def __init__(self, job: Job, supernet: Supernet) -> None:
        self._job = job
        self._supernet = supernet
        self._teacher: Teacher | None = None

    def build(self, profile: HardwareProfile) -> Verification:
        """Make ``model.onnx`` of ``profile`` from its stored architecture, and check that it computes the same.

        What the folder holds already is used.
        """
        folder = self._job.folder.model(profile.name)
        architecture = stored_architecture(self._job, profile.name)
        network = self.trained(profile.name, architecture, folder)
        make_exporter(self._job.settings.exporter).export(
            network,
            image_shape=self._job.dataset.image_shape,
            path=folder.model,
            opset=profile.runtime.opset,
            batch_size=None if self._job.settings.dynamic_batch else profile.runtime.batch_size,
            metadata=metadata_of(self._job, profile, architecture),
        )
        verification = self._verify(network, folder, profile)
        write_json(folder.verify, verification.to_json())
        return verification

    def _verify(self, network: nn.Module, folder: ModelFolder, profile: HardwareProfile) -> Verification:
        return verify_export(
            folder.model,
            network,
            parity_images(self._job),
            limits=VerifyLimits(min_images=min(PARITY_IMAGES, len(self._job.valid) + len(self._job.train))),
            opset=profile.runtime.opset,
        )

    def trained(self, name: str, architecture: Architecture, folder: ModelFolder) -> nn.Module:
        """Return the trained network on the CPU, in evaluation mode: from the run folder, or trained now."""
        if folder.training.exists() and folder.weights.exists():
            network: nn.Module = build_network(self._job.space, architecture, self._job.normalise())
            network.load_state_dict(self._job.folder.load_tensors(folder.weights))
            return network.eval()
        network, facts = self.retrain(name, architecture)
        self._job.folder.save_tensors(folder.weights, network.state_dict())
        write_json(folder.training, {"schema": TRAINING_SCHEMA, "profile": name, **facts})
        return network

    def retrain(self, name: str, architecture: Architecture) -> tuple[nn.Module, dict[str, Any]]:
        """Train ``architecture`` by the recipe of the settings; return it on the CPU with the facts of its training."""
        job, settings = self._job, self._job.settings.retrain
        started = time.perf_counter()
        phase = f"retrain {name}"
        job.observer.start(phase, settings.num_steps)

        def report(step: int, loss: Tensor) -> None:
            if step % 10 == 0:  # reading a value waits for the device
                value = float(loss)
                job.observer.advance(
                    phase, step, {"loss": round(value, 4) if math.isfinite(value) else "not finite"}
                )

        network = retrain(
            self._start(architecture),
            job.batches(job.train, purpose="retrain", batch_size=settings.batch_size, augment=True),
            settings,
            teacher=self._shared_teacher() if settings.distillation_weight > 0.0 else None,
            report=report,
        )
        loss, accuracy = loss_and_accuracy(network, job.valid.images, job.valid.labels)
        if not math.isfinite(loss):
            raise ConfigError(
                f"retrain.learning_rate = {settings.learning_rate}: the training of {name} diverged (its loss is not "
                "finite); expected a lower rate, such as 0.05"
            )
        seconds = time.perf_counter() - started
        job.observer.finish(phase, {"seconds": round(seconds, 1), "validation accuracy": round(accuracy, 4)})
        facts = {
            "validation": {"loss": loss, "accuracy": accuracy},
            "retraining": {
                "start": settings.start,
                "num_steps": settings.num_steps,
                "seconds": seconds,
                "images_per_second": settings.num_steps * settings.batch_size / seconds,
            },
        }
        return network.cpu().to(memory_format=torch.contiguous_format), facts

    def _start(self, architecture: Architecture) -> nn.Module:
        if self._job.settings.retrain.start == "supernet":
            return self._inherited(architecture)
        generator = self._job.generator("retrain/weights")
        network = build_network(self._job.space, architecture, self._job.normalise(), generator)
        return network.to(self._job.device).to(memory_format=torch.channels_last)

    def _inherited(self, architecture: Architecture) -> nn.Module:
        network = self._supernet.extract(architecture).to(memory_format=torch.channels_last)
        recalibrate(network, self._job.recalibration_images)
        return network

    def _shared_teacher(self) -> Teacher:
        if self._teacher is None:
            self._teacher = Teacher(self._inherited(self._job.space.largest()))
        return self._teacher


def parity_images(job: Job) -> Tensor:
    """Return the real images that outputs are compared on: of the validation split, then training images."""
    images = job.dataset.valid.images
    if len(images) < PARITY_IMAGES:
        images = torch.cat([images, job.dataset.train.images[: PARITY_IMAGES - len(images)]])
    return images


def training_facts(folder: ModelFolder) -> dict[str, Any]:
    """Return what was stored of the training of a model."""
    return read_json(folder.training, schema=TRAINING_SCHEMA)
