"""From a labelled image set and profiles to certified files: what the command line and the Python API call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasdeploy.costs.budgets import Feasibility, FeasibilityRow, feasibility
from nasdeploy.costs.counting import counting_tables
from nasdeploy.exporters.verification import Verification
from nasdeploy.pipeline.bench_packs import import_bench, pack_bench
from nasdeploy.pipeline.benching import BenchResult, bench
from nasdeploy.pipeline.building import BuildResult, identity, run_build
from nasdeploy.pipeline.certifying import CapResult
from nasdeploy.pipeline.context import Job, check_buildable, default_folder, prepare, torch_environment
from nasdeploy.pipeline.devices import where
from nasdeploy.pipeline.exporting import ExportResult, export_run
from nasdeploy.pipeline.figures import ProfileResult
from nasdeploy.pipeline.measuring import MeasuredRuntime, MeasureResult, measure
from nasdeploy.pipeline.memory import quick_memory_tables
from nasdeploy.pipeline.packing import KeptResult, WrittenPack, import_result, pack_table
from nasdeploy.pipeline.random_weight_tables import (
    RandomWeightResult,
    RandomWeightTable,
    ScoredNetwork,
    random_weight_result,
)
from nasdeploy.pipeline.schedule import (
    PlannedPhase,
    planned_phases,
    scaled,
    steps_of,
    training_speed,
    with_steps,
)
from nasdeploy.pipeline.searching import (
    check_joining,
    describe_selected,
    find_networks,
    is_searched,
    method_of,
)
from nasdeploy.pipeline.selecting import Selector, join_run, select_missing
from nasdeploy.pipeline.tables import exact_tables, quick_latency_table, size_table
from nasdeploy.pipeline.verifying import verify_run
from nasdeploy.profiles import HardwareProfile
from nasdeploy.profiles.messages import read_model
from nasdeploy.progress import Observer, Several, Silent
from nasdeploy.reporting import write_report
from nasdeploy.runs import EventLog, RunFolder, read_json, stored_settings
from nasdeploy.settings import EXPECTED, BuildSettings
from nasdeploy.spaces import make_space

__all__ = [
    "BenchResult",
    "BuildResult",
    "BuildSettings",
    "CapResult",
    "ExportResult",
    "Feasibility",
    "FeasibilityRow",
    "KeptResult",
    "MeasureResult",
    "MeasuredRuntime",
    "Plan",
    "PlannedPhase",
    "ProfileResult",
    "RandomWeightResult",
    "RandomWeightTable",
    "ScoredNetwork",
    "SearchResult",
    "Verification",
    "WrittenPack",
    "bench",
    "build",
    "check_profile",
    "export_run",
    "import_bench",
    "import_result",
    "measure",
    "pack_bench",
    "pack_table",
    "plan",
    "report",
    "search",
    "verify_run",
]


METADATA_BYTES = 2_048
"""Of a file whose data set is not known yet: its class names and the like are a part of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found: per profile the architecture by names, its validation accuracy and predicted costs.

    num_steps: of the shared weights; where none were trained, how many networks were scored, and the accuracy is that
    with random weights. random_weight: what those say, None where they were not asked.
    """

    run_dir: Path
    num_steps: int
    seconds: float
    architectures: dict[str, dict[str, str]]
    validation_accuracy: dict[str, float]
    costs: dict[str, dict[str, float]]
    trained_weights: bool = True
    random_weight: RandomWeightResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a build would do, how long it would take, and whether its budgets can be met."""

    run_dir: Path
    images: str
    space: str
    phases: tuple[PlannedPhase, ...]
    total_seconds: float
    images_per_second: float
    feasibility: tuple[Feasibility, ...]


def build(
    settings: BuildSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    observer: Observer | None = None,
    resume: bool = True,
    **overrides: Any,
) -> BuildResult:
    """Search once, then retrain, export, verify, measure and certify one network for every profile.

    settings: defaults where None; ``overrides`` replace single fields, as in ``build(data="photos/")``.
    output_dir: the run folder; None: one below ``runs/`` that belongs to these settings. resume: continue behind what
    the folder holds, or start over. Raises NasdeployError; a profile that fails alone is reported in the result.
    """
    with ExitStack() as stack:
        settings = _with(settings, overrides, output_dir=output_dir if resume else None)
        return run_build(_open(stack, settings, output_dir, observer, resume=resume))


def search(
    settings: BuildSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    observer: Observer | None = None,
    resume: bool = True,
    **overrides: Any,
) -> SearchResult:
    """Search and select one architecture for every profile, without retraining it; arguments as in :func:`build`."""
    with ExitStack() as stack:
        settings = _with(settings, overrides, output_dir=output_dir if resume else None)
        job = _open(stack, settings, output_dir, observer, resume=resume)
        with torch_environment(job):
            found = find_networks(job)
            select_missing(job, found.costs, Selector(job, found.outcome))
            join_run(job)
            describe_selected(job, found.costs)
        return _search_result(job)


def _search_result(job: Job) -> SearchResult:
    totals = method_of(job).totals(job)
    selected = {p.name: read_json(job.folder.model(p.name).architecture) for p in job.profiles}
    return SearchResult(
        run_dir=job.folder.path,
        num_steps=totals.num_steps,
        seconds=totals.seconds,
        architectures={name: one["architecture"] for name, one in selected.items()},
        validation_accuracy={name: one["validation"]["accuracy"] for name, one in selected.items()},
        costs={name: one["predicted"] for name, one in selected.items()},
        trained_weights=totals.trained_weights,
        random_weight=random_weight_result(job),
    )


