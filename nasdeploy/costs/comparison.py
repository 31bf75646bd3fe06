"""Files against each other: in the same blocks, beside a second copy of the first and a reference model.

The second copy tells how far two measurements of one file lie apart (the noise floor); the reference model, which
ships with the product, tells whether the machine holds still. What is in doubt is measured again with twice the runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nasdeploy.costs.certification import MIN_BLOCKS, instability, is_unstable
from nasdeploy.costs.device.timing import MIN_RUNS, Plan
from nasdeploy.costs.latency import (
    ModelLatency,
    block_ratios,
    collect,
    noise_floor,
    plan_of_a_block,
    write_reference_model,
)
from nasdeploy.costs.machine import Fingerprint
from nasdeploy.costs.sessions import HERE, Device, Progress, Shapes, block_requests
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime, format_quantity

__all__ = [
    "FULL",
    "QUICK",
    "REFERENCE",
    "Attempt",
    "BenchProtocol",
    "Comparison",
    "Relative",
    "compare",
    "relative",
]

Verdict = Literal["faster", "slower", "no difference"]

# No file can have a name with this character.
AGAIN, REFERENCE = "\0again", "\0reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchProtocol:
    """How long each file is measured, over all blocks. num_starts: fresh processes for its start alone.

    interval_ms: a run begins every so often and the process sleeps between them; None: one right after the other.
    attempts: how often at most all is measured, each time with twice the runs and seconds of the time before; the
    last one counts. max_seconds stays.
    """

    blocks: int = MIN_BLOCKS
    min_runs: int = 1000
    min_seconds: float = 10.0
    max_seconds: float = 60.0
    num_starts: int = 5
    interval_ms: float | None = None
    attempts: int = 1

    def plan(self, *, effort: int = 1) -> Plan:
        """Return what one block does. effort: factor on runs and seconds.

        Raises ConfigError for an interval that leaves too few runs for a median.
        """
        longest_ms = 1e3 * self.max_seconds / self.blocks / MIN_RUNS
        if self.interval_ms is not None and not 0.0 < self.interval_ms <= longest_ms:
            raise ConfigError(
                f"interval = {format_quantity(self.interval_ms, 'latency')}: expected more than 0 and at most "
                f"{format_quantity(longest_ms, 'latency')}: {MIN_RUNS} runs in each of {self.blocks} blocks of "
                f"{self.max_seconds / self.blocks:g} s"
            )
        return plan_of_a_block(
            self.blocks,
            min_runs=effort * self.min_runs,
            min_seconds=effort * self.min_seconds,
            max_seconds=self.max_seconds,
            interval_ms=self.interval_ms,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as plain data."""
        return asdict(self)


