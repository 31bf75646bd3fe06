"""The run folder: the name of every file in one place, whole writes, and the lock against a second build.

::

    run.json  config.toml  events.jsonl
    latency/<profile>.json
    memory/<profile>.json
    search/{supernet.safetensors, state.json, history.csv, evaluations.csv, result.json, importance.json?}
    search/added/{<profile>.json, <profile>.csv}
    search/{random_weight.json, random_weight.csv}? random_weight/<profile>.json?
    models/<profile>/{model.onnx, model.int8.onnx?, architecture.json, weights.safetensors, training.json, metrics.json,
                      latency.json, verify.json, certify.zip?, MODEL_CARD.md, SHA256SUMS}
    baselines/<profile>/<kind>.json
    report/{index.html, report.json, report.md, pareto.csv}

A phase is done when its last file is there; that file is written when the phase ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import tomli_w
from safetensors.torch import load_file, save
from torch import Tensor

from nasdeploy.errors import RunFolderError
from nasdeploy.files import write_json, write_whole
from nasdeploy.progress import Value

__all__ = ["EventLog", "ModelFolder", "RunFolder"]


REDUCED_PRECISIONS = ("fp16", "int8")
LEFTOVER = re.compile(r"\..+\.\d+\.tmp")
"""Of a file that was being written, as nasdeploy.files names it."""


class ModelFolder:
    """``models/<profile>/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model.onnx"
        self.architecture = path / "architecture.json"
        self.weights = path / "weights.safetensors"
        self.training = path / "training.json"
        self.checkpoint = path / "checkpoint.safetensors"
        self.metrics = path / "metrics.json"
        self.latency = path / "latency.json"
        self.verify = path / "verify.json"
        self.pack = path / "certify.zip"
        self.card = path / "MODEL_CARD.md"
        self.checksums = path / "SHA256SUMS"

    def file(self, precision: str) -> Path:
        """Return the path of the ONNX file in ``precision``: ``model.onnx``, or ``model.int8.onnx`` beside it."""
        return self.model if precision == "fp32" else self.path / f"model.{precision}.onnx"

    def shipped(self) -> Path:
        """Return the path of the file that ships, as ``metrics.json`` says; ``model.onnx`` as long as there is none.

        Raises RunFolderError where that is damaged.
        """
        stored = read_json(self.metrics) if self.metrics.exists() else {}
        return self.path / str(stored.get("shipped", self.model.name))

    def discard_reduced(self) -> None:
        """Delete the files in other precisions than fp32."""
        for precision in REDUCED_PRECISIONS:
            self.file(precision).unlink(missing_ok=True)

    def discard_figures(self) -> None:
        """Delete what describes the files as finished."""
        for file in (self.checksums, self.card, self.metrics):
            file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the files, the architecture last, so that an interrupted deletion is finished next time."""
        self.discard_figures()
        self.discard_reduced()
        for file in (
            self.latency,
            self.verify,
            self.pack,
            self.model,
            self.training,
            self.weights,
            self.checkpoint,
            self.architecture,
        ):
            file.unlink(missing_ok=True)


class RunFolder:
    """Paths, typed reads and whole writes below one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._was_run = False
        self.run = path / "run.json"
        self.config = path / "config.toml"
        self.events = path / "events.jsonl"
        self.supernet = path / "search" / "supernet.safetensors"
        self.search_state = path / "search" / "state.json"
        self.search_history = path / "search" / "history.csv"
        self.search_result = path / "search" / "result.json"
        self.search_checkpoint = path / "search" / "checkpoint.safetensors"
        self.search_history_part = path / "search" / "history.part.csv"
        self.search_evaluations = path / "search" / "evaluations.csv"
        self.search_evaluations_part = path / "search" / "evaluations.part.csv"
        self.importance = path / "search" / "importance.json"
        self.random_weight = path / "search" / "random_weight.json"
        self.random_weight_evaluations = path / "search" / "random_weight.csv"
        self.random_weight_checkpoint = path / "search" / "random_weight.checkpoint.safetensors"
        self.exports = path / "exports"
        self.report_json = path / "report" / "report.json"
        self.report_html = path / "report" / "index.html"
        self.report_markdown = path / "report" / "report.md"
        self.pareto = path / "report" / "pareto.csv"

    def latency(self, profile: str) -> Path:
        """Return the path of the latency table of ``profile``."""
        return self.path / "latency" / f"{profile}.json"

    def memory(self, profile: str) -> Path:
        """Return the path of the memory table of ``profile``; there is one where its budget names peak_memory."""
        return self.path / "memory" / f"{profile}.json"

    def model(self, profile: str) -> ModelFolder:
        """Return the folder of the model of ``profile``."""
        return ModelFolder(self.path / "models" / profile)

    def baseline(self, profile: str, kind: str) -> Path:
        """Return the path of the figures of a baseline network."""
        return self.path / "baselines" / profile / f"{kind}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. Raises RunFolderError when another process holds it or it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"--output-dir {self.path}: cannot be made ({error.strerror}); expected a folder that can be written"
            ) from error
        if not os.access(self.path, os.W_OK):
            raise RunFolderError(
                f"--output-dir {self.path}: cannot be written to; expected a folder that can"
            )
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            if not (self.path / ".lock").exists():  # the library waits for a file that cannot be made, too
                raise RunFolderError(
                    f"--output-dir {self.path}: cannot be written to; expected a folder that can"
                ) from error
            raise RunFolderError(
                f"{self.path}: another build is running here; wait for it, or choose another folder with --output-dir"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def claim(
        self, *, settings: Mapping[str, Any], fingerprint: str, facts: Callable[[], Mapping[str, Any]]
    ) -> bool:
        """Make the folder that of a build, or check that it already is; return whether it is resumed.

        settings: written to ``config.toml``. facts: what else ``run.json`` says, asked for once. Raises
        RunFolderError when the folder holds a build with other settings, or something else.
        """
        if self.run.exists():
            self.check_is(fingerprint, settings)
            self._drop_leftovers()
            return True
        strangers = [name for name in sorted(os.listdir(self.path)) if not _is_own(name)]
        if strangers and not self._was_run:
            raise RunFolderError(
                f"{self.path}: is not empty ({strangers[0]}) and no run of nasdeploy; "
                "choose another folder with --output-dir"
            )
        write_whole(self.config, tomli_w.dumps(_without_none(settings)).encode())
        run = {"schema": "nasdeploy/run/2", "fingerprint": fingerprint, **facts(), "settings": dict(settings)}
        write_json(self.run, run)
        return False

    def _drop_leftovers(self) -> None:
        """Delete what killed processes left of files that they were writing: this one holds the folder."""
        for leftover in self.path.rglob(".*.tmp"):
            if LEFTOVER.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)

    def check_is(self, fingerprint: str, settings: Mapping[str, Any]) -> None:
        """Raise RunFolderError unless the folder holds the run of these settings, profiles aside."""
        stored = read_json(self.run, schema="nasdeploy/run/2")
        if stored["fingerprint"] != fingerprint:
            difference = _difference(_without_profiles(stored["settings"]), _without_profiles(settings))
            raise RunFolderError(
                f"{self.path}: holds a build with other settings ({difference}); "
                "choose another folder with --output-dir, or start over with --no-resume"
            )

    def stored_run(self) -> dict[str, Any] | None:
        """Return the content of ``run.json``, None where there is no run. Raises RunFolderError if it is damaged."""
        return read_json(self.run, schema="nasdeploy/run/2") if self.run.exists() else None

    def add_profiles(self, profiles: Mapping[str, Mapping[str, Any]], *, sources: Sequence[str]) -> None:
        """Make ``profiles``, by name, a part of the run; sources: what the settings call them."""
        stored = read_json(self.run, schema="nasdeploy/run/2")
        settings = stored["settings"]
        settings["profiles"] = list(dict.fromkeys([*settings["profiles"], *sources]))
        write_whole(self.config, tomli_w.dumps(_without_none(settings)).encode())
        write_json(self.run, {**stored, "profiles": {**stored["profiles"], **profiles}, "settings": settings})

    def discard_exports(self, name: str) -> None:
        """Delete what ``nasdeploy export`` made of a network that the profile ``name`` no longer has."""
        for precision in ("fp32", *REDUCED_PRECISIONS):
            for ending in ("json", "onnx"):
                (self.exports / f"{name}.{precision}.{ending}").unlink(missing_ok=True)

    def discard_profile(self, name: str) -> None:
        """Delete what there is of a profile that has not become a part of the run."""
        self.model(name).discard()
        for file in (
            self.latency(name),
            self.memory(name),
            self.adapted(name),
            self.adapted_evaluations(name),
            self.random_weight_table(name),
        ):
            file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete what a build wrote here; files of others stay, and all of a folder that holds no build."""
        if not self.run.exists():
            return
        self._was_run = True
        for name in ("models", "baselines", "search", "latency", "memory", "report", "exports"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for file in (self.run, self.events, self.config):
            file.unlink(missing_ok=True)

    def baseline_checkpoint(self, profile: str, kind: str) -> Path:
        """Return the path of the state of a baseline's training."""
        return self.path / "baselines" / profile / f"{kind}.checkpoint.safetensors"

    def random_weight_table(self, profile: str) -> Path:
        """Return the path of what random weights say of the networks that ``profile`` may have."""
        return self.path / "search" / "random_weight" / f"{profile}.json"

    def adapted(self, profile: str) -> Path:
        """Return the path of the distribution of a profile that was added after the search."""
        return self.path / "search" / "added" / f"{profile}.json"

    def adapted_evaluations(self, profile: str) -> Path:
        """Return the path of what was evaluated for a profile that was added after the search."""
        return self.path / "search" / "added" / f"{profile}.csv"

    def save_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors: no pickle is written or trusted."""
        write_whole(path, save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))

    def load_tensors(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors in ``path``. Raises RunFolderError when it is damaged."""
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises types of its own, by version
            raise RunFolderError(f"{path}: cannot be read ({error}); delete it and build again") from error


