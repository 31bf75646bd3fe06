"""What a model needs before it is warm: processes that load it alone and run it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.sessions import HERE, Device, start_requests
from nasdeploy.profiles import Runtime

__all__ = ["StartUp", "measure_startup", "summarise_starts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """Medians of ``num_processes`` fresh processes.

    cold_start_ms: creation of the session and its first run. peak_memory_bytes: of the whole process;
    memory_before_bytes: its peak before the model was loaded, Python and ONNX Runtime. None where the system does
    not tell. added_memory_bytes: by how much a process grew at most, the largest of all: what a device has to have.
    """

    num_processes: int
    cold_start_ms: float
    session_ms: float
    first_run_ms: float
    peak_memory_bytes: int | None
    memory_before_bytes: int | None
    added_memory_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def measure_startup(
    model: Path,
    runtime: Runtime,
    *,
    num_processes: int,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    device: Device = HERE,
) -> StartUp:
    """Start ``model`` in ``num_processes`` fresh processes of ``device``, one after the other.

    Raises as :meth:`nasdeploy.costs.sessions.Device.carry_out`.
    """
    requests = start_requests(model, runtime, count=num_processes, seed=seed, shapes=shapes)
    return summarise_starts(device.carry_out(requests).results)


def summarise_starts(results: Sequence[Mapping[str, Any]]) -> StartUp:
    """Return the medians of the results of :func:`~nasdeploy.costs.sessions.start_requests`."""
    rows = [next(iter(result["models"].values())) for result in results]
    session, first = ([row[key] for row in rows] for key in ("session_ms", "first_run_ms"))
    return StartUp(
        num_processes=len(results),
        cold_start_ms=float(np.median([a + b for a, b in zip(session, first, strict=True)])),
        session_ms=float(np.median(session)),
        first_run_ms=float(np.median(first)),
        peak_memory_bytes=_median_bytes([result["peak_memory_bytes"] for result in results]),
        memory_before_bytes=_median_bytes([result["memory_before_bytes"] for result in results]),
        added_memory_bytes=_most_added(results),
    )


def _most_added(results: Sequence[Mapping[str, Any]]) -> int | None:
    pairs = [(result["peak_memory_bytes"], result["memory_before_bytes"]) for result in results]
    if any(size is None for pair in pairs for size in pair):
        return None
    return int(max(peak - before for peak, before in pairs))


def _median_bytes(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return int(np.median(known)) if len(known) == len(sizes) else None
