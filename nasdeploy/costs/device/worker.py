"""Times ONNX models in a process of its own; needs only numpy and onnxruntime, and Python 3.8 or newer.

The request names the models, the provider, the number of threads and how long to measure; the result holds
statistics for each model, or {"error": one line}. Every model gets its own session. After a warm-up they
run in turns, in an order drawn anew for each round, so that drift spreads evenly over them. A request whose
plan is null starts the models, runs each of them once and measures nothing more; one with "operators" also lets
the runtime's profiler time the nodes of each model. The models in "unpaced" run without the pauses of the plan.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .feeds import SessionError, batch_of, make_feed
from .profiling import read_trace, run_for_profile
from .timing import Plan, clocks_of, measure_in_turns, statistics

REQUEST_SCHEMA = "nasdeploy/session-request/1"
RESULT_SCHEMA = "nasdeploy/session-result/1"

if TYPE_CHECKING:  # subscripting it fails before Python 3.9
    from collections.abc import Sequence

    from .timing import Run


def pin(cores: Sequence[int] | None) -> bool:
    """Bind this process to ``cores``; return whether the system allowed it."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return False
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int | None:
    """Return the largest resident size of this process so far.

    Linux tells it per address space; getrusage there also counts what the parent held before this process began.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            sizes = [line.split()[1] for line in status if line.startswith("VmHWM:")]
        return int(sizes[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def share_thread_pool(request: dict[str, Any]) -> bool:
    """Give all sessions one thread pool where onnxruntime can; return whether they share one.

    Idle threads of a session wait busily for a while after its run: those of the model before would take the
    cores from the model that is being measured.
    """
    import onnxruntime as ort

    wanted = request["threads"] > 1 and len(request["models"]) > 1 and request["spinning"]
    if not wanted or not hasattr(ort, "set_global_thread_pool_sizes"):
        return False
    ort.set_global_thread_pool_sizes(request["threads"], 1)
    return True


def open_session(path: str, request: dict[str, Any], *, shared_pool: bool, trace: str | None = None) -> Any:
    """Return a session on ``path`` with everything explicit. Raises SessionError when it cannot be made.

    trace: begin the profiler, which writes a file whose name starts so.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if request["spinning"] else "0")
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = trace
    if shared_pool:
        options.use_per_session_threads = False
    elif len(request["models"]) > 1:  # see share_thread_pool; older versions can only stop the waiting
        options.add_session_config_entry("session.force_spinning_stop", "1")
    provider = request["provider"]
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # onnxruntime raises a class per status code, with no common base of its own
        raise SessionError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from error
    if session.get_providers()[0] != provider:
        raise SessionError(f"{path}: runs on {session.get_providers()[0]} instead of {provider}")
    session.disable_fallback()
    return session


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Started(NamedTuple):
    """A model that has run once. facts: how long its session and its first run took in ms, and its batch."""

    session: Any
    run: Run
    facts: dict[str, Any]


def start_model(
    name: str,
    request: dict[str, Any],
    rng: np.random.Generator,
    *,
    shared_pool: bool = False,
    trace: str | None = None,
) -> Started:
    """Load a model and run it once. Raises SessionError."""
    path = request["models"][name]
    started = time.perf_counter()
    session = open_session(path, request, shared_pool=shared_pool, trace=trace)
    loaded = time.perf_counter()
    shapes = request.get("shapes", {}).get(name, {})
    try:
        feed = make_feed(session, path, request["batch_size"], rng, shapes)
    except (MemoryError, ValueError) as error:  # numpy raises ValueError for more bytes than it can count
        raise SessionError(f"{path}: its inputs do not fit into memory ({first_line(error)})") from error
    begun = time.perf_counter()
    try:
        session.run(None, feed)
    except Exception as error:  # as above: no common base class
        raise SessionError(f"{path}: onnxruntime cannot run it ({first_line(error)})") from error
    facts = {
        "session_ms": (loaded - started) * 1e3,
        "first_run_ms": (time.perf_counter() - begun) * 1e3,
        "batch_size": batch_of(feed, request["batch_size"]),
    }
    return Started(session, lambda: session.run(None, feed), facts)


def profile_model(name: str, request: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Return the facts of a start, and under "operators" what the profiler says of each node."""
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        started = start_model(name, request, rng, trace=os.path.join(folder, "trace"))
        runs = run_for_profile(started.run, request["operators"]["runs"])
        return {**started.facts, "operators": read_trace(started.session.end_profiling(), runs)}


def measure(request: dict[str, Any], rng: np.random.Generator, *, shared_pool: bool) -> dict[str, Any]:
    """Return what was measured of each model that a request names."""
    started = {name: start_model(name, request, rng, shared_pool=shared_pool) for name in request["models"]}
    models = {name: one.facts for name, one in started.items()}
    if request["plan"] is None:
        return models
    plan = Plan(**request["plan"])
    clocks = clocks_of(request["provider"])
    intervals = [0.0 if name in request.get("unpaced", ()) else plan.interval_s for name in started]
    runs = [one.run for one in started.values()]
    times = measure_in_turns(runs, plan, clocks, Random(request["seed"]), intervals)
    return {
        name: {**statistics(times[m], intervals[m]), **facts}
        for m, (name, facts) in enumerate(models.items())
    }


def carry_out(request: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a request. Raises SessionError."""
    import onnxruntime as ort

    if request.get("schema") != REQUEST_SCHEMA:
        raise SessionError(f"request: schema {request.get('schema')!r}; expected '{REQUEST_SCHEMA}'")
    pinned = pin(request["cores"])
    rng = np.random.default_rng(request["seed"])
    shared_pool = share_thread_pool(request)
    memory_before = peak_memory_bytes()
    if request.get("operators"):
        models = {name: profile_model(name, request, rng) for name in request["models"]}
    else:
        models = measure(request, rng, shared_pool=shared_pool)
    return {
        "schema": RESULT_SCHEMA,
        "models": models,
        "pinned": pinned,
        "shared_pool": shared_pool,
        "spinning": request["spinning"],
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "memory_before_bytes": memory_before,
        "peak_memory_bytes": peak_memory_bytes(),
        "onnxruntime": ort.__version__,
    }


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write ``content`` whole or not at all."""
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(path + ".part", path)


def main(arguments: Sequence[str]) -> int:
    """Carry out the request in the first file and write the result to the second; return the exit code."""
    if len(arguments) != 2:
        print("usage: worker.py REQUEST.json RESULT.json", file=sys.stderr)
        return 2
    with open(arguments[0], encoding="utf-8") as file:
        request = json.load(file)
    try:
        result = carry_out(request)
    except SessionError as error:
        write_json(arguments[1], {"schema": RESULT_SCHEMA, "error": str(error)})
        return 2
    write_json(arguments[1], result)
    return 0