def stored_settings(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings of the run in ``run_dir``, its profiles by their names; None where there is no run."""
    stored = RunFolder(run_dir).stored_run()
    return None if stored is None else {**stored["settings"], "profiles": list(stored["profiles"])}


def read_json(path: Path, *, schema: str | None = None) -> dict[str, Any]:
    """Return the object in ``path``. Raises RunFolderError when it is missing, damaged or of another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); delete it and build again") from error
    if not isinstance(data, dict) or (schema is not None and data.get("schema") != schema):
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise RunFolderError(f"{path}: schema {found!r}; expected '{schema}'; delete it and build again")
    return data


class EventLog:
    """An observer that appends every event to ``events.jsonl``, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _drop_cut_off_line(path)

    def start(self, phase: str, total: int | None = None) -> None:
        """Write that ``phase`` began."""
        self._write({"event": "start", "phase": phase, "total": total})

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        """Write one step."""
        self._write({"event": "step", "phase": phase, "step": step, **values})

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        """Write that ``phase`` ended."""
        self._write({"event": "finish", "phase": phase, **values})

    def note(self, message: str) -> None:
        """Write a message."""
        self._write({"event": "note", "message": message})

    def _write(self, event: dict[str, Any]) -> None:
        line = {name.replace(" ", "_"): value for name, value in event.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")


def _drop_cut_off_line(path: Path) -> None:
    """Cut what a killed process left of its last line, so that the next one stands alone."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            write_whole(path, content[: content.rfind(b"\n") + 1])


def _is_own(name: str) -> bool:
    """Whether a file of this name may be left of a first start that was killed."""
    known = (".lock", "latency", "memory", "config.toml", "events.jsonl")
    return name in known or LEFTOVER.fullmatch(name) is not None


def _difference(stored: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> str:
    """Return the first key in which two settings differ, with both values."""
    for key in [*stored, *(key for key in here if key not in stored)]:
        old, new = stored.get(key), here.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, f"{prefix}{key}.")
        return f"{prefix}{key} = {json.dumps(old)} there, {json.dumps(new)} here"
    return "its data or its search space has changed since"


def _without_profiles(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "profiles"}


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` without unset keys: TOML has no null."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value is not None
    }
