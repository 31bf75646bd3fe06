"""The main flow: tables → search → select → retrain → export → verify → measure → certify → report."""

from __future__ import annotations

import datetime
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nasdeploy.costs.certification import CapCheck, is_astride
from nasdeploy.costs.counting import count_network
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.data.metrics import accuracy_metrics, is_unbalanced
from nasdeploy.errors import most_serious
from nasdeploy.exporters.runtime import onnx_predictions
from nasdeploy.files import write_json
from nasdeploy.networks import build_network
from nasdeploy.pipeline.baselines import build_baselines
from nasdeploy.pipeline.certifying import CapResult, cap_results, measure_latency_caps
from nasdeploy.pipeline.context import Job, dataset_facts, package_versions, torch_environment
from nasdeploy.pipeline.distributions import Distributions, find_distributions
from nasdeploy.pipeline.models import Builder, training_facts
from nasdeploy.pipeline.selecting import (
    SAFETY,
    Selection,
    Selector,
    architecture_hash_of,
    join_run,
    latency_room,
    select_missing,
    stored_architecture,
    tighten,
)
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.reporting import write_checksums, write_model_card, write_report
from nasdeploy.runs import ModelFolder, read_json

METRICS_SCHEMA = "nasdeploy/metrics/1"
MAX_ATTEMPTS = 3
"""How often a profile goes back to selection after its exported file broke a cap."""

