"""The memory of a profile's networks and files; only where its budget names it, since it takes a hundred starts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nasdeploy.costs.by_hand import NotMeasuredError
from nasdeploy.costs.certification import CapCheck, check_memory_cap, is_astride
from nasdeploy.costs.memory import (
    TABLE_STARTS,
    MemoryTable,
    measure_memory,
    measure_memory_table,
    require_telling_share,
    require_told,
)
from nasdeploy.costs.memory_law import REQUIRED_TERM, term_tables
from nasdeploy.costs.packs import Pack
from nasdeploy.costs.table import CostTable
from nasdeploy.costs.table_models import ModelWriter
from nasdeploy.files import write_json
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.devices import device_for, device_of, is_by_hand, machine_to_match, where
from nasdeploy.pipeline.latency_tables import conversion_to
from nasdeploy.profiles import HardwareProfile, Percent, Runtime, format_limit, format_quantity
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.spaces.base import SearchSpace

__all__ = [
    "PHASE",
    "SCHEMA",
    "FileMemory",
    "MemoryTables",
    "ProfileMemory",
    "borrow_memory",
    "memory_of_file",
    "memory_room",
    "memory_rooms",
    "profile_memory",
    "quick_memory_tables",
]

SCHEMA = "nasdeploy/profile-memory/1"
PHASE = "memory table"
METRIC = "peak_memory"
SAFETY = 0.995
"""Of what just holds: 60 kB of 12 MB, about what starts of one file differ by."""

MemoryTables = dict[tuple[str, int, str], MemoryTable]
"""Tables that were measured or read already, by the runtime, its channel grid and the device."""


@dataclass(kw_only=True)
class ProfileMemory:
    """The memory table of a profile. probes: networks that were measured whole, by architecture hash."""

    profile: HardwareProfile
    table: MemoryTable
    path: Path
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def remember(self, architecture: str, check: CapCheck) -> None:
        """Store what was measured of an architecture, by its hash; a later selection does not measure it again."""
        self.probes[architecture] = asdict(check)
        self.save()

    def known(self, architecture: str) -> CapCheck | None:
        """Return what was measured of an architecture against the cap of the profile, None where nothing was."""
        stored = self.probes.get(architecture)
        check = None if stored is None else CapCheck(**stored)
        return check if check is not None and (check.cap, check.unit) == _cap_of(self.profile) else None

    def save(self) -> None:
        """Write the table with its probes."""
        stored = {"profile": self.profile.name, "table": self.table.to_json(), "probes": self.probes}
        write_json(self.path, {"schema": SCHEMA, **stored})

    def margin(self, cap_bytes: float) -> float:
        """Return the factor on a cap with which 90 % of the networks that the table calls feasible are; 1 for none."""
        rest = cap_bytes - self.table.accuracy.quantile90_bytes
        return rest / cap_bytes if rest > 0.0 else 1.0


def profile_memory(job: Job, profile: HardwareProfile, known: MemoryTables) -> ProfileMemory | None:
    """Return the memory of a profile that budgets it, None for another; measured once for each runtime, and stored.

    Raises ConfigError for a stored table of another space, runtime or machine, and for a cap that is a share of a
    range within the noise; NoisyMeasurementError where the system does not tell the memory of a process.
    """
    if profile.budget.peak_memory is None:
        return None
    path = job.folder.memory(profile.name)
    key = profile.runtime.key(), profile.runtime.channel_multiple, where(profile)
    probes: dict[str, dict[str, Any]] = {}
    if path.exists():
        stored = read_json(path, schema=SCHEMA)
        table, probes = MemoryTable.from_json(stored["table"]), stored["probes"]
        if profile in job.profiles:  # what others were measured on does not matter here
            machine = machine_to_match(profile, table.machine)
            table.check_matches(job.space, profile.runtime, machine=machine)
    else:
        table = known[key] if key in known else _measured(job, profile)
    if table.is_of(machine_to_match(profile, table.machine)):
        known[key] = table
    _require_telling(profile, table.smallest_bytes, table.largest_bytes, table.noise_bytes)
    found = ProfileMemory(profile=profile, table=table, path=path, probes=probes)
    if not path.exists():
        found.save()
    return found


def _measured(job: Job, profile: HardwareProfile) -> MemoryTable:
    job.observer.start(PHASE, 100)
    table = measure_memory_table(
        job.space,
        profile.runtime,
        seed=job.settings.seed,
        convert=conversion_to(profile.runtime.precision),
        device=device_for(job, profile),
        progress=lambda share: job.observer.advance(PHASE, round(100 * share), {}),
    )
    job.observer.finish(PHASE, {})
    job.observer.note(_description(table))
    return table


def _description(table: MemoryTable) -> str:
    sizes = (
        table.smallest_bytes,
        table.largest_bytes,
        table.accuracy.mean_bytes,
        table.accuracy.quantile90_bytes,
        table.noise_bytes,
    )
    low, high, mean, most, noise = (format_quantity(size, METRIC, digits=3) for size in sizes)
    return (
        f"{PHASE}: the smallest network adds {low} to a process, the largest {high}; networks left out of the fit are "
        f"predicted to {mean} on average, 90 % of them to {most}; starts of one file differ by up to {noise}"
    )


def borrow_memory(job: Job, profile: HardwareProfile, other: RunFolder) -> None:
    """Copy the memory table of another run, for a profile that has none here yet. Raises ConfigError: does not fit."""
    source, target = other.memory(profile.name), job.folder.memory(profile.name)
    if profile.budget.peak_memory is None or target.exists() or not source.exists():
        return
    stored = read_json(source, schema=SCHEMA)
    table = MemoryTable.from_json(stored["table"])
    table.check_matches(job.space, profile.runtime, machine=machine_to_match(profile, table.machine))
    write_json(target, stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMemory:
    """What a file adds to a process, and the check of the cap on it; None where that is not known or not asked for.

    pack: what the device has to measure first, where packs are carried there.
    """

    median_bytes: int | None = None
    check: CapCheck | None = None
    pack: Pack | None = None


def memory_of_file(job: Job, profile: HardwareProfile, file: Path) -> FileMemory:
    """Return the memory of a file of ``profile``, measured where its budget names it.

    Beside a cap that is a share the smallest and the largest network of the space are started.
    """
    if profile.budget.peak_memory is None:
        return FileMemory()
    cap, unit = _cap_of(profile)
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        files = {"file": file}
        if unit == "fraction":
            files |= _write_ends(job.space, profile.runtime, Path(folder))
        device = device_for(job, profile)
        try:
            uses = measure_memory(files, profile.runtime, seed=job.settings.seed, device=device)
        except NotMeasuredError as error:
            return FileMemory(check=_awaited(cap, unit), pack=error.pack)
    median = uses["file"].median_bytes
    ends = (uses["smallest"], uses["largest"]) if unit == "fraction" else None
    return FileMemory(
        median_bytes=None if median is None else round(median),
        check=None if cap is None else check_memory_cap(uses["file"], cap, ends=ends),
    )


def _awaited(cap: float | None, unit: Literal["fraction", "bytes"]) -> CapCheck | None:
    """Return the check of a cap on what the device has not measured yet."""
    if cap is None:
        return None
    return CapCheck(
        status="undecided",
        cap=cap,
        unit=unit,
        percentile=None,
        estimate=None,
        bound=None,
        num_blocks=0,
        reason="not measured on the device yet",
        disturbed=True,
    )


def memory_rooms(memory: ProfileMemory | None, check: CapCheck | None) -> dict[str, float]:
    """Return {"peak_memory": room} where the check says that the cap is broken, or its processes lie on both sides."""
    if memory is None or check is None or not (check.status == "violated" or is_astride(check)):
        return {}
    return {METRIC: min(SAFETY, memory_room(memory, check))}


def memory_room(memory: ProfileMemory, check: CapCheck) -> float:
    """Return the allowed memory over the most that was measured, less a safety margin; 1 or more is accepted."""
    assert check.bound is not None
    if check.unit == "bytes":
        return SAFETY * check.cap / check.bound
    low, high = memory.table.smallest_bytes, memory.table.largest_bytes
    allowed, found = low + check.cap * (high - low), low + check.bound * (high - low)
    return SAFETY * allowed / found


def quick_memory_tables(
    space: SearchSpace, profile: HardwareProfile, *, seed: int = 0
) -> Mapping[str, CostTable]:
    """Return {"peak_memory": table} good enough for ``profiles check``, in seconds; {} without such a budget.

    Weights between two measured ends: exact for the smallest and the largest network, a guess between them. For a
    device that packs are carried to: the table of ``seed`` that came back. Raises as :func:`profile_memory`.
    """
    if profile.budget.peak_memory is None:
        return {}
    device = device_of(profile)
    if is_by_hand(profile):
        convert = conversion_to(profile.runtime.precision)
        table = measure_memory_table(space, profile.runtime, seed=seed, convert=convert, device=device)
        return {METRIC: table.cost_table(space)}
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        files = _write_ends(space, profile.runtime, Path(folder))
        uses = measure_memory(files, profile.runtime, num_processes=TABLE_STARTS, device=device)
    require_told(list(uses.values()))
    low, high = (float(use.largest_bytes or 0) for use in uses.values())
    _require_telling(profile, low, high, max(use.spread_bytes for use in uses.values()))
    weights = term_tables(space)[REQUIRED_TERM]
    mask = space.candidate_mask(profile.runtime.channel_multiple)
    first, last = weights.of(np.array([end(mask).choices for end in (space.smallest, space.largest)]))
    slope = (high - low) / (last - first)
    return {METRIC: weights.scaled(low - slope * first, slope)}


def _write_ends(space: SearchSpace, runtime: Runtime, folder: Path) -> dict[str, Path]:
    mask = space.candidate_mask(runtime.channel_multiple)
    writer = ModelWriter(folder, space, runtime, seed=0, convert=conversion_to(runtime.precision))
    return {
        "smallest": writer.network(space.smallest(mask)),
        "largest": writer.network(space.largest(mask)),
    }


def _cap_of(profile: HardwareProfile) -> tuple[float | None, Literal["fraction", "bytes"]]:
    """Return the cap and its unit, as in a check."""
    budget = profile.budget.peak_memory
    if budget is None or budget.max is None:
        return None, "bytes"
    if isinstance(budget.max, Percent):
        return budget.max.fraction, "fraction"
    return budget.max.value, "bytes"


def _require_telling(profile: HardwareProfile, low: float, high: float, noise: float) -> None:
    """Raise ConfigError where the cap is a share of a range within the noise."""
    budget = profile.budget.peak_memory
    if budget is not None and isinstance(budget.max, Percent):
        require_telling_share(
            key=f"{profile.name}: budget.{METRIC}.max",
            written=format_limit(budget.max, METRIC),
            cap_bytes=low + budget.max.fraction * (high - low),
            range_bytes=high - low,
            noise_bytes=noise,
        )
