"""Starts the worker that times sessions: a fresh process, bound to its cores, with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from nasdeploy.costs import session_worker
from nasdeploy.errors import ConfigError, NasdeployError, NoisyMeasurementError
from nasdeploy.profiles import Runtime

__all__ = ["Shapes", "check_runtime_available", "choose_cores", "run_block", "run_once"]

Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""{model: {input: shape}}; an input that is not there gets the batch size for its open dimensions."""

ALONE = "model"

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


def run_block(
    models: Mapping[str, Path],
    runtime: Runtime,
    *,
    plan: session_worker.Plan,
    seed: int,
    shapes: Shapes | None = None,
) -> dict[str, Any]:
    """Measure ``models`` in one fresh process and return its result.

    Raises ConfigError for a model that cannot be loaded, NoisyMeasurementError when the process does not end
    in time, NasdeployError when it dies.
    """
    deadline_s = START_SECONDS + len(models) * (1.0 + 4.0 * plan.max_seconds)
    return _answer(models, runtime, plan=plan, seed=seed, shapes=shapes, deadline_s=deadline_s)


def run_once(
    model: Path, runtime: Runtime, *, seed: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Load ``model`` alone in a fresh process, run it once, and return the result; raises as :func:`run_block`."""
    return _answer(
        {ALONE: model},
        runtime,
        plan=None,
        seed=seed,
        shapes={ALONE: shapes or {}},
        deadline_s=2 * START_SECONDS,
    )


def _answer(
    models: Mapping[str, Path],
    runtime: Runtime,
    *,
    plan: session_worker.Plan | None,
    seed: int,
    shapes: Shapes | None,
    deadline_s: float,
) -> dict[str, Any]:
    order = Random(seed).sample(sorted(models), len(models))
    request = {
        "schema": session_worker.REQUEST_SCHEMA,
        "models": {name: str(Path(models[name]).resolve()) for name in order},
        "shapes": {
            name: {key: list(shape) for key, shape in one.items()} for name, one in (shapes or {}).items()
        },
        "provider": runtime.provider,
        "threads": runtime.threads,
        "batch_size": runtime.batch_size,
        "spinning": True,
        "cores": choose_cores(runtime.threads),
        "seed": seed,
        "plan": None if plan is None else plan._asdict(),
    }
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        process = _start_worker(asked, answered, deadline_s)
        if not answered.exists():
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise NasdeployError(f"the measuring process ended with code {process.returncode}: {last}")
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "error" in result:
        raise ConfigError(result["error"])
    return result


def _start_worker(asked: Path, answered: Path, deadline_s: float) -> subprocess.CompletedProcess[str]:
    # -P: the folder of the script must not hide modules of the standard library.
    command = [sys.executable, "-P", session_worker.__file__, str(asked), str(answered)]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NoisyMeasurementError(
            f"latency: a measuring process did not end within {deadline_s:.0f} s; "
            "expected a less busy machine or a smaller model"
        ) from error


def choose_cores(threads: int) -> list[int] | None:
    """Return the cores to bind a session to: as many as threads, None where there are not enough.

    Always the last ones of those allowed: the first serve most interrupts.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return allowed[-threads:] if len(allowed) >= threads else None


def check_runtime_available(runtime: Runtime, *, available: Sequence[str] | None = None) -> None:
    """Raise ConfigError unless this machine's ONNX Runtime has the runtime's provider.

    available: the providers to look in; None asks ONNX Runtime.
    """
    if available is None:
        import onnxruntime

        available = onnxruntime.get_available_providers()
    if runtime.provider not in available:
        raise ConfigError(
            f"runtime.provider = '{runtime.provider}': the ONNX Runtime of this machine does not have it; "
            f"expected one of {', '.join(available)}"
        )
