"""How well each scorer ranks networks that were trained alone, beside parameters and FLOPs.

    python tests/benchmarks/rank_correlation.py train --results ranks.jsonl [--networks 24] [--seeds 2]
    nasdeploy search -o runs/ranks
    python tests/benchmarks/rank_correlation.py score --results ranks.jsonl --run runs/ranks --scores scores.json
    python tests/benchmarks/rank_correlation.py table --results ranks.jsonl --scores scores.json

train: architectures from small to large, each trained from random weights by the default recipe, without a teacher;
accuracy and loss are those of the moving average on the test images. One line of JSON each; a second call trains what
is missing. With two seeds, the ranks of one training by the other are the ceiling: no scorer is expected to do better.
score: what every scorer says of them. table: Kendall's tau-b and Spearman's rho, over all networks and over pairs of
one bin of FLOPs, where size tells little, with 95 % intervals by bootstrap over networks. Run it alone: a rival process
makes training several times slower.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_scorers import SCORERS, Known
from statistics_of_ranks import STATISTICS, Ranking, bins_of, estimate_of

from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.costs.table_models import stratified_architectures
from nasdeploy.errors import ConfigError, NasdeployError
from nasdeploy.files import write_json
from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import Job, finished_job, package_versions, prepare, torch_environment
from nasdeploy.progress import Silent
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings, RetrainSettings
from nasdeploy.spaces.base import Architecture, SearchSpace
from nasdeploy.training.evaluation import loss_and_accuracy
from nasdeploy.training.retraining import Retraining

Line = Mapping[str, Any]
DRAW_SEED = 0
"""Of the architectures."""
CEILING = "another training of the same networks"
REFERENCE = "FLOPs"
HEADERS = {
    "tau": "tau",
    "rho": "rho",
    "tau within": "tau within bins",
}


def make_job(arguments: argparse.Namespace) -> Job:
    """Return the job whose recipe is used; nothing is written to its folder."""
    recipe = RetrainSettings(start="scratch", distillation_weight=0.0, num_steps=arguments.steps)
    settings = BuildSettings(
        data=arguments.data, space=arguments.space, retrain=recipe, threads=arguments.threads
    )
    return prepare(settings, folder=RunFolder(Path()), observer=Silent(), measures=False)


def train(job: Job, architecture: Architecture, *, seed: int) -> dict[str, Any]:
    """Train ``architecture`` alone; return what the test images say of it. seed: of weights and batches."""
    job, started = job.at(architecture), time.perf_counter()
    settings = job.settings.retrain
    generator = job.generator(f"rank/weights/{seed}")
    network = build_network(job.space, architecture, job.normalise(), generator)
    loop = Retraining(
        network.to(job.device).to(memory_format=torch.channels_last),
        job.batches(job.train, purpose=f"rank/{seed}", batch_size=settings.batch_size, augment=True),
        settings,
        teacher=None,
        class_weights=job.class_weights,
    )
    while loop.num_done < loop.num_steps:
        loop.step()
    test = job.dataset.test.to(job.device)
    loss, accuracy = loss_and_accuracy(loop.result(), test.images, test.labels)
    return {"loss": loss, "accuracy": accuracy, "seconds": round(time.perf_counter() - started, 1)}


def train_all(arguments: argparse.Namespace) -> None:
    """Train what the file of results does not hold yet, whole seeds first."""
    job = make_job(arguments)
    rng = np.random.default_rng(DRAW_SEED)
    architectures = stratified_architectures(job.space, arguments.networks, rng)
    order = rng.permutation(len(architectures)).tolist()  # what is interrupted holds all sizes
    known = {(key_of(line["architecture"]), line["seed"]) for line in stored(arguments)}
    with torch_environment(job):
        for seed, i in itertools.product(range(arguments.seeds), order):
            names = job.space.to_names(architectures[i])
            if (key_of(names), seed) in known:
                continue
            line = {**conditions(arguments), "seed": seed, "architecture": names}
            line |= train(job, architectures[i], seed=seed)
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"seed {seed}, network {i}: {100 * line['accuracy']:.2f} % in {line['seconds']} s", flush=True
            )


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what results must have in common to be compared."""
    return {"data": arguments.data, "space": arguments.space, "steps": arguments.steps}


def key_of(names: Mapping[str, str]) -> str:
    """Return an architecture as one text."""
    return json.dumps(names, sort_keys=True)


def stored(arguments: argparse.Namespace) -> list[Line]:
    """Return the results under the conditions of the call."""
    path: Path = arguments.results
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    wanted = conditions(arguments).items()
    return [line for line in lines if wanted <= {**line, "architecture": None}.items()]


def trained(arguments: argparse.Namespace, space: SearchSpace) -> dict[Architecture, list[Line]]:
    """Return the results of every architecture by the seeds that all have. Raises ConfigError for less than two."""
    found: dict[Architecture, dict[int, Line]] = {}
    for line in stored(arguments):
        found.setdefault(space.from_names(line["architecture"]), {})[line["seed"]] = line
    if len(found) < 2:
        raise ConfigError(
            f"--results {arguments.results}: {len(found)} networks of {conditions(arguments)}; expected at least 2"
        )
    common = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    if not common:
        raise ConfigError(f"--results {arguments.results}: no seed that all networks have; train them first")
    return {architecture: [by_seed[seed] for seed in common] for architecture, by_seed in found.items()}