def plan(
    settings: BuildSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    resume: bool = True,
    **overrides: Any,
) -> Plan:
    """Return what :func:`build` would do; writes nothing. Takes seconds: latency is measured at the ends only."""
    settings = _with(settings, overrides, output_dir=output_dir if resume else None)
    folder = RunFolder(Path(output_dir) if output_dir is not None else default_folder(settings))
    known = folder.stored_run() if resume else None
    job = prepare(settings, folder=folder, observer=Silent(), known=known)
    with torch_environment(job):
        speed = training_speed(job)
    work = _work(job, speed)
    if known is None:
        settings = scaled(settings, **work)
    else:
        folder.check_is(job.fingerprint(), settings.model_dump(mode="json"))
        check_joining(job, known)
        settings = with_steps(settings, known["steps"])
    phases = planned_phases(settings, **work)
    if known is not None and is_searched(job):
        phases = [phase for phase in phases if phase.name not in ("random weights", "search")]
    shape = "x".join(map(str, job.dataset.image_shape))
    return Plan(
        run_dir=folder.path,
        images=f"{job.dataset.name}: {len(job.dataset.train)} images of {shape} to train on, "
        f"{len(job.dataset.valid)} to validate, {len(job.dataset.test)} to test, {job.dataset.num_classes} classes",
        space=job.space.name,
        phases=tuple(phases),
        total_seconds=sum(phase.seconds for phase in phases),
        images_per_second=speed,
        feasibility=tuple(
            feasibility(
                p,
                job.space,
                {
                    **exact_tables(job, p),
                    "latency": quick_latency_table(job.space, p),
                    **quick_memory_tables(job.space, p, seed=settings.seed),
                },
            )
            for p in job.profiles
        ),
    )


def check_profile(
    profile: HardwareProfile,
    *,
    space: str = "mobile",
    image_shape: tuple[int, int, int] = (1, 28, 28),
    num_classes: int = 10,
    image_sizes: Sequence[int] = (),
) -> Feasibility:
    """Return what the space costs on ``profile`` and whether its caps can be met, in seconds.

    image_sizes: several to choose from, the largest that of ``image_shape``; none: only that one.
    Raises ConfigError where the profile's runtime is not on this machine.
    """
    check_buildable(profile)
    made = make_space(space, image_shape, num_classes, image_sizes=image_sizes)
    tables = {
        **counting_tables(made),
        "latency": quick_latency_table(made, profile),
        "file_size": size_table(made, profile.runtime, metadata_bytes=METADATA_BYTES),
        **quick_memory_tables(made, profile),
    }
    return feasibility(profile, made, tables)


def report(run_dir: str | Path) -> Path:
    """Write the report of a run folder again; return its page. Raises RunFolderError where there is no run."""
    folder = RunFolder(Path(run_dir))
    read_json(folder.run, schema="nasdeploy/run/2")
    return write_report(folder)


def _open(
    stack: ExitStack,
    settings: BuildSettings,
    output_dir: str | Path | None,
    observer: Observer | None,
    *,
    resume: bool,
) -> Job:
    """Return the job of ``settings`` in its locked folder; its schedule is that of the first start."""
    folder = RunFolder(Path(output_dir) if output_dir is not None else default_folder(settings))
    known = folder.stored_run() if resume else None
    job = prepare(settings, folder=folder, observer=observer or Silent(), known=known)
    stack.enter_context(folder.locked())
    if not resume:
        folder.discard()
    resumed = folder.claim(
        settings=settings.model_dump(mode="json"),
        fingerprint=job.fingerprint(),
        facts=lambda: _facts(job),
    )
    stored = read_json(folder.run)
    if resumed:
        check_joining(job, stored)
        for profile in job.profiles:
            if profile.name not in stored["profiles"]:
                folder.discard_profile(profile.name)  # of an attempt that failed
    settings = with_steps(settings, stored["steps"])
    observers: Sequence[Observer] = [EventLog(folder.events), *([observer] if observer else [])]
    job = job.with_(
        settings=settings,
        observer=Several(*observers),
        searched=tuple(HardwareProfile.from_dict(stored["profiles"][name]) for name in stored["searched"]),
        threads=stored["threads"],
    )
    if resumed:
        job.observer.note(f"{folder.path}: continuing the build that is there")
    return job


def _facts(job: Job) -> dict[str, Any]:
    """Return what ``run.json`` says beside the settings; ``steps`` is the schedule after ``time_budget``."""
    settings = job.settings
    if settings.time_budget is not None:
        with torch_environment(job):
            settings = scaled(settings, **_work(job, training_speed(job)))
    return {**identity(job), "steps": steps_of(settings)}


def _work(job: Job, images_per_second: float) -> dict[str, Any]:
    """Return what the schedule needs to know of a job."""
    with_memory = [p for p in job.profiles if p.budget.peak_memory is not None]
    return {
        "image_sizes": job.image_sizes,
        "num_runtimes": _num_runtimes(job.profiles),
        "images_per_second": images_per_second,
        "num_memory_tables": _num_runtimes(with_memory),
        "split_sizes": (len(job.dataset.train), len(job.dataset.valid)),
    }


def _num_runtimes(profiles: Sequence[HardwareProfile]) -> int:
    return len({(p.runtime.key(), p.runtime.channel_multiple, where(p)) for p in profiles})


def _with(
    settings: BuildSettings | None, overrides: dict[str, Any], *, output_dir: str | Path | None
) -> BuildSettings:
    """Return ``settings`` with ``overrides``; None: those of the run in ``output_dir``, or the defaults."""
    if settings is None:
        stored = stored_settings(Path(output_dir)) if output_dir is not None else None
        settings = read_model(BuildSettings, stored or {}, source=str(output_dir), expected=EXPECTED)
    if not overrides:
        return settings
    return read_model(
        BuildSettings, {**settings.model_dump(), **overrides}, source="build", expected=EXPECTED
    )
