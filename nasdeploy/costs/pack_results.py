"""What a device may answer: the form of ``latency.json``, and numbers that a clock can give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from nasdeploy.costs.device.pack_runner import RESULT_SCHEMA, digest_of
from nasdeploy.costs.device.timing import MIN_RUNS
from nasdeploy.costs.sessions import Request
from nasdeploy.errors import UsageError

__all__ = ["DeviceResult", "check_answered", "parse_result"]

# Below this share of the time that a plan allows, fewer runs than it asks for are no matter of a slow model.
SLOW_SHARE = 0.1

Number = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Percentiles = dict[Literal["p50", "p90", "p95", "p99"], Milliseconds | None]


class _Node(BaseModel):
    """A node under the profiler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: StrictStr
    op_type: StrictStr
    provider: StrictStr
    calls: Annotated[StrictInt, Field(ge=0)]
    median_us: Annotated[float, Field(allow_inf_nan=False, strict=True)]


class _Operators(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Annotated[StrictInt, Field(ge=1)]
    run_us: Number
    nodes: list[_Node]


class _Answer(BaseModel):
    """One model of one request that only started it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    session_ms: Milliseconds
    first_run_ms: Milliseconds
    batch_size: Annotated[StrictInt, Field(ge=1)]


class _Profiled(_Answer):
    """One model of one request that profiled it."""

    operators: _Operators


class _Times(_Answer):
    """One model of one request."""

    n: Annotated[StrictInt, Field(ge=MIN_RUNS)]
    min_ms: Number
    mean_ms: Milliseconds
    wall_ms: Percentiles
    cpu_ms: Percentiles
    cpu_p25_ms: Milliseconds
    wall_over_cpu: Milliseconds
    late: Annotated[StrictInt, Field(ge=0)] = 0


class _Conditions(BaseModel):
    """Of one request."""

    model_config = ConfigDict(extra="allow", frozen=True)

    pinned: StrictBool
    shared_pool: StrictBool
    spinning: StrictBool
    onnxruntime: StrictStr
    memory_before_bytes: Annotated[StrictInt, Field(ge=0)] | None
    peak_memory_bytes: Annotated[StrictInt, Field(ge=0)] | None
    load: list[Number] | None = None


class _Plan(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    rounds: Annotated[StrictInt, Field(ge=1)]
    min_runs: Annotated[StrictInt, Field(ge=1)]
    min_seconds: Number
    max_seconds: Milliseconds
    interval_s: Number = 0.0


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    models: Annotated[dict[str, StrictStr], Field(min_length=1)]
    plan: _Plan | None


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Annotated[Literal["nasdeploy/pack/1"], Field(alias="schema")]
    version: StrictStr
    purpose: dict[str, Any]
    files: dict[str, StrictStr]
    requests: list[_Request]


class DeviceResult(BaseModel):
    """``latency.json`` as a whole. pack: the manifest of what was run. cores: as asked for on the device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack_sha256: StrictStr
    pack: dict[str, Any]
    machine: dict[str, StrictStr | StrictInt | StrictFloat | None]
    cores: list[StrictInt] | None
    seconds: Number
    results: list[dict[str, Any]]


def parse_result(path: Path) -> DeviceResult:
    """Return the content of ``path``, whole and as its pack wrote it. Raises UsageError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON, or cut off"
        raise UsageError(f"{path}: cannot be read ({reason}); expected a file that a pack wrote") from error
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if schema != RESULT_SCHEMA:
        raise UsageError(f"{path}: schema {schema!r}; expected '{RESULT_SCHEMA}', a file that a pack wrote")
    digest = data.pop("digest", None)
    try:
        unchanged = digest == digest_of({"schema": schema, **data})
        if unchanged:
            result = DeviceResult.model_validate(data)
            _Manifest.model_validate(result.pack)
            return result
    except ValidationError as error:
        raise UsageError(f"{path}: {_first(error)}; expected a file as a pack writes it") from error
    except (ValueError, RecursionError):  # a number that JSON cannot hold
        unchanged = False
    raise UsageError(
        f"{path}: its digest is not that of its content: it was changed or damaged; expected the file as it was written"
    )


def check_answered(path: Path, requests: Sequence[Request], result: DeviceResult) -> None:
    """Raise UsageError unless every request has a believable result for every model."""
    if len(result.results) != len(requests):
        raise UsageError(
            f"{path}: {len(result.results)} of {len(requests)} requests are answered; expected all of them"
        )
    for number, (request, answer) in enumerate(zip(requests, result.results, strict=True), start=1):
        where = f"{path}: request {number}"
        models = answer.get("models")
        missing = [name for name in request["models"] if not isinstance(models, dict) or name not in models]
        if missing or not isinstance(models, dict):
            raise UsageError(f"{where}: no result for the model '{missing[0]}'; expected one for each")
        try:
            _Conditions.model_validate(answer)
            kind = _kind_of(request)
            for name in request["models"]:
                _check_percentiles(where, name, kind.model_validate(models[name]))
        except ValidationError as error:
            raise UsageError(f"{where}: {_first(error)}; expected what a clock can give") from error
    _check_counts(path, requests, result)


def _kind_of(request: Request) -> type[_Answer]:
    if request["plan"] is not None:
        return _Times
    return _Profiled if request.get("operators") else _Answer


def _check_percentiles(where: str, name: str, times: _Answer) -> None:
    if not isinstance(times, _Times):
        return
    for clock in (times.wall_ms, times.cpu_ms):
        values = [value for key in ("p50", "p90", "p95", "p99") if (value := clock.get(key)) is not None]
        if len(clock) != 4 or clock["p50"] is None or values != sorted(values):
            raise UsageError(
                f"{where}: percentiles of '{name}' are {dict(clock)}; expected a rising row with a p50"
            )


def _check_counts(path: Path, requests: Sequence[Request], result: DeviceResult) -> None:
    """Raise UsageError for a model that was run less often than planned without being slow.

    In no request: a rival during the warm-up makes a model look slow in one.
    """
    closest: dict[tuple[str, int], float] = {}
    for request, answer in zip(requests, result.results, strict=True):
        if (plan := request["plan"]) is None:
            continue
        for name in request["models"]:
            row, key = answer["models"][name], (name, int(plan["min_runs"]))
            turn_ms = max(row["mean_ms"], 1e3 * plan.get("interval_s", 0.0))
            by_time = row["n"] * turn_ms / (1e3 * SLOW_SHARE * plan["max_seconds"])
            closest[key] = max(closest.get(key, 0.0), row["n"] / plan["min_runs"], by_time)
    for (name, wanted), share in closest.items():
        if share < 1.0:
            raise UsageError(
                f"{path}: '{name}' has too few runs; expected {wanted} in each request, as planned"
            )


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(text)


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    return f"{key} = {json.dumps(problem['input'], default=str)[:60]}: {problem['msg'].lower()}"
