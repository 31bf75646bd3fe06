"""The figures of a profile's file: counted, measured, and stored in ``metrics.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nasdeploy.costs.counting import count_network
from nasdeploy.data.metrics import accuracy_metrics
from nasdeploy.exporters.runtime import onnx_predictions
from nasdeploy.networks import build_network
from nasdeploy.pipeline.certifying import CapResult
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.gates import Gates
from nasdeploy.pipeline.models import training_facts
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.runs import ModelFolder, read_json

METRICS_SCHEMA = "nasdeploy/metrics/2"

EXIT_CODES = {"certified": 0, "violated": 3, "gate-failed": 4, "noisy": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileResult:
    """What came of one profile; accuracy and latency are those of the ONNX file, accuracy on the test split.

    model: the file that ships; shipped: its name; precision: its number format. peak_memory: the median of what the
    file added to a process, None where the budget does not name it.
    """

    profile: str
    status: str
    exit_code: int
    message: str
    model: Path | None
    shipped: str
    precision: str
    accuracy: float | None
    latency_ms: float | None
    params: int
    flops: int
    macs: int
    file_size: int
    peak_memory: int | None
    caps: tuple[CapResult, ...]


def is_finished(folder: ModelFolder) -> bool:
    """Return whether a profile's figures stand: of this very file, and not of a machine too noisy to certify it."""
    if not folder.metrics.exists() or read_json(folder.metrics).get("schema") != METRICS_SCHEMA:
        return False  # of an earlier version: made again from the trained weights
    stored = read_json(folder.metrics)
    files = {folder.model: stored["sha256_fp32"], folder.shipped(): stored["sha256"]}
    whole = all(path.exists() and _sha256(path) == expected for path, expected in files.items())
    return bool(whole and stored["status"] != "noisy")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exact_values(job: Job, name: str, shipped: Path) -> dict[str, float | None]:
    """Return what the stand-alone network and the shipped file really have: built again and counted."""
    architecture = stored_architecture(job, name)
    network = build_network(job.space, architecture, job.normalise())
    count = count_network(network, job.space.input_shape(architecture))
    file_size = shipped.stat().st_size
    return {"params": count.params, "flops": count.flops, "macs": count.macs, "file_size": file_size}


def metrics_of(
    job: Job,
    name: str,
    shipped: Path,
    values: Mapping[str, float | None],
    caps: Sequence[CapResult],
    gates: Gates | None,
    *,
    awaited: str,
) -> dict[str, Any]:
    folder = job.folder.model(name)
    training, verify = training_facts(folder), read_json(folder.verify)
    status, message = status_of(name, caps, verify, awaited)
    reduced = gates.accuracy.accuracy if gates is not None and gates.passed else None
    if gates is not None and not gates.passed:
        message = f"{message}; {gates.describe()}"
    return {
        "schema": METRICS_SCHEMA,
        "profile": name,
        "status": status,
        "exit_code": EXIT_CODES[status],
        "message": message,
        "shipped": shipped.name,
        "precision": gates.precision if gates is not None and gates.passed else "fp32",
        "gates": None if gates is None else gates.to_json(),
        "accuracy": _test_accuracy(job, name, shipped) if verify["passed"] else None,
        "validation_accuracy": training["validation"]["accuracy"] if reduced is None else reduced,
        **values,
        "caps": [asdict(cap) for cap in caps],
        "retraining": training["retraining"],
        "exporter": job.settings.exporter,
        "opset": next(p.runtime.opset for p in job.profiles if p.name == name),
        "sha256": _sha256(shipped),
        "sha256_fp32": _sha256(folder.model),
    }


def status_of(
    name: str, caps: Sequence[CapResult], verify: Mapping[str, Any], awaited: str
) -> tuple[str, str]:
    if not verify["passed"]:
        failed = next(check for check in verify["checks"] if not check["passed"])
        return "gate-failed", f"{name}: the exported file failed the check '{failed['name']}'"
    if awaited:
        return "noisy", f"{name}: {awaited}"
    for status, word in (("violated", "violated"), ("undecided", "noisy")):
        texts = [cap.text for cap in caps if cap.status == status]
        if texts:
            return word, f"{name}: {'; '.join(texts)}"
    return "certified", f"{name}: every cap holds"


def _test_accuracy(job: Job, name: str, shipped: Path) -> dict[str, Any]:
    """Return the accuracy of the ONNX file that ships on the test split: the one time that split is read."""
    test = job.at(stored_architecture(job, name)).dataset.test
    predictions = onnx_predictions(shipped, test.images)
    accuracy = accuracy_metrics(predictions, test.labels.numpy(), num_classes=job.dataset.num_classes)
    return {
        "top1": accuracy.top1,
        "macro": accuracy.macro,
        "per_class": dict(zip(job.dataset.class_names, accuracy.per_class, strict=True)),
        "num_images": len(test),
    }


def profile_result(job: Job, name: str) -> ProfileResult:
    """Return the stored result of one profile."""
    folder = job.folder.model(name)
    stored = read_json(folder.metrics, schema=METRICS_SCHEMA)
    accuracy = stored["accuracy"]
    return ProfileResult(
        profile=name,
        status=stored["status"],
        exit_code=stored["exit_code"],
        message=stored["message"],
        model=folder.shipped(),
        shipped=stored["shipped"],
        precision=stored["precision"],
        accuracy=accuracy["top1"] if accuracy else None,
        latency_ms=read_json(folder.latency)["summary"]["p50_ms"] if folder.latency.exists() else None,
        params=stored["params"],
        flops=stored["flops"],
        macs=stored["macs"],
        file_size=stored["file_size"],
        peak_memory=stored["peak_memory"],
        caps=tuple(CapResult(**cap) for cap in stored["caps"]),
    )
