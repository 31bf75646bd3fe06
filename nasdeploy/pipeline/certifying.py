"""Phase 5: the exported files against the clock and the caps."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nasdeploy.costs.budgets import ROUNDING
from nasdeploy.costs.by_hand import NotMeasuredError, packed
from nasdeploy.costs.certification import CapCheck, check_cap, check_percent_cap
from nasdeploy.costs.device.timing import RUNS_FOR_PERCENTILE
from nasdeploy.costs.latency import ModelLatency, measure_models, write_reference_model
from nasdeploy.costs.packs import Pack
from nasdeploy.costs.sessions import Device
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.devices import device_for, is_by_hand, where
from nasdeploy.pipeline.gates import SpeedGate
from nasdeploy.pipeline.tables import ProfileCosts, write_untrained
from nasdeploy.profiles import HardwareProfile, Percent, Runtime, format_quantity

MAX_MEASUREMENTS = 3
MAX_SECONDS = 60.0
"""For each file, over all blocks, in the first measurement: a p99 needs 1 500 runs."""
SMALLEST, LARGEST = "the smallest network", "the largest network"
FP32, FP32_AGAIN = " in fp32", " in fp32 again"  # no name of a profile holds a space
REFERENCE = " reference"

Status = Literal["holds", "violated", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CapResult:
    """A cap and what the exported file has. ``text``: the same in one readable line."""

    metric: str
    cap: float
    value: float | None
    bound: float | None
    status: Status
    unit: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredFile:
    """What was measured of the file that would ship. check: of its latency cap, None without one.

    speed: of the reduced file, which ships where it passed; None where there is only one file. latency: None where the
    device has not measured it yet. pack: what it has to measure next, where packs are carried there.
    """

    latency: ModelLatency | None
    check: CapCheck | None
    speed: SpeedGate | None
    pack: Pack | None = None

    @property
    def is_disturbed(self) -> bool:
        """Whether the machine is why the cap is undecided."""
        return self.check is not None and self.check.status == "undecided" and self.check.disturbed

    @property
    def is_open(self) -> bool:
        """Whether more runs may decide what these did not."""
        undecided = self.check is not None and self.check.status == "undecided"
        return undecided or (self.speed is not None and self.speed.relative.verdict == "no difference")


def measure_latency_caps(
    job: Job,
    profiles: Sequence[HardwareProfile],
    paths: Mapping[str, Path],
    *,
    fp32: Mapping[str, Path] | None = None,
) -> dict[str, MeasuredFile]:
    """Return the latency of each profile's file and the check of its cap.

    Files of one runtime are measured together with the smallest and the largest network of the space, and the reference
    model, without which holding still no absolute cap is certified. What stays
    undecided is measured again with twice the runs, at most three times. fp32: by profile, the float32 file behind a
    reduced one: measured twice in the same blocks, and in its place where the reduced one is not faster.
    """
    groups: dict[tuple[str, int, str], list[HardwareProfile]] = defaultdict(list)
    for profile in profiles:
        groups[profile.runtime.key(), profile.runtime.channel_multiple, where(profile)].append(profile)
    found: dict[str, MeasuredFile] = {}
    for group in groups.values():
        pending = list(group)
        for attempt in range(MAX_MEASUREMENTS):
            try:
                found |= _measure_group(job, pending, paths, fp32 or {}, effort=2**attempt)
            except NotMeasuredError as error:
                found |= {p.name: _awaited(p, found.get(p.name), error.pack) for p in pending}
                break
            pending = [p for p in pending if found[p.name].is_open]
            if not pending:
                break
        if is_by_hand(group[0]):
            found |= _asked_again(job, group, paths, fp32 or {}, found)
    return found


def _asked_again(
    job: Job,
    profiles: Sequence[HardwareProfile],
    paths: Mapping[str, Path],
    fp32: Mapping[str, Path],
    found: Mapping[str, MeasuredFile],
) -> dict[str, MeasuredFile]:
    """Return the files that every answer of a device left undecided, with the pack that it may measure once more."""
    left = [p for p in profiles if found[p.name].is_disturbed and found[p.name].pack is None]
    if not left:
        return {}
    effort = 2 ** (MAX_MEASUREMENTS - 1)
    pack = packed(lambda device: _measure_group(job, left, paths, fp32, effort=effort, device=device))
    return {p.name: _awaited(p, found[p.name], pack) for p in left}


def _awaited(profile: HardwareProfile, before: MeasuredFile | None, pack: Pack) -> MeasuredFile:
    """Return what is known of a file as long as its device has not measured ``pack``."""
    budget = profile.budget.latency
    if before is not None and before.check is not None:
        return replace(before, check=replace(before.check, disturbed=True), pack=pack)
    if before is not None or budget is None or budget.max is None:
        return replace(before or MeasuredFile(latency=None, check=None, speed=None), pack=pack)
    is_share = isinstance(budget.max, Percent)
    check = CapCheck(
        status="undecided",
        cap=budget.max.fraction if isinstance(budget.max, Percent) else budget.max.value,
        unit="fraction" if is_share else "ms",
        percentile=budget.percentile,
        estimate=None,
        bound=None,
        num_blocks=0,
        reason="not measured on the device yet",
        disturbed=True,
    )
    return MeasuredFile(latency=None, check=check, speed=None, pack=pack)


def _measure_group(
    job: Job,
    profiles: Sequence[HardwareProfile],
    paths: Mapping[str, Path],
    fp32: Mapping[str, Path],
    *,
    effort: int,
    device: Device | None = None,
) -> dict[str, MeasuredFile]:
    runtime = profiles[0].runtime
    settings = job.settings.measure
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        files = {profile.name: paths[profile.name] for profile in profiles}
        for profile in profiles:
            if profile.name in fp32:
                files |= {profile.name + suffix: fp32[profile.name] for suffix in (FP32, FP32_AGAIN)}
        files |= _anchors(job, runtime, Path(folder))
        files[REFERENCE] = Path(folder, "reference.onnx")
        write_reference_model(files[REFERENCE], batch_size=runtime.batch_size)
        times = measure_models(
            files,
            runtime,
            blocks=settings.blocks,
            min_runs=max(effort * settings.min_runs, settings.blocks * _runs_for_caps(profiles)),
            min_seconds=effort * settings.min_seconds,
            max_seconds=effort * MAX_SECONDS,
            seed=job.settings.seed,
            device=device or device_for(job, profiles[0]),
        )
    return {profile.name: measured_file(profile, times) for profile in profiles}


def measured_file(profile: HardwareProfile, times: Mapping[str, ModelLatency]) -> MeasuredFile:
    """Return what counts of a profile's files: the reduced one where it is faster, else that in float32."""
    latency, speed = times[profile.name], None
    if profile.name + FP32 in times:
        plain, again = (times[profile.name + suffix] for suffix in (FP32, FP32_AGAIN))
        speed = SpeedGate.of(latency, plain, again)
        latency = latency if speed.passed else plain
    return MeasuredFile(latency=latency, check=_check(profile, latency, times), speed=speed)


