"""How well a latency table predicts whole networks that it has never seen, beside FLOPs and the ceiling.

    python tests/benchmarks/table_accuracy.py --results accuracy.jsonl [--precision fp32 int8] [--image-shape 1x28x28]

For every precision and image shape: a table of the default space in the usual way, no stored one used, then networks
drawn with another seed and measured twice in five later processes. Error: predicted over measured median CPU time,
less 1, without its sign. Ceiling: the second measurement in place of a prediction; no table can do better. FLOPs (as
fvcore counts them) predict by a straight line through the networks that the table itself held out. A/A: the two
measurements of a network against each other. The networks are drawn evenly over all sizes, as the table's own are, or
with --draw uniform as a random search would draw them: nearly all of middle size, which is hard on ranks.

One line of JSON per case goes to --results; a second call continues there. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import nasdeploy
from nasdeploy.costs.calibration import line_through, rank_correlation
from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.latency import ModelLatency, block_ratios, measure_models, write_reference_model
from nasdeploy.costs.latency_table import (
    NUM_CALIBRATION,
    NUM_HELD_OUT,
    LatencyTable,
    measure_latency_table,
)
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.costs.table_models import Convert, ModelWriter, stratified_architectures
from nasdeploy.exporters.quantization import convert_untrained
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import Architecture, SearchSpace

SCHEMA = "nasdeploy/table-accuracy-benchmark/1"
DEFAULT_PROFILES = ("cpu-tight", "cpu-middle", "cpu-roomy")
REFERENCE = "reference"
TABLE_SEED, UNSEEN_SEED = 0, 12345
AA_LIMIT = 0.02
HEADER = (
    "case",
    "networks",
    "MAPE",
    "Spearman",
    "ceiling",
    "FLOPs: MAPE",
    "FLOPs: Spearman",
    "A/A <= 2 %",
    "A/A, worst",
    "table",
    "three profiles",
)

FloatArray = npt.NDArray[np.float64]
Precision = Literal["fp32", "fp16", "int8"]


def unseen_architectures(space: SearchSpace, count: int, *, draw: str) -> list[Architecture]:
    """Return ``count`` distinct architectures of which the table has measured none."""
    known = stratified_architectures(space, NUM_CALIBRATION + NUM_HELD_OUT, np.random.default_rng(TABLE_SEED))
    rng = np.random.default_rng(UNSEEN_SEED)
    if draw == "stratified":
        found = [a for a in stratified_architectures(space, 2 * count, rng) if a not in known]
        picked = np.linspace(0, len(found) - 1, count).round().astype(int)
        return [found[i] for i in picked]
    drawn: dict[Architecture, None] = {}
    while len(drawn) < count:
        architecture = Architecture(tuple(int(rng.integers(num)) for num in space.num_candidates()))
        if architecture not in known:
            drawn[architecture] = None
    return list(drawn)


def measure_twice(
    space: SearchSpace, drawn: Sequence[Architecture], runtime: Runtime, *, convert: Convert, seconds: float
) -> tuple[list[ModelLatency], list[ModelLatency], ModelLatency]:
    """Return two measurements of each network and that of the reference model, all in the same blocks."""
    with tempfile.TemporaryDirectory() as name:
        writer = ModelWriter(Path(name), space, runtime, seed=UNSEEN_SEED, convert=convert)
        files = [writer.network(architecture) for architecture in drawn]
        paths = {f"{kind}{i}": path for kind in ("first", "again") for i, path in enumerate(files)}
        paths[REFERENCE] = Path(name, "reference.onnx")
        write_reference_model(paths[REFERENCE])
        times = measure_models(
            paths,
            runtime,
            min_runs=250,
            min_seconds=seconds,
            max_seconds=max(2.0, 2 * seconds),
            seed=UNSEEN_SEED,
        )
    first, again = ([times[f"{kind}{i}"] for i in range(len(drawn))] for kind in ("first", "again"))
    return first, again, times[REFERENCE]


def mean_error(predicted: FloatArray, measured: FloatArray) -> float:
    """Return the mean relative error."""
    return float(np.abs(predicted / measured - 1.0).mean())


def assess_case(
    space: SearchSpace,
    table: LatencyTable,
    drawn: Sequence[Architecture],
    first: Sequence[ModelLatency],
    again: Sequence[ModelLatency],
) -> dict[str, Any]:
    """Return what the table, FLOPs and a second measurement say about the first measurement of ``drawn``."""
    measured, repeated = (np.array([latency.cpu_p50_ms for latency in some]) for some in (first, again))
    choices = np.array([a.choices for a in drawn])
    predicted = table.cost_table(space).of(choices)
    count = counting_tables(space)["flops"]
    intercept, slope = line_through(
        count.of(np.array([row.choices for row in table.held_out])),
        np.array([row.measured_ms for row in table.held_out]),
    )
    flops = count.of(choices)
    gaps = np.abs(repeated / measured - 1.0)
    block_gaps = [
        abs(ratio - 1.0)
        for one, other in zip(again, first, strict=True)
        for ratio in block_ratios(one, other)
    ]
    return {
        "num_networks": len(drawn),
        "mape": mean_error(predicted, measured),
        "max_error": float(np.abs(predicted / measured - 1.0).max()),
        "median_predicted_over_measured": float(np.median(predicted / measured)),
        "spearman": rank_correlation(predicted, measured),
        "ceiling": float(gaps.mean()),
        "ceiling_spearman": rank_correlation(repeated, measured),
        "flops_mape": mean_error(intercept + slope * flops, measured),
        "flops_spearman": rank_correlation(flops, measured),
        "aa_worst": float(gaps.max()),
        "aa_within_limit": int((gaps <= AA_LIMIT).sum()),
        "aa_blocks_median": float(np.median(block_gaps)),
        "aa_blocks_p95": float(np.quantile(block_gaps, 0.95)),
        "measured_ms": [float(measured.min()), float(measured.max())],
        "contended": sum(latency.contended_blocks > 0 for latency in first),
        "networks": [
            {
                "choices": list(a.choices),
                "predicted_ms": float(p),
                "measured_ms": float(m),
                "again_ms": float(r),
            }
            for a, p, m, r in zip(drawn, predicted, measured, repeated, strict=True)
        ],
    }


def num_runtimes(precision: Precision) -> int:
    """Return how many tables the three default profiles need in this precision."""
    profiles = [nasdeploy.load_profile(name) for name in DEFAULT_PROFILES]
    runtimes = [profile.runtime.model_copy(update={"precision": precision}) for profile in profiles]
    return len({(runtime.key(), runtime.channel_multiple) for runtime in runtimes})


def run_case(
    precision: Precision, image_shape: tuple[int, int, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Build the table, measure the networks, and return the figures."""
    space = nasdeploy.make_space("mobile", image_shape, 10)
    runtime = Runtime(precision=precision)
    convert = partial(convert_untrained, precision=precision)
    table = measure_latency_table(
        space, runtime, flops=counting_tables(space)["flops"], seed=TABLE_SEED, convert=convert
    )
    drawn = unseen_architectures(space, arguments.networks, draw=arguments.draw)
    first, again, reference = measure_twice(space, drawn, runtime, convert=convert, seconds=arguments.seconds)
    return {
        "table_seconds": table.seconds,
        "num_runtimes": num_runtimes(precision),
        "num_entries": len(table.entries),
        "own": {
            name: getattr(table.accuracy, name) for name in ("mape", "spearman", "ceiling", "num_held_out")
        },
        "calibration": dict(table.calibration.coefficients),
        "reference_spread": reference.spread,
        **assess_case(space, table, drawn, first, again),
    }


