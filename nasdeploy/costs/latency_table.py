"""The latency of every architecture of a space: layers measured alone, calibrated on whole networks.

Every distinct layer becomes a small ONNX model; they, random whole networks for the calibration and others to
check it are measured in turns in a few fresh processes. Layers that an older table of the same machine and runtime
holds need not be measured again: a few of them are, and say by how much the machine has become slower since.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nasdeploy.costs.calibration import assess, fit, line_through
from nasdeploy.costs.device.timing import Plan
from nasdeploy.costs.latency import ModelLatency, collect
from nasdeploy.costs.machine import Fingerprint
from nasdeploy.costs.sessions import HERE, Answers, Device, Progress, Request, block_requests
from nasdeploy.costs.table import CostTable
from nasdeploy.costs.table_data import (
    MAX_CEILING,
    MAX_MAPE,
    REMEDY,
    SCHEMA,
    Bridge,
    LatencyTable,
    LayerTime,
    NetworkTime,
)
from nasdeploy.costs.table_models import Convert, ModelWriter, split, stratified_architectures
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import Architecture, LayerSpec, SearchSpace

__all__ = [
    "MAX_CEILING",
    "MAX_MAPE",
    "REMEDY",
    "SCHEMA",
    "Bridge",
    "LatencyTable",
    "LayerTime",
    "NetworkTime",
    "PlannedTable",
    "measure_latency_table",
    "plan_latency_table",
]

FloatArray = npt.NDArray[np.float64]

BLOCKS = 5
PLAN = Plan(rounds=5, min_runs=50, min_seconds=0.0, max_seconds=0.25)
NUM_CALIBRATION = 40
NUM_HELD_OUT = 20

MIN_BRIDGE = 16
BRIDGE_SHARE = 0.1
MAX_BRIDGE_SPREAD = 0.05


def measure_latency_table(
    space: SearchSpace,
    runtime: Runtime,
    *,
    flops: CostTable,
    known: LatencyTable | None = None,
    seed: int = 0,
    blocks: int = BLOCKS,
    plan: Plan = PLAN,
    num_calibration: int = NUM_CALIBRATION,
    num_held_out: int = NUM_HELD_OUT,
    convert: Convert | None = None,
    device: Device = HERE,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the latency table of ``space`` under ``runtime`` on ``device``.

    flops: of the space; another predictor of the same networks, for comparison. known: an older table of the same
    runtime and machine, whose layers are not measured again. Where the layers that tell how the machine has changed
    since do not agree, or the table becomes too weak, everything is measured. convert: makes the model of
    ``runtime.precision``; needed unless that is "fp32". Raises ConfigError without it, or when ONNX Runtime cannot
    run a layer.
    """
    started = time.perf_counter()
    planned = plan_latency_table(
        space,
        runtime,
        flops=flops,
        seed=seed,
        blocks=blocks,
        plan=plan,
        num_calibration=num_calibration,
        num_held_out=num_held_out,
        convert=convert,
    )
    if known is not None and (shorter := planned.reusing(known)) is not None:
        table = _carry_out(shorter, device=device, progress=progress, started=started)
        if table.bridge is not None and table.bridge.spread <= MAX_BRIDGE_SPREAD and not table.weakness:
            return table
    return _carry_out(planned, device=device, progress=progress, started=started)


def _carry_out(
    planned: PlannedTable, *, device: Device, progress: Progress | None, started: float
) -> LatencyTable:
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        answers = device.carry_out(planned.requests(Path(folder)), progress=progress)
    took = time.perf_counter() - started if answers.seconds is None else answers.seconds
    return planned.evaluate(answers, seconds=took)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTable:
    """A table before it is measured: what its models are, and what their times will mean.

    The same arguments give the same models, byte for byte, so that times which come from a device can be checked
    against the models that they are said to be of. reused: {layer: its time in an older table}, less those that are
    measured again all the same, ``bridge``.
    """

    space: SearchSpace
    runtime: Runtime
    flops: CostTable
    seed: int
    blocks: int
    plan: Plan
    calibration: tuple[Architecture, ...]
    held_out: tuple[Architecture, ...]
    convert: Convert | None
    reused: Mapping[LayerSpec, LayerTime] = field(default_factory=dict)
    bridge: Mapping[LayerSpec, LayerTime] = field(default_factory=dict)
    reused_from: str = ""

    def reusing(self, known: LatencyTable) -> PlannedTable | None:
        """Return the plan that measures only what ``known`` has not measured; None where it has too little.

        At least 16 known layers, a tenth of them and from the fastest to the slowest, are measured again.
        """
        wanted = set(self.space.distinct_layers())
        measured = sorted(
            (entry for entry in known.entries if entry.spec in wanted and not entry.reused),
            key=lambda entry: entry.ms,
        )
        count = max(MIN_BRIDGE, round(BRIDGE_SHARE * len(measured)))
        if len(measured) < 2 * count:
            return None
        bridge = {int((i + 0.5) * len(measured) / count) for i in range(count)}
        return replace(
            self,
            reused={entry.spec: entry for i, entry in enumerate(measured) if i not in bridge},
            bridge={entry.spec: entry for i, entry in enumerate(measured) if i in bridge},
            reused_from=known.measured_at,
        )

    def requests(self, folder: Path) -> list[Request]:
        """Write the models into ``folder`` and return the requests that measure them."""
        writer = ModelWriter(folder, self.space, self.runtime, seed=self.seed, convert=self.convert)
        paths = writer.write_all(self.calibration, self.held_out, without=self.reused.keys())
        return block_requests(paths, self.runtime, plan=self.plan, blocks=self.blocks, seed=self.seed)

    def evaluate(self, answers: Answers, *, seconds: float, measured_at: str | None = None) -> LatencyTable:
        """Return the table that the answers to :meth:`requests` make.

        seconds: how long they took. measured_at: UTC, ISO 8601; None: now.
        """
        times = collect(answers, self.runtime)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return _evaluate(
            self, times, machine=answers.machine, seconds=seconds, measured_at=measured_at or now
        )


