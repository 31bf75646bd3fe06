"""What ``nasdeploy bench`` prints for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nasdeploy.cli.output import NOTHING, quantity, text_table
from nasdeploy.cli.texts import relative_text

if TYPE_CHECKING:
    from nasdeploy.costs.latency import ModelLatency
    from nasdeploy.costs.operators import OperatorProfile
    from nasdeploy.pipeline.bench_results import BenchedModel, BenchResult

HEADER = (
    "model",
    "weights",
    "n",
    "p50 (blocks)",
    "p90",
    "p95",
    "p99",
    "mean",
    "min",
    "items/s",
    "CPU p50",
    "wall/CPU (contended)",
    "cold start",
    "peak memory",
    "time against the first",
)
OPERATOR_HEADER = ("operator", "nodes", "calls", "time", "share")
NUM_NODES = 10


def bench_text(result: BenchResult) -> str:
    """Return a line per model, where its time goes, and the conditions under which the figures hold."""
    table = text_table(HEADER, [_row(model) for model in result.models])
    profiles = [
        f"{model.file.label}: {operators_text(model.operators)}" for model in result.models if model.operators
    ]
    return "\n\n".join([table, *_caps(result), *profiles, "\n".join(_conditions(result))])


def _row(model: BenchedModel) -> tuple[str, ...]:
    latency, start = model.latency, model.start_up
    return (
        model.file.label,
        model.file.precision or NOTHING,
        str(latency.n),
        f"{_ms(latency.p50_ms)} ({'-'.join(map(_ms, latency.p50_range_ms))})",
        *(_ms(latency.percentile_ms(q)) for q in (90, 95, 99)),
        *map(_ms, (latency.mean_ms, latency.min_ms)),
        _per_second(latency.images_per_second),
        _ms(latency.cpu_p50_ms),
        f"{latency.wall_over_cpu:.2f} ({_contended(latency)})",
        _ms(start.cold_start_ms),
        quantity(start.added_memory_bytes, "file_size"),
        "the first" if model.relative is None else relative_text(model.relative),
    )


def _contended(latency: ModelLatency) -> str:
    blocks = f"{latency.contended_blocks}/{len(latency.blocks)}"
    return f"{blocks} CONTENDED" if latency.is_contended else blocks


def _ms(value: float | None) -> str:
    """Return a time with three digits; "n/a" for a percentile that the runs cannot support."""
    from nasdeploy.profiles import format_quantity

    return "n/a" if value is None else format_quantity(value, "latency", digits=3)


def _per_second(value: float) -> str:
    return f"{value:.0f}" if value >= 1000.0 else f"{value:.4g}"


def _caps(result: BenchResult) -> Iterator[str]:
    """Yield a table with the latency cap of the profile, where that is a time."""
    from nasdeploy.pipeline.bench_results import cap_text

    rows = [(model.file.label, model.cap.status, cap_text(model.cap)) for model in result.models if model.cap]
    if rows:
        yield text_table((f"cap of {result.profile}", "status", "measured"), rows)


def operators_text(profile: OperatorProfile) -> str:
    """Return the operator types and the nodes that take the longest."""
    types = [
        (
            row.op_type,
            str(row.num_nodes),
            str(row.calls),
            _ms(row.median_us / 1e3),
            f"{100 * row.share:.1f} %",
        )
        for row in profile.by_type
    ]
    nodes = [
        (row.name or NOTHING, row.op_type, _ms(row.median_us / 1e3), f"{100 * row.share:.1f} %")
        for row in profile.nodes[:NUM_NODES]
    ]
    head = (
        f"operators as the runtime runs them, after fusion; medians of {profile.runs} runs under its profiler, which "
        f"slows a run down to {_ms(profile.run_us / 1e3)}"
    )
    longest = text_table((f"longest of {len(profile.nodes)} nodes", "operator", "time", "share"), nodes)
    return "\n".join([head, text_table(OPERATOR_HEADER, types), longest])


def _conditions(result: BenchResult) -> Iterator[str]:
    floor, reference = result.comparison.noise_floor, result.comparison.reference
    conditions, before = reference.conditions, result.models[0].start_up.memory_before_bytes
    batches = sorted({model.latency.conditions.batch_size for model in result.models})
    yield (
        f"runtime: ONNX Runtime {conditions.onnxruntime}, {conditions.provider}, {_threads(reference)}, "
        f"batch {', '.join(map(str, batches))}"
    )
    if len(batches) > 1:
        yield "batches differ: times are those of one run, so compare the items per second"
    interval_ms = result.models[0].latency.conditions.interval_ms
    pauses = "" if interval_ms is None else " (without pauses)"
    if interval_ms is not None:
        late = ", ".join(
            f"{100 * (model.latency.late_share or 0.0):.1f} % of {model.file.label}"
            for model in result.models
        )
        yield f"paced: a run every {_ms(interval_ms)}, asleep between; runs that took longer: {late}"
    yield f"machine: {_machine(result)}"
    yield (
        f"noise floor: {100 * floor:.2f} % (the first model measured twice); "
        f"up to {200 * floor:.2f} % is no difference; "
        "from one bench to the next expect the spread of the blocks"
    )
    yield (
        f"reference model{pauses}: {_ms(reference.p50_ms)}, spread {100 * reference.spread:.1f} % over "
        f"{len(reference.blocks)} blocks: {'stable' if result.comparison.stable else 'UNSTABLE'}"
    )
    if len(result.comparison.attempts) > 1:
        yield f"attempts: {len(result.comparison.attempts)}, each with twice the runs; these figures are of the last"
    if before is not None:
        yield (
            f"peak memory: what the file adds at most to a process that has {quantity(before, 'file_size')} with "
            "Python and ONNX Runtime loaded"
        )


def _threads(latency: ModelLatency) -> str:
    number = latency.conditions.threads
    pinned = "pinned" if latency.conditions.pinned else "not pinned"
    return f"{number} thread{'s' if number > 1 else ''} ({pinned})"


def _machine(result: BenchResult) -> str:
    machine = result.machine
    load = " and ".join(NOTHING if value is None else f"{value:.2f}" for value in result.load)
    quota = "" if machine["cpu_quota"] is None else f", quota {machine['cpu_quota']:g} cores"
    return (
        f"{machine['cpu']}, {machine['logical_cores']} cores{quota}, governor {machine['governor'] or 'n/a'}, "
        f"load {load} before and after"
    )
