"""``nasdeploy bench``: the latency of any ONNX files under a profile, compared fairly."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from nasdeploy.costs import certification
from nasdeploy.costs.certification import CapCheck
from nasdeploy.costs.comparison import FULL, BenchProtocol, Comparison, compare
from nasdeploy.costs.device.timing import RUNS_FOR_PERCENTILE
from nasdeploy.costs.operators import OperatorProfile, profile_operators
from nasdeploy.costs.sessions import HERE, Device, check_runtime_available, choose_cores
from nasdeploy.costs.startup import StartUp, measure_startup
from nasdeploy.errors import ConfigError
from nasdeploy.pipeline.bench_files import ModelFile, read_files
from nasdeploy.pipeline.bench_results import BenchedModel, BenchResult, cap_text
from nasdeploy.pipeline.devices import device_of
from nasdeploy.pipeline.input_shapes import Batch
from nasdeploy.profiles import HardwareProfile, MetricBudget, Quantity, Runtime, load_profile
from nasdeploy.progress import Observer, Silent

__all__ = ["BenchResult", "Work", "bench", "prepare_work"]


def bench(
    models: Sequence[str | Path],
    *,
    profile: HardwareProfile | str | Path | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    protocol: BenchProtocol = FULL,
    check_cap: bool = False,
    operators: bool = False,
    seed: int = 0,
    device: Device | None = None,
    observer: Observer | None = None,
) -> BenchResult:
    """Measure ONNX files of any origin together, block by block in fresh processes.

    profile: whose runtime they run under; None: one CPU thread, batches of one. threads, batch_size: in its place.
    shapes: {input: shape} for sizes that a file leaves open, the batch apart. protocol: how long, FULL or QUICK of
    :mod:`nasdeploy.costs.comparison`. check_cap: let the profile's latency cap decide on ``exit_code``, and measure
    until it can. operators: also profile each file, in a run of its own. device: where; None: on that of the profile.
    Raises UsageError for a file that is not ONNX, ConfigError for one that cannot be run so, NoisyMeasurementError
    when a process does not end in time; an unstable machine and a violated cap are in the result's ``failures``.
    """
    loaded = load_profile(profile) if isinstance(profile, str | Path) else profile
    observer = observer or Silent()
    device = device or _device_of(loaded, observer)
    work, protocol, cap = prepare_work(
        models,
        profile=loaded,
        threads=threads,
        batch_size=batch_size,
        shapes=shapes,
        protocol=protocol,
        check_cap=check_cap,
        seed=seed,
        device=device,
        observer=observer,
    )
    before = _load(device)
    start_ups = work.start_all(protocol.num_starts, num_blocks=protocol.blocks)
    comparison = work.compare(protocol, cap=cap if check_cap else None)
    profiled = work.profile_all() if operators else {}
    return BenchResult(
        profile=None if loaded is None else loaded.name,
        runtime=work.runtime,
        protocol=protocol,
        seed=seed,
        machine=comparison.machine,
        load=(before, comparison.loads[-1]),
        models=tuple(
            _benched(file, comparison, start_ups[file.label], cap, profiled.get(file.label))
            for file in work.files
        ),
        comparison=comparison,
        device=device.name,
        check_cap=check_cap,
    )


def _benched(
    file: ModelFile,
    comparison: Comparison,
    start_up: StartUp,
    cap: MetricBudget | None,
    operators: OperatorProfile | None,
) -> BenchedModel:
    is_first = file.label == next(iter(comparison.models))
    return BenchedModel(
        file=file,
        latency=comparison.models[file.label],
        start_up=start_up,
        relative=None if is_first else comparison.relative(file.label),
        cap=_checked(comparison, file.label, cap),
        operators=operators,
    )


def prepare_work(
    models: Sequence[str | Path],
    *,
    profile: HardwareProfile | None,
    threads: int | None,
    batch_size: int | None,
    shapes: Mapping[str, Sequence[int]] | None,
    protocol: BenchProtocol,
    check_cap: bool,
    seed: int,
    device: Device,
    observer: Observer,
) -> tuple[Work, BenchProtocol, MetricBudget | None]:
    """Return what is to be measured, the protocol with the runs that it needs, and the profile's latency cap.

    Arguments and errors as in :func:`bench`.
    """
    if not models:
        raise ConfigError("models: none; expected at least one ONNX file")
    runtime, batch = _conditions(profile, threads, batch_size)
    cap = _latency_cap(profile, runtime, needed=check_cap)
    protocol = _with_runs_for(cap if check_cap else None, protocol)
    if device is HERE:
        _check_here(runtime, observer)
    files = read_files([Path(model) for model in models], batch=batch, given=shapes or {})
    work = Work(files=files, runtime=runtime, seed=seed, device=device, observer=observer)
    return work, protocol, cap


def _device_of(profile: HardwareProfile | None, observer: Observer) -> Device:
    if profile is None:
        return HERE
    pack = shlex.quote(f"{profile.name}.zip")
    remedy = (
        f"expected what it has measured: the same command with --pack {pack}, there python3 {pack}, and here nasdeploy "
        "bench --import latency.json"
    )
    return device_of(profile, remedy=remedy, note=observer.note)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is measured, and how."""

    files: Sequence[ModelFile]
    runtime: Runtime
    seed: int
    device: Device
    observer: Observer

    def start_all(self, num_starts: int, *, num_blocks: int) -> dict[str, StartUp]:
        """Start each file alone in fresh processes, in random order: beside others a peak memory would be theirs."""
        self.observer.start("bench", len(self.files) + num_blocks)
        found = {}
        for n, file in enumerate(Random(self.seed).sample(self.files, len(self.files))):
            found[file.label] = measure_startup(
                file.path,
                self.runtime,
                num_processes=num_starts,
                seed=self.seed,
                shapes=file.shapes,
                device=self.device,
            )
            self.observer.advance("bench", n + 1, {})
        return found

    def compare(self, protocol: BenchProtocol, *, cap: MetricBudget | None) -> Comparison:
        """Measure all files together; again where the machine, or the cap, needs it."""
        done = len(self.files)

        def again(doubt: str) -> None:
            nonlocal done
            self.observer.note(f"{doubt}; measuring again with twice the runs")
            self.observer.start("bench", protocol.blocks)
            done = 0

        comparison = compare(
            {file.label: file.path for file in self.files},
            self.runtime,
            protocol=protocol,
            seed=self.seed,
            shapes={file.label: file.shapes for file in self.files},
            device=self.device,
            progress=lambda share: self.observer.advance("bench", done + round(share * protocol.blocks), {}),
            doubts=lambda found: found.doubt or _cap_doubt(found, cap),
            again=again,
        )
        self.observer.finish("bench", {"noise floor": f"{100 * comparison.noise_floor:.2f} %"})
        if comparison.contention:
            self.observer.note(comparison.contention)
        return comparison

    def profile_all(self) -> dict[str, OperatorProfile]:
        """Profile each file in a process of its own."""
        self.observer.start("operators", len(self.files))
        found = {}
        for n, file in enumerate(self.files):
            found[file.label] = profile_operators(
                file.path, self.runtime, seed=self.seed, shapes=file.shapes, device=self.device
            )
            self.observer.advance("operators", n + 1, {})
        self.observer.finish("operators", {})
        return found