def plan_latency_table(
    space: SearchSpace,
    runtime: Runtime,
    *,
    flops: CostTable,
    seed: int = 0,
    blocks: int = BLOCKS,
    plan: Plan = PLAN,
    num_calibration: int = NUM_CALIBRATION,
    num_held_out: int = NUM_HELD_OUT,
    convert: Convert | None = None,
) -> PlannedTable:
    """Draw the networks of a table; arguments as in :func:`measure_latency_table`. Raises ConfigError."""
    if runtime.precision != "fp32" and convert is None:
        raise ConfigError(
            f"runtime.precision = '{runtime.precision}': latency tables are measured in 'fp32'; expected a "
            "conversion of the models for any other"
        )
    drawn = stratified_architectures(space, num_calibration + num_held_out, np.random.default_rng(seed))
    calibration, held_out = split(space, drawn, num_held_out / (num_calibration + num_held_out))
    return PlannedTable(
        space=space,
        runtime=runtime,
        flops=flops,
        seed=seed,
        blocks=blocks,
        plan=plan,
        calibration=tuple(calibration),
        held_out=tuple(held_out),
        convert=convert,
    )


def _evaluate(
    planned: PlannedTable,
    times: Mapping[str, ModelLatency],
    *,
    machine: Fingerprint,
    seconds: float,
    measured_at: str,
) -> LatencyTable:
    space, runtime = planned.space, planned.runtime
    calibration, held_out = planned.calibration, planned.held_out
    entries, bridge = _entries(planned, times)
    alone = {entry.spec: entry.ms for entry in entries}
    fitted_on = _medians(times, "calibration", len(calibration))
    fitted = fit([space.decode(a) for a in calibration], fitted_on, alone)
    predicted = np.array([fitted.network_ms(space.decode(a), alone) for a in held_out])
    measured = _medians(times, "held-out", len(held_out))
    constant, slope = line_through(_flops(planned, calibration), fitted_on)
    return LatencyTable(
        runtime_key=runtime.key(),
        channel_multiple=runtime.channel_multiple,
        space_name=space.name,
        space_fingerprint=space.fingerprint(),
        machine=machine,
        seed=planned.seed,
        measured_at=measured_at,
        seconds=seconds,
        entries=entries,
        bridge=bridge,
        calibration=fitted,
        accuracy=assess(
            predicted,
            measured,
            again_ms=_medians(times, "again", len(held_out)),
            by_flops_ms=constant + slope * _flops(planned, held_out),
            num_calibration=len(calibration),
        ),
        held_out=tuple(
            NetworkTime(choices=a.choices, predicted_ms=float(p), measured_ms=float(m))
            for a, p, m in zip(held_out, predicted, measured, strict=True)
        ),
        smallest_ms=times["smallest"].cpu_p50_ms,
        largest_ms=times["largest"].cpu_p50_ms,
    )


def _entries(
    planned: PlannedTable, times: Mapping[str, ModelLatency]
) -> tuple[tuple[LayerTime, ...], Bridge | None]:
    """Return the time of every layer of the space, measured now or brought up to date, and what that rests on."""
    layers = planned.space.distinct_layers()
    measured = {
        spec: _layer_time(spec, times[f"layer{i}"], times["call"].cpu_p25_ms)
        for i, spec in enumerate(layers)
        if spec not in planned.reused
    }
    if not planned.reused:
        return tuple(measured.values()), None
    ratios = [measured[spec].ms / old.ms for spec, old in planned.bridge.items()]
    low, drift, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    updated = {spec: replace(old, ms=drift * old.ms, reused=True) for spec, old in planned.reused.items()}
    return tuple((measured | updated)[spec] for spec in layers), Bridge(
        num_layers=len(ratios),
        drift=drift,
        spread=(high - low) / drift,
        measured_at=planned.reused_from,
    )


def _flops(planned: PlannedTable, networks: Sequence[Architecture]) -> FloatArray:
    return planned.flops.of(np.array([architecture.choices for architecture in networks]))


def _layer_time(spec: LayerSpec, latency: ModelLatency, call_ms: float) -> LayerTime:
    ms = latency.cpu_p25_ms
    # Never below a tenth: the cheapest layers take hardly longer than the call itself.
    return LayerTime(spec=spec, ms=max(ms - call_ms, 0.1 * ms), spread=latency.spread)


def _medians(times: Mapping[str, ModelLatency], kind: str, count: int) -> FloatArray:
    return np.array([times[f"{kind}{i}"].cpu_p50_ms for i in range(count)])
