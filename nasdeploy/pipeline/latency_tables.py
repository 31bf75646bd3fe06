"""The latency table of a space under a runtime: found again, or measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from nasdeploy.costs.by_hand import ByHandDevice
from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.latency_table import (
    LatencyTable,
    PlannedTable,
    measure_latency_table,
    plan_latency_table,
)
from nasdeploy.costs.sessions import HERE, Device
from nasdeploy.costs.table_models import Convert
from nasdeploy.costs.table_store import TableStore, default_folder
from nasdeploy.exporters.quantization import convert_untrained
from nasdeploy.profiles import Runtime
from nasdeploy.progress import Observer
from nasdeploy.spaces import SearchSpace

__all__ = ["FoundTable", "Origin", "conversion_to", "plan_table", "table_for", "table_store"]

Origin = Literal["measured", "cache", "run"]
"""Measured now; found in the cache; or taken from another run folder."""

PHASE = "latency table"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTable:
    """A table and where it came from. stored: its file in the cache; None where it is in none."""

    table: LatencyTable
    origin: Origin
    stored: Path | None


def conversion_to(precision: str) -> Convert | None:
    """Return what makes models of ``precision`` from those in float32, None where they are that already."""
    return None if precision == "fp32" else partial(convert_untrained, precision=precision)


def table_store(observer: Observer) -> TableStore:
    """Return the user's own store, which tells ``observer`` what it does not use."""
    return TableStore(folder=default_folder(), note=observer.note)


def plan_table(space: SearchSpace, runtime: Runtime, *, seed: int) -> PlannedTable:
    """Return the whole table of ``space`` before it is measured: its requests can be carried out anywhere."""
    return plan_latency_table(
        space,
        runtime,
        flops=counting_tables(space)["flops"],
        seed=seed,
        convert=conversion_to(runtime.precision),
    )


def table_for(
    space: SearchSpace,
    runtime: Runtime,
    *,
    seed: int,
    observer: Observer,
    store: TableStore | None,
    fresh: bool = False,
    device: Device = HERE,
) -> FoundTable:
    """Return the latency table of ``space`` under ``runtime``: from ``store``, or measured on ``device``.

    store: None measures without looking. fresh: nothing stored is used, but the new table is stored. Where ``store``
    holds other tables of the device and runtime, only the layers that they lack are measured. Raises as
    :func:`nasdeploy.costs.latency_table.measure_latency_table`.
    """
    known = None
    if store is not None and not fresh:
        machine = device.carry_out([]).machine
        if found := store.find(space, runtime, machine):
            observer.note(
                f"{PHASE} of {runtime.key()}: measured {found.measured_at}, taken from {store.folder}"
            )
            return FoundTable(table=found, origin="cache", stored=store.path_of(found))
        if not isinstance(device, ByHandDevice):  # that one has answered whole packs, and nothing else
            known = store.find_related(space, runtime, machine)
    table = _measured(space, runtime, seed=seed, known=known, device=device, observer=observer)
    return FoundTable(table=table, origin="measured", stored=None if store is None else store.put(table))


def _measured(
    space: SearchSpace,
    runtime: Runtime,
    *,
    seed: int,
    known: LatencyTable | None,
    device: Device,
    observer: Observer,
) -> LatencyTable:
    flops = counting_tables(space)["flops"]  # seconds, where it is counted for the first time
    observer.start(PHASE, 100)
    observer.advance(PHASE, 1, {})  # what is left is told from the first step on, and a block is many
    table = measure_latency_table(
        space,
        runtime,
        flops=flops,
        known=known,
        seed=seed,
        convert=conversion_to(runtime.precision),
        device=device,
        progress=lambda share: observer.advance(PHASE, round(100 * share), {}),
    )
    observer.finish(
        PHASE,
        {
            "seconds": round(table.seconds, 1),
            "mape": round(table.accuracy.mape, 4),
            "spearman": round(table.accuracy.spearman, 4),
        },
    )
    return table
