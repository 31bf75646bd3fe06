"""Does a bench notice a rival on its core, and does one on another core leave it alone?

    python tests/benchmarks/rival_process.py --results rival.jsonl [--trials 100] [--rival numpy]

A trial is one measurement of a small network of the default space, as ``nasdeploy bench --quick`` makes it without the
starts: five blocks in fresh processes, beside a second copy and the reference model. A round is three trials in random
order: without a rival, with one bound to the measuring core, with one bound to the first other core. The rival is a
process that never rests: "python" counts, "numpy" multiplies matrices, "memory" adds arrays of 256 MB.

Flagged: a contended block of the network, or an unstable machine. Doubted: most blocks contended, or an unstable
machine, so that a bench which is not quick would measure again. A p50 (wall clock) beside a rival on the other core is
compared with the mean of the idle trials next before and next after it; each idle trial with its idle neighbours
stands beside it, because two measurements of an idle machine differ, too. Two yardsticks: the noise floor, which a
bench finds by measuring its first file twice in the same processes, and the spread of the block medians, which holds
what fresh processes differ by and so speaks of two benches. Both are medians over all trials that are compared. One
line of JSON per trial goes to --results; a second call continues there. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from statistics_of_counts import counted

import nasdeploy
from nasdeploy.costs.comparison import BenchProtocol, compare
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.costs.sessions import choose_cores
from nasdeploy.pipeline.tables import write_untrained
from nasdeploy.profiles import Runtime

SCHEMA = "nasdeploy/rival-benchmark/2"
IDLE, SAME, OTHER = KINDS = ("idle", "same core", "other core")
RIVALS = {
    "python": ("", "pass"),
    "numpy": ("import numpy; a = numpy.random.rand(256, 256)", "a @ a"),
    "memory": ("import numpy; a = numpy.ones(2**25)", "a += 1.0"),
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
MIN_TRIALS = 3

Row = Mapping[str, Any]


@contextmanager
def rival(name: str, core: int | None) -> Iterator[None]:
    """Keep ``core`` busy meanwhile; None: nothing."""
    if core is None:
        yield
        return
    first, again = RIVALS[name]
    code = f"import os; os.sched_setaffinity(0, [{core}])\n{first}\nprint('busy', flush=True)\nwhile True: {again}"
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != b"busy":
                raise RuntimeError(f"the rival did not start: {process.wait()}")
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the rival ended by itself: {process.returncode}")
        finally:
            process.kill()


def cores() -> dict[str, int | None]:
    """Return the core of the rival for each kind of trial."""
    chosen = choose_cores(1)
    others = sorted(set(os.sched_getaffinity(0)) - set(chosen or ()))
    if not chosen or not others:
        raise SystemExit("two cores are needed: one to measure on, one for the rival beside it")
    return {IDLE: None, SAME: chosen[0], OTHER: others[0]}


def trial(
    kind: str, model: Path, core: int | None, *, rival_name: str, protocol: BenchProtocol, seed: int
) -> Row:
    """Measure once and return what the bench says."""
    with rival(rival_name, core):
        started = time.perf_counter()
        found = compare({"model": model}, Runtime(), protocol=protocol, seed=seed)
        seconds = time.perf_counter() - started
    latency = found.models["model"]
    return {
        "kind": kind,
        "flagged": found.flagged,
        "doubted": bool(found.doubt),
        "contended_blocks": latency.contended_blocks,
        "stable": found.stable,
        "reference_spread": found.reference.spread,
        "noise_floor": found.noise_floor,
        "spread": latency.spread,
        "p50_ms": latency.p50_ms,
        "cpu_p50_ms": latency.cpu_p50_ms,
        "wall_over_cpu": max(block.wall_over_cpu for block in latency.blocks),
        "seconds": seconds,
    }


def neighbours(rows: Sequence[Row], kind: str) -> list[float]:
    """Return p50 / mean p50 of the idle trials next before and next after it, for the trials of ``kind``.

    Trials that lack one of the two are left out.
    """
    ratios = []
    for i, row in enumerate(rows):
        before = [other["p50_ms"] for other in rows[:i] if other["kind"] == IDLE]
        after = [other["p50_ms"] for other in rows[i + 1 :] if other["kind"] == IDLE]
        if row["kind"] == kind and before and after:
            ratios.append(row["p50_ms"] / statistics.fmean([before[-1], after[0]]))
    return ratios


def describe_ratios(kind: str, ratios: Sequence[float], yardsticks: Mapping[str, float]) -> str:
    """Return how far the p50 of trials lies from that of their idle neighbours, by each yardstick."""
    ordered = sorted(ratios)
    low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
    middle = statistics.median(ordered)
    found = f"{kind}: p50 over that of its idle neighbours: median {middle:.4f}; nine in ten {low:.4f} to {high:.4f}"
    for name, size in yardsticks.items():
        within = sum(abs(ratio - 1.0) <= size for ratio in ratios)
        found += (
            f"\n  median {(middle - 1.0) / size:+.2f} x the {name}; within it {counted(within, len(ratios))}"
        )
    return found


def report(rows: Sequence[Row]) -> str:
    """Return what the trials say."""
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    header = (
        "rival",
        "flagged",
        "doubted",
        "contended block",
        "unstable",
        "wall / CPU, worst block",
        "seconds",
    )
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for kind, some in by_kind.items():
        cells = (
            kind,
            counted(sum(row["flagged"] for row in some), len(some)),
            counted(sum(row["doubted"] for row in some), len(some)),
            counted(sum(row["contended_blocks"] > 0 for row in some), len(some)),
            counted(sum(not row["stable"] for row in some), len(some)),
            f"{min(row['wall_over_cpu'] for row in some):.3f} to {max(row['wall_over_cpu'] for row in some):.3f}",
            f"{statistics.fmean(row['seconds'] for row in some):.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    compared = [row for row in rows if row["kind"] != SAME]
    yardsticks = {
        "noise floor": statistics.median(row["noise_floor"] for row in compared),
        "spread of the blocks": statistics.median(row["spread"] for row in compared),
    }
    lines += [
        "",
        *(f"{name}, median of {len(compared)}: {100 * size:.2f} %" for name, size in yardsticks.items()),
    ]
    for kind in (OTHER, IDLE):
        ratios = neighbours(rows, kind)
        lines.append(describe_ratios(kind, ratios, yardsticks))
        lines.append(f"  all ratios: {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    return "\n".join(lines)


def read_results(path: Path, settings: Mapping[str, Any]) -> list[Row]:
    """Return the trials in ``path``, which is begun where it is not there. Cuts off half a line of a killed call."""
    if not path.exists():
        path.write_text(json.dumps({"schema": SCHEMA, **settings}) + "\n", encoding="utf-8")
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        path.write_text(whole, encoding="utf-8")
    first, *rest = map(json.loads, whole.splitlines())
    if first != json.loads(json.dumps({"schema": SCHEMA, **settings})):
        raise SystemExit(f"{path}: trials under other settings or on another machine; choose another file")
    return rest


def schedule(trials: int) -> list[str]:
    """Return the kinds of all trials: rounds in random order, then one more idle one for the last neighbours."""
    rng = Random(0)
    return [IDLE, *(kind for _ in range(trials) for kind in rng.sample(KINDS, len(KINDS))), IDLE]


def read_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="of each kind")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rival", choices=tuple(RIVALS), default="numpy")
    parser.add_argument("--runs", type=int, default=100, help="of the network in a trial, at least")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the network in a trial, at least")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    protocol = BenchProtocol(min_runs=arguments.runs, min_seconds=arguments.seconds)
    machine = machine_fingerprint()
    settings = {"rival": arguments.rival, "protocol": protocol.to_json(), "machine": machine}
    rows = read_results(arguments.results, settings)
    kinds, core_of = schedule(max(arguments.trials, MIN_TRIALS)), cores()
    space = nasdeploy.make_space("mobile", (1, 28, 28), 10)
    with tempfile.TemporaryDirectory() as name, arguments.results.open("a", encoding="utf-8") as file:
        model = Path(name, "model.onnx")
        write_untrained(space, space.largest(), model, runtime=Runtime())
        for n, kind in list(enumerate(kinds))[len(rows) :]:
            row = trial(kind, model, core_of[kind], rival_name=arguments.rival, protocol=protocol, seed=n)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{n + 1}/{len(kinds)} {kind}: {'flagged' if row['flagged'] else 'quiet'}", file=sys.stderr)
    print(report(rows))
    print(
        f"\n{machine['cpu']}, {machine['logical_cores']} cores, {machine['release']}, Python {machine['python']}, "
        f"onnxruntime {machine['onnxruntime']}; rival '{arguments.rival}'; {protocol.blocks} blocks, at least "
        f"{protocol.min_runs} runs and {protocol.min_seconds:g} s a file"
    )


if __name__ == "__main__":
    main()
