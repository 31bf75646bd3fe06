"""What a search evaluated is on disk: every architecture once, whatever interrupts the search, the same bytes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.pipeline import resuming, search
from nasdeploy.pipeline.evaluations import GUIDED, Evaluations
from nasdeploy.pipeline.step_rows import StepRows, csv_text
from nasdeploy.progress import Silent, Value
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import make_space

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = make_space("mobile", (1, 28, 28), 10)
BUDGETS = {
    "small": 'params = { max = "40%" }\n',
    "wide": "flops = { coefficient = 0.1 }\n",
    "late": 'params = { max = "60%" }\n',
}


def steps_of(path: Path) -> list[tuple[int, str]]:
    return [(int(row["step"]), str(row["value"])) for row in StepRows(path, first=("step",)).stored()]


def test_rows_come_back_in_their_order(tmp_path: Path) -> None:
    rows = StepRows(tmp_path / "deep" / "rows.csv", first=("step",))
    assert list(rows.stored()) == []
    rows.append([{"step": 1, "value": "a,b"}, {"step": 1, "value": 'quo"ted'}, {"step": 2, "value": ""}])
    rows.append([{"step": 4, "value": "d"}])
    assert steps_of(tmp_path / "deep" / "rows.csv") == [(1, "a,b"), (1, 'quo"ted'), (2, ""), (4, "d")]
    rows.discard()
    assert list(rows.stored()) == []


def test_steps_that_were_done_again_count_once_and_as_done_last(tmp_path: Path) -> None:
    rows = StepRows(tmp_path / "rows.csv", first=("step",))
    rows.append([{"step": 1, "value": "a"}, {"step": 2, "value": "old"}, {"step": 2, "value": "old"}])
    rows.append([{"step": 3, "value": "old"}])
    rows.append([{"step": 2, "value": "new"}, {"step": 3, "value": "new"}])
    assert steps_of(tmp_path / "rows.csv") == [(1, "a"), (2, "new"), (3, "new")]


@pytest.mark.parametrize("left", range(1, 26))
def test_what_a_kill_cut_off_does_not_spoil_what_follows(tmp_path: Path, left: int) -> None:
    path = tmp_path / "rows.csv"
    rows = StepRows(path, first=("step",))
    rows.append([{"step": 1, "value": "a"}])
    whole = path.read_bytes()
    rows.append([{"step": 2, "value": 'b"x,'}, {"step": 3, "value": "c"}])
    path.write_bytes(path.read_bytes()[: len(whole) + left])
    rows.append([{"step": 2, "value": "new"}, {"step": 3, "value": "new"}])
    assert steps_of(path) == [(1, "a"), (2, "new"), (3, "new")]


def test_columns_stand_as_asked_for_and_without_rows_too() -> None:
    assert csv_text([{"b": 1, "step": 2, "a": 3}], first=("step", "a")) == "step,a,b\n2,3,1\n"
    assert csv_text([], first=("step", "a")) == "step,a\n"


class Fixed:
    """A proposer of one architecture."""

    def propose(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return np.zeros((min(count, 1), len(SPACE.decisions)), dtype=np.int64)

    def tell(self, choices: np.ndarray, losses: np.ndarray, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


def test_every_evaluation_is_stored_with_its_loss_and_where_it_came_from(tmp_path: Path) -> None:
    table = CostTable((Factor((0,), np.arange(3.0)),))
    optimizer = PooledOptimizer(
        num_candidates=SPACE.num_candidates(),
        objectives=[Objective(tables={"params": table}), Objective(tables={"params": table})],
        archive_size=5,
        proposer=Fixed(),
        guided_share=0.2,
    )
    path = tmp_path / "part.csv"
    stored = Evaluations(path, names=("a", "b"), space=SPACE, optimizer=optimizer)
    rng, told = np.random.default_rng(0), []
    for step in range(1, 31):
        if step % 3 == 0:  # most steps train weights alone
            choices = optimizer.ask(5, rng)
            losses = rng.normal(size=5)
            optimizer.tell(choices, losses)
            told += [(step, row, loss) for row, loss in zip(choices.tolist(), losses.tolist(), strict=True)]
        stored.add(step)
        if step % 7 == 0:
            stored.flush()
    rows = list(csv.DictReader(stored.to_csv().splitlines()))
    assert len(rows) == len(told) == 50 > len(optimizer.archive.losses)
    names = [decision.name for decision in SPACE.decisions]
    assert list(rows[0]) == ["step", "origin", "loss", *names]
    found = [
        (
            int(row["step"]),
            list(SPACE.from_names({name: row[name] for name in names}).choices),
            float(row["loss"]),
        )
        for row in rows
    ]
    assert found == told
    origins = [row["origin"] for row in rows]
    assert {name: origins.count(name) for name in ("a", "b", GUIDED)} == {"a": 20, "b": 20, GUIDED: 10}


class Run:
    """A small search for two profiles."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        labels = np.arange(300) % 3
        images = rng.integers(0, 100, size=(300, 28, 28)) + 40 * labels[:, None, None]
        np.savez(folder / "data.npz", train_images=images.astype(np.uint8), train_labels=labels)
        for name, budget in BUDGETS.items():
            text = f'name = "{name}"\n[runtime]\nthreads = 1\n[budget]\n{budget}'
            (folder / f"{name}.toml").write_text(text, encoding="utf-8")
        self.root = folder
        self.settings = BuildSettings(
            data=str(folder / "data.npz"),
            profiles=tuple(str(folder / f"{name}.toml") for name in ("small", "wide")),
            device="cpu",
            threads=1,
            search={"num_steps": 18, "batch_size": 16, "loss_batch_size": 32, "num_finalists": 1},
            retrain={"num_steps": 10, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )
        self.folder = RunFolder(folder / "run")
        search(self.settings, output_dir=self.folder.path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Search once for all tests."""
    return Run(tmp_path_factory.mktemp("run"))


class KilledError(BaseException):
    """Ends a search like a kill does: nothing catches it, nothing is stored on its way."""


class Killer(Silent):
    """Kills the search behind its ``step``."""

    def __init__(self, step: int) -> None:
        self._step = step

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        if (phase, step) == ("search", self._step):
            raise KilledError


def test_the_file_of_a_run_holds_all_evaluations_of_its_search(run: Run) -> None:
    rows = list(csv.DictReader(run.folder.search_evaluations.read_text("utf-8").splitlines()))
    assert len(rows) == read_json(run.folder.search_result)["num_evaluations"] > 0
    optimizer = read_json(run.folder.search_state)["optimizer"]
    assert [float(row["loss"]) for row in rows] == [
        loss for one in optimizer["archive"] for loss in one["losses"]
    ]
    assert {row["origin"] for row in rows} == {"small", "wide"}
    history = csv.DictReader(run.folder.search_history.read_text("utf-8").splitlines())
    moved = [int(row["step"]) for row in history if row["stage"] == "search"]
    steps = sorted({int(row["step"]) for row in rows})
    assert steps == moved[::3]  # the distributions move in every third step
    assert not run.folder.search_evaluations_part.exists()


@pytest.mark.parametrize("steps", [(1,), (5, 6, 14), (18,)])
def test_a_search_that_was_killed_stores_the_same_evaluations(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "MAX_SAVING_SHARE", 1e9)
    folder = RunFolder(tmp_path / "run")
    settings = run.settings.model_copy(update={"latency_from": str(run.folder.path)})
    for step in steps:
        with pytest.raises(KilledError):
            search(settings, output_dir=folder.path, observer=Killer(step))
        assert not folder.search_evaluations.exists()
    search(settings, output_dir=folder.path)
    assert folder.search_evaluations.read_bytes() == run.folder.search_evaluations.read_bytes()
    assert not folder.search_evaluations_part.exists()


def test_what_is_evaluated_for_a_later_profile_stands_by_itself(run: Run) -> None:
    before = run.folder.search_evaluations.read_bytes()
    search(output_dir=run.folder.path, profiles=(str(run.root / "late.toml"),))
    rows = list(csv.DictReader(run.folder.adapted_evaluations("late").read_text("utf-8").splitlines()))
    assert len(rows) == read_json(run.folder.adapted("late"))["num_evaluations"]
    origins = {row["origin"] for row in rows}
    assert GUIDED in origins
    assert origins <= {GUIDED, "late"}  # drawn where the space has no more to propose
    assert [int(row["step"]) for row in rows] == [1 + i // 12 for i in range(len(rows))]
    assert run.folder.search_evaluations.read_bytes() == before