def _runs_for_caps(profiles: Sequence[HardwareProfile]) -> int:
    """Return the runs a block that the percentiles of the latency caps need, with a tenth to spare."""
    percentiles = [p.budget.latency.percentile for p in profiles if p.budget.latency is not None]
    return max((round(1.1 * RUNS_FOR_PERCENTILE[q]) for q in percentiles), default=1)


def _anchors(job: Job, runtime: Runtime, folder: Path) -> dict[str, Path]:
    mask = job.space.candidate_mask(runtime.channel_multiple)
    anchors = {SMALLEST: job.space.smallest(mask), LARGEST: job.space.largest(mask)}
    paths = {name: folder / f"{i}.onnx" for i, name in enumerate(anchors)}
    for name, architecture in anchors.items():
        write_untrained(job.space, architecture, paths[name], runtime=runtime)
    return paths


def _check(
    profile: HardwareProfile, measured: ModelLatency, times: Mapping[str, ModelLatency]
) -> CapCheck | None:
    budget = profile.budget.latency
    if budget is None or budget.max is None:
        return None
    if isinstance(budget.max, Percent):
        return check_percent_cap(
            measured,
            budget.max.fraction,
            smallest=times[SMALLEST],
            largest=times[LARGEST],
            percentile=budget.percentile,
        )
    return check_cap(measured, budget.max.value, percentile=budget.percentile, reference=times.get(REFERENCE))


def cap_results(
    costs: ProfileCosts,
    values: Mapping[str, float | None],
    latency: CapCheck | None,
    memory: CapCheck | None = None,
) -> tuple[CapResult, ...]:
    """Return every cap of a profile against the ``values`` of its exported file, by metric.

    latency, memory: the checks of what is measured, for profiles that have such a cap.
    """
    results = []
    for metric, cap in costs.limits.caps.items():
        if metric == "latency":
            assert latency is not None
            results.append(_latency_result(latency))
        elif metric == "peak_memory":
            assert memory is not None
            results.append(_memory_result(memory))
        else:
            value = values[metric]
            assert value is not None
            results.append(_exact_result(metric, cap, value))
    return tuple(results)


def _exact_result(metric: str, cap: float, value: float) -> CapResult:
    holds = value <= cap * (1.0 + ROUNDING)
    digits = 4 if holds else None  # all digits where rounding could hide by how much it fails
    shown, limit = (format_quantity(number, metric, digits=digits) for number in (value, cap))
    return CapResult(
        metric=metric,
        cap=cap,
        value=value,
        bound=None,
        status="holds" if holds else "violated",
        unit="bytes" if metric == "file_size" else "count",
        text=f"{metric} {shown} {'<=' if holds else '>'} {limit}",
    )


def _latency_result(check: CapCheck) -> CapResult:
    return _measured_result(check, "latency", name=f"latency p{check.percentile}", block="block")


def _memory_result(check: CapCheck) -> CapResult:
    return _measured_result(
        check, "peak_memory", name="peak_memory", block=f"of {check.num_blocks} processes"
    )


def _measured_result(check: CapCheck, metric: str, *, name: str, block: str) -> CapResult:
    def show(number: float | None) -> str:
        if number is None:
            return "n/a"
        return f"{100 * number:.1f}%" if check.unit == "fraction" else format_quantity(number, metric)

    relation = {"holds": "<=", "violated": ">", "undecided": "?"}[check.status]
    measured = f"{show(check.estimate)} (largest {block} {show(check.bound)})"
    text = f"{name} {measured} {relation} {show(check.cap)}"
    return CapResult(
        metric=metric,
        cap=check.cap,
        value=check.estimate,
        bound=check.bound,
        status=check.status,
        unit=check.unit,
        text=f"{text}: {check.reason}" if check.reason else text,
    )
