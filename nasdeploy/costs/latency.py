"""Latency of ONNX files: fresh processes, several models in turns, statistics block by block.

A *block* is one fresh process that measures every model. Times inside one process are not independent (two
processes of one file differ by more than any interval computed inside one of them), so blocks are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.device.timing import Plan
from nasdeploy.costs.graphs import chain_graph, random_weights, serialise
from nasdeploy.costs.sessions import HERE, Answers, Device, Progress, Shapes, block_requests
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import LayerSpec

__all__ = [
    "SCHEMA",
    "BlockStats",
    "Conditions",
    "ModelLatency",
    "block_ratios",
    "collect",
    "measure_models",
    "noise_floor",
    "plan_of_a_block",
    "write_reference_model",
]

SCHEMA = "nasdeploy/latency/1"
ROUNDS_PER_BLOCK = 8
CONTENDED_RATIO = 1.05

Percentiles = Mapping[int, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How a model was run.

    pinned: bound to as many cores as threads. spinning: idle threads wait busily. shared_pool: the sessions
    of a process share their threads. interval_ms: a run began every so often, and the process slept between them;
    None: one right after the other.
    """

    provider: str
    threads: int
    batch_size: int
    pinned: bool
    spinning: bool
    shared_pool: bool
    onnxruntime: str
    interval_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStats:
    """One model in one process; times in ms for one run of a batch.

    wall_ms, cpu_ms: percentiles 50, 90, 95, 99; None for one that n runs cannot support. CPU time is that of
    the calling thread. peak_memory_bytes: of the process with all its models. late: runs that took longer than the
    interval, where there is one.
    """

    n: int
    min_ms: float
    mean_ms: float
    wall_ms: Percentiles
    cpu_ms: Percentiles
    cpu_p25_ms: float
    wall_over_cpu: float
    session_ms: float
    first_run_ms: float
    peak_memory_bytes: int | None
    late: int = 0

    @property
    def contended(self) -> bool:
        """Whether a rival took the core for more than 5 % of the time."""
        return self.wall_over_cpu > CONTENDED_RATIO

    def contended_at(self, percentile: int) -> bool:
        """Whether a rival can be seen in this percentile: a short one spoils a p99, but not a median."""
        wall, cpu = self.wall_ms[percentile], self.cpu_ms[percentile]
        return wall is not None and cpu is not None and wall > CONTENDED_RATIO * cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLatency:
    """One model in several blocks; a statistic of the model is the median of its blocks."""

    conditions: Conditions
    blocks: tuple[BlockStats, ...]

    @property
    def n(self) -> int:
        """Runs in all blocks."""
        return sum(block.n for block in self.blocks)

    @property
    def p50_ms(self) -> float:
        """Median of the blocks' medians, wall clock."""
        return _median([_present(block.wall_ms[50]) for block in self.blocks])

    @property
    def p50_range_ms(self) -> tuple[float, float]:
        """Smallest and largest of the blocks' medians, wall clock."""
        medians = [_present(block.wall_ms[50]) for block in self.blocks]
        return min(medians), max(medians)

    @property
    def mean_ms(self) -> float:
        """Median of the blocks' means, wall clock."""
        return _median([block.mean_ms for block in self.blocks])

    @property
    def min_ms(self) -> float:
        """Shortest run of all blocks, wall clock."""
        return min(block.min_ms for block in self.blocks)

    @property
    def contended_blocks(self) -> int:
        """Blocks in which a rival took the core for more than 5 % of the time."""
        return sum(block.contended for block in self.blocks)

    @property
    def is_contended(self) -> bool:
        """Whether a rival took the core in most blocks: then the wall times are not the model's."""
        return 2 * self.contended_blocks > len(self.blocks)

    @property
    def wall_over_cpu(self) -> float:
        """Wall time over CPU time, of all runs of a block, median of the blocks."""
        return _median([block.wall_over_cpu for block in self.blocks])

    @property
    def late_share(self) -> float | None:
        """Share of the runs that took longer than the interval; None where runs followed each other at once."""
        if self.conditions.interval_ms is None:
            return None
        return sum(block.late for block in self.blocks) / self.n

    @property
    def cpu_p50_ms(self) -> float:
        """Median of the blocks' medians, CPU time: what models are compared by."""
        return _median([_present(block.cpu_ms[50]) for block in self.blocks])

    @property
    def cpu_p25_ms(self) -> float:
        """Median of the blocks' lower quartiles, CPU time: what the table of layers is made of."""
        return _median([block.cpu_p25_ms for block in self.blocks])

    @property
    def spread(self) -> float:
        """Largest block median over the smallest, minus 1, by CPU time.

        Each block is a process of its own: this is what to expect between two benches of one file, too.
        """
        medians = [_present(block.cpu_ms[50]) for block in self.blocks]
        return max(medians) / min(medians) - 1.0

    @property
    def cold_start_ms(self) -> float:
        """Creation of the session and its first run."""
        return _median([block.session_ms + block.first_run_ms for block in self.blocks])

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return 1e3 * self.conditions.batch_size / self.p50_ms

    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest resident size of any block's process; None where the system does not tell."""
        peaks = [block.peak_memory_bytes for block in self.blocks if block.peak_memory_bytes is not None]
        return max(peaks, default=None)

    def percentile_ms(self, percentile: int) -> float | None:
        """Return the median of the blocks' wall percentiles (50, 90, 95, 99), None where runs are too few."""
        values = [block.wall_ms[percentile] for block in self.blocks]
        return None if None in values else _median([_present(value) for value in values])

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain data, with the summary that readers look for."""
        return {
            "schema": SCHEMA,
            "conditions": asdict(self.conditions),
            "summary": {
                "n": self.n,
                "p50_ms": self.p50_ms,
                "spread": self.spread,
                **{f"p{q}_ms": self.percentile_ms(q) for q in (90, 95, 99)},
                "cpu_p50_ms": self.cpu_p50_ms,
                "cold_start_ms": self.cold_start_ms,
                "images_per_second": self.images_per_second,
                "peak_memory_bytes": self.peak_memory_bytes,
                "contended_blocks": self.contended_blocks,
            },
            "blocks": [_block_row(block) for block in self.blocks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelLatency:
        """Return what :meth:`to_json` gave. Raises ConfigError for another schema or missing keys."""
        if data.get("schema") != SCHEMA:
            raise ConfigError(f"latency: schema {data.get('schema')!r}; expected '{SCHEMA}'")
        try:
            blocks = tuple(_block(row) for row in data["blocks"])
            return cls(conditions=Conditions(**data["conditions"]), blocks=blocks)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"latency: {error!r}; expected what nasdeploy wrote") from error


def measure_models(
    models: Mapping[str, Path],
    runtime: Runtime,
    *,
    blocks: int = 5,
    min_runs: int = 100,
    min_seconds: float = 1.0,
    max_seconds: float = 60.0,
    seed: int = 0,
    shapes: Shapes | None = None,
    device: Device = HERE,
    progress: Progress | None = None,
) -> dict[str, ModelLatency]:
    """Return the latency of each model, measured together in ``blocks`` fresh processes of ``device``.

    min_runs, min_seconds, max_seconds: for each model, over all blocks; the full protocol is 1000 runs, 10 s
    and 60 s. shapes: of inputs; others get the batch size for what their file leaves open. Within a block the
    models run in turns, in random order. Raises as :meth:`nasdeploy.costs.sessions.Device.carry_out`.
    """
    plan = plan_of_a_block(blocks, min_runs=min_runs, min_seconds=min_seconds, max_seconds=max_seconds)
    requests = block_requests(models, runtime, plan=plan, blocks=blocks, seed=seed, shapes=shapes)
    return collect(device.carry_out(requests, progress=progress), runtime)


def plan_of_a_block(
    blocks: int, *, min_runs: int, min_seconds: float, max_seconds: float, interval_ms: float | None = None
) -> Plan:
    """Return what one of ``blocks`` processes does so that all of them together do what is asked."""
    return Plan(
        rounds=ROUNDS_PER_BLOCK,
        min_runs=-(-min_runs // blocks),
        min_seconds=min_seconds / blocks,
        max_seconds=max_seconds / blocks,
        interval_s=(interval_ms or 0.0) / 1e3,
    )


def collect(
    answers: Answers, runtime: Runtime, *, interval_ms: float | None = None
) -> dict[str, ModelLatency]:
    """Return the latency of each model from the answers to :func:`~nasdeploy.costs.sessions.block_requests`.

    interval_ms: that of their plan.
    """
    results = answers.results
    first = results[0]
    conditions = Conditions(
        provider=runtime.provider,
        threads=runtime.threads,
        batch_size=runtime.batch_size,
        pinned=first["pinned"],
        spinning=first["spinning"],
        shared_pool=first["shared_pool"],
        onnxruntime=first["onnxruntime"],
        interval_ms=interval_ms,
    )
    return {
        name: ModelLatency(
            # A file with a fixed batch is run with its own, whatever the profile says.
            conditions=replace(conditions, batch_size=first["models"][name]["batch_size"]),
            blocks=tuple(_measured_block(result, name) for result in results),
        )
        for name in first["models"]
    }


def _measured_block(result: Mapping[str, Any], name: str) -> BlockStats:
    row = {key: value for key, value in result["models"][name].items() if key != "batch_size"}
    return _block({**row, "peak_memory_bytes": result["peak_memory_bytes"]})


def block_ratios(model: ModelLatency, base: ModelLatency) -> list[float]:
    """Return model / base for each block, by median CPU time; both were measured in the same blocks.

    Blocks differ by far more than two models within one: what slows a block down slows both of them.
    """
    return [
        _present(one.cpu_ms[50]) / _present(other.cpu_ms[50])
        for one, other in zip(model.blocks, base.blocks, strict=True)
    ]


def noise_floor(first: ModelLatency, again: ModelLatency) -> float:
    """Return the relative gap between two measurements of one model: a difference must exceed it twice.

    That of the worst block: the gap of the medians is often next to nothing by luck.
    """
    return max(abs(ratio - 1.0) for ratio in block_ratios(again, first))


# A fixed small network: where its block medians spread by more than 5 %, the machine is not fit to certify.
REFERENCE_LAYERS = (
    LayerSpec(kind="stem", in_channels=3, out_channels=16, size=32, kernel=3, stride=2),
    LayerSpec(
        kind="inverted_residual", in_channels=16, out_channels=32, size=16, kernel=3, stride=2, expand=4
    ),
    LayerSpec(kind="inverted_residual", in_channels=32, out_channels=32, size=8, kernel=5, expand=4),
    LayerSpec(kind="classifier", in_channels=32, out_channels=10, size=8),
)


def write_reference_model(path: Path, *, batch_size: int = 1) -> None:
    """Write the reference model: always the same bytes."""
    rng = np.random.default_rng(0)
    layers = [(f"layer{i}", spec, random_weights(spec, rng)) for i, spec in enumerate(REFERENCE_LAYERS)]
    path.write_bytes(serialise(chain_graph(layers, batch_size=batch_size)))


def _block_row(block: BlockStats) -> dict[str, Any]:
    row = asdict(block)
    return row | {key: {f"p{q}": value for q, value in row[key].items()} for key in ("wall_ms", "cpu_ms")}


def _block(row: Mapping[str, Any]) -> BlockStats:
    percentiles = {
        key: {int(q.removeprefix("p")): value for q, value in row[key].items()}
        for key in ("wall_ms", "cpu_ms")
    }
    return BlockStats(**{**row, **percentiles})


def _present(value: float | None) -> float:
    if value is None:
        raise ValueError("a median needs at least 5 runs")
    return value


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
