"""Builds that are stopped inside a phase, and runs that a profile joins later: on copies of one small build."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from nasdeploy.errors import ConfigError, InfeasibleError, RunFolderError
from nasdeploy.pipeline import BuildResult, build, oneshot, plan, resuming, search, verify_run
from nasdeploy.progress import Silent, Value
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = ("small", "wide")
BUDGETS = {
    "small": 'params = { max = "40%" }\nlatency = { max = "80%" }\n',
    "wide": 'latency = { max = "95%" }\n',
    "late": 'params = { max = "60%" }\nflops = { coefficient = 0.1 }\nlatency = { max = "95%" }\n',
}
FILES = ("model.onnx", "weights.safetensors", "architecture.json")


class Run:
    """A small finished build of two profiles."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        rng = np.random.default_rng(0)
        labels = np.arange(400) % 4
        images = rng.integers(0, 100, size=(400, 28, 28)) + 40 * labels[:, None, None]
        np.savez(folder / "data.npz", train_images=images.astype(np.uint8), train_labels=labels)
        self.settings = BuildSettings(
            data=str(folder / "data.npz"),
            profiles=tuple(self.profile(name) for name in FIRST),
            device="cpu",
            threads=1,
            search={"num_steps": 24, "batch_size": 16, "loss_batch_size": 32, "num_finalists": 2},
            retrain={"num_steps": 24, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )
        self.folder = RunFolder(folder / "run")
        build(self.settings, output_dir=self.folder.path)

    def profile(self, name: str, *, runtime: str = "threads = 1") -> str:
        """Write a profile; return its path."""
        path = self.root / f"{name}.toml"
        text = f'name = "{name}"\n[runtime]\n{runtime}\n[budget]\n{BUDGETS[name]}'
        path.write_text(text, encoding="utf-8")
        return str(path)

    def copy(self, folder: Path) -> RunFolder:
        """Return a copy of the run that may be changed."""
        return RunFolder(Path(shutil.copytree(self.folder.path, folder / "copy")))

    @property
    def borrowing(self) -> BuildSettings:
        """The same settings, with the latency tables of this run."""
        return self.settings.model_copy(update={"latency_from": str(self.folder.path)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Build once for all tests."""
    return Run(tmp_path_factory.mktemp("growing"))


def contents(folder: RunFolder, profiles: tuple[str, ...] = FIRST) -> dict[str, bytes]:
    """Return the files that the seed decides."""
    return {f"{p}/{name}": (folder.model(p).path / name).read_bytes() for p in profiles for name in FILES}


class KilledError(BaseException):
    """Ends a build like a kill does: nothing catches it, nothing is stored on its way."""


class Killer(Silent):
    """Kills the build behind a step of a phase."""

    def __init__(self, phase: str, step: int) -> None:
        self._where = (phase, step)

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        if (phase, step) == self._where:
            raise KilledError


@pytest.mark.parametrize(
    ("phase", "step"),
    [
        ("search", 1),
        ("search", 5),
        ("search", 17),
        ("search", 24),
        ("retrain small", 10),
        ("retrain wide", 20),
    ],
)
def test_a_build_that_was_killed_inside_a_phase_ends_with_the_same_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, step: int
) -> None:
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "MAX_SAVING_SHARE", 1e9)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KilledError):
        build(run.borrowing, output_dir=folder.path, observer=Killer(phase, step))
    assert not folder.report_html.exists()
    build(run.borrowing, output_dir=folder.path)
    assert contents(folder) == contents(run.folder)
    left = [path.name for path in folder.path.rglob("*") if "checkpoint" in path.name or "part" in path.name]
    assert left == []
    rows = list(csv.DictReader(folder.search_history.read_text().splitlines()))
    expected = list(csv.DictReader(run.folder.search_history.read_text().splitlines()))
    for row in (*rows, *expected):
        del row["seconds"]
    assert rows == expected


def test_a_search_with_another_model_of_the_loss_continues_as_if_nothing_had_happened(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "MAX_SAVING_SHARE", 1e9)
    method = {
        "estimator": "doubly_robust",
        "predictor": "proxy",
        "proposer": "evolution",
        "proxy": {"rungs": ["ridge", "pairs"], "num_repeats": 1},
        "num_steps": 20,
        "loss_interval": 1,
    }
    settings = BuildSettings.model_validate(
        {**run.borrowing.model_dump(), "search": {**run.settings.search.model_dump(), **method}}
    )
    whole, folder = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    search(settings, output_dir=whole.path)
    with pytest.raises(KilledError):
        search(settings, output_dir=folder.path, observer=Killer("search", 13))
    search(output_dir=folder.path)
    for path in (folder.search_evaluations, folder.supernet, folder.search_state, folder.importance):
        assert path.read_bytes() == (whole.path / path.relative_to(folder.path)).read_bytes(), path.name
    assert [row["name"] for row in read_json(folder.importance)["rungs"]] == ["ridge", "pairs"]
    rows = list(csv.DictReader(folder.search_evaluations.read_text().splitlines()))
    assert sum(row["origin"] == "(guided)" for row in rows) > len(rows) // 4


def start(run: Run, folder: Path) -> subprocess.Popen[bytes]:
    """Start the same build in a process of its own."""
    config = folder.parent / "config.toml"
    config.write_bytes(run.folder.config.read_bytes())
    command = [sys.executable, "-m", "nasdeploy", "build", "-c", str(config), "-o", str(folder), "-q"]
    return subprocess.Popen(
        [*command, "--latency-from", str(run.folder.path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_for(folder: Path, phase: str, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the build has done a step of a phase."""
    deadline = time.monotonic() + 120.0
    events = RunFolder(folder).events
    while time.monotonic() < deadline:
        lines = events.read_text().splitlines() if events.exists() else []
        if any(f'"phase": "{phase}", "step": {step}' in line for line in lines):
            return
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError(f"no step {step} of {phase} in two minutes")


@pytest.mark.parametrize(("phase", "step"), [("search", 3), ("retrain small", 10)])
def test_sigterm_stores_the_state_and_exits_with_6(run: Run, tmp_path: Path, phase: str, step: int) -> None:
    folder = tmp_path / "run"
    process = start(run, folder)
    wait_for(folder, phase, step, process)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 6
    assert b"the same command continues" in message
    assert b"Traceback" not in message
    found = RunFolder(folder)
    stored = found.search_checkpoint if phase == "search" else found.model("small").checkpoint
    assert stored.exists()
    again = start(run, folder)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert contents(found) == contents(run.folder)


def test_sigkill_loses_nothing_that_was_stored(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for phase, step in [("search", 6), ("retrain wide", 10)]:
        process = start(run, folder)
        wait_for(folder, phase, step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    again = start(run, folder)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert contents(RunFolder(folder)) == contents(run.folder)


def phases_of(folder: RunFolder) -> list[str]:
    """Return the phase of every event."""
    return [json.loads(line).get("phase", "") for line in folder.events.read_text().splitlines()]


def added(run: Run, folder: RunFolder, **changes: object) -> BuildResult:
    """Build the profile that comes later."""
    return build(output_dir=folder.path, profiles=(run.profile("late"),), **changes)


def test_a_later_profile_trains_no_shared_weights_and_leaves_the_other_files(
    run: Run, tmp_path: Path
) -> None:
    folder = run.copy(tmp_path)
    kept = [path for path in folder.path.rglob("*") if path.is_file() and path.parent.name in FIRST]
    kept += [*(folder.path / "search").iterdir(), *(folder.latency(name) for name in FIRST)]
    before = {path: path.read_bytes() for path in kept}
    assert len(before) > 20
    result = added(run, folder)
    assert [(one.profile, one.status) for one in result.profiles] == [("late", "certified")]
    assert {path: path.read_bytes() for path in kept} == before
    assert all(cap.status == "holds" for cap in result.profiles[0].caps)
    stored = read_json(folder.run)
    assert list(stored["profiles"]) == [*FIRST, "late"]
    assert stored["searched"] == list(FIRST)
    assert phases_of(folder).count("search") == phases_of(run.folder).count("search")
    assert phases_of(folder).count("adapt late") == 2  # start and finish
    report = read_json(folder.report_json)
    assert [one["name"] for one in report["profiles"]] == [*FIRST, "late"]
    assert report["complete"]
    for name, path in (
        ("adaptation", folder.adapted("late")),
        ("run", folder.run),
        ("report", folder.report_json),
    ):
        assert list(Draft202012Validator(load_schema(name)).iter_errors(read_json(path))) == []


def test_a_later_profile_on_the_same_runtime_uses_the_table_that_is_there(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    added(run, folder)
    assert read_json(folder.latency("late"))["table"] == read_json(folder.latency("wide"))["table"]


def test_adding_a_profile_twice_does_nothing_more(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    added(run, folder)
    before = contents(folder, (*FIRST, "late")), folder.adapted("late").read_bytes(), folder.run.read_bytes()
    result = added(run, folder)
    assert result.exit_code == 0
    assert (
        contents(folder, (*FIRST, "late")),
        folder.adapted("late").read_bytes(),
        folder.run.read_bytes(),
    ) == before
    everything = build(output_dir=folder.path)
    assert [one.profile for one in everything.profiles] == [*FIRST, "late"]


def test_a_later_profile_does_not_depend_on_others_that_were_added_before(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('name = "other"\n[budget]\nparams = { max = "70%" }\n', encoding="utf-8")
    found = []
    for order in ((run.profile("late"),), (str(other), run.profile("late"))):
        folder = RunFolder(Path(shutil.copytree(run.folder.path, tmp_path / f"{len(order)}")))
        for profile in order:
            search(output_dir=folder.path, profiles=(profile,))
        facts = read_json(folder.adapted("late"))
        found.append((facts["optimizer"], folder.adapted_evaluations("late").read_bytes()))
    assert found[0] == found[1]


def test_a_stored_adaptation_is_used_again(run: Run, tmp_path: Path) -> None:
    folder, found = run.copy(tmp_path), []
    for _ in range(2):
        search(output_dir=folder.path, profiles=(run.profile("late"),))
        found.append(
            [path.read_bytes() for path in (folder.model("late").architecture, folder.adapted("late"))]
        )
        folder.model("late").architecture.unlink()
    assert found[0] == found[1]
    assert phases_of(folder).count("adapt late") == 2  # start and finish, once


def test_a_later_profile_that_was_killed_ends_with_the_same_files(run: Run, tmp_path: Path) -> None:
    whole, killed = run.copy(tmp_path), RunFolder(Path(shutil.copytree(run.folder.path, tmp_path / "killed")))
    added(run, whole)
    with pytest.raises(KilledError):
        added(run, killed, observer=Killer("retrain late", 10))
    added(run, killed)
    assert contents(killed, ("late",)) == contents(whole, ("late",))


def test_a_profile_with_candidates_that_were_not_trained_is_refused(run: Run, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    narrow = run.profile("small", runtime="threads = 1\nchannel_multiple = 16")
    settings = run.settings.model_copy(update={"profiles": (narrow,), "search": run.settings.search})
    search(settings, output_dir=folder.path)
    run.profile("small")
    before = folder.run.read_bytes()
    with pytest.raises(RunFolderError) as refused:
        added(run, folder)
    assert "does not cover late: no network with stem.width = 8 was trained" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert folder.run.read_bytes() == before


def test_a_profile_is_added_to_a_finished_search_only(run: Run, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KilledError):
        build(run.borrowing, output_dir=folder.path, observer=Killer("search", 2))
    before = folder.run.read_bytes()
    with pytest.raises(RunFolderError, match="its search, for small, wide, is not finished"):
        added(run, folder)
    assert folder.run.read_bytes() == before


def test_a_profile_of_the_same_name_must_be_the_same(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    changed = run.profile("wide", runtime="threads = 2")
    try:
        with pytest.raises(RunFolderError, match="its profile 'wide' is another one"):
            build(output_dir=folder.path, profiles=(changed,))
    finally:
        run.profile("wide")


def test_an_infeasible_budget_is_refused_before_a_single_training_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(job: object) -> float:
        raise AssertionError("trained")

    monkeypatch.setattr(oneshot, "training_speed", train)
    path = tmp_path / "tiny.toml"
    path.write_text('name = "tiny"\n[budget]\nparams = { max = "10" }\n', encoding="utf-8")
    settings = run.settings.model_copy(update={"profiles": (str(path),)})
    with pytest.raises(InfeasibleError):
        build(settings, output_dir=tmp_path / "run")


def test_an_infeasible_later_profile_is_refused_before_anything_is_trained(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text('name = "tiny"\n[budget]\nparams = { max = "10" }\n', encoding="utf-8")
    with pytest.raises(Exception, match=r"tiny: .*params") as refused:
        build(output_dir=folder.path, profiles=(str(path),))
    assert getattr(refused.value, "exit_code", None) == 3
    assert contents(folder) == contents(run.folder)
    assert build(output_dir=folder.path).exit_code == 0  # the profile has not become a part of the run
    assert all(one.passed for one in verify_run(folder.path).values())
    path.write_text('name = "tiny"\n[budget]\nparams = { max = "90%" }\n', encoding="utf-8")
    assert build(output_dir=folder.path, profiles=(str(path),)).exit_code == 0


def test_a_run_knows_its_profiles_without_their_files(run: Run, tmp_path: Path) -> None:
    folder, path = run.copy(tmp_path), tmp_path / "device.toml"
    for name in ("first", "second"):
        path.write_text(f'name = "{name}"\n[budget]\nparams = {{ max = "90%" }}\n', encoding="utf-8")
        build(output_dir=folder.path, profiles=(str(path),))
    path.unlink()
    result = build(output_dir=folder.path)
    assert [one.profile for one in result.profiles] == [*FIRST, "first", "second"]
    sources = read_json(folder.run)["settings"]["profiles"]
    assert sources == [*run.settings.profiles, str(path)]


def test_a_plan_for_a_later_profile_has_no_search(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    found = plan(output_dir=folder.path, profiles=(run.profile("late"),))
    names = [phase.name for phase in found.phases]
    assert "search" not in names
    assert "retrain" in names
    with pytest.raises(RunFolderError, match="other settings"):
        plan(output_dir=folder.path, seed=5)
    fresh = plan(run.settings, output_dir=folder.path, resume=False, seed=5)
    assert "search" in [phase.name for phase in fresh.phases]


def test_a_borrowed_probe_of_another_cap_is_not_taken(run: Run, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    source = run.copy(tmp_path)
    stored = read_json(source.latency("wide"))
    hash_of_choice = read_json(source.model("wide").architecture)["hash"]
    broken = {**stored["probes"][hash_of_choice], "cap": 0.5, "bound": 2.0, "status": "violated"}
    source.latency("wide").write_text(json.dumps({**stored, "probes": {hash_of_choice: broken}}))
    search(run.settings.model_copy(update={"latency_from": str(source.path)}), output_dir=folder.path)
    assert read_json(folder.model("wide").architecture)["hash"] == hash_of_choice
    probe = read_json(folder.latency("wide"))["probes"][hash_of_choice]
    assert (probe["cap"], probe["status"]) == (0.95, "holds")


def test_one_of_several_profiles_can_be_built_alone(run: Run, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    search(run.borrowing, output_dir=folder.path)
    result = build(output_dir=folder.path, profiles=(run.settings.profiles[1],))
    assert [one.profile for one in result.profiles] == ["wide"]
    assert not folder.model("small").model.exists()
    assert not read_json(folder.report_json)["complete"]
    build(output_dir=folder.path)
    assert contents(folder) == contents(run.folder)


def test_wrong_overrides_of_a_stored_run_are_one_line(run: Run) -> None:
    with pytest.raises(ConfigError, match="seed"):
        build(output_dir=run.folder.path, seed=-1)
