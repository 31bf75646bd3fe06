"""The latency of every architecture of a space: layers measured alone, calibrated on whole networks.

Every distinct layer becomes a small ONNX model; they, random whole networks for the calibration and others to
check it are measured in turns in a few fresh processes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from nasdeploy.costs.calibration import Accuracy, Calibration, assess, fit
from nasdeploy.costs.graphs import (
    INPUT_NAME,
    IR_VERSION,
    OUTPUT_NAME,
    chain_graph,
    network_graph,
    random_weights,
    serialise,
)
from nasdeploy.costs.latency import ModelLatency, Progress, collect
from nasdeploy.costs.machine import describe_difference, machine_fingerprint
from nasdeploy.costs.session_worker import Plan
from nasdeploy.costs.sessions import run_block
from nasdeploy.costs.table import CostTable, tabulate
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import Architecture, LayerSpec, SearchSpace

__all__ = [
    "REMEDY",
    "SCHEMA",
    "LatencyTable",
    "LayerTime",
    "NetworkTime",
    "measure_latency_table",
    "stratified_architectures",
]

SCHEMA = "nasdeploy/latency-table/1"
REMEDY = "nasdeploy build --no-resume"
BLOCKS = 5
PLAN = Plan(rounds=5, min_runs=50, min_seconds=0.0, max_seconds=0.25)
NUM_CALIBRATION = 40
NUM_HELD_OUT = 20
MIN_ARCHITECTURES = 9
MAX_TILT = 4.0

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]
"""Makes the model of the profile's precision from the one in float32."""


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
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the latency table of ``space`` under ``runtime`` on this machine.

    convert: makes the model of ``runtime.precision``; needed unless that is "fp32". Raises ConfigError
    without it, or when ONNX Runtime cannot run a layer.
    """
    if runtime.precision != "fp32" and convert is None:
        raise ConfigError(
            f"runtime.precision = '{runtime.precision}': latency tables are measured in 'fp32'; expected a "
            "conversion of the models for any other"
        )
    started = time.perf_counter()
    drawn = stratified_architectures(space, num_calibration + num_held_out, np.random.default_rng(seed))
    calibration, held_out = _split(space, drawn, num_held_out / (num_calibration + num_held_out))
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        writer = _Writer(Path(folder), space, runtime, seed=seed, convert=convert)
        paths = writer.write_all(calibration, held_out)
        results = []
        for b in range(blocks):
            results.append(run_block(paths, runtime, plan=plan, seed=seed + b))
            if progress:
                progress((b + 1) / blocks)
    times = collect(results, runtime)
    return _evaluate(space, runtime, times, calibration, held_out, seed=seed, started=started)


def stratified_architectures(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """Return ``count`` distinct random architectures, small ones first, large ones last.

    Uniform choices would nearly all be of middle size. Candidate c of C is drawn with a probability that
    grows as exp(t · c / (C - 1)); the tilt t runs evenly from -4 to 4 over the list.
    """
    found: dict[Architecture, None] = {}
    for tilt in np.linspace(-MAX_TILT, MAX_TILT, count):
        for _ in range(100):  # a small space may not hold ``count`` distinct ones
            architecture = _tilted(space, float(tilt), rng)
            if architecture not in found:
                break
        found[architecture] = None
    return list(found)


def _split(
    space: SearchSpace, drawn: Sequence[Architecture], share: float
) -> tuple[list[Architecture], list[Architecture]]:
    """Divide into (calibration, held out) at even distances, so that both parts hold all sizes."""
    if len(drawn) < MIN_ARCHITECTURES:
        raise ConfigError(
            f"space '{space.name}': only {len(drawn)} architectures found to measure; "
            f"expected {MIN_ARCHITECTURES} or more for a latency table"
        )
    num = max(3, round(share * len(drawn)))
    chosen = {int((i + 0.5) * len(drawn) / num) for i in range(num)}
    parts = [[a for i, a in enumerate(drawn) if (i in chosen) == held] for held in (False, True)]
    return parts[0], parts[1]


def _tilted(space: SearchSpace, tilt: float, rng: np.random.Generator) -> Architecture:
    choices = []
    for num in space.num_candidates():
        weights = np.exp(tilt * np.arange(num) / max(num - 1, 1))
        choices.append(int(rng.choice(num, p=weights / weights.sum())))
    return Architecture(tuple(choices))


class _Writer:
    """Writes the models that a table is measured from."""

    def __init__(
        self, folder: Path, space: SearchSpace, runtime: Runtime, *, seed: int, convert: Convert | None
    ) -> None:
        self.folder = folder
        self.space = space
        self.runtime = runtime
        self.convert = convert
        self.rng = np.random.default_rng(seed)

    def write_all(
        self, calibration: Sequence[Architecture], held_out: Sequence[Architecture]
    ) -> dict[str, Path]:
        """Return {name: path} of all models; held-out networks twice, for the ceiling of any prediction."""
        mask = self.space.candidate_mask(self.runtime.channel_multiple)
        paths = {f"layer{i}": self._layer(spec) for i, spec in enumerate(self.space.distinct_layers())}
        paths |= {f"calibration{i}": self._network(a) for i, a in enumerate(calibration)}
        paths |= {f"held-out{i}": self._network(a) for i, a in enumerate(held_out)}
        paths |= {f"again{i}": paths[f"held-out{i}"] for i in range(len(held_out))}
        paths["smallest"] = self._network(self.space.smallest(mask))
        paths["largest"] = self._network(self.space.largest(mask))
        paths["call"] = self._write(_call_graph(self.runtime.opset))
        return paths

    def _layer(self, spec: LayerSpec) -> Path:
        layers = [(spec.kind, spec, random_weights(spec, self.rng))]
        return self._write(chain_graph(layers, batch_size=self.runtime.batch_size, opset=self.runtime.opset))

    def _network(self, architecture: Architecture) -> Path:
        image_shape = self.space.input_shape(architecture)
        layers = [
            (name, spec, random_weights(spec, self.rng))
            for name, spec in self.space.named_layers(architecture)
        ]
        return self._write(
            network_graph(
                layers,
                image_shape=image_shape,
                mean=[127.5] * image_shape[0],
                scale=[1 / 127.5] * image_shape[0],
                batch_size=self.runtime.batch_size,
                opset=self.runtime.opset,
            )
        )

    def _write(self, model: onnx.ModelProto) -> Path:
        path = self.folder / f"{sum(1 for _ in self.folder.iterdir())}.onnx"
        path.write_bytes(serialise(self.convert(model) if self.convert else model))
        return path


def _call_graph(opset: int) -> onnx.ModelProto:
    """Return the least work that a session can do: what a layer alone pays on top of its own time."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (INPUT_NAME, OUTPUT_NAME)
    ]
    node = helper.make_node("Neg", [INPUT_NAME], [OUTPUT_NAME])
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "call", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSION,
    )
    return model


def _evaluate(
    space: SearchSpace,
    runtime: Runtime,
    times: Mapping[str, ModelLatency],
    calibration: Sequence[Architecture],
    held_out: Sequence[Architecture],
    *,
    seed: int,
    started: float,
) -> LatencyTable:
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
        machine=machine_fingerprint(),
        seed=seed,
        seconds=time.perf_counter() - started,
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
