"""The main flow: tables → search → select → retrain → export → verify → measure → certify → report."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nasdeploy.costs.certification import CapCheck, is_astride
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.data.metrics import is_unbalanced
from nasdeploy.errors import NasdeployError, most_serious
from nasdeploy.files import write_json
from nasdeploy.pipeline.baselines import build_baselines
from nasdeploy.pipeline.certifying import CapResult, MeasuredFile, cap_results, measure_latency_caps
from nasdeploy.pipeline.context import Job, dataset_facts, package_versions, torch_environment
from nasdeploy.pipeline.devices import await_device, device_for, where
from nasdeploy.pipeline.figures import ProfileResult, exact_values, is_finished, metrics_of, profile_result
from nasdeploy.pipeline.gates import Gates
from nasdeploy.pipeline.memory import memory_of_file, memory_rooms
from nasdeploy.pipeline.models import Builder
from nasdeploy.pipeline.reducing import slowness
from nasdeploy.pipeline.searching import Found, describe_selected, find_networks
from nasdeploy.pipeline.selecting import (
    SAFETY,
    Selection,
    Selector,
    architecture_hash_of,
    join_run,
    latency_room,
    select_missing,
    tighten,
)
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.profiles import HardwareProfile
from nasdeploy.reporting import write_checksums, write_model_card, write_report
from nasdeploy.runs import ModelFolder, read_json

MAX_ATTEMPTS = 3
"""How often a profile goes back to selection after its exported file broke a cap."""


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
        found = find_networks(job)
        builder, selector = Builder(job, found.outcome), Selector(job, found.outcome)
        given_up: set[str] = set()
        while True:
            reduced = _build_pending(job, found, builder, selector)
            broken = _finish_pending(job, found.costs, reduced, given_up)
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


def _build_pending(job: Job, found: Found, builder: Builder, selector: Selector) -> dict[str, Gates]:
    """Select, retrain, export and verify every profile that has no figures yet.

    Returns what is known of the files in smaller number formats, by profile.
    """
    select_missing(job, found.costs, selector)
    join_run(job)
    describe_selected(job, found.costs)
    pending = [p for p in job.profiles if not is_finished(job.folder.model(p.name))]
    for profile in pending:  # what is made again must not be described as finished meanwhile
        job.folder.model(profile.name).discard_figures()
    made = {profile.name: builder.build(profile) for profile in pending}
    return {name: gates for name, gates in made.items() if gates is not None}


def _finish_pending(
    job: Job, costs: Mapping[str, ProfileCosts], reduced: Mapping[str, Gates], given_up: set[str]
) -> dict[str, _Broken]:
    """Measure every file that has no figures yet and store them, device by device.

    Returns the profiles that broke a cap, without figures, to be selected again: a few times at most, and not those
    that were given up. A device that fails keeps no other from its figures: its error is raised behind them.
    """
    pending = [p for p in job.profiles if not is_finished(job.folder.model(p.name))]
    if not pending:
        return {}
    job.observer.start("certify", len(pending))
    broken: dict[str, _Broken] = {}
    failures = []
    for place in dict.fromkeys(map(where, pending)):
        try:
            broken |= _finish(job, [p for p in pending if where(p) == place], costs, reduced, given_up)
        except NasdeployError as error:
            failures.append(error)
    job.observer.finish("certify", {})
    if failures:
        raise failures[0]
    return broken


def _finish(
    job: Job,
    pending: Sequence[HardwareProfile],
    costs: Mapping[str, ProfileCosts],
    reduced: Mapping[str, Gates],
    given_up: set[str],
) -> dict[str, _Broken]:
    """Measure the files of one device and store their figures; a reduced one that failed a gate is deleted."""
    measured = _measure(job, [p.name for p in pending], reduced)
    broken = {}
    for profile in pending:
        latency, check = measured[profile.name].latency, measured[profile.name].check
        folder, one = job.folder.model(profile.name), costs[profile.name]
        gates = _decide(job, profile, reduced.get(profile.name), measured[profile.name])
        shipped = folder.file(gates.precision if gates is not None and gates.passed else "fp32")
        if latency is not None:
            write_json(folder.latency, latency.to_json())
        memory = memory_of_file(job, profile, shipped)
        packs = [measured[profile.name].pack, memory.pack]
        if measured[profile.name].pack is not None and profile.name in reduced:  # it may ship yet
            reduced_file = folder.file(reduced[profile.name].precision)
            packs.append(memory_of_file(job, profile, reduced_file).pack if reduced_file.exists() else None)
        awaited = await_device(job, profile, *packs)
        values = exact_values(job, profile.name, shipped) | {"peak_memory": memory.median_bytes}
        caps = cap_results(one, values, check, memory.check)
        # Before its device has answered it is not known which file ships: nothing of it can be broken.
        rooms = {} if awaited else _rooms(one, caps, check) | memory_rooms(one.memory, memory.check)
        if rooms and not _is_last_attempt(folder, profile.name, given_up):
            if (
                gates is None or gates.passed
            ):  # a file in another format than the tables' says nothing to them
                _remember(one, architecture_hash_of(job, profile.name), rooms, check, memory.check)
            broken[profile.name] = rooms
        else:
            metrics = metrics_of(job, profile.name, shipped, values, caps, gates, awaited=awaited)
            write_json(folder.metrics, metrics)
    return broken


def _remember(
    costs: ProfileCosts, architecture: str, rooms: _Broken, latency: CapCheck | None, memory: CapCheck | None
) -> None:
    """Store what was measured of a broken cap, so that the same network is not chosen again."""
    if latency is not None and "latency" in rooms:
        costs.remember(architecture, latency)
    if costs.memory is not None and memory is not None and "peak_memory" in rooms:
        costs.memory.remember(architecture, memory)


def _measure(job: Job, names: Sequence[str], reduced: Mapping[str, Gates]) -> dict[str, MeasuredFile]:
    """Measure the files of the profiles; a reduced one that may still ship beside the one in float32."""
    folders = {name: job.folder.model(name) for name in names}
    open_ones = {name: gates.precision for name, gates in reduced.items() if gates.accuracy.passed}
    return measure_latency_caps(
        job,
        [profile for profile in job.profiles if profile.name in folders],
        {name: folder.file(open_ones.get(name, "fp32")) for name, folder in folders.items()},
        fp32={name: folders[name].model for name in open_ones},
    )


def _decide(job: Job, profile: HardwareProfile, gates: Gates | None, measured: MeasuredFile) -> Gates | None:
    """Return both gates of a reduced file, and tell of them; the file is deleted where it does not ship."""
    if gates is None or measured.pack is not None:
        return gates if gates is not None and not gates.accuracy.passed else None
    folder = job.folder.model(profile.name)
    gates = replace(gates, speed=measured.speed)
    if measured.speed is not None and not measured.speed.passed:
        device = device_for(job, profile)
        reason = slowness(folder.model, folder.file(gates.precision), profile.runtime, device=device)
        gates = replace(gates, reason=reason)
    if not gates.passed:
        folder.discard_reduced()
    job.observer.note(f"{profile.name}: {gates.describe()}")
    return gates


def _rooms(costs: ProfileCosts, caps: Sequence[CapResult], check: CapCheck | None) -> _Broken:
    """Return what is allowed over what the file has, for every cap that it broke.

    A latency whose blocks still lie on both sides of its cap after all measurements counts as broken too: another
    network is more use than a machine that is quieter by a per cent.
    """
    rooms = {
        cap.metric: SAFETY * cap.cap / cap.value
        for cap in caps
        if cap.status == "violated" and cap.metric not in ("latency", "peak_memory") and cap.value
    }
    if check is not None and (check.status == "violated" or is_astride(check)):
        rooms["latency"] = min(SAFETY, latency_room(costs, check))
    return rooms


def _is_last_attempt(folder: ModelFolder, name: str, given_up: set[str]) -> bool:
    """Return whether a profile that breaks a cap is not selected again."""
    return name in given_up or int(read_json(folder.architecture)["attempt"]) >= MAX_ATTEMPTS


_Broken = dict[str, float]
"""By metric, what is allowed over what the exported file has, less a safety margin."""


def _next_selection(job: Job, found: Found, name: str, rooms: _Broken) -> Selection:
    """Return what is to be selected instead of a network whose file broke a cap."""
    stored = read_json(job.folder.model(name).architecture)
    job.observer.note(f"{name}: the exported file broke a cap ({', '.join(rooms)}); selecting again")
    selection = Selection(
        costs=found.costs[name],
        tightened=dict(stored["tightened"]),
        attempt=stored["attempt"] + 1,
    )
    for metric, room in rooms.items():
        tighten(selection, metric, room=room, predicted=stored["predicted"][metric])
    return selection


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
