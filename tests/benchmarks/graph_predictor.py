"""How well models of the loss rank architectures that they have not seen: the rungs of the ladder, on known tables.

    python tests/benchmarks/graph_predictor.py [--table nb201.npz] [--samples 100 300] [--repeats 4] [--seeds 3]

For each table: repeated 5-fold Kendall τ (within held-out folds) of the additive ridge, of neighbouring pairs, of the
Gaussian process and of the graph rung, fitted to --samples architectures drawn at random; mean and standard deviation
over --seeds draws, each with an encoder of its own. Then what the encoder gives back of graphs that were not drawn,
beside the majority of the edges, and seconds: of the pretraining, and of a fit with the predictions of its fold.

NAS-Bench-Macro is part of this checkout; NAS-Bench-201 is an NPZ file with the arrays ops (N, 6), op_names and
c10_valid_200 (per cent). The built-in spaces have no table: for them reconstruction and seconds are told alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tabular_problems import NASBENCH_MACRO, numbers, read_csv

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.cross_validation import Samples, cross_validate
from nasdeploy.optim.gaussian_process import GaussianProcess
from nasdeploy.optim.ladder import ridge_rungs
from nasdeploy.optim.surrogate import Surrogate
from nasdeploy.predictors import AutoencoderSize, GraphPredictors, reconstruction
from nasdeploy.predictors.pretraining import random_choices
from nasdeploy.spaces import Decision, make_space
from nasdeploy.spaces.graph_view import DecisionGraph, Edge, GraphView, Node, chain_view, graph_view

NUM_FOLDS = 5
NUM_HELD_OUT = 1000
"""Graphs that reconstruction is measured on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Choices (N, D) and losses (N,) in per cent, and how architectures look as graphs."""

    name: str
    view: GraphView
    choices: IntArray
    losses: FloatArray


def nasbench_macro() -> Table:
    """Return 8 layers of 3 operations: a chain, the loss is the mean error of three runs."""
    columns = read_csv(NASBENCH_MACRO)
    choices = np.array([[int(digit) for digit in arch] for arch in columns["arch"]], dtype=np.int64)
    runs = [numbers(NASBENCH_MACRO, f"acc{i}", columns[f"acc{i}"]) for i in range(3)]
    decisions = [Decision(name=f"layer{i}", candidates=("identity", "k3e3", "k5e6")) for i in range(8)]
    return Table(
        name="NAS-Bench-Macro",
        view=chain_view(decisions),
        choices=choices,
        losses=100.0 - np.mean(runs, axis=0),
    )


def nasbench_201(path: Path) -> Table:
    """Return the table of 6 edges of 5 operations; the loss is the validation error on CIFAR-10."""
    with np.load(path, allow_pickle=False) as file:
        names = tuple(str(name) for name in file["op_names"])
        choices, accuracy = file["ops"].astype(np.int64), file["c10_valid_200"].astype(np.float64)
    return Table(
        name="NAS-Bench-201",
        view=nasbench_201_view(names),
        choices=choices,
        losses=100.0 - accuracy,
    )


def nasbench_201_view(operations: Sequence[str]) -> DecisionGraph:
    """Return the cell with its edges as nodes, which hold the operations, between four sums.

    "none" takes the edges of its node away. The role of an operation is its place, as in a chain: the sums are told
    apart by what reads them.
    """
    ends = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # in the order of the table
    kept = tuple(c for c, name in enumerate(operations) if name != "none")
    nodes = [Node(role=role, operations=(role,)) for role in ("input", "sum", "sum", "output")]
    edges = []
    for d, (source, target) in enumerate(ends):
        edges.append(Edge(source=source, target=len(nodes), decision=d, candidates=kept))
        edges.append(Edge(source=len(nodes), target=target, decision=d, candidates=kept))
        nodes.append(Node(role=f"{source}->{target}", operations=tuple(operations), decision=d))
    return DecisionGraph([len(operations)] * len(ends), nodes=nodes, edges=edges)


def models(table: Table, graph: GraphPredictors) -> dict[str, Callable[[], Surrogate]]:
    """Return what is compared, by name."""
    sizes = table.view.num_candidates
    ridge, pairs = ridge_rungs(sizes)
    return {
        "ridge": ridge.make,
        "pairs": pairs.make,
        "Gaussian process": lambda: GaussianProcess(sizes),
        "graph": graph,
    }


def compare(
    table: Table, *, num_samples: Sequence[int], repeats: int, seeds: int, size: AutoencoderSize
) -> None:
    """Print one line per model: τ and seconds per fit for each number of samples."""
    print(f"\n{table.name}: {len(table.losses)} architectures; 5-fold τ, {repeats} times, {seeds} draws")
    taus: dict[tuple[str, int], list[float]] = {}
    seconds: dict[tuple[str, int], list[float]] = {}
    for seed in range(seeds):
        graph = GraphPredictors(table.view, seed=seed, size=size)
        drawn = np.random.default_rng(seed).permutation(len(table.losses))
        describe(table.view, graph, held_out=table.choices[drawn[-NUM_HELD_OUT:]])
        for count in num_samples:
            rows = drawn[:count]
            samples = Samples(
                choices=table.choices[rows], losses=table.losses[rows], steps=np.zeros(count, dtype=np.int64)
            )
            for name, make in models(table, graph).items():
                start = time.process_time()
                found = cross_validate(make, samples, num_folds=NUM_FOLDS, num_repeats=repeats, seed=seed)
                spent = (time.process_time() - start) / len(found.taus)
                taus.setdefault((name, count), []).append(float(found.taus.mean()))
                seconds.setdefault((name, count), []).append(spent)
    for name in models(table, graph):
        cells = [
            f"{count}: {statistics.fmean(taus[name, count]):.3f} ± {spread(taus[name, count]):.3f} "
            f"({statistics.fmean(seconds[name, count]):.3f} s)"
            for count in num_samples
        ]
        print(f"{name:17s} {'   '.join(cells)}", flush=True)


def describe(view: GraphView, graph: GraphPredictors, *, held_out: IntArray) -> None:
    """Print what an encoder gives back of the graphs of ``held_out`` (n, D), and how long it was pretrained."""
    start = time.process_time()
    encoder = graph.encoder()
    spent = time.process_time() - start
    found = reconstruction(encoder, view, held_out)
    print(
        f"pretrained in {spent:.1f} s; held-out graphs: operations {100 * found.operations:.2f} %, "
        f"edges {100 * found.edges:.2f} % (majority {100 * found.majority:.2f} %)",
        flush=True,
    )


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def built_in(name: str, *, num_samples: Sequence[int], size: AutoencoderSize) -> None:
    """Print reconstruction on a built-in space, and the seconds of fits to random numbers."""
    view = graph_view(make_space(name, (1, 28, 28), 10))
    graph = GraphPredictors(view, size=size)
    rng = np.random.default_rng(1)
    print(f"\nspace {name}: {len(view.num_candidates)} decisions, {len(view.vocabulary)} operations")
    describe(view, graph, held_out=random_choices(view, NUM_HELD_OUT, rng))
    for count in num_samples:
        choices, losses = random_choices(view, count, rng), rng.normal(size=count)
        model = graph()
        start = time.process_time()
        model.fit(choices, losses, np.arange(count))
        fitted = time.process_time()
        model.predict(random_choices(view, NUM_HELD_OUT, rng))
        predicted = time.process_time()
        print(
            f"{count} samples: fit {fitted - start:.2f} s, {NUM_HELD_OUT} predictions {predicted - fitted:.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, help="NAS-Bench-201 as NPZ; left out without it")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=AutoencoderSize().width)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = AutoencoderSize(width=arguments.width)
    tables = [nasbench_macro(), *([nasbench_201(arguments.table)] if arguments.table else [])]
    for table in tables:
        compare(
            table,
            num_samples=arguments.samples,
            repeats=arguments.repeats,
            seeds=arguments.seeds,
            size=size,
        )
    for name in ("mobile", "cell"):
        built_in(name, num_samples=[300, 1000], size=size)


if __name__ == "__main__":
    main()
