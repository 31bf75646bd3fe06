"""Times the nodes of a model by the runtime's own profiler: in a session of its own, since the profiler costs time.

Needs only the standard library, and Python 3.8 or newer.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # subscripting these classes fails before Python 3.9
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Event = Mapping[str, Any]
    Key = tuple[str, str, str, str]

WARM_RUNS = 10
# A huge model is profiled in fewer runs: the process has a deadline.
MAX_SECONDS = 40.0
NODE_SUFFIX, RUN_EVENT = "_kernel_time", "model_run"


def run_for_profile(run: Callable[[], object], runs: int, clock: Callable[[], float] = time.monotonic) -> int:
    """Run ten times, then ``runs`` times; return how many of these there was time for, at least one."""
    end = clock() + MAX_SECONDS
    for _ in range(WARM_RUNS):
        if clock() < end - MAX_SECONDS / 2:
            run()
    done = 0
    while done < runs and (done == 0 or clock() < end):
        run()
        done += 1
    return done


def read_trace(path: str, runs: int) -> dict[str, Any]:
    """Return what the last ``runs`` runs in the profiler's file say of each node.

    runs; run_us: median of a whole run under the profiler; nodes: name, op_type, provider, calls (in one run) and
    median_us (of its times in one run, in whole microseconds as the profiler counts them). The nodes are those
    that the runtime runs, after fusion; the time of a node with a graph inside is without that of the nodes in it.
    """
    with open(path, encoding="utf-8") as file:
        measured = list(split_runs(json.load(file)))[-runs:]
    per_run = [_sums(own_times(nodes)) for nodes, _ in measured]
    keys = dict.fromkeys(key for times, _ in per_run for key in times)
    return {
        "runs": len(measured),
        "run_us": float(median(us for _, us in measured)),
        "nodes": [
            {
                "name": key[0],
                "op_type": key[2],
                "provider": key[3],
                "calls": round(median(calls[key] for _, calls in per_run)),
                "median_us": float(median(times[key] for times, _ in per_run)),  # 0 in a run without it
            }
            for key in keys
        ],
    }


def split_runs(events: Iterable[Event]) -> Iterator[tuple[list[Event], float]]:
    """Yield the nodes of each run and how long it took in us; the profiler writes a run after its nodes."""
    nodes: list[Event] = []
    for event in events:
        if event.get("name") == RUN_EVENT:
            yield nodes, float(event["dur"])
            nodes = []
        elif event.get("cat") == "Node" and event["name"].endswith(NODE_SUFFIX):
            nodes.append(event)


def own_times(nodes: Sequence[Event]) -> list[tuple[Key, int]]:
    """Return (node, us) of each call, less what the calls inside of it took."""
    ordered = sorted(nodes, key=lambda event: (event["ts"], -event["dur"]))
    own = [int(event["dur"]) for event in ordered]
    around: list[int] = []
    for n, event in enumerate(ordered):
        while around and event["ts"] >= ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"]:
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        around.append(n)
    return [(_key(event), own[n]) for n, event in enumerate(ordered)]


def _sums(calls: Iterable[tuple[Key, int]]) -> tuple[Counter[Key], Counter[Key]]:
    """Return the time of each node in a run, and how often it was called."""
    times: Counter[Key] = Counter()
    counts: Counter[Key] = Counter()
    for key, us in calls:
        times[key] += us
        counts[key] += 1
    return times, counts


def _key(event: Event) -> Key:
    # Nodes may lack a name: their place in the graph tells them apart.
    facts = event["args"]
    name = event["name"][: -len(NODE_SUFFIX)]
    return name, str(facts.get("node_index", "")), facts.get("op_name", ""), facts.get("provider", "")
