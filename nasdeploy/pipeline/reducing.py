"""A trained file in a smaller number format: made from the float32 file, and checked on validation images.

Shared by a build and by ``nasdeploy export``: both make the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasdeploy.costs.operators import OperatorProfile, profile_operators
from nasdeploy.costs.sessions import HERE, Device
from nasdeploy.data.stored import image_chunks
from nasdeploy.data.types import Split
from nasdeploy.errors import NasdeployError
from nasdeploy.exporters import ExportedModel
from nasdeploy.exporters.quantization import halve_model, quantize_model
from nasdeploy.exporters.quantization_errors import float_operators
from nasdeploy.exporters.runtime import DEFAULT_BATCH, OnnxClassifier, top1
from nasdeploy.exporters.verification import Check, network_logits
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.gates import AccuracyGate, Reason, times_by_operator
from nasdeploy.profiles import HardwareProfile, Runtime

NUM_CALIBRATION_IMAGES = 512
CALIBRATION_BATCH = 32
NUM_EXPLAINED_IMAGES = 8
"""Images on which errors of single operators are told: two files keep every tensor of them in memory."""

MAX_ACCURACY_DROP: Mapping[str, float] = {"fp16": 0.005, "int8": 0.01}
"""Of the accuracy on validation images; fp32 has the gate of a build instead, which compares outputs."""


def accuracy_limit(profile: HardwareProfile, precision: str) -> float | None:
    """Return what a file of ``profile`` in ``precision`` may lose on validation images; None: not limited."""
    own = profile.runtime.max_accuracy_drop
    return (
        own
        if own is not None and precision == profile.runtime.precision
        else MAX_ACCURACY_DROP.get(precision)
    )


def in_fp32(profile: HardwareProfile) -> HardwareProfile:
    """Return ``profile`` as it would be for float32 files: what their metadata say."""
    return with_precision(profile, "fp32")


def with_precision(profile: HardwareProfile, precision: str) -> HardwareProfile:
    """Return ``profile`` with another number format."""
    runtime = profile.runtime.model_copy(update={"precision": precision})
    return profile.model_copy(update={"runtime": runtime})


def reduce_model(
    job: Job,
    plain: ExportedModel,
    *,
    precision: str,
    path: Path,
    batch_size: int | None,
    metadata: Mapping[str, str],
) -> ExportedModel:
    """Write ``plain`` in ``precision`` to ``path``; batch_size: that of the file, None for any."""
    if precision == "int8":
        return quantize_model(
            plain.path,
            path=path,
            batches=calibration_batches(job, batch_size),
            exporter=plain.exporter,
            metadata=metadata,
        )
    return halve_model(plain.path, path=path, exporter=plain.exporter, metadata=metadata)


def num_calibration_images(job: Job, precision: str) -> int:
    """Return on how many training images a file in ``precision`` is calibrated."""
    return min(NUM_CALIBRATION_IMAGES, len(job.dataset.train)) if precision == "int8" else 0


def calibration_batches(
    job: Job, batch_size: int | None, *, num_images: int = NUM_CALIBRATION_IMAGES
) -> Iterator[NDArray[np.float32]]:
    """Yield training images drawn at random, in batches that the file takes: splits may be sorted by class."""
    train = job.dataset.train
    order = torch.randperm(len(train), generator=job.generator("export/calibration"))
    chosen = order[:num_images]
    # A fixed batch is filled up: the same images again change no range.
    missing = -len(chosen) % (batch_size or 1)
    chosen = torch.cat([chosen, chosen[torch.arange(missing) % len(chosen)]])
    for indices in torch.split(chosen, batch_size or CALIBRATION_BATCH):
        yield _as_float(train.images[indices])


def _as_float(images: Tensor) -> NDArray[np.float32]:
    return np.asarray(images.numpy()).astype(np.float32)


def accuracy_gate(
    job: Job, network: nn.Module, path: Path, *, checks: tuple[Check, ...], limit: float | None
) -> AccuracyGate:
    """Return the gate of the file ``path``, whose ``checks`` stand already; limit: in [0, 1], None for none.

    Where one of them failed, the file is not run.
    """
    valid = job.dataset.valid
    right_before = _num_right(valid, lambda images: network_logits(network, images, DEFAULT_BATCH))
    accuracy = None
    if all(check.passed for check in checks):
        right = _num_right(valid, OnnxClassifier(path).logits)
        accuracy = right / len(valid)
        if limit is not None:
            # By counts: 0.9 - 0.89 > 0.01 in floating point.
            drop = (right_before - right) / len(valid)
            checks += (Check(name="accuracy_drop", value=drop, relation="<=", limit=limit),)
    return AccuracyGate(
        checks=checks, before=right_before / len(valid), accuracy=accuracy, num_images=len(valid)
    )


def unconverted(job: Job, network: nn.Module, why: str) -> AccuracyGate:
    """Return the gate of a file that could not be made; why: in one line."""
    failed = Check(name="conversion", value="failed", relation="==", limit="converted", detail=why)
    right = _num_right(job.dataset.valid, lambda images: network_logits(network, images, DEFAULT_BATCH))
    total = len(job.dataset.valid)
    return AccuracyGate(checks=(failed,), before=right / total, accuracy=None, num_images=total)


def slowness(fp32: Path, reduced: Path, runtime: Runtime, *, device: Device = HERE) -> Reason:
    """Return why ``reduced`` is not faster than ``fp32``: the time of each operator in both, and what is in float.

    Without times where a file cannot be profiled.
    """
    try:
        before, after = (_times(profile_operators(path, runtime, device=device)) for path in (fp32, reduced))
    except NasdeployError:  # both were measured: an explanation is not worth the build
        before, after = {}, {}
    in_float = float_operators(reduced) if runtime.precision == "int8" else {}
    return Reason(gate="speed", times=times_by_operator(before, after), in_float=in_float)


def _times(profile: OperatorProfile) -> dict[str, float]:
    """Return {operator: ms of a run}, over all providers."""
    times: dict[str, float] = {}
    for row in profile.by_type:
        times[row.op_type] = times.get(row.op_type, 0.0) + row.median_us / 1e3
    return times


def _num_right(split: Split, logits_of: Callable[[NDArray[Any]], NDArray[np.float32]]) -> int:
    """Return how many images get their class; the images are read part by part."""
    right = start = 0
    for images in image_chunks(split.images):
        labels = split.labels[start : start + len(images)].numpy()
        right += int((top1(logits_of(images.numpy())) == labels).sum())
        start += len(images)
    return right
