"""What results look like for people: each function returns text and knows nothing of the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nasdeploy.cli.output import NOTHING, duration, percent, quantity, text_table

if TYPE_CHECKING:
    from nasdeploy.costs.budgets import Feasibility, FeasibilityRow
    from nasdeploy.costs.comparison import Relative
    from nasdeploy.costs.latency import ModelLatency
    from nasdeploy.exporters.verification import Verification
    from nasdeploy.pipeline import BuildResult, CapResult, Plan, ProfileResult, SearchResult
    from nasdeploy.pipeline.benching import BenchedModel, BenchResult
    from nasdeploy.pipeline.exporting import ExportResult, ProfileExport
    from nasdeploy.profiles import Budget, HardwareProfile


def build_text(result: BuildResult) -> str:
    """Return a line per profile: its figures, and the cap of each that has one."""
    header = ("profile", "status", "accuracy", "latency p50", "params", "FLOPs", "file size")
    rows = [_build_row(profile) for profile in result.profiles]
    return f"{text_table(header, rows)}\n\nreport: {result.report}"


def _build_row(result: ProfileResult) -> tuple[str, ...]:
    caps = {cap.metric: cap for cap in result.caps}
    figures = {
        "latency": result.latency_ms,
        "params": result.params,
        "flops": result.flops,
        "file_size": result.file_size,
    }
    cells = (_capped(figures[metric], metric, caps.get(metric)) for metric in figures)
    return result.profile, result.status, percent(result.accuracy), *cells


def _capped(value: float | None, metric: str, cap: CapResult | None) -> str:
    text = quantity(value, metric)
    if cap is None:
        return text
    if (
        cap.unit == "fraction"
    ):  # of the way from the smallest to the largest network, measured beside the file
        at = "n/a" if cap.value is None else f"{100 * cap.value:.3g}%"
        return f"{text} (at {at}, cap {100 * cap.cap:.3g}%)"
    return f"{text} (cap {quantity(cap.cap, metric)})"


def search_text(result: SearchResult) -> str:
    """Return a line per profile: the accuracy with shared weights, and what the tables say it costs."""
    metrics = list(dict.fromkeys(metric for costs in result.costs.values() for metric in costs))
    header = ("profile", "validation accuracy", *metrics)
    rows = [
        (
            profile,
            percent(result.validation_accuracy.get(profile)),
            *(quantity(result.costs.get(profile, {}).get(metric), metric) for metric in metrics),
        )
        for profile in result.architectures
    ]
    summary = f"{result.num_steps} steps in {duration(result.seconds)}; run folder: {result.run_dir}"
    return f"{text_table(header, rows)}\n\n{summary}"


def feasibility_text(feasibility: Feasibility) -> str:
    """Return a line per metric: what the space offers, the cap, and the nearest cap that can be met."""
    header = ("metric", "smallest", "median", "largest", "cap", "satisfiable", "nearest")
    title = f"{feasibility.profile}: {'feasible' if feasibility.feasible else 'infeasible'}"
    return f"{title}\n{text_table(header, [_feasibility_row(row) for row in feasibility.rows])}"


def _feasibility_row(row: FeasibilityRow) -> tuple[str, ...]:
    values = (quantity(value, row.metric) for value in (row.smallest, row.median, row.largest, row.cap))
    satisfiable = NOTHING if row.cap is None else "yes" if row.satisfiable else "no"
    return row.metric, *values, satisfiable, quantity(row.nearest, row.metric)


def plan_text(plan: Plan) -> str:
    """Return what a build would do and how long it would take, then the feasibility of each profile."""
    facts = [
        ("run folder", str(plan.run_dir)),
        ("images", plan.images),
        ("space", plan.space),
        ("speed", f"{plan.images_per_second:.0f} images/s"),
    ]
    phases = [(phase.name, f"about {duration(phase.seconds)}") for phase in plan.phases]
    total = ("total", f"about {duration(plan.total_seconds)}")
    parts = [_columns(facts), text_table(("phase", "time"), [*phases, total])]
    return "\n\n".join([*parts, *map(feasibility_text, plan.feasibility)])


def _columns(rows: list[tuple[str, str]]) -> str:
    return text_table(rows[0], rows[1:])


def verification_text(verification: Verification, *, title: str) -> str:
    """Return every check of a file with its value and limit, and the accuracy where it was measured."""
    lines = [f"{title}: {'passed' if verification.passed else 'failed'}"]
    lines += [f"  {'ok  ' if check.passed else 'FAIL'}  {check.describe()}" for check in verification.checks]
    if verification.accuracy is not None:
        lines.append(f"  accuracy {percent(verification.accuracy)} ({verification.num_images} images)")
    return "\n".join(lines)


def profiles_text(profiles: Iterable[HardwareProfile]) -> str:
    """Return a line per profile: its name, budget and description."""
    rows = [(profile.name, budget_text(profile.budget), profile.description) for profile in profiles]
    return text_table(("profile", "budget", "description"), rows)


def budget_text(budget: Budget) -> str:
    """Return a budget on one line, such as "latency p90 <= 1ms, flops weight 0.3"."""
    from nasdeploy.profiles import format_limit

    parts = []
    for metric, limits in budget.items():
        name = f"{metric} p{limits.percentile}" if metric == "latency" else metric
        if limits.max is not None:
            parts.append(f"{name} <= {format_limit(limits.max, metric)}")
        if limits.coefficient:
            parts.append(f"{metric} weight {limits.coefficient:g}")
    return ", ".join(parts)


BENCH_HEADER = (
    "model",
    "p50 (blocks)",
    "p90",
    "p95",
    "p99",
    "mean",
    "min",
    "CPU p50",
    "cold start",
    "memory",
    "items/s",
    "contended",
    "time against the first",
)


def bench_text(result: BenchResult) -> str:
    """Return a line per model, then the conditions under which the figures hold."""
    table = text_table(BENCH_HEADER, [_bench_row(model) for model in result.models])
    return "\n".join([table, "", *_bench_conditions(result)])


def _bench_row(model: BenchedModel) -> tuple[str, ...]:
    latency = model.latency
    return (
        model.file.label,
        f"{_ms(latency.p50_ms)} ({'-'.join(map(_ms, latency.p50_range_ms))})",
        *(_ms(latency.percentile_ms(q)) for q in (90, 95, 99)),
        *map(_ms, (latency.mean_ms, latency.min_ms, latency.cpu_p50_ms, model.start_up.cold_start_ms)),
        quantity(model.start_up.peak_memory_bytes, "file_size"),
        _per_second(latency.images_per_second),
        f"{latency.contended_blocks}/{len(latency.blocks)}",
        "the first" if model.relative is None else relative_text(model.relative),
    )


def _ms(value: float | None) -> str:
    """Return a time with three digits; "n/a" for a percentile that the runs cannot support."""
    from nasdeploy.profiles import format_quantity

    return "n/a" if value is None else format_quantity(value, "latency", digits=3)


def _per_second(value: float) -> str:
    return f"{value:.0f}" if value >= 1000.0 else f"{value:.4g}"


def relative_text(relative: Relative, *, of: str = "") -> str:
    """Return the factor on the time with its verdict, such as "x0.782, faster"; of: on whose time."""
    return f"x{relative.ratio:.3g}{f' of {of}' if of else ''}, {relative.verdict}"


def _bench_conditions(result: BenchResult) -> Iterator[str]:
    floor, reference = result.comparison.noise_floor, result.comparison.reference
    conditions, before = reference.conditions, result.models[0].start_up.memory_before_bytes
    batches = sorted({model.latency.conditions.batch_size for model in result.models})
    yield (
        f"runtime: ONNX Runtime {conditions.onnxruntime}, {conditions.provider}, {_threads(reference)}, "
        f"batch {', '.join(map(str, batches))}"
    )
    if len(batches) > 1:
        yield "batches differ: times are those of one run, so compare the items per second"
    yield f"machine: {_machine_text(result)}"
    yield (
        f"noise floor: {100 * floor:.2f} % (the first model measured twice); up to {200 * floor:.2f} % is no difference"
    )
    yield (
        f"reference model: {_ms(reference.p50_ms)}, spread {100 * reference.spread:.1f} % over "
        f"{len(reference.blocks)} blocks: {'stable' if result.comparison.stable else 'UNSTABLE'}"
    )
    if before is not None:
        yield (
            f"memory: peak of a process with this model alone; {quantity(before, 'file_size')} of it are Python and "
            "ONNX Runtime"
        )


def _threads(latency: ModelLatency) -> str:
    number = latency.conditions.threads
    pinned = "pinned" if latency.conditions.pinned else "not pinned"
    return f"{number} thread{'s' if number > 1 else ''} ({pinned})"


def _machine_text(result: BenchResult) -> str:
    machine = result.machine
    load = " and ".join(NOTHING if value is None else f"{value:.2f}" for value in result.load)
    quota = "" if machine["cpu_quota"] is None else f", quota {machine['cpu_quota']:g} cores"
    return (
        f"{machine['cpu']}, {machine['logical_cores']} cores{quota}, governor {machine['governor'] or 'n/a'}, "
        f"load {load} before and after"
    )


EXPORT_HEADER = ("profile", "file", "size", "validation before", "after", "test", "latency p50", "time")


def export_text(result: ExportResult) -> str:
    """Return a line per profile; what is missing of a file that failed a check is open."""
    table = text_table(EXPORT_HEADER, [_export_row(export) for export in result.exports])
    return f"{table}\n\nfolder: {result.output_dir}"


def _export_row(export: ProfileExport) -> tuple[str, ...]:
    latency = export.latency
    relative = None if latency is None else latency.relative
    return (
        export.profile,
        "none (failed)" if export.model is None else export.model.path.name,
        quantity(None if export.model is None else export.model.file_size, "file_size"),
        percent(export.validation_before),
        percent(export.validation_accuracy),
        percent(export.test_accuracy),
        quantity(None if latency is None else latency.p50_ms, "latency"),
        NOTHING
        if latency is None or relative is None
        else relative_text(relative, of=latency.baseline or ""),
    )
