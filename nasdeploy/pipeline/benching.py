"""``nasdeploy bench``: the latency of any ONNX files under a profile, compared fairly."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nasdeploy.costs.comparison import FULL, BenchProtocol, Comparison, Relative, compare
from nasdeploy.costs.latency import ModelLatency
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.costs.sessions import check_runtime_available, choose_cores
from nasdeploy.costs.startup import StartUp, measure_startup
from nasdeploy.errors import ConfigError, NoisyMeasurementError
from nasdeploy.exporters.files import parse_model, read_bytes
from nasdeploy.exporters.structure import TensorInfo, model_inputs
from nasdeploy.pipeline.input_shapes import Batch, Shape, resolve_shapes
from nasdeploy.profiles import HardwareProfile, Runtime, load_profile
from nasdeploy.progress import Observer, Silent

__all__ = ["BenchResult", "BenchedModel", "bench", "distinct_labels"]

SCHEMA = "nasdeploy/bench/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A file to measure. shapes: {input: shape} that it is run with."""

    label: str
    path: Path
    sha256: str
    file_size: int
    inputs: tuple[TensorInfo, ...]
    shapes: Mapping[str, Shape]

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return {
            "label": self.label,
            "path": str(self.path),
            "sha256": self.sha256,
            "file_size": self.file_size,
            "inputs": [
                {"name": value.name, "dtype": value.dtype, "shape": list(self.shapes[value.name])}
                for value in self.inputs
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchedModel:
    """What was measured of a file. relative: against the first file; None for that one itself."""

    file: ModelFile
    latency: ModelLatency
    start_up: StartUp
    relative: Relative | None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            **self.file.to_json(),
            "mean_ms": self.latency.mean_ms,
            "min_ms": self.latency.min_ms,
            "relative": None if self.relative is None else self.relative.to_json(),
            "start_up": self.start_up.to_json(),
            "latency": self.latency.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Files measured together, in the order in which they were given.

    profile: its name; None for the runtime alone. load: of the machine before and after; None where unknown.
    reference, again: see :class:`~nasdeploy.costs.comparison.Comparison`.
    """

    profile: str | None
    runtime: Runtime
    protocol: BenchProtocol
    seed: int
    machine: Mapping[str, str | int | float | None]
    load: tuple[float | None, float | None]
    models: tuple[BenchedModel, ...]
    comparison: Comparison

    @property
    def exit_code(self) -> int:
        """5 where the machine did not hold still, else 0."""
        return 0 if self.comparison.stable else NoisyMeasurementError.exit_code

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, after ``schemas/bench.schema.json``."""
        comparison = self.comparison
        return {
            "schema": SCHEMA,
            "profile": self.profile,
            "runtime": self.runtime.model_dump(
                mode="json", include={"engine", "provider", "threads", "batch_size"}
            ),
            "protocol": {**self.protocol.to_json(), "seed": self.seed},
            "machine": dict(self.machine),
            "load_before": self.load[0],
            "load_after": self.load[1],
            "stable": comparison.stable,
            "noise_floor": comparison.noise_floor,
            "models": [model.to_json() for model in self.models],
            "first_again": comparison.again.to_json(),
            "reference": comparison.reference.to_json(),
        }


def bench(
    models: Sequence[str | Path],
    *,
    profile: HardwareProfile | str | Path | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    protocol: BenchProtocol = FULL,
    seed: int = 0,
    observer: Observer | None = None,
) -> BenchResult:
    """Measure ONNX files of any origin together, block by block in fresh processes.

    profile: whose runtime they run under; None: one CPU thread, batches of one. threads, batch_size: in its place.
    shapes: {input: shape} for sizes that a file leaves open, the batch apart. protocol: how long, FULL or QUICK of
    :mod:`nasdeploy.costs.comparison`. Raises UsageError for a file that is not ONNX, ConfigError for one that cannot
    be run so, NoisyMeasurementError when a process does not end in time; an unstable machine is in the result's
    ``exit_code``.
    """
    if not models:
        raise ConfigError("models: none; expected at least one ONNX file")
    observer = observer or Silent()
    name, runtime, batch = _conditions(profile, threads, batch_size)
    check_runtime_available(runtime)
    if choose_cores(runtime.threads) is None:
        observer.note(
            f"{runtime.threads} threads: more than the cores that may be used here, or they cannot be bound"
        )
    files = _read_files([Path(model) for model in models], batch=batch, given=shapes or {})
    observer.start("bench", len(files) + protocol.blocks)
    before = _load()
    start_ups = _start_all(files, runtime, protocol.num_starts, seed=seed, observer=observer)
    comparison = compare(
        {file.label: file.path for file in files},
        runtime,
        protocol=protocol,
        seed=seed,
        shapes={file.label: file.shapes for file in files},
        progress=lambda share: observer.advance("bench", len(files) + round(share * protocol.blocks), {}),
    )
    observer.finish("bench", {"noise floor": f"{100 * comparison.noise_floor:.2f} %"})
    return BenchResult(
        profile=name,
        runtime=runtime,
        protocol=protocol,
        seed=seed,
        machine=machine_fingerprint(),
        load=(before, _load()),
        models=tuple(_benched(file, comparison, start_ups[file.label]) for file in files),
        comparison=comparison,
    )


def _conditions(
    profile: HardwareProfile | str | Path | None, threads: int | None, batch_size: int | None
) -> tuple[str | None, Runtime, Batch]:
    """Return the name of the profile, the runtime, and the batch size with who asked for it."""
    for option, value in (("threads", threads), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} = {value}: expected a whole number of 1 or more, such as 1")
    loaded = load_profile(profile) if isinstance(profile, str | Path) else profile
    runtime = Runtime() if loaded is None else loaded.runtime
    asked_by = "" if loaded is None else f"the profile {loaded.name}"
    changes = {"threads": threads, "batch_size": batch_size}
    runtime = runtime.model_copy(
        update={option: value for option, value in changes.items() if value is not None}
    )
    batch = Batch(size=runtime.batch_size, asked_by="--batch-size" if batch_size is not None else asked_by)
    return None if loaded is None else loaded.name, runtime, batch


def _read_files(
    paths: Sequence[Path], *, batch: Batch, given: Mapping[str, Sequence[int]]
) -> list[ModelFile]:
    files = []
    for label, path in zip(distinct_labels(paths), paths, strict=True):
        content = read_bytes(path)
        inputs = model_inputs(parse_model(content, path))
        files.append(
            ModelFile(
                label=label,
                path=path,
                sha256=hashlib.sha256(content).hexdigest(),
                file_size=len(content),
                inputs=inputs,
                shapes=resolve_shapes(inputs, path=path, batch=batch, given=given),
            )
        )
    _check_names(files, given)
    return files


def _check_names(files: Sequence[ModelFile], given: Mapping[str, Sequence[int]]) -> None:
    """Raise ConfigError for a shape of an input that no file has."""
    known = list(dict.fromkeys(value.name for file in files for value in file.inputs))
    for name in given:
        if name not in known:
            raise ConfigError(f"--shape {name}: no input has this name; expected one of {', '.join(known)}")


def distinct_labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: the file's own, with as many folders before it as tell it from the others.

    The same path given again gets a number: "model.onnx", "model.onnx (2)".
    """
    parts = [path.absolute().parts for path in paths]
    depths = [1] * len(paths)
    while True:
        labels = [str(Path(*part[-depth:])) for part, depth in zip(parts, depths, strict=True)]
        sharing: dict[str, set[tuple[str, ...]]] = {}
        for label, part in zip(labels, parts, strict=True):
            sharing.setdefault(label, set()).add(part)
        deeper = [
            len(sharing[label]) > 1 and depth < len(part)
            for label, part, depth in zip(labels, parts, depths, strict=True)
        ]
        if not any(deeper):
            return _numbered(labels)
        depths = [depth + more for depth, more in zip(depths, deeper, strict=True)]


def _numbered(labels: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    numbered = []
    for label in labels:
        seen[label] += 1
        numbered.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return numbered


def _start_all(
    files: Sequence[ModelFile], runtime: Runtime, num_starts: int, *, seed: int, observer: Observer
) -> dict[str, StartUp]:
    """Start each file alone in fresh processes, in random order: beside others a peak memory would be theirs."""
    found = {}
    for n, file in enumerate(Random(seed).sample(files, len(files))):
        found[file.label] = measure_startup(
            file.path,
            runtime,
            num_processes=num_starts,
            seed=seed,
            shapes=file.shapes,
        )
        observer.advance("bench", n + 1, {})
    return found


def _benched(file: ModelFile, comparison: Comparison, start_up: StartUp) -> BenchedModel:
    is_first = file.label == next(iter(comparison.models))
    return BenchedModel(
        file=file,
        latency=comparison.models[file.label],
        start_up=start_up,
        relative=None if is_first else comparison.relative(file.label),
    )


def _load() -> float | None:
    """Return how many processes wanted a core in the last minute, on average."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
