"""What is to be measured, as plain requests, and where: on this machine or on a device.

A request is what one fresh process does; its JSON form also travels to devices that have no nasdeploy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from nasdeploy.costs.device import runner, timing, worker
from nasdeploy.costs.device.runner import choose_cores
from nasdeploy.costs.machine import Fingerprint, machine_fingerprint
from nasdeploy.errors import ConfigError, NasdeployError, NoisyMeasurementError
from nasdeploy.profiles import Runtime

__all__ = [
    "HERE",
    "Answers",
    "Device",
    "Progress",
    "Request",
    "Shapes",
    "block_requests",
    "check_runtime_available",
    "choose_cores",
    "start_requests",
]

Request = dict[str, Any]
"""Of the schema ``nasdeploy/session-request/1``; "models" holds {name: path}."""

Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""{model: {input: shape}}; an input that is not there gets the batch size for its open dimensions."""

Progress = Callable[[float], None]
"""Called with the share that is done, in (0, 1]."""

ALONE = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One result for each request, of the schema ``nasdeploy/session-result/1``, and the machine that gave them.

    seconds: what the measuring took, where that was not now.
    """

    results: tuple[dict[str, Any], ...]
    machine: Fingerprint
    seconds: float | None = None


class Device(Protocol):
    """Where requests are carried out."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        """Measure, one request after the other.

        Raises ConfigError for a model that cannot be loaded, NoisyMeasurementError when a process does not end in
        time, NasdeployError when it dies or the device cannot be reached.
        """


class _Here:
    """This machine."""

    name = "this machine"

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        results = []
        for n, request in enumerate(requests):
            results.append(_run(request))
            if progress:
                progress((n + 1) / len(requests))
        return Answers(results=tuple(results), machine=machine_fingerprint())


HERE: Device = _Here()


def _run(request: Request) -> dict[str, Any]:
    try:
        return runner.run_request(request)
    except runner.RequestRefusedError as error:
        raise ConfigError(str(error)) from error
    except runner.WorkerDiedError as error:
        raise NasdeployError(str(error)) from error
    except runner.DeadlineError as error:
        raise NoisyMeasurementError(
            f"latency: {error}; expected a less busy machine or a smaller model"
        ) from error


def block_requests(
    models: Mapping[str, Path],
    runtime: Runtime,
    *,
    plan: timing.Plan,
    blocks: int,
    seed: int,
    shapes: Shapes | None = None,
) -> list[Request]:
    """Return the requests that measure ``models`` together in ``blocks`` fresh processes, each in its own order."""
    return [
        _request(models, runtime, plan=plan, seed=seed + block, shapes=shapes or {})
        for block in range(blocks)
    ]


def start_requests(
    model: Path, runtime: Runtime, *, count: int, seed: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> list[Request]:
    """Return the requests that load ``model`` alone in ``count`` fresh processes and run it once."""
    return [
        _request({ALONE: model}, runtime, plan=None, seed=seed + n, shapes={ALONE: shapes or {}})
        for n in range(count)
    ]


def _request(
    models: Mapping[str, Path], runtime: Runtime, *, plan: timing.Plan | None, seed: int, shapes: Shapes
) -> Request:
    order = Random(seed).sample(sorted(models), len(models))
    return {
        "schema": worker.REQUEST_SCHEMA,
        "models": {name: str(Path(models[name]).resolve()) for name in order},
        "shapes": {name: {key: list(shape) for key, shape in one.items()} for name, one in shapes.items()},
        "provider": runtime.provider,
        "threads": runtime.threads,
        "batch_size": runtime.batch_size,
        "spinning": True,
        "seed": seed,
        "plan": None if plan is None else plan._asdict(),
    }


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
