"""Carries out measuring requests, each in a fresh process that is bound to its cores and has a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # subscripting it fails before Python 3.9
    from collections.abc import Iterator, Sequence

START_SECONDS = 60.0  # for the start of a process and its sessions, on a slow machine

# Libraries that start threads of their own when they are loaded; the session's threads are given explicitly.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

# ONNX Runtime reports to its makers, unless the environment says no when it is imported: from a thread of its own,
# beside what is measured.
NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1"}

# Loads this very folder as a package under a name of its own, whether or not nasdeploy is installed. The working
# folder and this one stay out of the search path: a file there must not hide a module of the standard library.
WORKER = """
import importlib.util, sys
sys.path[:] = [entry for entry in sys.path if entry]
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "nasdeploy_device", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules[spec.name] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from nasdeploy_device.worker import main
sys.exit(main(sys.argv[2:]))
"""


class RequestRefusedError(Exception):
    """The request cannot be carried out: its model, its runtime or the room here is why; the message is one line."""


class WorkerDiedError(Exception):
    """The measuring process ended without a result; the message is one line."""


class DeadlineError(Exception):
    """The measuring process did not end in time; the message is one line."""


def choose_cores(threads: int) -> list[int] | None:
    """Return the cores to bind a session to: as many as threads, None where there are not enough.

    Always the last ones of those allowed: the first serve most interrupts.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return allowed[-threads:] if len(allowed) >= threads else None


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield a folder that is deleted at the end. Raises RequestRefusedError where none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="nasdeploy-")
    except OSError as error:
        raise no_room(error) from error
    with folder as path:
        yield path


def no_room(error: OSError) -> RequestRefusedError:
    """Return the error that says where a temporary file could not be written."""
    try:
        place = f"{tempfile.gettempdir()}: cannot be written to"
    except OSError:  # none of those that Python tries
        place = "no folder for temporary files"
    return RequestRefusedError(
        f"{place} ({error.strerror or error}); expected room for temporary files there or in another folder: "
        "TMPDIR=FOLDER"
    )


def run_request(
    request: dict[str, Any], *, cores: Sequence[int] | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the result of ``request``, measured in a fresh process on ``cores`` (None: as many as it has threads).

    code: where this package lies as plain files; None: where it was imported from, unless that is a zip file.
    Raises RequestRefusedError, WorkerDiedError or DeadlineError.
    """
    chosen = choose_cores(request["threads"]) if cores is None else list(cores)
    with temporary_folder() as folder:
        asked, answered = os.path.join(folder, "request.json"), os.path.join(folder, "result.json")
        try:
            with open(asked, "w", encoding="utf-8") as file:
                json.dump({**request, "cores": chosen}, file)
        except OSError as error:
            raise no_room(error) from error
        process = _start_worker(
            [code or os.path.dirname(os.path.abspath(__file__)), asked, answered], deadline_seconds(request)
        )
        if not os.path.exists(answered):
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise WorkerDiedError(f"the measuring process ended with code {process.returncode}: {last}")
        with open(answered, encoding="utf-8") as file:
            result: dict[str, Any] = json.load(file)
    if "error" in result:
        raise RequestRefusedError(result["error"])
    return result


def deadline_seconds(request: dict[str, Any]) -> float:
    """Return after how many seconds a request is given up.

    Ten seconds for each model above what its plan allows: a slow one is run a few times whatever that says.
    """
    if request["plan"] is None:
        return 2 * START_SECONDS
    return START_SECONDS + len(request["models"]) * (10.0 + 4.0 * float(request["plan"]["max_seconds"]))


def _start_worker(arguments: list[str], deadline_s: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1"), **NO_TELEMETRY}
    try:
        return subprocess.run(
            [sys.executable, "-c", WORKER, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"a measuring process did not end within {deadline_s:.0f} s") from error
