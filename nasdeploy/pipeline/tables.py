"""Phase 1: what every architecture costs on every profile, and whether the budgets can be met."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.budgets import Feasibility, Limits, can_be_met, feasibility, resolve_limits
from nasdeploy.costs.certification import CapCheck
from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.file_size import file_size_table
from nasdeploy.costs.graphs import network_graph, random_weights, serialise
from nasdeploy.costs.latency import measure_models
from nasdeploy.costs.latency_table import LatencyTable, measure_latency_table
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.costs.table import CostTable
from nasdeploy.errors import InfeasibleError
from nasdeploy.exporters.metadata import model_metadata
from nasdeploy.files import write_json
from nasdeploy.pipeline.context import Job, package_versions
from nasdeploy.profiles import HardwareProfile, Runtime
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.spaces.base import Architecture, CandidateMask, SearchSpace

SCHEMA = "nasdeploy/profile-latency/1"


@dataclass(kw_only=True)
class ProfileCosts:
    """What a profile knows of the space.

    latency_margin: factor on the latency cap, so that 90 % of the networks that the table calls feasible are; 1 where
    nothing would be left. probes: networks that were measured whole, by architecture hash.
    """

    profile: HardwareProfile
    latency: LatencyTable
    tables: Mapping[str, CostTable]
    limits: Limits
    latency_margin: float
    mask: CandidateMask
    path: Path
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)

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
    measured: dict[tuple[str, int], LatencyTable] = {}
    found = {profile.name: _costs_of(job, profile, measured) for profile in profiles}
    _require_all_feasible([feasibility(costs.profile, job.space, costs.tables) for costs in found.values()])
    return found


def _require_all_feasible(found: list[Feasibility]) -> None:
    broken = [one.message for one in found if not one.feasible]
    if broken:
        raise InfeasibleError("; ".join(broken))


def require_counts_feasible(job: Job) -> None:
    """Raise InfeasibleError for a cap on params, FLOPs or file size that cannot be met: before any measurement."""
    _require_all_feasible([feasibility(p, job.space, exact_tables(job, p)) for p in job.profiles])


def exact_tables(job: Job, profile: HardwareProfile) -> dict[str, CostTable]:
    """Return the tables that need no clock: params, FLOPs and file size."""
    size = file_size_table(
        job.space, opset=profile.runtime.opset, metadata_bytes=_metadata_bytes(job, profile)
    )
    return {**job.counts, "file_size": size}


def _costs_of(
    job: Job, profile: HardwareProfile, measured: dict[tuple[str, int], LatencyTable]
) -> ProfileCosts:
    path = job.folder.latency(profile.name)
    probes: dict[str, dict[str, Any]] = {}
    if path.exists():
        stored = read_json(path, schema=SCHEMA)
        latency, probes = LatencyTable.from_json(stored["table"]), stored["probes"]
        if profile in job.profiles:  # what others were measured on does not matter here
            latency.check_matches(job.space, profile.runtime, machine=machine_fingerprint())
    else:
        latency = _measured_table(job, profile.runtime, measured)
    if latency.is_of(machine_fingerprint()):
        measured[_key(profile.runtime)] = latency
    tables = {**exact_tables(job, profile), "latency": latency.cost_table(job.space)}
    limits = resolve_limits(profile, job.space, tables)
    costs = ProfileCosts(
        profile=profile,
        latency=latency,
        tables=tables,
        limits=limits,
        latency_margin=_latency_margin(job, profile, latency, limits, tables),
        mask=job.space.candidate_mask(profile.runtime.channel_multiple),
        path=path,
        probes=probes,
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


def _measured_table(
    job: Job, runtime: Runtime, measured: dict[tuple[str, int], LatencyTable]
) -> LatencyTable:
    if _key(runtime) in measured:
        return measured[_key(runtime)]
    job.observer.start("latency table", 100)

    def progress(share: float) -> None:
        job.observer.advance("latency table", round(100 * share), {})

    table = measure_latency_table(job.space, runtime, seed=job.settings.seed, progress=progress)
    job.observer.finish(
        "latency table",
        {
            "seconds": round(table.seconds, 1),
            "mape": round(table.accuracy.mape, 4),
            "spearman": round(table.accuracy.spearman, 4),
        },
    )
    return table


def _key(runtime: Runtime) -> tuple[str, int]:
    return runtime.key(), runtime.channel_multiple


def _borrow_tables(job: Job, profiles: Sequence[HardwareProfile]) -> None:
    """Copy the latency tables of the run named by ``latency_from``, for profiles that have none here yet."""
    if job.settings.latency_from is None:
        return
    other = RunFolder(Path(job.settings.latency_from))
    for profile in profiles:
        source, target = other.latency(profile.name), job.folder.latency(profile.name)
        if source.exists() and not target.exists():
            stored = read_json(source, schema=SCHEMA)
            table = LatencyTable.from_json(stored["table"])
            table.check_matches(job.space, profile.runtime, machine=machine_fingerprint())
            write_json(target, stored)


def _metadata_bytes(job: Job, profile: HardwareProfile) -> int:
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
    """Write the ONNX file of ``architecture`` with random weights: its latency is that of the trained one."""
    rng = np.random.default_rng(0)
    channels = space.image_shape[0]
    layers = [(name, spec, random_weights(spec, rng)) for name, spec in space.named_layers(architecture)]
    model = network_graph(
        layers,
        image_shape=space.input_shape(architecture),
        mean=[127.5] * channels,
        scale=[1 / 127.5] * channels,
        batch_size=None,
        opset=runtime.opset,
    )
    path.write_bytes(serialise(model))


def quick_latency_table(space: SearchSpace, runtime: Runtime) -> CostTable:
    """Return a latency table good enough for ``profiles check``, in seconds: FLOPs between two measured ends.

    Exact for the smallest and the largest network, which decide feasibility; a guess between them.
    """
    mask = space.candidate_mask(runtime.channel_multiple)
    ends = {"smallest": space.smallest(mask), "largest": space.largest(mask)}
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as name:
        paths = {end: Path(name, f"{end}.onnx") for end in ends}
        for end, architecture in ends.items():
            write_untrained(space, architecture, paths[end], runtime=runtime)
        times = measure_models(paths, runtime, min_runs=100, min_seconds=0.5)
    flops = counting_tables(space)["flops"]
    low, high = (float(flops.of(np.array([a.choices]))[0]) for a in ends.values())
    slope = (times["largest"].p50_ms - times["smallest"].p50_ms) / (high - low)
    return flops.scaled(times["smallest"].p50_ms - slope * low, slope)
