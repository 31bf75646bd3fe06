"""The estimators on a real supernet: what is shipped after searches that took equal time.

    python tests/benchmarks/supernet_estimators.py --folder builds/ [--seeds 5] [--steps 900]

A search of one more seed with each estimator, of --steps, tells how long a step of each takes; then every estimator
gets as many steps as fit into the time of "importance". Whole builds of the default profiles follow, with one latency
table: every network is retrained, exported and certified. Differences are paired by seed. The folder keeps one line of
JSON per search and the latency table; a second call continues there. Run it alone: a rival process makes training
several times slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from statistics_of_pairs import interval

import nasdeploy
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings, SearchSettings

ESTIMATORS = ("importance", "doubly_robust", "independent")
REFERENCE = ESTIMATORS[0]
CALIBRATION, BUILD = "calibration", "build"
CALIBRATION_SEED = 1000
FIGURES = ("accuracy", "loss", "shared_loss")
"""Top-1 on the test images; loss on the validation images after retraining, and before it with shared weights."""


def seconds_of(folder: Path) -> float:
    """Return how long the search of a run took, with its selection."""
    run = RunFolder(folder)
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    times = {event["event"]: event["time"] for event in events if event.get("phase") == "select"}
    return float(read_json(run.search_result)["seconds"]) + float(times["finish"] - times["start"])


def figures_of(folder: Path) -> dict[str, dict[str, float]]:
    """Return what a build reports, by figure and profile."""
    run = RunFolder(folder)
    figures: dict[str, dict[str, float]] = {figure: {} for figure in FIGURES}
    for name in read_json(run.run)["profiles"]:
        model = run.model(name)
        figures["accuracy"][name] = float(read_json(model.metrics)["accuracy"]["top1"])
        figures["loss"][name] = float(read_json(model.training)["validation"]["loss"])
        figures["shared_loss"][name] = float(read_json(model.architecture)["validation"]["loss"])
    return figures


class Series:
    """All results so far, and how to get one more."""

    def __init__(self, folder: Path, *, data: str, scratch: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._results, self._tables, self._scratch = folder / "results.jsonl", folder / "tables", scratch
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        self._lines: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._base = BuildSettings(data=data)

    def get(self, kind: str, estimator: str, seed: int, *, steps: int) -> dict[str, Any]:
        """Return a result; it is searched for, or built, where it is not there yet."""
        key = {"kind": kind, "estimator": estimator, "seed": seed, "data": self._base.data, "steps": steps}
        for line in self._lines:
            if key.items() <= line.items():
                return line
        folder = self._scratch / f"{kind}-{estimator}-{seed}"
        settings = self._base.model_copy(
            update={
                "seed": seed,
                "latency_from": str(self._measured()),
                "search": SearchSettings.model_validate({"num_steps": steps, "estimator": estimator}),
            }
        )
        (nasdeploy.build if kind == BUILD else nasdeploy.search)(settings, output_dir=folder)
        found: dict[str, Any] = {**key, "seconds": seconds_of(folder)}
        if kind == BUILD:
            found["figures"] = figures_of(folder)
        self._lines.append(found)
        with self._results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{kind}, seed {seed}, {estimator}: {steps} steps in {found['seconds']:.1f} s", flush=True)
        return found

    def _measured(self) -> Path:
        """Return the run whose latency tables all others use."""
        nasdeploy.search(
            self._base.model_copy(update={"search": SearchSettings(num_steps=10)}), output_dir=self._tables
        )
        return self._tables


def print_table(builds: dict[str, list[dict[str, Any]]]) -> None:
    """Print one line per figure and estimator: means over seeds and profiles, and differences from the reference."""
    for figure in FIGURES:
        print(f"\n{figure:15s} mean      minus {REFERENCE} [95 %]; by profile")
        means = {
            estimator: [statistics.fmean(one["figures"][figure].values()) for one in runs]
            for estimator, runs in builds.items()
        }
        for estimator, runs in builds.items():
            pairs = [here - there for here, there in zip(means[estimator], means[REFERENCE], strict=True)]
            by_profile = ", ".join(
                f"{name} {statistics.fmean(one['figures'][figure][name] for one in runs):.4f}"
                for name in runs[0]["figures"][figure]
            )
            difference = "" if estimator == REFERENCE else interval(pairs)
            print(
                f"{estimator:15s} {statistics.fmean(means[estimator]):.4f}    {difference:29s} {by_profile}"
            )
    for estimator, runs in builds.items():
        print(
            f"{estimator}: {runs[0]['steps']} steps, {statistics.fmean(one['seconds'] for one in runs):.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--data", default="fashion-mnist")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    with tempfile.TemporaryDirectory() as name:
        series = Series(arguments.folder, data=arguments.data, scratch=Path(name))
        seconds = {
            estimator: series.get(CALIBRATION, estimator, CALIBRATION_SEED, steps=arguments.steps)["seconds"]
            for estimator in ESTIMATORS
        }
        steps = {one: round(arguments.steps * seconds[REFERENCE] / seconds[one]) for one in ESTIMATORS}
        builds: dict[str, list[dict[str, Any]]] = {estimator: [] for estimator in ESTIMATORS}
        for seed in seeds:
            first = seed % len(ESTIMATORS)  # so that none is always the first on a machine that warms up
            for estimator in (*ESTIMATORS[first:], *ESTIMATORS[:first]):
                builds[estimator].append(series.get(BUILD, estimator, seed, steps=steps[estimator]))
    print_table(builds)


if __name__ == "__main__":
    main()
