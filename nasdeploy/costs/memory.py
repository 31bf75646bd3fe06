"""The memory that every architecture of a space adds to a process: whole networks started, a law fitted to them.

A file's memory is the peak resident size of a fresh process that loads and runs it, less that before the load. Starts
of one file differ: by some 10 kB of pages, and where the allocator keeps a large block for itself by megabytes. So
what counts is the largest of several starts: it differs less from one series to the next than the median does, and
it is what a device has to have.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.latency_table import REMEDY
from nasdeploy.costs.machine import Fingerprint, describe_difference
from nasdeploy.costs.memory_law import (
    MemoryAccuracy,
    MemoryLaw,
    assess_left_out,
    fit_law,
    left_out_predictions,
    term_tables,
)
from nasdeploy.costs.sessions import HERE, Answers, Device, Progress, Request, start_requests
from nasdeploy.costs.table import CostTable
from nasdeploy.costs.table_models import Convert, ModelWriter, stratified_architectures
from nasdeploy.errors import ConfigError, NoisyMeasurementError
from nasdeploy.profiles import Runtime, format_quantity
from nasdeploy.spaces.base import Architecture, SearchSpace

__all__ = [
    "CERTIFY_STARTS",
    "SCHEMA",
    "MemoryTable",
    "MemoryUse",
    "NetworkMemory",
    "PlannedMemory",
    "measure_memory",
    "measure_memory_table",
    "plan_memory_table",
    "require_telling_share",
    "require_told",
]

SCHEMA = "nasdeploy/memory-table/1"
NUM_NETWORKS = 16
MIN_NETWORKS = 6
TABLE_STARTS = 5
NOISE_STARTS = 20
"""Of the largest network: how far its starts lie apart is the noise of the machine."""

CERTIFY_STARTS = 10
"""The largest of ten is a 1 - 0.5**10 = 99.9 % bound on the median start, and a 94 % bound on the third quartile."""

NO_DIFFERENCE = 2.0
"""As for latencies: what differs by less than twice the noise does not differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What a file added to fresh processes, one value each; empty where the system does not tell."""

    added_bytes: tuple[int, ...]

    @property
    def median_bytes(self) -> float | None:
        """The median of the processes."""
        return float(np.median(self.added_bytes)) if self.added_bytes else None

    @property
    def largest_bytes(self) -> int | None:
        """The most that a process needed."""
        return max(self.added_bytes, default=None)

    @property
    def spread_bytes(self) -> int:
        """How far the processes lie apart."""
        return max(self.added_bytes, default=0) - min(self.added_bytes, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkMemory:
    """A whole network: the largest of its starts, and what the law says that was fitted without it."""

    choices: tuple[int, ...]
    predicted_bytes: float
    measured_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """The measured memory of a space on one machine and runtime, in bytes.

    smallest_bytes, largest_bytes: of the smallest and the largest network, the ends of percentage caps. noise_bytes:
    how far NOISE_STARTS starts of the largest network lie apart.
    """

    runtime_key: str
    channel_multiple: int
    space_name: str
    space_fingerprint: str
    machine: Fingerprint
    seed: int
    seconds: float
    law: MemoryLaw
    accuracy: MemoryAccuracy
    networks: tuple[NetworkMemory, ...]
    smallest_bytes: int
    largest_bytes: int
    noise_bytes: int

    def cost_table(self, space: SearchSpace) -> CostTable:
        """Return the memory of every architecture in bytes. Raises ConfigError for another space."""
        self._check("search space", self.space_fingerprint, space.fingerprint())
        return self.law.table(term_tables(space))

    def check_matches(self, space: SearchSpace, runtime: Runtime, *, machine: Fingerprint) -> None:
        """Raise ConfigError unless the table was measured for this space, runtime and machine."""
        self._check("search space", self.space_fingerprint, space.fingerprint())
        self._check("runtime", self.runtime_key, runtime.key())
        self._check("runtime.channel_multiple", self.channel_multiple, runtime.channel_multiple)
        if difference := describe_difference(self.machine, machine):
            raise ConfigError(
                f"memory table: measured on another machine ({difference}); {REMEDY} makes a new one"
            )

    def is_of(self, machine: Fingerprint) -> bool:
        """Return whether the table was measured on ``machine``."""
        return not describe_difference(self.machine, machine)

    def _check(self, what: str, stored: object, here: object) -> None:
        if stored != here:
            raise ConfigError(
                f"memory table: measured for {what} {stored}; expected {here}; {REMEDY} makes a new one"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryTable:
        """Return what :meth:`to_json` gave. Raises ConfigError for another schema or wrong keys."""
        if data.get("schema") != SCHEMA:
            raise ConfigError(f"memory table: schema {data.get('schema')!r}; expected '{SCHEMA}'")
        rest = {key: value for key, value in data.items() if key != "schema"}
        try:
            parts = {
                "law": MemoryLaw(**data["law"]),
                "accuracy": MemoryAccuracy(**data["accuracy"]),
                "networks": tuple(
                    NetworkMemory(**{**row, "choices": tuple(row["choices"])}) for row in data["networks"]
                ),
            }
            return cls(**{**rest, **parts})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"memory table: {error}; {REMEDY} makes a new one") from error


def require_told(uses: Sequence[MemoryUse]) -> None:
    """Raise NoisyMeasurementError where the system did not tell the memory of every process."""
    if not all(use.added_bytes for use in uses):
        raise NoisyMeasurementError(
            "budget.peak_memory: the system does not tell the memory of a process; expected Linux or macOS, or a "
            "budget without it"
        )


def require_telling_share(
    *, key: str, written: str, cap_bytes: float, range_bytes: float, noise_bytes: float
) -> None:
    """Raise ConfigError where a share of the space's range says nothing, since starts of one file differ as much.

    written: the cap as it stands in the profile. cap_bytes: what it comes to.
    """
    if range_bytes >= NO_DIFFERENCE * noise_bytes:
        return
    shown, noise, cap = (
        format_quantity(size, "peak_memory", digits=3)
        for size in (max(range_bytes, 0.0), noise_bytes, cap_bytes)
    )
    raise ConfigError(
        f'{key} = "{written}": the smallest and the largest network of the space differ by {shown}, starts of one '
        f'file by {noise}; expected a cap in bytes, such as "{cap}"'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMemory:
    """A table before it is measured: its networks, the smallest first and the largest last.

    The same arguments give the same files, byte for byte.
    """

    space: SearchSpace
    runtime: Runtime
    seed: int
    networks: tuple[Architecture, ...]
    convert: Convert | None

    def requests(self, folder: Path) -> list[Request]:
        """Write the networks into ``folder`` and return the requests that start them."""
        writer = ModelWriter(folder, self.space, self.runtime, seed=self.seed, convert=self.convert)
        paths = [writer.network(architecture) for architecture in self.networks]
        return [
            request
            for path, count in zip(paths, self._counts(), strict=True)
            for request in start_requests(path, self.runtime, count=count, seed=self.seed)
        ]

    def _counts(self) -> list[int]:
        return [TABLE_STARTS] * (len(self.networks) - 1) + [NOISE_STARTS]

    def evaluate(self, answers: Answers, *, seconds: float) -> MemoryTable:
        """Return the table that the answers to :meth:`requests` make; ``seconds``: how long they took.

        Raises NoisyMeasurementError where the machine does not tell the memory of a process.
        """
        uses = _uses(answers.results, self._counts())
        require_told(uses)
        # As many starts for each network of the fit: more of them find more.
        sizes = [max(use.added_bytes[:TABLE_STARTS]) for use in uses]
        choices = np.array([architecture.choices for architecture in self.networks])
        features = {term: table.of(choices) for term, table in term_tables(self.space).items()}
        measured = np.array(sizes, dtype=np.float64)
        predicted = left_out_predictions(features, measured)
        return MemoryTable(
            runtime_key=self.runtime.key(),
            channel_multiple=self.runtime.channel_multiple,
            space_name=self.space.name,
            space_fingerprint=self.space.fingerprint(),
            machine=answers.machine,
            seed=self.seed,
            seconds=seconds,
            law=fit_law(features, measured),
            accuracy=assess_left_out(predicted, measured),
            networks=tuple(
                NetworkMemory(choices=a.choices, predicted_bytes=float(p), measured_bytes=size)
                for a, p, size in zip(self.networks, predicted, sizes, strict=True)
            ),
            smallest_bytes=max(uses[0].added_bytes),
            largest_bytes=max(uses[-1].added_bytes),
            noise_bytes=uses[-1].spread_bytes,
        )


def plan_memory_table(
    space: SearchSpace,
    runtime: Runtime,
    *,
    seed: int = 0,
    num_networks: int = NUM_NETWORKS,
    convert: Convert | None = None,
) -> PlannedMemory:
    """Draw the networks of a table: the ends of the space, and random ones of all sizes between them.

    convert: makes the model of ``runtime.precision``; needed unless that is "fp32". Raises ConfigError without it,
    and for a space with too few networks.
    """
    if runtime.precision != "fp32" and convert is None:
        raise ConfigError(
            f"runtime.precision = '{runtime.precision}': memory tables are measured in 'fp32'; expected a conversion "
            "of the models for any other"
        )
    mask = space.candidate_mask(runtime.channel_multiple)
    ends = space.smallest(mask), space.largest(mask)
    drawn = stratified_architectures(space, num_networks, np.random.default_rng(seed))
    networks = (ends[0], *(a for a in drawn if a not in ends), ends[1])
    if len(networks) < MIN_NETWORKS:
        raise ConfigError(
            f"space '{space.name}': only {len(networks)} networks found to measure; expected {MIN_NETWORKS} or more "
            "for a memory table"
        )
    return PlannedMemory(space=space, runtime=runtime, seed=seed, networks=networks, convert=convert)


def measure_memory_table(
    space: SearchSpace,
    runtime: Runtime,
    *,
    seed: int = 0,
    num_networks: int = NUM_NETWORKS,
    convert: Convert | None = None,
    device: Device = HERE,
    progress: Progress | None = None,
) -> MemoryTable:
    """Measure the memory table of ``space`` under ``runtime`` on ``device``: some hundred starts.

    Arguments and errors as in :func:`plan_memory_table`; NoisyMeasurementError where the system does not tell the
    memory of a process.
    """
    started = time.perf_counter()
    planned = plan_memory_table(space, runtime, seed=seed, num_networks=num_networks, convert=convert)
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        answers = device.carry_out(planned.requests(Path(folder)), progress=progress)
    took = time.perf_counter() - started if answers.seconds is None else answers.seconds
    return planned.evaluate(answers, seconds=took)


def measure_memory(
    models: Mapping[str, Path],
    runtime: Runtime,
    *,
    num_processes: int = CERTIFY_STARTS,
    seed: int = 0,
    device: Device = HERE,
) -> dict[str, MemoryUse]:
    """Return what each of ``models`` adds to ``num_processes`` fresh processes, in turns.

    Raises as :meth:`nasdeploy.costs.sessions.Device.carry_out`.
    """
    requests = [start_requests(path, runtime, count=num_processes, seed=seed) for path in models.values()]
    answers = device.carry_out([request for turn in zip(*requests, strict=True) for request in turn])
    return {
        name: _uses(answers.results[m :: len(models)], [num_processes])[0] for m, name in enumerate(models)
    }


def _uses(results: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[MemoryUse]:
    """Return the memory of files whose starts follow one another, ``counts`` of each."""
    found, done = [], 0
    for count in counts:
        added = [_added_bytes(result) for result in results[done : done + count]]
        known = tuple(size for size in added if size is not None)
        found.append(MemoryUse(added_bytes=known if len(known) == count else ()))
        done += count
    return found


def _added_bytes(result: Mapping[str, Any]) -> int | None:
    peak, before = result["peak_memory_bytes"], result["memory_before_bytes"]
    return None if peak is None or before is None else int(peak) - int(before)
