"""Files against each other: in the same blocks, beside a second copy of the first and a reference model.

The second copy tells how far two measurements of one file lie apart (the noise floor); the reference model, which
ships with the product, tells whether the machine holds still.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nasdeploy.costs.certification import MIN_BLOCKS, instability, is_unstable
from nasdeploy.costs.latency import (
    ModelLatency,
    block_ratios,
    measure_models,
    noise_floor,
    write_reference_model,
)
from nasdeploy.costs.sessions import HERE, Device, Progress, Shapes
from nasdeploy.profiles import Runtime

__all__ = ["FULL", "QUICK", "BenchProtocol", "Comparison", "Relative", "compare", "relative"]

Verdict = Literal["faster", "slower", "no difference"]

# A name of a model never begins with a space.
AGAIN, REFERENCE = " again", " reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchProtocol:
    """How long each file is measured, over all blocks. num_starts: fresh processes for its start alone."""

    blocks: int = MIN_BLOCKS
    min_runs: int = 1000
    min_seconds: float = 10.0
    max_seconds: float = 60.0
    num_starts: int = 5

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as plain data."""
        return asdict(self)


FULL = BenchProtocol()
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
class Comparison:
    """What was measured together. again: the first model under another name."""

    models: Mapping[str, ModelLatency]
    again: ModelLatency
    reference: ModelLatency

    @property
    def noise_floor(self) -> float:
        """Relative gap between the two measurements of the first model."""
        return noise_floor(self._first, self.again)

    @property
    def stable(self) -> bool:
        """Whether the reference model took about the same time in every block."""
        return not is_unstable(self.reference)

    @property
    def instability(self) -> str:
        """One line that says by how much the machine is unstable; empty where it is not."""
        return instability(self.reference)

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
) -> Comparison:
    """Measure ``models``, the first of them twice, and the reference model in the same blocks.

    Raises as :func:`~nasdeploy.costs.latency.measure_models`.
    """
    first = next(iter(models))
    shapes = dict(shapes or {})
    if first in shapes:
        shapes[AGAIN] = shapes[first]
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        reference = Path(folder, "reference.onnx")
        write_reference_model(reference, batch_size=runtime.batch_size)
        measured = measure_models(
            {**models, AGAIN: models[first], REFERENCE: reference},
            runtime,
            blocks=protocol.blocks,
            min_runs=protocol.min_runs,
            min_seconds=protocol.min_seconds,
            max_seconds=protocol.max_seconds,
            seed=seed,
            shapes=shapes,
            device=device,
            progress=progress,
        )
    return Comparison(
        models={name: measured[name] for name in models},
        again=measured[AGAIN],
        reference=measured[REFERENCE],
    )
