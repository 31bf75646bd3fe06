"""Times ONNX models in a fresh process; needs only numpy and onnxruntime, and Python 3.8 or newer.

    python session_worker.py REQUEST.json RESULT.json

The request names the models, the provider, the number of threads and how long to measure; the result holds
statistics for each model, or {"error": one line}. Every model gets its own session. After a warm-up they
run in turns, in an order drawn anew for each round, so that drift spreads evenly over them. A request whose
plan is null starts the models, runs each of them once and measures nothing more.

Beside the wall clock stands the calling thread's CPU time; it does not grow while a rival holds the core.
Where a session has several threads the caller works too and waits busily for the others, so its CPU time
is still that of a run (that of all threads together is not: idle ones sleep, or spin between the runs).
"""

from __future__ import annotations

import json
import os
import sys
import time
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

REQUEST_SCHEMA = "nasdeploy/session-request/1"
RESULT_SCHEMA = "nasdeploy/session-result/1"

WARM_UP_GROUP = 10
WARM_UP_TOLERANCE = 0.02
WARM_UP_MAX_GROUPS = 20
# After another model's turn the caches hold that model's data: the first runs of a turn are not counted.
SETTLING_RUNS = 2
SETTLING_LIMIT_MS = 100.0  # beside a longer run that is nothing
# The fewest independent runs that bound a percentile at 95 % confidence: 1 - 0.9**29 and so on.
RUNS_FOR_PERCENTILE = {50: 5, 90: 29, 95: 59, 99: 299}
MIN_RUNS = RUNS_FOR_PERCENTILE[50]

if TYPE_CHECKING:  # subscripting these classes fails before Python 3.9
    from collections.abc import Callable, Sequence

    Run = Callable[[], object]
    Clock = Callable[[], int]


class Clocks(NamedTuple):
    """Two clocks in nanoseconds: of the wall, and of the calling thread's CPU time."""

    wall_ns: Clock
    cpu_ns: Clock


SYSTEM_CLOCKS = Clocks(time.perf_counter_ns, time.thread_time_ns)


class Plan(NamedTuple):
    """How long each model is measured. Runs come in ``rounds`` turns."""

    rounds: int
    min_runs: int
    min_seconds: float
    max_seconds: float


def clocks_of(provider: str) -> Clocks:
    """Return the clocks of a provider: beside an accelerator the thread only waits, so only wall time counts."""
    if provider == "CPUExecutionProvider":
        return SYSTEM_CLOCKS
    return Clocks(SYSTEM_CLOCKS.wall_ns, SYSTEM_CLOCKS.wall_ns)


class Times(NamedTuple):
    """Wall and CPU time of each run in ms, both of shape (n,)."""

    wall_ms: np.ndarray
    cpu_ms: np.ndarray


class SessionError(Exception):
    """The request cannot be carried out; the message is one line for the user."""


def time_runs(run: Run, count: int, clocks: Clocks) -> Times:
    """Call ``run`` ``count`` times and return the time of each call."""
    wall = np.empty(count, dtype=np.int64)
    cpu = np.empty(count, dtype=np.int64)
    wall_ns, cpu_ns = clocks.wall_ns, clocks.cpu_ns
    for n in range(count):
        cpu_start, wall_start = cpu_ns(), wall_ns()
        run()
        wall_end, cpu_end = wall_ns(), cpu_ns()
        wall[n], cpu[n] = wall_end - wall_start, cpu_end - cpu_start
    return Times(wall / 1e6, cpu / 1e6)


def clock_cost(clocks: Clocks) -> tuple[float, float]:
    """Return what reading the clocks adds to the wall and the CPU time of a run, in ms.

    The CPU clock is a system call: half a microsecond, 3 % of a network that takes 16.
    """
    times = time_runs(lambda: None, 1000, clocks)
    return float(np.median(times.wall_ms)), float(np.median(times.cpu_ms))


def warm_up(run: Run, clocks: Clocks, max_seconds: float) -> float:
    """Run until the median CPU time of ten runs moves by less than 2 %; return a run's mean wall time in ms.

    Stops after 200 runs or ``max_seconds`` at the latest, but not before ten runs; a model that needs longer than
    ``max_seconds`` for those is taken as warm after that time.
    """
    spent_ms = 0.0
    before = float("inf")
    for _ in range(WARM_UP_MAX_GROUPS):
        times = _time_group(run, clocks, 1e3 * max_seconds)
        median = float(np.median(times.cpu_ms))
        spent_ms += float(times.wall_ms.sum())
        if abs(median - before) < WARM_UP_TOLERANCE * before or spent_ms >= 1e3 * max_seconds:
            break
        before = median
    return float(times.wall_ms.mean())


def _time_group(run: Run, clocks: Clocks, limit_ms: float) -> Times:
    """Time ten runs, or as many as ``limit_ms`` allow."""
    parts: list[Times] = []
    while len(parts) < WARM_UP_GROUP and sum(float(part.wall_ms[0]) for part in parts) < limit_ms:
        parts.append(time_runs(run, 1, clocks))
    return Times(
        np.concatenate([part.wall_ms for part in parts]), np.concatenate([part.cpu_ms for part in parts])
    )


def runs_per_turn(plan: Plan, run_ms: float) -> int:
    """Return how many runs a turn needs so that all turns together fulfil ``plan``; at least one."""
    run_ms = max(run_ms, 1e-6)
    wanted = max(plan.min_runs, plan.min_seconds * 1e3 / run_ms)
    affordable = plan.max_seconds * 1e3 / run_ms
    return max(1, int(np.ceil(max(min(wanted, affordable), MIN_RUNS) / plan.rounds)))