def _check_here(runtime: Runtime, observer: Observer) -> None:
    """Raise ConfigError for a provider that this machine does not have."""
    check_runtime_available(runtime)
    if choose_cores(runtime.threads) is None:
        observer.note(
            f"{runtime.threads} threads: more than the cores that may be used here, or they cannot be bound"
        )


def _latency_cap(profile: HardwareProfile | None, runtime: Runtime, *, needed: bool) -> MetricBudget | None:
    """Return the profile's latency budget where its cap is a time, and is meant for ``runtime``.

    Raises ConfigError for none where it is needed.
    """
    budget = None if profile is None else profile.budget.latency
    if profile is None:
        reason = "no profile was given"
    elif budget is None or budget.max is None:
        reason = f"the profile {profile.name} has no latency cap"
    elif not isinstance(budget.max, Quantity):
        reason = f"the latency cap of the profile {profile.name} is a share of what a search space offers"
    elif runtime != profile.runtime:
        reason = f"the latency cap of the profile {profile.name} is for its own threads and batch size"
    else:
        return budget
    if needed:
        raise ConfigError(
            f'--check-cap: {reason}; expected a profile with a cap such as latency = {{ max = "15ms" }}, as it stands'
        )
    return None


def _with_runs_for(cap: MetricBudget | None, protocol: BenchProtocol) -> BenchProtocol:
    """Return the protocol with the runs a block that the cap's percentile needs, a tenth to spare.

    Raises ConfigError for an interval that is too long, before anything runs.
    """
    needed = 0 if cap is None else round(1.1 * RUNS_FOR_PERCENTILE[cap.percentile])
    enough = replace(protocol, min_runs=max(protocol.min_runs, protocol.blocks * needed))
    enough.plan()
    return enough


def _checked(comparison: Comparison, label: str, cap: MetricBudget | None) -> CapCheck | None:
    if cap is None or not isinstance(cap.max, Quantity):
        return None
    return certification.check_cap(
        comparison.models[label], cap.max.value, percentile=cap.percentile, reference=comparison.reference
    )


def _cap_doubt(comparison: Comparison, cap: MetricBudget | None) -> str:
    """Return which file's cap the blocks do not decide, "" for none."""
    for label in comparison.models:
        check = _checked(comparison, label, cap)
        if check is not None and check.status == "undecided":
            return f"{label}: {cap_text(check)}"
    return ""


def _conditions(
    profile: HardwareProfile | None, threads: int | None, batch_size: int | None
) -> tuple[Runtime, Batch]:
    """Return the runtime, and the batch size with who asked for it."""
    for option, value in (("threads", threads), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} = {value}: expected a whole number of 1 or more, such as 1")
    runtime = Runtime() if profile is None else profile.runtime
    asked_by = "" if profile is None else f"the profile {profile.name}"
    changes = {"threads": threads, "batch_size": batch_size}
    runtime = runtime.model_copy(
        update={option: value for option, value in changes.items() if value is not None}
    )
    return runtime, Batch(
        size=runtime.batch_size, asked_by="--batch-size" if batch_size is not None else asked_by
    )


def _load(device: Device) -> float | None:
    """Return how many processes wanted a core of this machine in the last minute, on average; None for another."""
    return os.getloadavg()[0] if device is HERE and hasattr(os, "getloadavg") else None