FULL = BenchProtocol(attempts=3)
# A quick look stays quick: what is in doubt is said, not measured again.
QUICK = BenchProtocol(min_runs=100, min_seconds=1.0, num_starts=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """A file against the first one. ratio: its time over that of the first, median of the blocks."""

    ratio: float
    smallest_ratio: float
    largest_ratio: float
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return asdict(self)


def relative(model: ModelLatency, base: ModelLatency, *, floor: float) -> Relative:
    """Return how ``model`` compares with ``base``, block by block; up to twice the noise floor is no difference."""
    ratios = block_ratios(model, base)
    ratio = float(np.median(ratios))
    verdict: Verdict = "faster" if ratio < 1.0 else "slower"
    if abs(ratio - 1.0) <= 2.0 * floor:
        verdict = "no difference"
    return Relative(ratio=ratio, smallest_ratio=min(ratios), largest_ratio=max(ratios), verdict=verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One measurement of everything. doubt: why it was not enough; "" for one that was."""

    effort: int
    reference_spread: float
    contended_blocks: int
    doubt: str

    def to_json(self) -> dict[str, Any]:
        """Return the attempt as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was measured together. again: the first model under another name. reference: always without pauses.

    machine: that measured. loads: how many processes wanted a core in the minute before the end of each block, None
    where the system does not tell. attempts: the measurements that were made; the figures are those of the last one.
    """

    models: Mapping[str, ModelLatency]
    again: ModelLatency
    reference: ModelLatency
    machine: Fingerprint = field(default_factory=dict)
    loads: tuple[float | None, ...] = ()
    attempts: tuple[Attempt, ...] = ()

    @property
    def noise_floor(self) -> float:
        """Relative gap between the two measurements of the first model."""
        return noise_floor(self._first, self.again)

    @property
    def stable(self) -> bool:
        """Whether the reference model took about the same time in every block."""
        return not is_unstable(self.reference)

    @property
    def flagged(self) -> bool:
        """Whether anything speaks against the machine: instability, or a block in which a rival took the core."""
        return not self.stable or any(latency.contended_blocks for latency in self.models.values())

    @property
    def instability(self) -> str:
        """One line that says by how much the machine is unstable; empty where it is not."""
        return instability(self.reference)

    @property
    def contention(self) -> str:
        """One line that says which files a rival disturbed in most of their blocks; empty where none was."""
        found = {name: latency for name, latency in self.models.items() if latency.is_contended}
        if not found:
            return ""
        worst = max(found, key=lambda name: found[name].wall_over_cpu)
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        blocks = f"{found[worst].contended_blocks} of {len(found[worst].blocks)} blocks"
        return (
            f"contended: another program took the core from {worst}{others} in {blocks} (wall time "
            f"{found[worst].wall_over_cpu:.2f} x CPU time): wall times hold some of its time; stop other programs, or "
            "bind them to other cores (taskset), and measure again"
        )

    @property
    def doubt(self) -> str:
        """Why all of it should be measured again; empty where it need not be."""
        return self.instability or self.contention

    def relative(self, name: str) -> Relative:
        """Return how a model compares with the first one."""
        return relative(self.models[name], self._first, floor=self.noise_floor)

    @property
    def _first(self) -> ModelLatency:
        return next(iter(self.models.values()))


def compare(
    models: Mapping[str, Path],
    runtime: Runtime,
    *,
    protocol: BenchProtocol = FULL,
    seed: int = 0,
    shapes: Shapes | None = None,
    device: Device = HERE,
    progress: Progress | None = None,
    doubts: Callable[[Comparison], str] = lambda comparison: comparison.doubt,
    again: Callable[[str], None] = lambda doubt: None,
) -> Comparison:
    """Measure ``models``, the first of them twice, and the reference model in the same blocks.

    doubts: returns why all of it should be measured again, "" where it need not be; again: called with that before it
    is. Raises ConfigError for an interval that leaves too few runs, and as
    :meth:`nasdeploy.costs.sessions.Device.carry_out`.
    """
    attempts: list[Attempt] = []
    while True:
        effort = 2 ** len(attempts)
        found = _measure(
            models,
            runtime,
            protocol=protocol,
            effort=effort,
            seed=seed + protocol.blocks * len(attempts),
            shapes=dict(shapes or {}),
            device=device,
            progress=progress,
        )
        doubt = doubts(found)
        attempts.append(
            Attempt(
                effort=effort,
                reference_spread=found.reference.spread,
                contended_blocks=sum(latency.contended_blocks for latency in found.models.values()),
                doubt=doubt,
            )
        )
        if not doubt or len(attempts) >= protocol.attempts:
            return replace(found, attempts=tuple(attempts))
        again(doubt)


def _measure(
    models: Mapping[str, Path],
    runtime: Runtime,
    *,
    protocol: BenchProtocol,
    effort: int,
    seed: int,
    shapes: Shapes,
    device: Device,
    progress: Progress | None,
) -> Comparison:
    first = next(iter(models))
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        reference = Path(folder, "reference.onnx")
        write_reference_model(reference, batch_size=runtime.batch_size)
        requests = block_requests(
            {**models, AGAIN: models[first], REFERENCE: reference},
            runtime,
            plan=protocol.plan(effort=effort),
            blocks=protocol.blocks,
            seed=seed,
            shapes={**shapes, **({AGAIN: shapes[first]} if first in shapes else {})},
        )
        # Paced, a small network takes many times as long, and how many depends on who used the caches: that the machine
        # holds still can only be told from runs without pauses.
        requests = [{**request, "unpaced": [REFERENCE]} for request in requests]
        answers = device.carry_out(requests, progress=progress)
    measured = collect(answers, runtime, interval_ms=protocol.interval_ms)
    unpaced = replace(measured[REFERENCE].conditions, interval_ms=None)
    return Comparison(
        models={name: measured[name] for name in models},
        again=measured[AGAIN],
        reference=replace(measured[REFERENCE], conditions=unpaced),
        machine=answers.machine,
        loads=tuple(result["load"][0] if result.get("load") else None for result in answers.results),
    )
