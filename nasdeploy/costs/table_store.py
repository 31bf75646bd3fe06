"""Latency tables that later builds find again: one file for each runtime, channel grid, space and machine.

A file may be deleted at any time; one that is damaged, or is not what its name says, is left alone and not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nasdeploy import __version__
from nasdeploy.costs.machine import Fingerprint, fingerprint_hash
from nasdeploy.costs.table_data import SCHEMA, LatencyTable
from nasdeploy.errors import ConfigError
from nasdeploy.files import cache_folder, write_json
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import SearchSpace

__all__ = ["TableStore", "default_folder"]

Note = Callable[[str], None]
"""Told, in one line, why a file is not used or a table is not stored."""


def default_folder() -> Path:
    """Return where tables are kept: a part of :func:`nasdeploy.files.cache_folder`."""
    return cache_folder() / "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStore:
    """The tables in ``folder``. No method raises for what it finds there; ``note`` is told instead."""

    folder: Path
    note: Note

    def find(self, space: SearchSpace, runtime: Runtime, machine: Fingerprint) -> LatencyTable | None:
        """Return the table of exactly this space, runtime and machine, None where there is none."""
        path = self._path(runtime.key(), runtime.channel_multiple, space.fingerprint(), machine)
        table = self._read(path) if path.exists() else None
        if table is None:
            return None
        try:
            table.check_matches(space, runtime, machine=machine)
        except ConfigError as error:
            self._ignore(path, str(error))
            return None
        return table

    def find_related(self, space: SearchSpace, runtime: Runtime, machine: Fingerprint) -> LatencyTable | None:
        """Return the table of this runtime and machine that has measured the most layers of ``space``, of another one.

        None where none of them has measured a single one.
        """
        wanted = set(space.distinct_layers())
        best: tuple[int, LatencyTable | None] = (0, None)
        own = self._path(runtime.key(), runtime.channel_multiple, space.fingerprint(), machine)
        for table in self._related(runtime, machine, without=own):
            shared = sum(entry.spec in wanted and not entry.reused for entry in table.entries)
            if shared > best[0]:
                best = (shared, table)
        return best[1]

    def path_of(self, table: LatencyTable) -> Path:
        """Return the file of ``table``, whether or not it is there."""
        return self._path(table.runtime_key, table.channel_multiple, table.space_fingerprint, table.machine)

    def put(self, table: LatencyTable) -> Path | None:
        """Store ``table``; return its file, None where it is too weak or the folder cannot be written."""
        if weakness := table.weakness:
            self.note(f"latency table of {table.runtime_key}: not stored for later: {weakness}")
            return None
        path = self.path_of(table)
        try:
            write_json(path, table.to_json())
        except OSError as error:
            self.note(f"{path}: cannot be written ({error.strerror or error}); the latency table is not kept")
            return None
        return path

    def _related(self, runtime: Runtime, machine: Fingerprint, *, without: Path) -> Iterator[LatencyTable]:
        pattern = f"{runtime.key()}-*-{_machine_key(machine)}.json"
        for path in sorted(self.folder.glob(pattern)):
            table = None if path == without else self._read(path)
            if table is None:
                continue
            if table.runtime_key != runtime.key() or not table.is_of(machine):
                self._ignore(path, "is the table of another runtime or machine than its name says")
                continue
            yield table

    def _path(self, runtime_key: str, channel_multiple: int, space: str, machine: Fingerprint) -> Path:
        return self.folder / f"{runtime_key}-c{channel_multiple}-{space}-{_machine_key(machine)}.json"

    def _read(self, path: Path) -> LatencyTable | None:
        try:
            data = json.loads(path.read_bytes())
            if not isinstance(data, dict):
                raise ConfigError("is not a JSON object")
            return LatencyTable.from_json(data)
        except OSError as error:
            self._ignore(path, f"cannot be read ({error.strerror or error})")
        except (ConfigError, ValueError, RecursionError) as error:
            self._ignore(path, (str(error).splitlines() or [""])[0])
        return None

    def _ignore(self, path: Path, why: str) -> None:
        self.note(f"{path}: {why}; it is not used, and may be deleted")


def _machine_key(machine: Fingerprint) -> str:
    """Return a short hash of the machine, its ONNX Runtime, and of what made the models that were measured.

    They are made here, also for a device: quantised ones by this machine's ONNX Runtime.
    """
    made_by = (__version__, version("onnx"), version("onnxruntime"))
    parts = (fingerprint_hash(machine), SCHEMA, *made_by)
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]
