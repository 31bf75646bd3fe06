"""Runs a pack on the device: ``python3 pack.zip``. Needs numpy and onnxruntime only, and Python 3.8 or newer.

A pack is a zip file, or the folder it was unpacked to::

    __main__.py  pack.json  models/<sha256>.onnx  device/*.py

Each request of ``pack.json`` is carried out in a fresh process. After each of them the results so far are stored
beside the result file; the same command continues behind them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .machine import machine_fingerprint
from .runner import (
    NO_TELEMETRY,
    DeadlineError,
    RequestRefusedError,
    WorkerDiedError,
    choose_cores,
    run_request,
    temporary_folder,
)

if TYPE_CHECKING:  # subscripting it fails before Python 3.9
    from collections.abc import Iterator, Sequence

PACK_SCHEMA = "nasdeploy/pack/1"
RESULT_SCHEMA = "nasdeploy/pack-result/1"
MANIFEST, CODE = "pack.json", "device"

REFUSED, NOISY, INTERRUPTED = 2, 5, 6  # the exit codes of nasdeploy itself

PROBE = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry]
import numpy, onnxruntime
print(json.dumps([numpy.__version__, onnxruntime.__version__, onnxruntime.get_available_providers()]))
"""
PROBE_SECONDS = 120.0


class PackError(Exception):
    """The pack cannot be run here; the message is one line."""

    def __init__(self, message: str, exit_code: int = REFUSED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(arguments: Sequence[str], source: str) -> int:
    """Run the pack at ``source``, a zip file or a folder, and return the exit code."""
    options = _parser(source).parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _unpacked(source) as folder:
            manifest, pack_sha256 = _read_manifest(folder)
            cores = _cores(options.cores, manifest)
            facts = _check(folder, manifest)
            _tell(f"ready: {facts}")
            if not options.check:
                _run(folder, manifest, pack_sha256, cores=cores, output=options.output)
    except PackError as error:
        _tell(f"error: {error}")
        return error.exit_code
    except RequestRefusedError as error:  # no room to unpack it
        _tell(f"error: {error}")
        return REFUSED
    except (KeyboardInterrupt, BrokenPipeError):
        _tell("interrupted; the same command continues")
        return INTERRUPTED
    return 0


def _parser(source: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 " + os.path.basename(source),
        description="Measures the models of this pack on this device.",
    )
    parser.add_argument(
        "-o", "--output", default="latency.json", metavar="FILE", help="the result (default: latency.json)"
    )
    parser.add_argument(
        "--cores", metavar="LIST", help="cores to measure on, such as 3 or 2,3 (default: the last)"
    )
    parser.add_argument("--check", action="store_true", help="only check that the pack can be run here")
    return parser


def _tell(line: str) -> None:
    """Write a line to stderr at once: whoever started this over a network counts on it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 2
        )  # nobody listens any more: flushing must not fail once more
        raise


@contextmanager
def _unpacked(source: str) -> Iterator[str]:
    """Yield the folder of the pack: sessions and fresh processes cannot read from a zip file."""
    if os.path.isdir(source):
        yield source
        return
    with temporary_folder() as folder:
        try:
            with zipfile.ZipFile(source) as archive:
                archive.extractall(folder)
        except OSError as error:
            raise PackError(
                f"{source}: cannot be unpacked to {tempfile.gettempdir()} ({error.strerror or error}); expected a pack "
                "that can be read, and room for it there or in another folder: TMPDIR=FOLDER"
            ) from error
        except (zipfile.BadZipFile, EOFError) as error:
            raise PackError(f"{source}: damaged ({error}); copy it again") from error
        yield folder


def _read_manifest(folder: str) -> tuple[dict[str, Any], str]:
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, "rb") as file:
            content = file.read()
        manifest = json.loads(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise PackError(f"{MANIFEST}: cannot be read ({error}); copy the pack again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != PACK_SCHEMA:
        raise PackError(f"{MANIFEST}: is not of the schema {PACK_SCHEMA}; expected what nasdeploy wrote")
    return manifest, hashlib.sha256(content).hexdigest()


def _cores(text: str | None, manifest: dict[str, Any]) -> list[int] | None:
    """Return the cores to measure on; None: as many as a request has threads. Raises PackError."""
    threads = max((request["threads"] for request in manifest["requests"]), default=1)
    if text is None:
        if choose_cores(threads) is None:
            _tell(f"note: {threads} threads are more than the cores here, or they cannot be bound")
        return None
    cores = text.split(",")
    if not all(core.isdigit() for core in cores) or len(set(cores)) != len(cores):
        raise PackError(f"--cores {text}: expected different numbers of cores, such as 3 or 2,3")
    if len(cores) != threads:
        raise PackError(f"--cores {text}: expected {threads}, one for each thread of the profile")
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not set(map(int, cores)) <= set(allowed):
        known = ", ".join(map(str, allowed))
        raise PackError(
            f"--cores {text}: expected some of {known or 'none, since they cannot be bound here'}"
        )
    return [int(core) for core in cores]


def _check(folder: str, manifest: dict[str, Any]) -> str:
    """Return what the pack will run with, in one line. Raises PackError where it cannot run."""
    numpy, onnxruntime, available = _libraries()
    for provider in sorted({request["provider"] for request in manifest["requests"]}):
        if provider not in available:
            raise PackError(
                f"{provider}: the ONNX Runtime of this device does not have it; it has {', '.join(available)}"
            )
    for name, sha256 in manifest["files"].items():
        _check_file(folder, name, sha256)
    python = ".".join(map(str, sys.version_info[:3]))
    models = sum(name.endswith(".onnx") for name in manifest["files"])
    return (
        f"Python {python}, numpy {numpy}, onnxruntime {onnxruntime}; {models} models, "
        f"{len(manifest['requests'])} requests"
    )


def _libraries() -> tuple[str, str, list[str]]:
    """Return the versions of numpy and onnxruntime, and its providers, from a process of its own.

    A build for another processor can end the process that imports it.
    """
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, **NO_TELEMETRY},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PackError(f"onnxruntime: not imported within {PROBE_SECONDS:.0f} s") from error
    if probe.returncode != 0:
        last = (probe.stderr.strip().splitlines() or [f"it ended with code {probe.returncode}"])[-1]
        raise PackError(
            f"{sys.executable}: cannot import numpy and onnxruntime ({last}); expected both: {sys.executable} -m pip "
            "install onnxruntime numpy"
        )
    numpy, onnxruntime, providers = json.loads(probe.stdout.splitlines()[-1])
    return numpy, onnxruntime, providers


def _check_file(folder: str, name: str, sha256: str) -> None:
    try:
        with open(os.path.join(folder, *name.split("/")), "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise PackError(f"{name}: {error.strerror}; copy the pack again") from error
    if found != sha256:
        raise PackError(f"{name}: its checksum is {found}; expected {sha256}: copy the pack again")


def _run(
    folder: str, manifest: dict[str, Any], pack_sha256: str, *, cores: list[int] | None, output: str
) -> None:
    """Carry out the requests that have no result yet and write the result file."""
    requests = manifest["requests"]
    state: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "pack_sha256": pack_sha256,
        "pack": manifest,
        "machine": machine_fingerprint(),
        "cores": cores,
        "seconds": 0.0,
        "results": [],
    }
    part = output + ".part"
    _check_target(output)
    state = _continued(part, state)
    if state["results"]:
        _tell(f"continuing behind {len(state['results'])} of {len(requests)} requests")
    for n in range(len(state["results"]), len(requests)):
        started = time.perf_counter()
        state["results"].append(_carry_out(requests[n], folder, cores))
        state["seconds"] += time.perf_counter() - started
        _write(part, state)
        _tell(f"[{n + 1}/{len(requests)}] {state['seconds']:.0f} s")
    _write(output, state)
    if os.path.exists(part):
        os.unlink(part)
    _tell(f"written: {output}")


def _continued(part: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return what an interrupted run of this very pack, on this machine and these cores, has left; else ``state``."""
    try:
        with open(part, encoding="utf-8") as file:
            stored = json.load(file)
    except (OSError, ValueError):
        return state
    if not isinstance(stored, dict) or stored.pop("digest", None) != digest_of(stored):
        return state
    same = all(stored.get(key) == state[key] for key in state if key not in ("seconds", "results"))
    return stored if same else state


def _carry_out(request: dict[str, Any], folder: str, cores: list[int] | None) -> dict[str, Any]:
    models = {name: os.path.join(folder, *path.split("/")) for name, path in request["models"].items()}
    try:
        return run_request({**request, "models": models}, cores=cores, code=os.path.join(folder, CODE))
    except RequestRefusedError as error:
        raise PackError(str(error).replace(os.path.join(folder, ""), "")) from error
    except WorkerDiedError as error:
        raise PackError(str(error), exit_code=1) from error
    except DeadlineError as error:
        raise PackError(f"{error}; expected a less busy device", exit_code=NOISY) from error


def digest_of(content: dict[str, Any]) -> str:
    """Return the sha256 of ``content`` in its canonical JSON: sorted keys, no spaces, ASCII. NaN is refused."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _check_target(path: str) -> None:
    """Raise PackError for a file that could not be written: before minutes of measuring, not after."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise PackError(f"--output {path}: cannot be written; expected a file name in a writable folder")


def _write(path: str, content: dict[str, Any]) -> None:
    """Write ``content`` with its digest, whole or not at all."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "w", encoding="ascii") as file:
            json.dump({**content, "digest": digest_of(content)}, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise PackError(f"{path}: cannot be written ({error.strerror})") from error
    except ValueError as error:
        raise PackError(f"{path}: a time is no finite number ({error})", exit_code=1) from error
