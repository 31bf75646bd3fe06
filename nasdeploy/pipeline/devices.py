"""Where the models of a profile are measured: on this machine, over ssh, or on a device that packs are carried to."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nasdeploy.costs.by_hand import ByHandDevice, NotMeasuredError
from nasdeploy.costs.latency_table import REMEDY
from nasdeploy.costs.machine import Fingerprint, describe_difference, machine_fingerprint
from nasdeploy.costs.operators import profile_operators
from nasdeploy.costs.packs import Pack, PackResult, read_result
from nasdeploy.costs.sessions import HERE, Answers, Device, Progress, Request
from nasdeploy.costs.ssh import SshDevice
from nasdeploy.errors import ConfigError, UsageError
from nasdeploy.files import CACHE_VARIABLE, cache_folder, write_whole
from nasdeploy.pipeline.context import Job
from nasdeploy.profiles import HardwareProfile
from nasdeploy.runs import read_json
from nasdeploy.settings import BuildSettings

__all__ = [
    "CERTIFY",
    "await_device",
    "device_for",
    "device_of",
    "is_by_hand",
    "keep_result",
    "machine_to_match",
    "where",
]

DEFAULT_PYTHON = "python3"
CERTIFY = "certify"
"""The kind of a pack that certifies an exported file."""

Note = Callable[[str], None]
"""Told, in one line, why a kept result is not used."""


def where(profile: HardwareProfile) -> str:
    """Return a text that is equal for profiles whose models are measured on one device."""
    access = profile.device
    if access is None:
        return ""
    return f"by hand: {profile.name}" if access.by_hand else f"{access.host} {access.python}"


def is_by_hand(profile: HardwareProfile) -> bool:
    """Return whether packs are carried to the device of ``profile``."""
    return profile.device is not None and bool(profile.device.by_hand)


def device_of(profile: HardwareProfile, *, remedy: str = "", note: Note = lambda message: None) -> Device:
    """Return the device of ``profile``; nothing is connected yet.

    remedy: what to do where packs must be carried; "": how a table is measured there. note: told of kept results that
    are not used.
    """
    access = profile.device
    if access is None:
        return HERE
    if access.host is not None:
        return SshDevice(host=access.host, python=access.python or DEFAULT_PYTHON)
    command = f"nasdeploy measure -p {profile.name} (--data, --space and the like as here)"
    return ByHandDevice(
        name=profile.name,
        remedy=remedy or f"expected what it has measured: {_pack_commands(profile.name, command)}",
        results=_kept_results(profile.name, note),
    )


def device_for(job: Job, profile: HardwareProfile) -> Device:
    """Return the device of ``profile`` for a job; elsewhere, only that on which the latency table was measured."""
    commands = _table_commands(job, profile)
    device = device_of(profile, remedy=f"expected what it has measured: {commands}", note=job.observer.note)
    path = job.folder.latency(profile.name)
    if device is HERE or not path.exists():
        return device
    way_out = f"{REMEDY} makes a new table"
    if is_by_hand(profile):
        way_out = f"run the pack there, or measure the table again ({commands}) and then {REMEDY}"
    return _SameDevice(device=device, machine=read_json(path)["table"]["machine"], way_out=way_out)


def machine_to_match(profile: HardwareProfile, stored: Fingerprint) -> Fingerprint:
    """Return what a stored table's machine must be: this one; elsewhere whatever it is until something is measured."""
    return machine_fingerprint() if profile.device is None else stored


@dataclass(frozen=True, slots=True, kw_only=True)
class _SameDevice:
    """A device whose answers count only as long as it is the machine of the latency table.

    way_out: what to do where it is another one.
    """

    device: Device
    machine: Fingerprint
    way_out: str

    @property
    def name(self) -> str:
        return self.device.name

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        answers = self.device.carry_out(requests, progress=progress)
        if difference := describe_difference(self.machine, answers.machine):
            raise ConfigError(
                f"{self.name}: is not the machine that the latency table was measured on ({difference}); "
                f"{self.way_out}"
            )
        return answers


def await_device(job: Job, profile: HardwareProfile, *packs: Pack | None) -> str:
    """Write the pack that the device of a profile has to measure before its file is certified.

    Returns what is to be done, in one line; "" where there is nothing: then a pack of an earlier call is deleted.
    """
    target, whole = job.folder.model(profile.name).pack, Pack()
    for pack in packs:
        if pack is not None:
            whole.join(pack)
    if not whole.requests:
        target.unlink(missing_ok=True)
        return ""
    whole.join(_explanation(job, profile))
    whole.write(target, purpose={"kind": CERTIFY, "profile": profile.to_dict()})
    return (
        f"waits for its device: run {target} there (python3 {target.name}), then here nasdeploy measure --import "
        "latency.json, and this command again"
    )


def _explanation(job: Job, profile: HardwareProfile) -> Pack:
    """Return what tells why a reduced file is slower than the one in float32, should it be: the operators of both.

    As :func:`nasdeploy.pipeline.reducing.slowness` asks for it; only what the device has not answered yet.
    """
    pack, device, folder = Pack(), device_of(profile), job.folder.model(profile.name)
    files = dict.fromkeys((folder.model, folder.file(profile.runtime.precision)))
    if len(files) == 2 and all(path.exists() for path in files):
        for path in files:
            try:
                profile_operators(path, profile.runtime, device=device)
            except NotMeasuredError as error:
                pack.join(error.pack)
    return pack


def keep_result(result: PackResult, profile: str) -> Path:
    """Keep what came back from the device of ``profile``, where builds find it, and return the file.

    Raises UsageError where it cannot be written.
    """
    content = result.path.read_bytes()
    path = _results_folder(profile) / f"{hashlib.sha256(content).hexdigest()[:32]}.json"
    try:
        write_whole(path, content)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror or error}); expected room in a folder that can be: "
            f"{CACHE_VARIABLE}=FOLDER chooses another"
        ) from error
    return path


def _kept_results(profile: str, note: Note) -> tuple[PackResult, ...]:
    """Return the results of a device, the newest first, and only those of the machine of the newest one.

    After an upgrade of its ONNX Runtime, on another board of this name, or on other cores, what was measured before
    says nothing any more. note: told of files that are damaged or of another version.
    """
    files = sorted(
        _results_folder(profile).glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    )
    results: list[PackResult] = []
    for path in files:
        try:
            result = read_result(path)
        except UsageError as error:
            note(f"{error}; it is not used, and may be deleted")
            continue
        if not results or not describe_difference(results[0].answers.machine, result.answers.machine):
            results.append(result)
    return tuple(results)


def _results_folder(profile: str) -> Path:
    return cache_folder() / "devices" / profile


def _pack_commands(profile: str, command: str) -> str:
    """Return, in one line, the commands that fetch a latency table from the device of ``profile``."""
    pack = shlex.quote(f"{profile}.zip")
    return f"{command} --pack {pack}, there python3 {pack}, and here nasdeploy measure --import latency.json"


def _table_commands(job: Job, profile: HardwareProfile) -> str:
    settings = job.settings
    sources = dict(zip((p.name for p in job.profiles), settings.profiles, strict=True))
    options = [("-p", sources.get(profile.name, profile.name)), ("--data", settings.data)]
    options += [("--space", settings.space)] if settings.space != BuildSettings().space else []
    options += [("--image-size", str(size)) for size in settings.image_sizes]
    options += [("--seed", str(settings.seed))] if settings.seed else []
    return _pack_commands(
        profile.name,
        "nasdeploy measure " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options),
    )
