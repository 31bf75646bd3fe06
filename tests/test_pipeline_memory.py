"""Builds whose budgets name the memory of a process, and the size of the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from nasdeploy.costs.certification import check_memory_cap
from nasdeploy.costs.memory import MemoryTable, MemoryUse
from nasdeploy.errors import ConfigError, InfeasibleError
from nasdeploy.pipeline import BuildResult, build, check_profile, search
from nasdeploy.pipeline.memory import ProfileMemory, memory_room, memory_rooms
from nasdeploy.profiles import HardwareProfile
from nasdeploy.progress import Silent
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGETS = {
    "share": 'peak_memory = { max = "50%" }\nfile_size = { max = "60%", coefficient = 0.05 }\n',
    "bytes": 'peak_memory = { max = "13MB", coefficient = 0.05, reference = "14MB" }\n',
    "none": 'file_size = { max = "60%" }\n',
}


# Few layers, so that tables take seconds, and wide ones, so that memory differs by megabytes.
SPACE = """
from nasdeploy.spaces import Decision, LayerSpec, SearchSpace, make_slot

def space(image_shape, num_classes):
    channels, size, _ = image_shape
    half, quarter = -(-size // 2), -(-size // 4)
    widths = (32, 64, 96, 128)
    decisions = (
        Decision(name="width", candidates=tuple(map(str, widths)), channels=widths),
        Decision(name="block1", candidates=("1", "2")),
        Decision(name="block2", candidates=("1", "2", "3", "4")),
    )
    def stem(width):
        return LayerSpec(kind="stem", in_channels=channels, out_channels=int(width), size=size, kernel=3, stride=2)
    def block(size, stride):
        return lambda width, expand: LayerSpec(
            kind="inverted_residual", in_channels=int(width), out_channels=int(width), size=size, kernel=3,
            stride=stride, expand=int(expand),
        )
    def classifier(width):
        return LayerSpec(kind="classifier", in_channels=int(width), out_channels=num_classes, size=quarter)
    slots = (
        make_slot("stem", decisions, ["width"], stem),
        make_slot("block1", decisions, ["width", "block1"], block(half, 2)),
        make_slot("block2", decisions, ["width", "block2"], block(quarter, 1)),
        make_slot("classifier", decisions, ["width"], classifier),
    )
    return SearchSpace(
        name="wide", decisions=decisions, slots=slots, image_shape=image_shape, num_classes=num_classes
    )
"""


def write_profile(folder: Path, name: str, budget: str) -> str:
    """Write a profile; return its path."""
    path = folder / f"{name}.toml"
    path.write_text(f'name = "{name}"\n[budget]\n{budget}', encoding="utf-8")
    return str(path)


class Phases(Silent):
    """An observer that notes what began."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.notes: list[str] = []

    def start(self, phase: str, total: int | None = None) -> None:
        self.started.append(phase)

    def note(self, message: str) -> None:
        self.notes.append(message)


class Finished:
    """A small finished build; tests change copies of it only."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        labels = np.arange(300) % 2
        images = np.where(labels[:, None, None] == 1, 180, 60) + rng.integers(0, 60, size=(300, 28, 28))
        np.savez(folder / "images.npz", train_images=images.astype(np.uint8), train_labels=labels)
        (folder / "wide.py").write_text(SPACE, encoding="utf-8")
        self.path = folder
        self.settings = self.settings_of(
            *(write_profile(folder, name, budget) for name, budget in BUDGETS.items())
        )
        self.folder = RunFolder(folder / "run")
        self.observer = Phases()
        self.result: BuildResult = build(self.settings, output_dir=self.folder.path, observer=self.observer)

    def settings_of(self, *profiles: str, **changes: Any) -> BuildSettings:
        return BuildSettings(
            data=str(self.path / "images.npz"),
            space=f"{self.path / 'wide.py'}:space",
            profiles=profiles,
            device="cpu",
            threads=1,
            search={"num_steps": 6, "batch_size": 16, "loss_batch_size": 32, "num_finalists": 2},
            retrain={"num_steps": 10, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
            **changes,
        )

    def tables_as(self, name: str, folder: Path, **changes: Any) -> Path:
        """Write the tables of "bytes" into ``folder`` as those of profile ``name``, its memory table changed."""
        for kind in ("latency", "memory"):
            target = folder / kind / f"{name}.json"
            target.parent.mkdir(parents=True)
            stored = read_json(self.folder.path / kind / "bytes.json") | {"profile": name, "probes": {}}
            if kind == "memory":
                stored["table"] |= changes
            target.write_text(json.dumps(stored), encoding="utf-8")
        return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The shared build."""
    return Finished(tmp_path_factory.mktemp("memory"))


def is_valid(schema: str, data: Any) -> list[str]:
    """Return what is wrong with ``data``."""
    return [error.message for error in Draft202012Validator(load_schema(schema)).iter_errors(data)]


def test_every_file_keeps_its_cap_on_memory(finished: Finished) -> None:
    assert finished.result.exit_code == 0
    by_name = {profile.profile: profile for profile in finished.result.profiles}
    assert by_name["none"].peak_memory is None
    (share, size), (absolute,) = (by_name[name].caps for name in ("share", "bytes"))
    if share.metric == "file_size":
        share, size = size, share
    assert (share.metric, share.unit, share.cap) == ("peak_memory", "fraction", 0.5)
    assert share.bound is not None
    assert -0.1 < share.bound <= 0.5
    assert size.value == by_name["share"].file_size <= size.cap
    assert (absolute.metric, absolute.unit, absolute.cap) == ("peak_memory", "bytes", 13e6)
    assert absolute.value is not None
    assert absolute.bound is not None
    assert 1e6 < absolute.value <= absolute.bound <= 13e6
    assert by_name["bytes"].peak_memory == pytest.approx(absolute.value, abs=1)
    assert absolute.text.startswith("peak_memory ")
    assert "(largest of 10 processes " in absolute.text


def test_what_is_stored_follows_the_schemas(finished: Finished) -> None:
    folder = finished.folder
    for name in ("share", "bytes"):
        stored = read_json(folder.memory(name))
        assert is_valid("profile-memory", stored) == []
        assert MemoryTable.from_json(stored["table"]).largest_bytes > 10e6
    assert not folder.memory("none").exists()
    for name in BUDGETS:
        metrics, architecture = (
            read_json(folder.model(name).metrics),
            read_json(folder.model(name).architecture),
        )
        assert is_valid("metrics", metrics) == []
        assert is_valid("architecture", architecture) == []
        assert ("peak_memory" in architecture["predicted"]) == (name != "none")
    assert is_valid("report", read_json(folder.report_json)) == []
    lines = folder.events.read_text(encoding="utf-8").splitlines()
    assert [is_valid("event", json.loads(line)) for line in lines] == [[]] * len(lines)


def test_the_report_and_the_card_show_the_memory(finished: Finished) -> None:
    report = finished.folder.report_markdown.read_text(encoding="utf-8")
    assert "| peak memory |" in report
    assert "starts of one file differ by up to" in report
    assert "peak memory" in finished.folder.model("bytes").card.read_text(encoding="utf-8")
    assert "| peak memory |" not in finished.folder.model("none").card.read_text(encoding="utf-8")


def test_one_table_serves_the_profiles_of_a_runtime(finished: Finished) -> None:
    assert finished.observer.started.count("memory table") == 1
    assert [note for note in finished.observer.notes if "starts of one file differ by up to" in note]
    tables = [read_json(finished.folder.memory(name))["table"] for name in ("share", "bytes")]
    assert tables[0] == tables[1]


def test_a_build_that_goes_on_does_not_measure_the_table_again(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "run")
    RunFolder(tmp_path / "run").model("bytes").metrics.unlink()
    observer = Phases()
    result = build(finished.settings, output_dir=tmp_path / "run", observer=observer)
    assert result.exit_code == 0
    assert "memory table" not in observer.started
    assert "certify" in observer.started


def test_a_table_that_is_wrong_does_not_certify_a_file(finished: Finished, tmp_path: Path) -> None:
    table = read_json(finished.folder.memory("bytes"))["table"]
    # It says that large networks need the least, so the weight asks for the largest one.
    law = {"constant_bytes": 1.1e7, "coefficients": {"weights": -3.0}}
    other = finished.tables_as("wrong", tmp_path / "other", law=law)
    cap = round((0.8 * table["smallest_bytes"] + 0.2 * table["largest_bytes"]) / 1e3)
    budget = f'peak_memory = {{ max = "{cap}kB", coefficient = 1000.0 }}\n'
    path = write_profile(tmp_path, "wrong", budget)
    result = build(finished.settings_of(path, latency_from=str(other)), output_dir=tmp_path / "run")
    (profile,) = result.profiles
    (found,) = profile.caps
    assert (result.exit_code, profile.status, found.status) == (3, "violated", "violated")
    assert found.value is not None
    assert found.value > 1e3 * cap
    assert profile.message == f"wrong: {found.text}"
    folder = RunFolder(tmp_path / "run")
    assert folder.model("wrong").model.exists()
    assert read_json(folder.model("wrong").architecture)["tightened"]["peak_memory"] < 1.0
    probes = read_json(folder.memory("wrong"))["probes"]
    assert {probe["status"] for probe in probes.values()} == {"violated"}
    assert is_valid("profile-memory", read_json(folder.memory("wrong"))) == []


def test_a_share_within_the_noise_is_refused_before_any_training(finished: Finished, tmp_path: Path) -> None:
    other = finished.tables_as("loud", tmp_path / "other", noise_bytes=5_000_000)
    path = write_profile(tmp_path, "loud", BUDGETS["share"])
    observer = Phases()
    with pytest.raises(
        ConfigError, match=r'^loud: budget.peak_memory.max = "50%": .* by 5MB; expected a cap in'
    ):
        search(
            finished.settings_of(path, latency_from=str(other)),
            output_dir=tmp_path / "run",
            observer=observer,
        )
    assert "search" not in observer.started


def profile_of(**budget: dict[str, Any]) -> HardwareProfile:
    return HardwareProfile.from_dict({"name": "one", "budget": budget})


def test_feasibility_tells_of_memory_where_the_budget_names_it() -> None:
    found = check_profile(profile_of(peak_memory={"max": "40%"}, file_size={"max": "40%"}))
    rows = {row.metric: row for row in found.rows}
    assert found.feasible
    memory, size = rows["peak_memory"], rows["file_size"]
    assert 1e6 < memory.smallest < memory.median < memory.largest
    for row in (memory, size):
        assert row.cap == pytest.approx(row.smallest + 0.4 * (row.largest - row.smallest))


def test_a_cap_below_the_smallest_network_comes_with_the_nearest_one(
    finished: Finished, tmp_path: Path
) -> None:
    found = check_profile(profile_of(peak_memory={"max": "1MB"}))
    assert not found.feasible
    assert "budget.peak_memory.max = 1MB is below the cheapest network" in found.message
    path = write_profile(tmp_path, "small", 'peak_memory = { max = "1MB" }\n')
    other = finished.tables_as("small", tmp_path / "other")
    observer = Phases()
    with pytest.raises(InfeasibleError, match=r"^small: budget.peak_memory.max = 1MB is below"):
        build(
            finished.settings_of(path, latency_from=str(other)),
            output_dir=tmp_path / "run",
            observer=observer,
        )
    assert "search" not in observer.started


def test_rooms_tell_how_far_a_cap_is_missed(finished: Finished) -> None:
    stored = read_json(finished.folder.memory("bytes"))["table"]
    stored |= {"smallest_bytes": 10_000_000, "largest_bytes": 14_000_000}
    memory = ProfileMemory(
        profile=profile_of(peak_memory={"max": "1MB"}),
        table=MemoryTable.from_json(stored),
        path=finished.path / "unused.json",
    )
    use = MemoryUse(added_bytes=(12_500_000,) * 5)
    broken = check_memory_cap(use, 12e6)
    assert memory_room(memory, broken) == pytest.approx(0.995 * 12 / 12.5)
    assert memory_rooms(memory, broken) == {"peak_memory": pytest.approx(0.995 * 12 / 12.5)}
    ends = MemoryUse(added_bytes=(10_000_000,)), MemoryUse(added_bytes=(15_000_000,))
    # 50 % of what was measured beside the file, 40 % allowed: 11.6 MB instead of 12 MB between the table's ends
    assert memory_room(memory, check_memory_cap(use, 0.4, ends=ends)) == pytest.approx(0.995 * 11.6 / 12)
    assert memory_rooms(memory, check_memory_cap(use, 13e6)) == {}
    assert memory_rooms(memory, check_memory_cap(MemoryUse(added_bytes=()), 12e6)) == {}
    assert memory_rooms(None, None) == {}