def read_scores(arguments: argparse.Namespace, *, of: str | None = None) -> dict[str, Any]:
    """Return the file of scores, an empty one where there is none. of: the run that they must come from, if any."""
    path: Path = arguments.scores
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"run": of, "scores": {}}
    if of is not None and known["run"] != of:
        raise ConfigError(
            f"--scores {path}: holds those of another search; expected a file of its own for this one"
        )
    return known


def score_all(arguments: argparse.Namespace) -> None:
    """Ask every scorer that the file of scores does not hold yet."""
    run = None if arguments.run is None else RunFolder(arguments.run)
    job = make_job(arguments) if run is None else finished_job(run.path, Silent())
    architectures = list(trained(arguments, job.space))
    known = read_scores(arguments, of="none" if run is None else str(read_json(run.run)["created"]))
    scores = known["scores"]
    keys = [key_of(job.space.to_names(architecture)) for architecture in architectures]
    with torch_environment(job):
        for name, scorer in SCORERS.items():
            if set(keys) <= set(scores.get(name, ())):
                continue
            started = time.perf_counter()
            try:
                found = scorer(Known(job=job, run=run), architectures)
            except NasdeployError as error:
                print(f"{name}: left out ({error})", file=sys.stderr)
                continue
            scores[name] = dict(zip(keys, found.tolist(), strict=True))
            write_json(arguments.scores, known)
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


def print_tables(arguments: argparse.Namespace) -> None:
    """Print the correlations with accuracy and with loss."""
    job = make_job(arguments)
    results = trained(arguments, job.space)
    known = _scored(arguments, [key_of(job.space.to_names(architecture)) for architecture in results])
    flops = known[REFERENCE]
    groups = bins_of(flops, min(arguments.bins, len(flops) // 2))
    truths = {  # (n, seeds), larger is better
        name: sign * np.array([[line[name] for line in lines] for lines in results.values()])
        for name, sign in (("accuracy", 1.0), ("loss", -1.0))
    }
    accuracies = 100 * truths["accuracy"].mean(axis=1)
    millions = [flops[groups == b] / 1e6 for b in np.unique(groups)]
    print(
        f"{len(results)} networks of the space {arguments.space} on {arguments.data}, {arguments.steps} steps, "
        f"{truths['accuracy'].shape[1]} training(s) each; accuracy {accuracies.min():.2f} to {accuracies.max():.2f} %; "
        f"bins of FLOPs: {', '.join(f'{part.min():.2f} to {part.max():.2f} M' for part in millions)}\n{versions()}"
    )
    for name, truth in truths.items():
        print(f"\nRank correlation with the {name} on the test images:\n")
        print(table(truth, known, groups))


def _scored(arguments: argparse.Namespace, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the scores (n,) of every scorer that was asked about all of ``keys`` (n)."""
    scores = read_scores(arguments)["scores"]
    known = {name: np.array([of[key] for key in keys]) for name, of in scores.items() if set(keys) <= set(of)}
    if REFERENCE not in known:
        raise ConfigError(f"--scores {arguments.scores}: no {REFERENCE} of these networks; score them first")
    return known


def table(truth: np.ndarray, scores: Mapping[str, np.ndarray], groups: np.ndarray) -> str:
    """Return one row a scorer; truth: (n, seeds), larger is better, whose mean over the seeds is what is ranked."""
    ranking = Ranking(truth.mean(axis=1), groups)
    rows = [["scorer", *(f"{HEADERS[s]} [95 %]" for s in STATISTICS), f"within, minus {REFERENCE}"]]
    rows.append(["---"] * len(rows[0]))
    for name, values in scores.items():
        difference = ranking.difference(values, scores[REFERENCE], "tau within")
        rows.append(
            [
                name,
                *(str(ranking.estimate(values, statistic)) for statistic in STATISTICS),
                "" if name == REFERENCE else str(difference),
            ]
        )
    if truth.shape[1] > 1:
        rows.append([CEILING, *_ceiling(truth, groups), ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _ceiling(truth: np.ndarray, groups: np.ndarray) -> list[str]:
    """Return how one training ranks another one, the mean over all pairs of them."""
    pairs = list(itertools.combinations(truth.T, 2))
    rankings = [(Ranking(one, groups), other) for one, other in pairs]
    return [
        str(estimate_of(np.mean([ranking.values(other, s) for ranking, other in rankings], axis=0)))
        for s in STATISTICS
    ]


def versions() -> str:
    """Return the machine and the versions that the numbers depend on."""
    machine, packages = machine_fingerprint(), package_versions()
    return f"{machine['cpu']}, {machine['allowed_cores']} cores, torch {packages['torch']}"


STAGES = {"train": train_all, "score": score_all, "table": print_tables}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--results", type=Path, required=True, help="file with a line for each training")
    parser.add_argument(
        "--scores", type=Path, help="file with what the scorers say; needed by score and table"
    )
    parser.add_argument("--run", type=Path, help="score: run folder of a search of the same data and space")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--space", default="mobile")
    parser.add_argument("--steps", type=int, default=RetrainSettings().num_steps, help="of every training")
    parser.add_argument(
        "--threads", type=int, help="of train, and of score without --run; default: all cores"
    )
    parser.add_argument("--networks", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every network")
    parser.add_argument("--bins", type=int, default=4)
    found = parser.parse_args(arguments)
    if found.stage != "train" and found.scores is None:
        parser.error(f"{found.stage}: expected --scores FILE")
    return found


def main() -> int:
    """Carry out one stage."""
    arguments = parsed()
    try:
        STAGES[arguments.stage](arguments)
    except NasdeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
