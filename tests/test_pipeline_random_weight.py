"""Searches that score networks with random weights: one small build, searches beside it, and copies of it."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from nasdeploy.cli import main
from nasdeploy.costs.counting import count_network, counting_tables
from nasdeploy.costs.table import CostTable, Factor, FloatArray
from nasdeploy.errors import RunFolderError
from nasdeploy.networks import Normalise, build_network
from nasdeploy.optim import categorical
from nasdeploy.optim.objective import Objective
from nasdeploy.pipeline import BuildResult, build, oneshot, resuming, search
from nasdeploy.progress import Silent, Value
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.schemas import load_schema
from nasdeploy.searchers.archived import ArchiveOutcome, ScoredArchive
from nasdeploy.searchers.evaluator import Scores
from nasdeploy.searchers.evolution import MultiObjectiveSearch
from nasdeploy.searchers.scoring import ScoringLoop
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import Architecture, SearchSpace, make_space

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("small", "wide")
BUDGETS = {
    "small": 'params = { max = "20%" }\nlatency = { max = "90%" }\n',
    "wide": 'flops = { coefficient = 0.05 }\nlatency = { max = "99%" }\n',
    "late": 'params = { max = "60%" }\nlatency = { max = "95%" }\n',
}
NUM_EVALUATIONS, POPULATION = 11, 5
SCORED = ("random_weight.json", "random_weight.csv", "random_weight/small.json", "random_weight/wide.json")


class KilledError(BaseException):
    """Ends a run like a kill does: nothing catches it, nothing is stored on its way."""


class Recorder(Silent):
    """Notes which phases start, and kills the run behind a step of one."""

    def __init__(self, kill: tuple[str, int] | None = None) -> None:
        self.started: list[str] = []
        self._kill = kill

    def start(self, phase: str, total: int | None = None) -> None:
        self.started.append(phase)

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        if (phase, step) == self._kill:
            raise KilledError


class Run:
    """A small finished build of two profiles."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        rng = np.random.default_rng(0)
        labels = rng.permutation(np.arange(300) % 3)
        rows, columns = np.mgrid[0:28, 0:28]
        stripes = np.stack([rows, columns, rows + columns])[labels] + rng.integers(0, 6, size=(300, 1, 1))
        images = np.where(stripes % 6 < 3, 170, 80) + rng.normal(0, 40, size=stripes.shape)
        images = np.clip(images, 0, 255).astype(np.uint8)
        np.savez(folder / "data.npz", train_images=images, train_labels=labels)
        self.folder = RunFolder(folder / "run")
        self.observer = Recorder()
        self.result: BuildResult = build(self.settings(), output_dir=self.folder.path, observer=self.observer)

    def settings(self, *, borrowing: bool = False, **method: Any) -> BuildSettings:
        """Return the settings; borrowing: with the latency tables of this run."""
        return BuildSettings(
            data=str(self.root / "data.npz"),
            profiles=tuple(self.profile(name) for name in NAMES),
            device="cpu",
            threads=1,
            latency_from=str(self.folder.path) if borrowing else None,
            search={
                **(method or {"evaluator": "random-weight"}),
                "num_steps": 4,
                "batch_size": 16,
                "loss_batch_size": 32,
                "num_loss_samples": 4,
                "num_finalists": 2,
                "random_weight": {
                    "num_evaluations": NUM_EVALUATIONS,
                    "population_size": POPULATION,
                    "num_images": 150,
                    "num_seeds": 2,
                    "num_elite": 3,
                },
            },
            retrain={"num_steps": 6, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )

    def profile(self, name: str) -> str:
        """Write a profile; return its path."""
        path = self.root / f"{name}.toml"
        text = f'name = "{name}"\n[runtime]\nthreads = 1\n[budget]\n{BUDGETS[name]}'
        path.write_text(text, encoding="utf-8")
        return str(path)

    def copy(self, folder: Path) -> RunFolder:
        """Return a copy of the run that may be changed."""
        return RunFolder(Path(shutil.copytree(self.folder.path, folder / "copy")))

    @property
    def space(self) -> SearchSpace:
        """The space of the build."""
        return make_space("mobile", (1, 28, 28), 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Build once for all tests."""
    return Run(tmp_path_factory.mktemp("random-weight"))


def scored(folder: RunFolder) -> dict[str, Any]:
    """Return what the search stored, without how long it took."""
    found: dict[str, Any] = {}
    for name in SCORED:
        path = folder.path / "search" / name
        found[name] = path.read_text() if path.suffix == ".csv" else json.loads(path.read_bytes())
    found["random_weight.json"].pop("seconds")
    return found


def archive(run: Run) -> list[dict[str, str]]:
    """Return the rows of everything that was scored."""
    with run.folder.random_weight_evaluations.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_build_without_shared_weights_is_certified(run: Run) -> None:
    assert [(p.profile, p.status) for p in run.result.profiles] == [(n, "certified") for n in NAMES]
    assert [phase for phase in run.observer.started if phase in ("random weights", "search")] == [
        "random weights"
    ]
    assert not run.folder.supernet.exists()
    assert not run.folder.search_result.exists()
    assert not run.folder.random_weight_checkpoint.exists()
    for name in NAMES:
        training = read_json(run.folder.model(name).training)
        assert training["retraining"]["start"] == "scratch"
        stored = read_json(run.folder.model(name).architecture)
        architecture = run.space.from_names(stored["architecture"])
        count = count_network(build_network(run.space, architecture, Normalise((0.5,), (0.5,))), (1, 28, 28))
        assert count.params == stored["predicted"]["params"]


def test_every_file_follows_its_schema(run: Run) -> None:
    folder = run.folder
    files = {
        "run": [folder.run],
        "report": [folder.report_json],
        "random-weight": [folder.random_weight],
        "random-weight-table": [folder.random_weight_table(name) for name in NAMES],
        "architecture": [folder.model(name).architecture for name in NAMES],
        "training": [folder.model(name).training for name in NAMES],
    }
    errors = []
    for schema, paths in files.items():
        validator = Draft202012Validator(load_schema(schema))
        for path in paths:
            errors += [
                f"{path}: {error.message}" for error in validator.iter_errors(json.loads(path.read_bytes()))
            ]
    validator = Draft202012Validator(load_schema("event"))
    for line in folder.events.read_text().splitlines():
        errors += [f"{line}: {error.message}" for error in validator.iter_errors(json.loads(line))]
    assert errors == []


def test_the_tables_are_the_fronts_of_what_was_scored(run: Run) -> None:
    rows = archive(run)
    assert len(rows) == NUM_EVALUATIONS
    assert sorted({int(row["generation"]) for row in rows}) == [1, 2, 3]
    names = [decision.name for decision in run.space.decisions]
    architectures = [{name: row[name] for name in names} for row in rows]
    assert len({tuple(a.values()) for a in architectures}) == NUM_EVALUATIONS
    choices = np.array([run.space.from_names(a).choices for a in architectures])
    params = counting_tables(run.space)["params"].of(choices)
    errors = np.array([float(row["error"]) for row in rows])
    smallest, largest = (
        float(counting_tables(run.space)["params"].of(np.array([a.choices]))[0])
        for a in (run.space.smallest(), run.space.largest())
    )
    table = read_json(run.folder.random_weight_table("small"))
    within = params <= smallest + 0.2 * (largest - smallest)
    assert 0 < table["num_feasible"] <= within.sum()
    found = [(row["error"], row["costs"]["params"], row["costs"]["latency"]) for row in table["networks"]]
    assert found == sorted(found, key=lambda row: row[0])
    for one in found:
        assert one[1] <= smallest + 0.2 * (largest - smallest)
        assert not any(
            other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in found
        )
    assert table["chosen"]["error"] == min(row[0] for row in found)  # a profile with nothing but caps
    assert table["chosen"] in table["networks"]
    assert table["chosen"]["error"] == errors[within].min()
    chosen = read_json(run.folder.model("small").architecture)
    assert (chosen["architecture"], chosen["hash"]) == (table["chosen"]["architecture"], table["hash"])


def test_what_is_beyond_a_cap_stands_in_no_table_of_its_profile(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    stored = read_json(folder.random_weight)
    choices = np.array(stored["choices"])
    largest = int(counting_tables(run.space)["params"].of(choices).argmax())
    stored["losses"][largest] = 0.0  # the best by far, were it not so large
    folder.random_weight.write_text(json.dumps(stored))
    for name in NAMES:
        folder.random_weight_table(name).unlink()
    found = search(output_dir=folder.path).random_weight
    assert found is not None
    small, wide = (found.tables[name] for name in NAMES)
    assert wide.networks[0].error == 0.0
    assert wide.networks[0].architecture == run.space.to_names(Architecture(tuple(choices[largest].tolist())))
    assert min(network.error for network in small.networks) > 0.0
    assert small.num_feasible < NUM_EVALUATIONS


@pytest.mark.parametrize("step", [3, 5, 7])
def test_an_interrupted_search_ends_with_the_same_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "MAX_SAVING_SHARE", 1e9)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KilledError):
        search(
            run.settings(borrowing=True),
            output_dir=folder.path,
            observer=Recorder(kill=("random weights", step)),
        )
    assert not folder.random_weight.exists()
    result = search(output_dir=folder.path)
    assert scored(folder) == scored(run.folder)
    assert not folder.random_weight_checkpoint.exists()
    assert result.num_steps == NUM_EVALUATIONS
    for name in NAMES:
        assert (
            folder.model(name).architecture.read_bytes() == run.folder.model(name).architecture.read_bytes()
        )


def test_a_profile_that_joins_reads_the_archive(run: Run, tmp_path: Path) -> None:
    folder, observer = run.copy(tmp_path), Recorder()
    before = scored(folder)
    result = build(output_dir=folder.path, profiles=(run.profile("late"),), observer=observer)
    assert [(p.profile, p.status) for p in result.profiles] == [("late", "certified")]
    assert "random weights" not in observer.started
    assert scored(folder) == before
    late = read_json(folder.random_weight_table("late"))
    assert late["chosen"] in late["networks"]
    assert set(json.loads(folder.report_json.read_bytes())["random_weight"]["profiles"]) == {*NAMES, "late"}


def test_a_profile_cannot_join_an_unfinished_search(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    folder.random_weight.unlink()
    with pytest.raises(RunFolderError, match="its search, for small, wide, is not finished"):
        build(output_dir=folder.path, profiles=(run.profile("late"),))


def test_the_distributions_of_a_warm_start_begin_at_the_elite(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[FloatArray | None] = []
    make = oneshot.make_strategy

    def note(*arguments: Any, initial_theta: FloatArray | None = None) -> Any:
        started.append(initial_theta)
        return make(*arguments, initial_theta=initial_theta)

    monkeypatch.setattr(oneshot, "make_strategy", note)
    folder, observer = RunFolder(tmp_path / "run"), Recorder()
    result = search(
        run.settings(borrowing=True, warm_start="random-weight"), output_dir=folder.path, observer=observer
    )
    assert [p for p in observer.started if p in ("random weights", "search")] == ["random weights", "search"]
    (theta,) = started
    assert theta is not None
    assert theta.shape[:2] == (2, len(run.space.decisions))
    stored = read_json(folder.random_weight)
    losses, choices = np.array(stored["losses"]), np.array(stored["choices"])
    params = counting_tables(run.space)["params"].of(choices)
    low, high = (
        float(counting_tables(run.space)["params"].of(np.array([a.choices]))[0])
        for a in (run.space.smallest(), run.space.largest())
    )
    within = np.flatnonzero(params <= low + 0.2 * (high - low))
    elite = choices[within[np.argsort(losses[within], kind="stable")[:3]]]
    d = int(np.argmax([len(set(column)) == 1 for column in elite.T]))  # all of the elite agree there
    assert theta[0, d].argmax() == elite[0, d]
    num = run.space.num_candidates()[d]
    assert theta[0, d].max() == pytest.approx(0.6 + 0.4 / num, abs=0.02)  # smoothing 0.4, then the margin
    assert result.trained_weights
    assert result.random_weight is not None
    assert set(result.random_weight.tables) == set(NAMES)
    assert scored(folder)["random_weight.csv"] == scored(run.folder)["random_weight.csv"]


def test_the_report_shows_what_random_weights_say(run: Run) -> None:
    report = json.loads(run.folder.report_json.read_bytes())["random_weight"]
    assert report["num_evaluations"] == NUM_EVALUATIONS
    html, markdown = run.folder.report_html.read_text(), run.folder.report_markdown.read_text()
    for name in NAMES:
        chosen = report["profiles"][name]["chosen"]
        error = f"{100 * chosen['error']:.1f} % ± {100 * chosen['standard_error']:.2f}"
        assert error in html
        assert f"| chosen | {error} |" in markdown
    assert report["limits"][0] in html
    assert report["limits"][0] in markdown
    assert "shared weights on the validation images" not in html


def test_the_command_prints_the_tables_and_the_limits(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    shown = CliRunner().invoke(main, ["search", "-o", str(folder.path), "-q"])
    assert shown.exit_code == 0, shown.stderr
    stored = read_json(folder.random_weight)
    for limit in stored["limits"]:
        assert f"- {limit}" in shown.stdout
    chosen = read_json(folder.random_weight_table("small"))["chosen"]
    line = next(line for line in shown.stdout.splitlines() if line.startswith("chosen"))
    assert f"{100 * chosen['error']:.2f} % +- {100 * chosen['standard_error']:.2f}" in line
    told = CliRunner().invoke(main, ["search", "-o", str(folder.path), "-q", "--json"])
    found = json.loads(told.stdout)["random_weight"]
    assert found["tables"]["small"]["chosen"] == chosen
    assert found["limits"] == stored["limits"]


SIZES = (3, 2, 3)


class Digits:
    """Scores an architecture by its own digits, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def score(self, architectures: Sequence[Architecture], *, seed: int) -> Scores:
        self.asked += [architecture.choices for architecture in architectures]
        losses = [1.0 - sum(a.choices) / 10 + (a.choices[0] == 1) / 100 for a in architectures]
        return Scores(losses=np.array(losses), errors=np.full(len(losses), 0.01))


def objective(cap: float) -> Objective:
    """Return the objective of a device that can afford a sum of choices up to ``cap``."""
    factors = tuple(
        Factor(decisions=(d,), values=np.arange(size, dtype=np.float64)) for d, size in enumerate(SIZES)
    )
    return Objective(tables={"params": CostTable(factors=factors)}, caps={"params": cap})


def made_loop(evaluator: Digits, *, num_evaluations: int) -> ScoringLoop:
    search = MultiObjectiveSearch(
        mask=categorical.mask_array(SIZES), num_evaluations=num_evaluations, population_size=4, seed=3
    )
    return ScoringLoop(
        search,
        evaluator,
        cost=objective(9.0).tables["params"].of,
        num_evaluations=num_evaluations,
        seed=0,
    )


def carried_out(loop: ScoringLoop) -> list[tuple[int, ...]]:
    while loop.num_done < loop.num_steps:
        loop.step()
    return [tuple(row) for row in loop.choices.tolist()]


def test_every_architecture_is_scored_once_and_a_small_space_ends_the_search() -> None:
    evaluator = Digits()
    found = carried_out(made_loop(evaluator, num_evaluations=100))
    assert evaluator.asked == found
    assert sorted(found) == list(itertools.product(range(3), range(2), range(3)))


@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_a_loop_that_is_continued_scores_what_it_would_have_scored(stop: int) -> None:
    whole = carried_out(made_loop(Digits(), num_evaluations=10))
    first = made_loop(Digits(), num_evaluations=10)
    for _ in range(stop):
        first.step()
    evaluator = Digits()
    second = made_loop(evaluator, num_evaluations=10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert carried_out(second) == whole
    assert evaluator.asked == whole[stop:]


def outcome(
    evaluator: Digits, choices: list[tuple[int, ...]], *, scaled: int | None = None
) -> ArchiveOutcome:
    """Return the outcome of a search that scored ``choices``."""
    scores = Digits().score([Architecture(one) for one in choices], seed=0)
    archive = ScoredArchive(choices=np.array(choices), losses=scores.losses, errors=scores.errors)
    masks = {"device": tuple((True,) * size for size in SIZES)}
    return ArchiveOutcome(
        archive, num_candidates=SIZES, masks=masks, evaluator=evaluator, seed=0, scaled=scaled
    )


def test_candidates_are_what_was_scored_within_the_caps_the_best_first() -> None:
    evaluator = Digits()
    found = outcome(evaluator, [(2, 1, 2), (0, 1, 0), (1, 1, 1), (0, 1, 2), (0, 0, 3 - 1)])
    candidates = found.candidates("device", objective=objective(3.0))
    assert candidates.tolist() == [[0, 1, 2], [1, 1, 1], [0, 0, 2], [0, 1, 0]]
    ranked = found.ranked("device", candidates, objective=objective(3.0), size=2)
    assert [one.architecture.choices for one in ranked] == [(0, 1, 2), (1, 1, 1)]
    assert ranked[0].accuracy == pytest.approx(1.0 - ranked[0].loss)
    assert evaluator.asked == []
    assert found.trained(Architecture((0, 0, 0))) is None


def test_the_decision_that_is_solved_for_is_as_wide_as_the_caps_allow() -> None:
    evaluator = Digits()
    found = outcome(evaluator, [(2, 1, 2), (0, 1, 0), (1, 1, 1), (0, 1, 1), (2, 0, 0)], scaled=2)
    candidates = found.candidates("device", objective=objective(3.0))
    # within the caps, the best first: (1, 1, 1), (0, 1, 1), (2, 0, 0), (0, 1, 0); the second and the last become one
    assert candidates.tolist() == [[1, 1, 1], [0, 1, 2], [2, 0, 1]]
    ranked = found.ranked("device", candidates, objective=objective(3.0), size=3)
    assert set(evaluator.asked) == {(2, 0, 1), (0, 1, 2)}  # what the archive has is not scored again
    assert len({one.architecture for one in ranked}) == 3
    assert outcome(evaluator, [(2, 1, 2)], scaled=2).candidates("device", objective=objective(1.0)).sum() == 1


def test_a_profile_that_can_afford_nothing_scored_gets_the_network_nearest_to_its_caps() -> None:
    evaluator = Digits()
    found = outcome(evaluator, [(2, 1, 2), (2, 1, 1)])
    candidates = found.candidates("device", objective=objective(1.0))
    assert len(candidates) == 1
    assert candidates.sum() <= 1
    ranked = found.ranked("device", candidates, objective=objective(1.0), size=2)
    assert evaluator.asked == [ranked[0].architecture.choices]
    assert found.candidates("device", objective=objective(1e-9)).sum() == 0
