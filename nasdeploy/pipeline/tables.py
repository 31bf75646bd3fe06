"""Phase 1: what every architecture costs on every profile, and whether the budgets can be met."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.budgets import Limits, can_be_met, feasibility, require_feasible, resolve_limits
from nasdeploy.costs.certification import CapCheck
from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.file_size import file_size_table
from nasdeploy.costs.graphs import graph_layers, network_graph, random_weights, serialise
from nasdeploy.costs.latency import measure_models
from nasdeploy.costs.latency_table import REMEDY, LatencyTable
from nasdeploy.costs.table import CostTable
from nasdeploy.errors import ConfigError
from nasdeploy.exporters.metadata import model_metadata
from nasdeploy.files import write_json
from nasdeploy.pipeline.context import Job, package_versions
from nasdeploy.pipeline.devices import device_for, device_of, is_by_hand, machine_to_match, where
from nasdeploy.pipeline.latency_tables import Origin, conversion_to, table_for, table_store
from nasdeploy.pipeline.memory import MemoryTables, ProfileMemory, borrow_memory, profile_memory
from nasdeploy.profiles import HardwareProfile, Runtime
from nasdeploy.progress import Silent
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.spaces.base import Architecture, CandidateMask, SearchSpace

SCHEMA = "nasdeploy/profile-latency/2"

SharedTables = dict[tuple[str, int, str], tuple[LatencyTable, Origin]]
"""Tables that are known already, by the runtime, its channel grid and the device."""


@dataclass(kw_only=True)
class ProfileCosts:
    """What a profile knows of the space.

    origin: of the latency table. latency_margin: factor on the latency cap, so that 90 % of the networks that the table
    calls feasible are; 1 where nothing would be left. probes: networks that were measured whole, by architecture hash.
    memory: None where the budget does not name it; memory_margin: as latency_margin.
    """

    profile: HardwareProfile
    latency: LatencyTable
    origin: Origin
    tables: Mapping[str, CostTable]
    limits: Limits
    latency_margin: float
    mask: CandidateMask
    path: Path
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: ProfileMemory | None = None
    memory_margin: float = 1.0

    def remember(self, architecture: str, check: CapCheck) -> None:
        """Store what was measured of an architecture, by its hash; a later selection does not measure it again."""
        self.probes[architecture] = asdict(check)
        self.save()

    def save(self) -> None:
        """Write the table with its probes."""
        write_json(
            self.path,
            {
                "schema": SCHEMA,
                "profile": self.profile.name,
                "origin": self.origin,
                "table": self.latency.to_json(),
                "probes": self.probes,
            },
        )


def profile_costs(job: Job) -> dict[str, ProfileCosts]:
    """Return the costs of the profiles that were searched for and of those of the job.

    Each is measured once for each runtime, and stored in the run folder.
    Raises InfeasibleError when some profile has a budget that the space cannot meet.
    """
    profiles = [*job.searched, *(profile for profile in job.profiles if profile not in job.searched)]
    _borrow_tables(job, profiles)
    shared: SharedTables = {}
    memories: MemoryTables = {}
    found = {profile.name: _costs_of(job, profile, shared, memories) for profile in profiles}
    require_feasible(*(feasibility(costs.profile, job.space, costs.tables) for costs in found.values()))
    return found


def require_counts_feasible(job: Job) -> None:
    """Raise InfeasibleError for a cap on params, FLOPs or file size that cannot be met: before any measurement."""
    require_feasible(*(feasibility(p, job.space, exact_tables(job, p)) for p in job.profiles))


def exact_tables(job: Job, profile: HardwareProfile) -> dict[str, CostTable]:
    """Return the tables that need no clock: params, FLOPs and file size."""
    key = profile.runtime.precision, profile.runtime.opset
    if key not in job.file_sizes:  # seconds in a reduced precision
        job.file_sizes[key] = size_table(job.space, profile.runtime)
    size = job.file_sizes[key].scaled(metadata_size(job, profile), 1.0)
    return {**job.counts, "file_size": size}


def size_table(space: SearchSpace, runtime: Runtime, *, metadata_bytes: int = 0) -> CostTable:
    """Return the size of the file that ships where it keeps to ``runtime.precision``."""
    return file_size_table(
        space, opset=runtime.opset, metadata_bytes=metadata_bytes, convert=conversion_to(runtime.precision)
    )


def _costs_of(
    job: Job,
    profile: HardwareProfile,
    shared: SharedTables,
    memories: MemoryTables,
) -> ProfileCosts:
    path = job.folder.latency(profile.name)
    probes: dict[str, dict[str, Any]] = {}
    if path.exists():
        stored = read_json(path, schema=SCHEMA)
        latency, probes = LatencyTable.from_json(stored["table"]), stored["probes"]
        origin: Origin = stored["origin"]
        if profile in job.profiles:  # what others were measured on does not matter here
            machine = machine_to_match(profile, latency.machine)
            latency.check_matches(job.space, profile.runtime, machine=machine)
    else:
        latency, origin = _found_table(job, profile, shared)
    if latency.is_of(machine_to_match(profile, latency.machine)):
        shared[_key(profile)] = latency, origin
    tables = {**exact_tables(job, profile), "latency": latency.cost_table(job.space)}
    memory = profile_memory(job, profile, memories)
    if memory is not None:
        tables["peak_memory"] = memory.table.cost_table(job.space)
    limits = resolve_limits(profile, job.space, tables)
    latency_margin = _latency_margin(job, profile, latency, limits, tables)
    costs = ProfileCosts(
        profile=profile,
        latency=latency,
        origin=origin,
        tables=tables,
        limits=limits,
        latency_margin=latency_margin,
        mask=job.space.candidate_mask(profile.runtime.channel_multiple),
        path=path,
        probes=probes,
        memory=memory,
        memory_margin=_memory_margin(job, profile, memory, limits, tables, latency_margin=latency_margin),
    )
    if not path.exists():
        costs.save()
    return costs


def _latency_margin(
    job: Job, profile: HardwareProfile, latency: LatencyTable, limits: Limits, tables: Mapping[str, CostTable]
) -> float:
    margin = 1.0 / (1.0 + latency.accuracy.quantile90)
    if "latency" not in limits.caps:
        return margin
    caps = {**limits.caps, "latency": limits.caps["latency"] * margin}
    return margin if can_be_met(caps, profile, job.space, tables) else 1.0


def _memory_margin(
    job: Job,
    profile: HardwareProfile,
    memory: ProfileMemory | None,
    limits: Limits,
    tables: Mapping[str, CostTable],
    *,
    latency_margin: float,
) -> float:
    if memory is None or "peak_memory" not in limits.caps:
        return 1.0
    margin = memory.margin(limits.caps["peak_memory"])
    factors = {"latency": latency_margin, "peak_memory": margin}
    caps = {metric: cap * factors.get(metric, 1.0) for metric, cap in limits.caps.items()}
    return margin if can_be_met(caps, profile, job.space, tables) else 1.0


def _found_table(job: Job, profile: HardwareProfile, found: SharedTables) -> tuple[LatencyTable, Origin]:
    if _key(profile) in found:
        return found[_key(profile)]
    made = table_for(
        job.space,
        profile.runtime,
        device=device_for(job, profile),
        seed=job.settings.seed,
        observer=job.observer,
        store=table_store(job.observer) if job.settings.measure.cache else None,
    )
    return made.table, made.origin


def _key(profile: HardwareProfile) -> tuple[str, int, str]:
    return profile.runtime.key(), profile.runtime.channel_multiple, where(profile)


def _borrow_tables(job: Job, profiles: Sequence[HardwareProfile]) -> None:
    """Copy the tables of the run named by ``latency_from``, for profiles that have none here yet."""
    if job.settings.latency_from is None:
        return
    other = RunFolder(Path(job.settings.latency_from))
    for profile in profiles:
        borrow_memory(job, profile, other)
        source, target = other.latency(profile.name), job.folder.latency(profile.name)
        if source.exists() and not target.exists():
            stored = read_json(source, schema=SCHEMA)
            table = LatencyTable.from_json(stored["table"])
            machine = machine_to_match(profile, table.machine)
            try:
                table.check_matches(job.space, profile.runtime, machine=machine)
            except ConfigError as error:
                why = str(error).removesuffix(f"; {REMEDY} makes a new one")
                raise ConfigError(
                    f"--latency-from {other.path}: {profile.name}: {why}; without the option it is measured"
                ) from error
            write_json(target, {**stored, "origin": "run"})


def metadata_size(job: Job, profile: HardwareProfile) -> int:
    """Return about how many bytes the metadata of a file for ``profile`` take."""
    metadata = metadata_of(job, profile, job.space.largest())
    return sum(len(key) + len(value.encode()) + 12 for key, value in metadata.items())


def metadata_of(job: Job, profile: HardwareProfile, architecture: Architecture) -> dict[str, str]:
    """Return the metadata of the file of ``architecture`` for ``profile``."""
    image_shape = job.space.input_shape(architecture)
    return model_metadata(
        profile=profile.name,
        precision=profile.runtime.precision,
        budget=profile.to_dict()["budget"],
        space=job.space.name,
        architecture=job.space.to_names(architecture),
        dataset=job.data_fingerprint,
        seed=job.settings.seed,
        versions=package_versions(),
        image_shape=image_shape,
        preprocessing=replace(job.dataset.preprocessing, image_size=image_shape[1]).to_dict(),
        mean=job.normalisation.mean,
        std=job.normalisation.std,
        labels=job.dataset.class_names,
    )


def write_untrained(space: SearchSpace, architecture: Architecture, path: Path, *, runtime: Runtime) -> None:
    """Write the ONNX file of ``architecture`` with random weights: its latency is that of the trained one.

    In the number format of ``runtime``.
    """
    rng = np.random.default_rng(0)
    channels = space.image_shape[0]
    layers = graph_layers(space.placed(architecture), lambda spec: random_weights(spec, rng))
    model = network_graph(
        layers,
        image_shape=space.input_shape(architecture),
        mean=[127.5] * channels,
        scale=[1 / 127.5] * channels,
        batch_size=None,
        opset=runtime.opset,
    )
    convert = conversion_to(runtime.precision)
    path.write_bytes(serialise(model if convert is None else convert(model)))


def quick_latency_table(space: SearchSpace, profile: HardwareProfile) -> CostTable:
    """Return a latency table good enough for ``profiles check``, in seconds: FLOPs between two measured ends.

    Exact for the smallest and the largest network, which decide feasibility; a guess between them. For a device that
    packs are carried to: the table that came back.
    """
    runtime, device = profile.runtime, device_of(profile)
    if is_by_hand(profile):
        found = table_for(
            space, runtime, seed=0, observer=Silent(), store=table_store(Silent()), device=device
        )
        return found.table.cost_table(space)
    mask = space.candidate_mask(runtime.channel_multiple)
    ends = {"smallest": space.smallest(mask), "largest": space.largest(mask)}
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as name:
        paths = {end: Path(name, f"{end}.onnx") for end in ends}
        for end, architecture in ends.items():
            write_untrained(space, architecture, paths[end], runtime=runtime)
        times = measure_models(paths, runtime, min_runs=100, min_seconds=0.5, device=device)
    flops = counting_tables(space)["flops"]
    low, high = (float(flops.of(np.array([a.choices]))[0]) for a in ends.values())
    slope = (times["largest"].p50_ms - times["smallest"].p50_ms) / (high - low)
    return flops.scaled(times["smallest"].p50_ms - slope * low, slope)