def measure_in_turns(runs: Sequence[Run], plan: Plan, clocks: Clocks, rng: Random) -> list[Times]:
    """Warm every model up, then measure them in rounds of random order; return the times of each.

    A model that has used up its ``max_seconds`` (a rival came) sits out the rounds that are left, unless it has
    too few runs for a median.
    """
    run_ms = [warm_up(run, clocks, plan.max_seconds) for run in runs]
    counts = [runs_per_turn(plan, ms) for ms in run_ms]
    parts: list[list[Times]] = [[] for _ in runs]
    spent_ms = [0.0] * len(runs)
    for _ in range(plan.rounds):
        for m in rng.sample(range(len(runs)), len(runs)):
            if spent_ms[m] < 1e3 * plan.max_seconds or sum(len(p.wall_ms) for p in parts[m]) < MIN_RUNS:
                if run_ms[m] < SETTLING_LIMIT_MS:
                    time_runs(runs[m], SETTLING_RUNS, clocks)
                parts[m].append(time_runs(runs[m], counts[m], clocks))
                spent_ms[m] += float(parts[m][-1].wall_ms.sum())
    wall_cost, cpu_cost = clock_cost(clocks)
    return [
        Times(
            np.concatenate([p.wall_ms for p in part]) - wall_cost,
            np.concatenate([p.cpu_ms for p in part]) - cpu_cost,
        )
        for part in parts
    ]


def percentiles(values: np.ndarray) -> dict[str, float | None]:
    """Return the percentiles of ``values`` (n,); None for one that n runs cannot support."""
    return {
        f"p{q}": float(np.percentile(values, q)) if len(values) >= needed else None
        for q, needed in RUNS_FOR_PERCENTILE.items()
    }


def statistics(times: Times) -> dict[str, Any]:
    """Return the statistics of one model in one process, in ms."""
    return {
        "n": len(times.wall_ms),
        "min_ms": float(times.wall_ms.min()),
        "mean_ms": float(times.wall_ms.mean()),
        "wall_ms": percentiles(times.wall_ms),
        "cpu_ms": percentiles(times.cpu_ms),
        # What the model takes when nothing disturbs it: the best statistic for comparing models.
        "cpu_p25_ms": float(np.percentile(times.cpu_ms, 25)),
        "wall_over_cpu": float(times.wall_ms.sum() / max(times.cpu_ms.sum(), 1e-9)),
    }


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


def open_session(path: str, request: dict[str, Any], *, shared_pool: bool) -> Any:
    """Return a session on ``path`` with everything explicit. Raises SessionError when it cannot be made."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if request["spinning"] else "0")
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


INPUT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
    "tensor(uint32)": np.uint32,
    "tensor(int32)": np.int32,
    "tensor(uint64)": np.uint64,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
# Integers wider than a pixel are mostly indices, and these two are in range nearly everywhere.
PIXELS = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(uint8)", "tensor(int8)")
PIXEL_LIMIT, INDEX_LIMIT = 128, 2


def make_feed(
    session: Any, path: str, batch_size: int, rng: np.random.Generator, shapes: dict[str, list[int]]
) -> dict[str, np.ndarray]:
    """Return random values for every input: pixels, or 0 and 1 for indices.

    shapes: {input: shape}; for an input that is not in it, dynamic dimensions become ``batch_size``.
    """
    feed: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.type not in INPUT_TYPES:
            raise SessionError(
                f"{path}: input '{value.name}' is a {value.type}; expected a tensor of numbers"
            )
        shape = [size if isinstance(size, int) else batch_size for size in value.shape]
        limit = PIXEL_LIMIT if value.type in PIXELS else INDEX_LIMIT
        values = rng.integers(0, limit, shapes.get(value.name, shape))
        feed[value.name] = np.asarray(values).astype(INPUT_TYPES[value.type])
    return feed


def batch_of(feed: dict[str, np.ndarray], batch_size: int) -> int:
    """Return how many items one run takes: the first dimension of the first input, unless that is a vector."""
    first = next(iter(feed.values()), None)
    return batch_size if first is None or first.ndim < 2 else int(first.shape[0])


def start_model(
    name: str, request: dict[str, Any], rng: np.random.Generator, *, shared_pool: bool
) -> tuple[Run, dict[str, Any]]:
    """Return the model's run, how long its session and its first run took in ms, and the size of its batch."""
    path = request["models"][name]
    started = time.perf_counter()
    session = open_session(path, request, shared_pool=shared_pool)
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
    return lambda: session.run(None, feed), facts


def carry_out(request: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a request. Raises SessionError."""
    import onnxruntime as ort

    if request.get("schema") != REQUEST_SCHEMA:
        raise SessionError(f"request: schema {request.get('schema')!r}; expected '{REQUEST_SCHEMA}'")
    pinned = pin(request["cores"])
    rng = np.random.default_rng(request["seed"])
    shared_pool = share_thread_pool(request)
    memory_before = peak_memory_bytes()
    started = {name: start_model(name, request, rng, shared_pool=shared_pool) for name in request["models"]}
    models = {name: facts for name, (_, facts) in started.items()}
    if request["plan"] is not None:
        times = measure_in_turns(
            [run for run, _ in started.values()],
            Plan(**request["plan"]),
            clocks_of(request["provider"]),
            Random(request["seed"]),
        )
        models = {name: {**statistics(times[m]), **models[name]} for m, name in enumerate(models)}
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
        print("usage: session_worker.py REQUEST.json RESULT.json", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
