"""What results look like for people: each function returns text and knows nothing of the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nasdeploy.cli.output import NOTHING, duration, percent, quantity, text_table

if TYPE_CHECKING:
    from nasdeploy.costs.budgets import Feasibility, FeasibilityRow
    from nasdeploy.costs.comparison import Relative
    from nasdeploy.exporters.verification import Verification
    from nasdeploy.pipeline import (
        BuildResult,
        CapResult,
        Plan,
        ProfileResult,
        RandomWeightResult,
        RandomWeightTable,
        ScoredNetwork,
        SearchResult,
    )
    from nasdeploy.pipeline.exporting import ExportResult, ProfileExport
    from nasdeploy.profiles import Budget, HardwareProfile


def build_text(result: BuildResult) -> str:
    """Return a line per profile: its figures, and the cap of each that has one."""
    header = [
        "profile",
        "status",
        "format",
        "accuracy",
        "latency p50",
        "params",
        "FLOPs",
        "file size",
        "peak memory",
    ]
    rows = [_build_row(profile) for profile in result.profiles]
    if all(profile.peak_memory is None for profile in result.profiles):  # no budget names it
        header, rows = header[:-1], [row[:-1] for row in rows]
    return f"{text_table(header, rows)}\n\nreport: {result.report}"


def _build_row(result: ProfileResult) -> tuple[str, ...]:
    caps = {cap.metric: cap for cap in result.caps}
    figures = {
        "latency": result.latency_ms,
        "params": result.params,
        "flops": result.flops,
        "file_size": result.file_size,
        "peak_memory": result.peak_memory,
    }
    cells = (_capped(figures[metric], metric, caps.get(metric)) for metric in figures)
    return result.profile, result.status, result.precision, percent(result.accuracy), *cells


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
    """Return what a search found, and what random weights say, where they were asked."""
    where = f"run folder: {result.run_dir}"
    if result.random_weight is None:
        return f"{_selected_text(result)}\n\n{_search_time(result)}; {where}"
    scored = random_weight_text(result.random_weight)
    if not result.trained_weights:
        return f"{scored}\n\n{where}"
    return f"{_selected_text(result)}\n\n{_search_time(result)}; {where}\n\n{scored}"


def _search_time(result: SearchResult) -> str:
    return f"{result.num_steps} steps in {duration(result.seconds)}"


def _selected_text(result: SearchResult) -> str:
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
    return text_table(header, rows)


MAX_SCORED_ROWS = 10


def random_weight_text(result: RandomWeightResult) -> str:
    """Return a table per profile: what it may choose from, and what it has; beneath them the limits of the method."""
    tables = [_scored_text(profile, table) for profile, table in result.tables.items()]
    summary = (
        f"top-1 errors with random weights and a trained last layer, mean and standard error of {result.num_seeds} "
        f"draws; {result.num_evaluations} networks in {duration(result.seconds)}"
    )
    limits = "\n".join(["What these errors do not say:", *(f"- {limit}" for limit in result.limits)])
    return "\n\n".join([*tables, summary, limits])


def _scored_text(profile: str, table: RandomWeightTable) -> str:
    """Return the non-dominated networks of a profile by error, the chosen one marked; --json has all of them."""
    metrics = list(table.chosen.costs)
    shown = list(table.networks[:MAX_SCORED_ROWS])
    if table.chosen not in shown:
        shown.append(table.chosen)
    rows = [_scored_row(network, metrics, chosen=network == table.chosen) for network in shown]
    left = len(table.networks) - sum(network in shown for network in table.networks)
    title = f"{profile}: {len(table.networks)} non-dominated of {table.num_feasible} scored within its caps"
    lines = [title, text_table(("", "error", *metrics), rows), *([f"and {left} more"] if left else [])]
    return "\n".join(lines)


def _scored_row(network: ScoredNetwork, metrics: list[str], *, chosen: bool) -> tuple[str, ...]:
    error = f"{percent(network.error)} +- {100 * network.standard_error:.2f}"
    costs = (quantity(network.costs.get(metric), metric) for metric in metrics)
    return "chosen" if chosen else "", error, *costs


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


def relative_text(relative: Relative, *, of: str = "") -> str:
    """Return the factor on the time with its verdict, such as "x0.782, faster"; of: on whose time."""
    return f"x{relative.ratio:.3g}{f' of {of}' if of else ''}, {relative.verdict}"


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