def describe(case: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a case."""

    def percent(key: str) -> str:
        return f"{100 * case[key]:.2f} %"

    return (
        f"{case['precision']}, {case['image_shape']}",
        str(case["num_networks"]),
        percent("mape"),
        f"{case['spearman']:.4f}",
        percent("ceiling"),
        percent("flops_mape"),
        f"{case['flops_spearman']:.4f}",
        f"{case['aa_within_limit']} of {case['num_networks']}",
        percent("aa_worst"),
        f"{case['table_seconds']:.0f} s",
        f"{case['table_seconds'] * case['num_runtimes']:.0f} s",
    )


def report(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of all cases, and what else there is to say about each."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *map(describe, cases)]
    text = [f"| {' | '.join(line)} |" for line in lines] + [""]
    for case in cases:
        own, (low, high) = case["own"], case["measured_ms"]
        text.append(
            f"{case['precision']}, {case['image_shape']}: networks of {low:.4f} to {high:.4f} ms; predicted over "
            f"measured {case['median_predicted_over_measured']:.3f} in the median, worst error "
            f"{100 * case['max_error']:.1f} %; the table's own {own['num_held_out']} held-out networks: MAPE "
            f"{100 * own['mape']:.2f} %, Spearman {own['spearman']:.4f}, ceiling {100 * own['ceiling']:.2f} %; A/A by "
            f"single blocks: median {100 * case['aa_blocks_median']:.2f} %, 95th percentile "
            f"{100 * case['aa_blocks_p95']:.2f} %; reference model's spread {100 * case['reference_spread']:.1f} %, "
            f"{case['contended']} networks with a contended block"
        )
    return "\n".join(text)


def read_results(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cases in ``path`` that were measured under the same settings on this machine."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cases = [json.loads(line) for line in lines]
    return [case for case in cases if case["settings"] == json.loads(json.dumps(settings))]


def read_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp16", "int8"), default=("fp32", "int8"))
    parser.add_argument("--image-shape", nargs="+", default=("1x28x28", "3x96x96"), metavar="CxHxW")
    parser.add_argument("--networks", type=int, default=32)
    parser.add_argument("--draw", choices=("stratified", "uniform"), default="stratified")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, over five processes")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    machine = machine_fingerprint()
    settings = {
        "schema": SCHEMA,
        "machine": machine,
        "networks": arguments.networks,
        "draw": arguments.draw,
        "seconds": arguments.seconds,
    }
    known = {
        (case["precision"], case["image_shape"]): case for case in read_results(arguments.results, settings)
    }
    cases = []
    for shape in arguments.image_shape:
        channels, height, width = map(int, shape.split("x"))
        for precision in arguments.precision:
            case = known.get((precision, shape))
            if case is None:
                figures = run_case(precision, (channels, height, width), arguments)
                case = {"precision": precision, "image_shape": shape, **figures, "settings": settings}
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(case) + "\n")
            cases.append(case)
            print(" | ".join(describe(case)), flush=True)
    print(f"\n{report(cases)}")
    print(
        f"\n{machine['cpu']}, one thread, {machine['release']}, Python {machine['python']}, onnxruntime "
        f"{machine['onnxruntime']}, nasdeploy {nasdeploy.__version__}"
    )


if __name__ == "__main__":
    main()
