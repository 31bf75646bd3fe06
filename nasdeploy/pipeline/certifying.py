"""Phase 5: the exported files against the clock and the caps."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nasdeploy.costs.certification import CapCheck, check_cap, check_percent_cap
from nasdeploy.costs.device.timing import RUNS_FOR_PERCENTILE
from nasdeploy.costs.latency import ModelLatency, measure_models
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.tables import ProfileCosts, write_untrained
from nasdeploy.profiles import HardwareProfile, Percent, Runtime, format_quantity

MAX_MEASUREMENTS = 3
SMALLEST, LARGEST = "the smallest network", "the largest network"

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


def measure_latency_caps(
    job: Job, profiles: Sequence[HardwareProfile], paths: Mapping[str, Path]
) -> dict[str, tuple[ModelLatency, CapCheck | None]]:
    """Return the latency of each profile's file and the check of its cap (None without one).

    Files of one runtime are measured together with the smallest and the largest network of the space. What stays
    undecided is measured again with twice the runs, at most three times.
    """
    groups: dict[tuple[str, int], list[HardwareProfile]] = defaultdict(list)
    for profile in profiles:
        groups[profile.runtime.key(), profile.runtime.channel_multiple].append(profile)
    found: dict[str, tuple[ModelLatency, CapCheck | None]] = {}
    for group in groups.values():
        pending = list(group)
        for attempt in range(MAX_MEASUREMENTS):
            found |= _measure_group(job, pending, paths, effort=2**attempt)
            pending = [p for p in pending if _is_open(found[p.name][1])]
            if not pending:
                break
    return found


def _is_open(check: CapCheck | None) -> bool:
    return check is not None and check.status == "undecided"


def _measure_group(
    job: Job, profiles: Sequence[HardwareProfile], paths: Mapping[str, Path], *, effort: int
) -> dict[str, tuple[ModelLatency, CapCheck | None]]:
    runtime = profiles[0].runtime
    settings = job.settings.measure
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        files = {profile.name: paths[profile.name] for profile in profiles} | _anchors(
            job, runtime, Path(folder)
        )
        times = measure_models(
            files,
            runtime,
            blocks=settings.blocks,
            min_runs=max(effort * settings.min_runs, settings.blocks * _runs_for_caps(profiles)),
            min_seconds=effort * settings.min_seconds,
            seed=job.settings.seed,
        )
    return {profile.name: (times[profile.name], _check(profile, times)) for profile in profiles}


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


def _check(profile: HardwareProfile, times: Mapping[str, ModelLatency]) -> CapCheck | None:
    budget = profile.budget.latency
    if budget is None or budget.max is None:
        return None
    measured = times[profile.name]
    if isinstance(budget.max, Percent):
        return check_percent_cap(
            measured,
            budget.max.fraction,
            smallest=times[SMALLEST],
            largest=times[LARGEST],
            percentile=budget.percentile,
        )
    return check_cap(measured, budget.max.value, percentile=budget.percentile)


def cap_results(
    costs: ProfileCosts, values: Mapping[str, float], latency: CapCheck | None
) -> tuple[CapResult, ...]:
    """Return every cap of a profile against the ``values`` of its exported file, by metric."""
    results = []
    for metric, cap in costs.limits.caps.items():
        if metric == "latency":
            assert latency is not None
            results.append(_latency_result(latency))
        else:
            results.append(_exact_result(metric, cap, values[metric]))
    return tuple(results)


def _exact_result(metric: str, cap: float, value: float) -> CapResult:
    holds = value <= cap
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
    def show(number: float | None) -> str:
        if number is None:
            return "n/a"
        return f"{100 * number:.1f}%" if check.unit == "fraction" else format_quantity(number, "latency")

    relation = {"holds": "<=", "violated": ">", "undecided": "?"}[check.status]
    measured = f"{show(check.estimate)} (largest block {show(check.bound)})"
    text = f"latency p{check.percentile} {measured} {relation} {show(check.cap)}"
    return CapResult(
        metric="latency",
        cap=check.cap,
        value=check.estimate,
        bound=check.bound,
        status=check.status,
        unit=check.unit,
        text=f"{text}: {check.reason}" if check.reason else text,
    )
