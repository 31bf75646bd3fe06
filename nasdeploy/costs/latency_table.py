"""The latency of every architecture of a space: layers measured alone, calibrated on whole networks.

Every distinct layer becomes a small ONNX model; they, random whole networks for the calibration and others to
check it are measured in turns in a few fresh processes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.calibration import Accuracy, Calibration, assess, fit
from nasdeploy.costs.device.timing import Plan
from nasdeploy.costs.latency import ModelLatency, collect
from nasdeploy.costs.machine import Fingerprint, describe_difference
from nasdeploy.costs.sessions import HERE, Answers, Device, Progress, Request, block_requests
from nasdeploy.costs.table import CostTable, tabulate
from nasdeploy.costs.table_models import Convert, ModelWriter, split, stratified_architectures
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import Architecture, LayerSpec, SearchSpace

__all__ = [
    "REMEDY",
    "SCHEMA",
    "LatencyTable",
    "LayerTime",
    "NetworkTime",
    "PlannedTable",
    "measure_latency_table",
    "plan_latency_table",
]

SCHEMA = "nasdeploy/latency-table/1"
REMEDY = "nasdeploy build --no-resume"
BLOCKS = 5
PLAN = Plan(rounds=5, min_runs=50, min_seconds=0.0, max_seconds=0.25)
NUM_CALIBRATION = 40
NUM_HELD_OUT = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """A layer alone in a session, without the session's call. spread: of the blocks, relative."""

    spec: LayerSpec
    ms: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTime:
    """A whole network that the calibration did not see."""

    choices: tuple[int, ...]
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """The measured latency of a space on one machine and runtime; times in ms of one run of a batch.

    smallest_ms, largest_ms: the anchors of percentage caps, measured beside the layers.
    """

    runtime_key: str
    channel_multiple: int
    space_name: str
    space_fingerprint: str
    machine: Mapping[str, str | int | float | None]
    seed: int
    seconds: float
    entries: tuple[LayerTime, ...]
    calibration: Calibration
    accuracy: Accuracy
    held_out: tuple[NetworkTime, ...]
    smallest_ms: float
    largest_ms: float

    def cost_table(self, space: SearchSpace) -> CostTable:
        """Return the latency of every architecture in ms. Raises ConfigError for another space."""
        self._check("search space", self.space_fingerprint, space.fingerprint())
        alone = {entry.spec: entry.ms for entry in self.entries}
        return tabulate(
            space,
            lambda spec: self.calibration.layer_ms(spec, alone[spec]),
            constant=self.calibration.constant_ms,
        )

    def check_matches(
        self, space: SearchSpace, runtime: Runtime, *, machine: Mapping[str, str | int | float | None]
    ) -> None:
        """Raise ConfigError unless the table was measured for this space, runtime and machine."""
        self._check("search space", self.space_fingerprint, space.fingerprint())
        self._check("runtime", self.runtime_key, runtime.key())
        self._check("runtime.channel_multiple", self.channel_multiple, runtime.channel_multiple)
        if difference := describe_difference(self.machine, machine):
            raise ConfigError(
                f"latency table: measured on another machine ({difference}); {REMEDY} makes a new one"
            )

    def is_of(self, machine: Mapping[str, str | int | float | None]) -> bool:
        """Return whether the table was measured on ``machine``."""
        return not describe_difference(self.machine, machine)

    def _check(self, what: str, stored: object, here: object) -> None:
        if stored != here:
            raise ConfigError(
                f"latency table: measured for {what} {stored}; expected {here}; {REMEDY} makes a new one"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Return what :meth:`to_json` gave. Raises ConfigError for another schema or wrong keys."""
        if data.get("schema") != SCHEMA:
            raise ConfigError(f"latency table: schema {data.get('schema')!r}; expected '{SCHEMA}'")
        rest = {key: value for key, value in data.items() if key != "schema"}
        try:
            parts = {
                "entries": tuple(
                    LayerTime(**{**row, "spec": LayerSpec(**row["spec"])}) for row in data["entries"]
                ),
                "calibration": Calibration(**data["calibration"]),
                "accuracy": Accuracy(**data["accuracy"]),
                "held_out": tuple(
                    NetworkTime(**{**row, "choices": tuple(row["choices"])}) for row in data["held_out"]
                ),
            }
            return cls(**{**rest, **parts})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"latency table: {error}; {REMEDY} makes a new one") from error


def measure_latency_table(
    space: SearchSpace,
    runtime: Runtime,
    *,
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

    convert: makes the model of ``runtime.precision``; needed unless that is "fp32". Raises ConfigError
    without it, or when ONNX Runtime cannot run a layer.
    """
    started = time.perf_counter()
    planned = plan_latency_table(
        space,
        runtime,
        seed=seed,
        blocks=blocks,
        plan=plan,
        num_calibration=num_calibration,
        num_held_out=num_held_out,
        convert=convert,
    )
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        requests = planned.requests(Path(folder))
        answers = device.carry_out(requests, progress=progress)
    return planned.evaluate(answers, seconds=time.perf_counter() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTable:
    """A table before it is measured: what its models are, and what their times will mean.

    The same arguments give the same models, byte for byte, so that times which come from a device can be checked
    against the models that they are said to be of.
    """

    space: SearchSpace
    runtime: Runtime
    seed: int
    blocks: int
    plan: Plan
    calibration: tuple[Architecture, ...]
    held_out: tuple[Architecture, ...]
    convert: Convert | None

    def requests(self, folder: Path) -> list[Request]:
        """Write the models into ``folder`` and return the requests that measure them."""
        writer = ModelWriter(folder, self.space, self.runtime, seed=self.seed, convert=self.convert)
        paths = writer.write_all(self.calibration, self.held_out)
        return block_requests(paths, self.runtime, plan=self.plan, blocks=self.blocks, seed=self.seed)

    def evaluate(self, answers: Answers, *, seconds: float) -> LatencyTable:
        """Return the table that the answers to :meth:`requests` make; ``seconds``: how long they took."""
        times = collect(answers, self.runtime)
        return _evaluate(self, times, machine=answers.machine, seconds=seconds)


def plan_latency_table(
    space: SearchSpace,
    runtime: Runtime,
    *,
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
        seed=seed,
        blocks=blocks,
        plan=plan,
        calibration=tuple(calibration),
        held_out=tuple(held_out),
        convert=convert,
    )


def _evaluate(
    planned: PlannedTable, times: Mapping[str, ModelLatency], *, machine: Fingerprint, seconds: float
) -> LatencyTable:
    space, runtime = planned.space, planned.runtime
    calibration, held_out = planned.calibration, planned.held_out
    entries = tuple(
        _layer_time(spec, times[f"layer{i}"], times["call"].cpu_p25_ms)
        for i, spec in enumerate(space.distinct_layers())
    )
    alone = {entry.spec: entry.ms for entry in entries}
    fitted = fit(
        [space.decode(a) for a in calibration], _medians(times, "calibration", len(calibration)), alone
    )
    predicted = np.array([fitted.network_ms(space.decode(a), alone) for a in held_out])
    measured = _medians(times, "held-out", len(held_out))
    again = _medians(times, "again", len(held_out))
    return LatencyTable(
        runtime_key=runtime.key(),
        channel_multiple=runtime.channel_multiple,
        space_name=space.name,
        space_fingerprint=space.fingerprint(),
        machine=machine,
        seed=planned.seed,
        seconds=seconds,
        entries=entries,
        calibration=fitted,
        accuracy=assess(predicted, measured, again, num_calibration=len(calibration)),
        held_out=tuple(
            NetworkTime(choices=a.choices, predicted_ms=float(p), measured_ms=float(m))
            for a, p, m in zip(held_out, predicted, measured, strict=True)
        ),
        smallest_ms=times["smallest"].cpu_p50_ms,
        largest_ms=times["largest"].cpu_p50_ms,
    )


def _layer_time(spec: LayerSpec, latency: ModelLatency, call_ms: float) -> LayerTime:
    ms = latency.cpu_p25_ms
    # Never below a tenth: the cheapest layers take hardly longer than the call itself.
    return LayerTime(spec=spec, ms=max(ms - call_ms, 0.1 * ms), spread=latency.spread)


def _medians(
    times: Mapping[str, ModelLatency], kind: str, count: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([times[f"{kind}{i}"].cpu_p50_ms for i in range(count)])
