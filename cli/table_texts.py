"""Latency tables as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nasdeploy.cli.output import NOTHING, duration, quantity, text_table

if TYPE_CHECKING:
    from nasdeploy.costs.calibration import Accuracy
    from nasdeploy.costs.latency_table import LatencyTable, LayerTime
    from nasdeploy.pipeline.measuring import MeasuredRuntime, MeasureResult

NUM_DEAREST = 5
ACCURACY_HEADER = ("predictor", "mean error", "90 % below", "Spearman")


def measure_text(result: MeasureResult) -> str:
    """Return what was measured under each runtime, how well it predicts, and where it is kept."""
    shape = "x".join(map(str, result.image_shape))
    sizes = ", ".join(map(str, result.image_sizes))
    images = f"images of {shape}" + (
        f" (sides to choose from: {sizes})" if len(result.image_sizes) > 1 else ""
    )
    head = f"space {result.space}: {images}, {result.num_classes} classes; measured on {result.device}"
    return "\n\n".join([head, *("\n".join(_runtime_lines(one)) for one in result.runtimes)])


def _runtime_lines(one: MeasuredRuntime) -> Iterator[str]:
    table = one.table
    yield f"{', '.join(one.profiles)}: {_origin(one)}"
    yield f"  runtime: {table.runtime_key}, ONNX Runtime {table.machine.get('onnxruntime')}"
    yield f"  layers: {_layers(table)}"
    yield (
        f"  networks: {quantity(table.smallest_ms, 'latency')} (smallest) to "
        f"{quantity(table.largest_ms, 'latency')} (largest), CPU time"
    )
    yield f"  predictions of {table.accuracy.num_held_out} networks that it was not fitted on:"
    yield _indented(text_table(ACCURACY_HEADER, accuracy_rows(table.accuracy)))
    yield f"  its {min(NUM_DEAREST, len(table.entries))} dearest layers:"
    yield _indented(text_table(("layer", "input", "alone"), list(map(_layer_row, _dearest(table)))))
    yield f"  kept: {one.found.stored or 'no'}"


def accuracy_rows(accuracy: Accuracy) -> list[tuple[str, ...]]:
    """Return the table, FLOPs and a second measurement as predictors of the same networks."""
    return [
        ("this table", _share(accuracy.mape), _share(accuracy.quantile90), f"{accuracy.spearman:.3f}"),
        ("FLOPs", _share(accuracy.flops_mape), NOTHING, f"{accuracy.flops_spearman:.3f}"),
        ("measured twice", _share(accuracy.ceiling), NOTHING, f"{accuracy.ceiling_spearman:.3f}"),
    ]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _origin(one: MeasuredRuntime) -> str:
    when, seconds = one.table.measured_at, duration(one.table.seconds)
    if one.found.origin == "cache":
        return f"measured {when}, in {seconds}; nothing measured now"
    return f"measured in {seconds}"


def _layers(table: LatencyTable) -> str:
    measured, bridge = len(table.entries) - table.num_reused, table.bridge
    if bridge is None:
        return f"{measured} measured"
    return (
        f"{measured} measured, {table.num_reused} taken from the table of {bridge.measured_at}, "
        f"times x{bridge.drift:.3f} ({bridge.num_layers} layers in both; spread {100 * bridge.spread:.1f} %)"
    )


def _dearest(table: LatencyTable) -> list[LayerTime]:
    return sorted(table.entries, key=lambda entry: -entry.ms)[:NUM_DEAREST]


def _layer_row(entry: LayerTime) -> tuple[str, ...]:
    spec = entry.spec
    details = f"{spec.in_channels} to {spec.out_channels}, {spec.kernel}x{spec.kernel}"
    details += f", stride {spec.stride}" * (spec.stride > 1) + f", expand {spec.expand}" * (spec.expand > 1)
    return (
        f"{spec.kind.replace('_', ' ')} {details}",
        f"{spec.size}x{spec.size}",
        quantity(entry.ms, "latency"),
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