EXIT_CODES = {"certified": 0, "violated": 3, "gate-failed": 4, "noisy": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileResult:
    """What came of one profile; accuracy and latency are those of the ONNX file, accuracy on the test split."""

    profile: str
    status: str
    exit_code: int
    message: str
    model: Path | None
    accuracy: float | None
    latency_ms: float | None
    params: int
    flops: int
    macs: int
    file_size: int
    caps: tuple[CapResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build made; ``report`` is the page for people."""

    run_dir: Path
    profiles: tuple[ProfileResult, ...]
    report: Path

    @property
    def exit_code(self) -> int:
        """The most serious code of the profiles."""
        return most_serious([profile.exit_code for profile in self.profiles])


def run_build(job: Job) -> BuildResult:
    """Carry out a build in its claimed folder; what is already there is used."""
    with torch_environment(job):
        _warn_of_unbalanced_classes(job)
        found = find_distributions(job)
        builder, selector = Builder(job, found.supernet), Selector(job, found.supernet)
        given_up: set[str] = set()
        while True:
            _build_pending(job, found, builder, selector)
            broken = _finish_pending(job, found.costs, given_up)
            if not broken:
                break
            given_up |= selector.select([_next_selection(job, found, *item) for item in broken.items()])
        if job.settings.baselines:
            build_baselines(job, found.costs, builder)
    for profile in job.profiles:
        write_model_card(job.folder, profile.name)
        write_checksums(job.folder.model(profile.name).path)
    report = write_report(job.folder)
    results = tuple(profile_result(job, profile.name) for profile in job.profiles)
    return BuildResult(run_dir=job.folder.path, profiles=results, report=report)


def _warn_of_unbalanced_classes(job: Job) -> None:
    if job.settings.class_weights == "none" and is_unbalanced(job.dataset.train.labels.numpy()):
        job.observer.note(
            "the classes differ in size: frequent ones count more in training; --class-weights balanced changes that"
        )


def _build_pending(job: Job, found: Distributions, builder: Builder, selector: Selector) -> None:
    """Select, retrain, export and verify every profile that has no figures yet."""
    select_missing(job, found, selector)
    join_run(job)
    for profile in job.profiles:
        if not _is_finished(job.folder.model(profile.name)):
            builder.build(profile)


def _finish_pending(job: Job, costs: Mapping[str, ProfileCosts], given_up: set[str]) -> dict[str, _Broken]:
    """Measure every file that has no figures yet and store them.

    Returns the profiles that broke a cap, without figures, to be selected again: a few times at most, and not those
    that were given up.
    """
    pending = [p for p in job.profiles if not _is_finished(job.folder.model(p.name))]
    if not pending:
        return {}
    job.observer.start("certify", len(pending))
    measured = measure_latency_caps(job, pending, {p.name: job.folder.model(p.name).model for p in pending})
    broken = {}
    for profile in pending:
        latency, check = measured[profile.name]
        folder, one = job.folder.model(profile.name), costs[profile.name]
        write_json(folder.latency, latency.to_json())
        values = _exact_values(job, profile.name)
        caps = cap_results(one, values, check)
        rooms = _rooms(one, caps, check)
        if rooms and not _is_last_attempt(folder, profile.name, given_up):
            if check is not None and "latency" in rooms:
                one.remember(architecture_hash_of(job, profile.name), check)
            broken[profile.name] = rooms
        else:
            write_json(folder.metrics, _metrics(job, profile.name, values, caps))
    job.observer.finish("certify", {})
    return broken


def _rooms(costs: ProfileCosts, caps: Sequence[CapResult], check: CapCheck | None) -> _Broken:
    """Return what is allowed over what the file has, for every cap that it broke.

    A latency whose blocks still lie on both sides of its cap after all measurements counts as broken too: another
    network is more use than a machine that is quieter by a per cent.
    """
    rooms = {
        cap.metric: SAFETY * cap.cap / cap.value
        for cap in caps
        if cap.status == "violated" and cap.metric != "latency" and cap.value
    }
    if check is not None and (check.status == "violated" or is_astride(check)):
        rooms["latency"] = min(SAFETY, latency_room(costs, check))
    return rooms


def _is_finished(folder: ModelFolder) -> bool:
    """Return whether a profile's figures stand: of this very file, and not of a machine too noisy to certify it."""
    if not folder.metrics.exists() or not folder.model.exists():
        return False
    stored = read_json(folder.metrics, schema=METRICS_SCHEMA)
    return bool(stored["status"] != "noisy" and stored["sha256"] == _sha256(folder.model))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_last_attempt(folder: ModelFolder, name: str, given_up: set[str]) -> bool:
    """Return whether a profile that breaks a cap is not selected again."""
    return name in given_up or int(read_json(folder.architecture)["attempt"]) >= MAX_ATTEMPTS


_Broken = dict[str, float]
"""By metric, what is allowed over what the exported file has, less a safety margin."""


def _next_selection(job: Job, found: Distributions, name: str, rooms: _Broken) -> Selection:
    """Return what is to be selected instead of a network whose file broke a cap."""
    stored = read_json(job.folder.model(name).architecture)
    job.observer.note(f"{name}: the exported file broke a cap ({', '.join(rooms)}); selecting again")
    selection = Selection(
        costs=found.costs[name],
        source=found.sources[name],
        tightened=dict(stored["tightened"]),
        attempt=stored["attempt"] + 1,
    )
    for metric, room in rooms.items():
        tighten(selection, metric, room=room, predicted=stored["predicted"][metric])
    return selection


def _exact_values(job: Job, name: str) -> dict[str, float]:
    """Return what the stand-alone network and the exported file really have: built again and counted."""
    architecture = stored_architecture(job, name)
    network = build_network(job.space, architecture, job.normalise())
    count = count_network(network, job.space.input_shape(architecture))
    file_size = job.folder.model(name).model.stat().st_size
    return {"params": count.params, "flops": count.flops, "macs": count.macs, "file_size": file_size}


def _metrics(job: Job, name: str, values: Mapping[str, float], caps: Sequence[CapResult]) -> dict[str, Any]:
    folder = job.folder.model(name)
    training, verify = training_facts(folder), read_json(folder.verify)
    status, message = _status(name, caps, verify)
    return {
        "schema": METRICS_SCHEMA,
        "profile": name,
        "status": status,
        "exit_code": EXIT_CODES[status],
        "message": message,
        "accuracy": _test_accuracy(job, name) if verify["passed"] else None,
        "validation_accuracy": training["validation"]["accuracy"],
        **values,
        "caps": [asdict(cap) for cap in caps],
        "retraining": training["retraining"],
        "exporter": job.settings.exporter,
        "opset": next(p.runtime.opset for p in job.profiles if p.name == name),
        "sha256": _sha256(folder.model),
    }


def _status(name: str, caps: Sequence[CapResult], verify: Mapping[str, Any]) -> tuple[str, str]:
    if not verify["passed"]:
        failed = next(check for check in verify["checks"] if not check["passed"])
        return "gate-failed", f"{name}: the exported file failed the check '{failed['name']}'"
    for status, word in (("violated", "violated"), ("undecided", "noisy")):
        texts = [cap.text for cap in caps if cap.status == status]
        if texts:
            return word, f"{name}: {'; '.join(texts)}"
    return "certified", f"{name}: every cap holds"


def _test_accuracy(job: Job, name: str) -> dict[str, Any]:
    """Return the accuracy of the ONNX file on the test split: the one time that split is read."""
    test = job.at(stored_architecture(job, name)).dataset.test
    predictions = onnx_predictions(job.folder.model(name).model, test.images)
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
        model=folder.model,
        accuracy=accuracy["top1"] if accuracy else None,
        latency_ms=read_json(folder.latency)["summary"]["p50_ms"],
        params=stored["params"],
        flops=stored["flops"],
        macs=stored["macs"],
        file_size=stored["file_size"],
        caps=tuple(CapResult(**cap) for cap in stored["caps"]),
    )


def _command() -> list[str]:
    """Return the command line without the path of the program, which says something of this machine only."""
    program = Path(sys.argv[0]).name
    return ["nasdeploy" if program in ("nasdeploy", "__main__.py") else program, *sys.argv[1:]]


def identity(job: Job) -> dict[str, Any]:
    """Return what ``run.json`` says beside the settings."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": package_versions(),
        "machine": machine_fingerprint(),
        "threads": job.threads,
        "device": str(job.device),
        "dataset": dataset_facts(job),
        "space": {
            "name": job.space.name,
            "fingerprint": job.space.fingerprint(),
            "num_decisions": len(job.space.decisions),
            "num_architectures": str(math.prod(job.space.num_candidates())),
        },
        "profiles": {profile.name: profile.to_dict() for profile in job.profiles},
        "searched": [profile.name for profile in job.profiles],
    }
