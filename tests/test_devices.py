"""Profiles whose device is elsewhere: their tables, builds and benches, on devices with constructed times."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from nasdeploy.cli import main
from nasdeploy.costs.by_hand import ByHandDevice, NotMeasuredError, packed
from nasdeploy.costs.device.pack_runner import RESULT_SCHEMA, digest_of
from nasdeploy.costs.device.timing import Plan, Times, statistics
from nasdeploy.costs.latency import write_reference_model
from nasdeploy.costs.operators import operator_request
from nasdeploy.costs.packs import Pack, manifest_bytes, read_result
from nasdeploy.costs.sessions import HERE, Answers, Progress, Request, block_requests
from nasdeploy.costs.ssh import SshDevice
from nasdeploy.errors import ConfigError, UsageError
from nasdeploy.pipeline import (
    BuildResult,
    MeasureResult,
    build,
    check_profile,
    import_result,
    measure,
    pack_table,
)
from nasdeploy.pipeline.certifying import LARGEST, REFERENCE, SMALLEST
from nasdeploy.pipeline.devices import await_device, device_of, is_by_hand, keep_result, where
from nasdeploy.pipeline.memory import quick_memory_tables
from nasdeploy.pipeline.reducing import slowness
from nasdeploy.profiles import HardwareProfile, Runtime
from nasdeploy.runs import ModelFolder, RunFolder
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import make_space

pytestmark = pytest.mark.usefixtures("one_thread")

MACHINE: dict[str, Any] = {
    "cpu": "A",
    "cpu_flags": "neon",
    "architecture": "aarch64",
    "logical_cores": 4,
    "cpu_quota": None,
    "system": "Linux",
    "onnxruntime": "1.20.0",
    "onnx": None,
}


def profile_data(
    device: Mapping[str, Any] | None, *, name: str = "board", cap: str = "60%"
) -> dict[str, Any]:
    data: dict[str, Any] = {"name": name, "budget": {"latency": {"max": cap}}}
    return data if device is None else data | {"device": dict(device)}


def profile_of(device: Mapping[str, Any] | None, **changes: str) -> HardwareProfile:
    return HardwareProfile.from_dict(profile_data(device, **changes))


def read_manifest(pack: Path) -> dict[str, Any]:
    with zipfile.ZipFile(pack) as archive:
        manifest: dict[str, Any] = json.loads(archive.read("pack.json"))
    return manifest


@dataclass
class MadeUpDevice:
    """Answers at once: a run takes 0.01 ms and a nanosecond for each byte of its model.

    factors: on the times of the models of these names. gaps: by block, so that the blocks differ.
    """

    name: str = "a made-up device"
    machine: dict[str, Any] = field(default_factory=lambda: dict(MACHINE))
    factors: Mapping[str, float] = field(default_factory=dict)
    gaps: Sequence[float] = (1.0,)
    cores: Sequence[int] | None = None

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        sizes = [{name: Path(path).stat().st_size for name, path in r["models"].items()} for r in requests]
        results = tuple(
            self.result(r, size, n) for n, (r, size) in enumerate(zip(requests, sizes, strict=True))
        )
        return Answers(results=results, machine=self.machine)

    def result(self, request: Request, sizes: Mapping[str, int], number: int) -> dict[str, Any]:
        models: dict[str, Any] = {}
        for name in request["models"]:
            models[name] = {"session_ms": 1.0, "first_run_ms": 1.0, "batch_size": 1}
            if request.get("operators"):
                node = {"name": "n", "op_type": "Conv", "provider": "CPU", "calls": 1, "median_us": 3.0}
                models[name]["operators"] = {"runs": 50, "run_us": 4.0, "nodes": [node]}
            elif request["plan"] is not None:
                ms = (0.01 + 1e-6 * sizes[name]) * self.factors.get(name, 1.0)
                if name in self.factors:
                    ms *= self.gaps[number % len(self.gaps)]
                runs = np.full(request["plan"]["min_runs"], ms)
                models[name] |= statistics(Times(**dict.fromkeys(Times._fields, runs)))
        return {
            "schema": "nasdeploy/session-result/1",
            "models": models,
            "pinned": True,
            "shared_pool": False,
            "spinning": True,
            "load": None,
            "memory_before_bytes": 40_000_000,
            "peak_memory_bytes": 40_000_000 + max(sizes.values(), default=0),
            "onnxruntime": "1.20.0",
        }

    def run_pack(self, pack: Path, output: Path) -> Path:
        """Write what ``python3 pack`` would write on this device."""
        manifest = read_manifest(pack)
        with zipfile.ZipFile(pack) as archive:
            content = archive.read("pack.json")
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        results = [
            self.result(r, {name: sizes[path] for name, path in r["models"].items()}, n)
            for n, r in enumerate(manifest["requests"])
        ]
        data = {
            "schema": RESULT_SCHEMA,
            "pack_sha256": hashlib.sha256(content).hexdigest(),
            "pack": manifest,
            "machine": self.machine,
            "cores": self.cores,
            "seconds": 12.5,
            "results": results,
        }
        output.write_text(json.dumps(data | {"digest": digest_of(data)}))
        return output


def test_device_follows_from_the_profile() -> None:
    assert device_of(profile_of(None)) is HERE
    assert device_of(profile_of({"host": "me@board"})) == SshDevice(host="me@board", python="python3")
    assert device_of(profile_of({"host": "b", "python": "~/p"})) == SshDevice(host="b", python="~/p")
    assert isinstance(device_of(profile_of({"by_hand": True})), ByHandDevice)
    assert [is_by_hand(profile_of(d)) for d in (None, {"host": "b"}, {"by_hand": True})] == [
        False,
        False,
        True,
    ]


def test_profiles_are_together_on_one_device_only() -> None:
    places = [
        where(profile_of(device, name=name))
        for device in (None, {"host": "a"}, {"host": "b"}, {"by_hand": True})
        for name in ("one", "two")
    ]
    assert [places.index(place) for place in places] == [0, 0, 2, 2, 4, 4, 6, 7]


# --- answers that came back


@pytest.fixture
def requests(tmp_path: Path) -> list[Request]:
    write_reference_model(tmp_path / "one.onnx")
    write_reference_model(tmp_path / "two.onnx", batch_size=2)
    models = {"one": tmp_path / "one.onnx", "two": tmp_path / "two.onnx"}
    plan = Plan(rounds=1, min_runs=30, min_seconds=0.0, max_seconds=1.0)
    return block_requests(models, Runtime(), plan=plan, blocks=3, seed=0)


def test_answers_are_found_by_content_in_any_order(requests: list[Request], tmp_path: Path) -> None:
    pack = Pack()
    pack.add(requests)
    pack.write(tmp_path / "p.zip", purpose={})
    result = read_result(MadeUpDevice().run_pack(tmp_path / "p.zip", tmp_path / "latency.json"))
    device = ByHandDevice(name="board", remedy="ask it", results=(result,))
    order = [2, 0]
    answers = device.carry_out([requests[n] for n in order])
    assert answers.results == tuple(result.answers.results[n] for n in order)
    assert answers.seconds == 12.5
    assert device.carry_out([]).machine == MACHINE
    write_reference_model(tmp_path / "one.onnx", batch_size=3)
    with pytest.raises(NotMeasuredError, match=r"^board: cannot be measured from here; ask it$") as caught:
        device.carry_out(requests[:1])
    assert len(caught.value.pack.requests) == 1


def test_same_request_twice_needs_two_answers(requests: list[Request], tmp_path: Path) -> None:
    pack = Pack()
    pack.add(requests[:1])
    pack.write(tmp_path / "p.zip", purpose={})
    result = read_result(MadeUpDevice().run_pack(tmp_path / "p.zip", tmp_path / "latency.json"))
    assert result.answers_to(requests[:1]) is not None
    assert result.answers_to([*requests[:1], *requests[:1]]) is None


def test_packed_takes_what_each_measurement_asks(requests: list[Request]) -> None:
    pack = packed(lambda d: d.carry_out(requests[:2]), lambda d: None, lambda d: d.carry_out(requests[2:]))
    assert len(pack.requests) == 3
    assert len(pack.models) == 2


# --- the latency table


@pytest.fixture(scope="module")
def by_hand_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack of a table."""
    path = tmp_path_factory.mktemp("table") / "board.zip"
    facts = pack_table(profile_of({"by_hand": True}), path, num_classes=4)
    assert (facts.num_requests, facts.file_size) == (5, path.stat().st_size)
    return path


@pytest.fixture(scope="module")
def table_result(by_hand_pack: Path) -> Path:
    """What the device answered."""
    return MadeUpDevice().run_pack(by_hand_pack, by_hand_pack.parent / "latency.json")


@pytest.fixture(scope="module")
def imported(table_result: Path) -> MeasureResult:
    """The table, imported: builds with the cache of this file find it."""
    found = import_result(table_result)
    assert isinstance(found, MeasureResult)
    return found


def test_imported_table_is_that_of_a_device_with_the_same_answers(imported: MeasureResult) -> None:
    profile = profile_of(None)
    device = MadeUpDevice(machine={**MACHINE, "cpu": "elsewhere"})
    expected = measure([profile], num_classes=4, device=device, fresh=True).runtimes[0].table
    table = imported.runtimes[0].table
    assert (table.entries, table.calibration) == (expected.entries, expected.calibration)
    assert (table.accuracy, table.held_out) == (expected.accuracy, expected.held_out)
    assert (table.machine, table.seconds) == (MACHINE, 12.5)


def test_imported_table_is_found_by_its_profile(imported: MeasureResult) -> None:
    again = measure([profile_of({"by_hand": True})], num_classes=4).runtimes[0]
    assert (again.found.origin, again.table) == ("cache", imported.runtimes[0].table)
    with pytest.raises(
        NotMeasuredError, match=r"^other: cannot be measured from here.*--pack other\.zip, there"
    ):
        measure([profile_of({"by_hand": True}, name="other")], num_classes=4)


@pytest.mark.usefixtures("imported")
def test_check_of_a_profile_uses_the_imported_table() -> None:
    found = check_profile(profile_of({"by_hand": True}, cap="1ms"), num_classes=4)
    assert found.feasible
    assert not check_profile(profile_of({"by_hand": True}, cap="1us"), num_classes=4).feasible


def test_table_of_other_models_is_refused(table_result: Path, tmp_path: Path) -> None:
    data = json.loads(table_result.read_text())
    data["pack"]["purpose"]["num_classes"] = 5  # whose networks are others
    changed = redigested(data, tmp_path / "latency.json")
    with pytest.raises(
        UsageError, match="its models or requests are not those that this version of nasdeploy makes"
    ):
        import_result(changed)


def redigested(data: dict[str, Any], path: Path) -> Path:
    """Write a result as one who knows how checksums are made would change it."""
    data["pack_sha256"] = hashlib.sha256(manifest_bytes(data["pack"])).hexdigest()
    rest = {key: value for key, value in data.items() if key != "digest"}
    path.write_text(json.dumps(rest | {"digest": digest_of(rest)}))
    return path


def test_result_is_of_one_profile(table_result: Path) -> None:
    with pytest.raises(ConfigError, match="was measured for name 'board'; expected 'cpu-tight'"):
        import_result(table_result, profile="cpu-tight")
    two_threads = HardwareProfile.from_dict(
        profile_data({"by_hand": True}) | {"runtime": {"threads": 2}}, source="x"
    )
    with pytest.raises(ConfigError, match=r"was measured for runtime '.*-t1-.*'; expected '.*-t2-"):
        import_result(table_result, profile=two_threads)


def test_purpose_that_says_too_little_is_refused(table_result: Path, tmp_path: Path) -> None:
    data = json.loads(table_result.read_text())
    for purpose, expected in (
        ({"kind": "latency-table"}, "does not say what it is the table of"),
        ({"kind": "bench"}, "written for 'bench'; expected nasdeploy bench --import"),
        ({}, "written for None; expected a latency table or a certification"),
        ({"kind": "certify"}, "expected a table with the keys name, runtime and budget"),
    ):
        data["pack"]["purpose"] = purpose
        with pytest.raises(UsageError, match=expected):
            import_result(redigested(data, tmp_path / "latency.json"))


def test_noisy_device_gives_a_table_that_is_not_kept(by_hand_pack: Path, tmp_path: Path) -> None:
    noisy = MadeUpDevice(factors={f"again{i}": 1.2 for i in range(20)}, machine={**MACHINE, "cpu": "noisy"})
    found = import_result(noisy.run_pack(by_hand_pack, tmp_path / "latency.json"))
    assert isinstance(found, MeasureResult)
    assert (found.exit_code, found.runtimes[0].found.stored) == (5, None)


def test_files_meet_their_schemas(by_hand_pack: Path, table_result: Path) -> None:
    for schema, data in (
        ("pack", read_manifest(by_hand_pack)),
        ("pack-result", json.loads(table_result.read_text())),
    ):
        assert [e.message for e in Draft202012Validator(load_schema(schema)).iter_errors(data)] == []


def test_pack_for_a_profile_that_is_measured_here_is_refused(by_hand_pack: Path, tmp_path: Path) -> None:
    expected = (
        "^board: device: none, so builds measure on this machine and would not use the pack; expected .device. with "
        "by_hand = true .or host. in the profile$"
    )
    with pytest.raises(ConfigError, match=expected):
        pack_table(profile_of(None), tmp_path / "p.zip", num_classes=4)
    assert not (tmp_path / "p.zip").exists()
    result = MadeUpDevice().run_pack(by_hand_pack, tmp_path / "latency.json")
    data = json.loads(result.read_text())
    del data["pack"]["purpose"]["profile"]["device"]
    with pytest.raises(ConfigError, match=expected):
        import_result(redigested(data, tmp_path / "changed.json"))
    with pytest.raises(ConfigError, match="for device 'by hand: board'; expected 'this machine', as in"):
        import_result(result, profile=profile_of(None))


def test_python_file_that_a_result_names_is_not_executed_unless_it_is_named_here(
    table_result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "from pathlib import Path\nfrom nasdeploy.spaces import mobile_space as space\nPath('executed').touch()\n"
    )
    data = json.loads(table_result.read_text())
    data["pack"]["purpose"]["space"] = "own.py:space"
    changed = redigested(data, tmp_path / "latency.json")
    with pytest.raises(
        UsageError, match=r"a Python file that would be executed; expected --space own\.py:space"
    ):
        import_result(changed)
    code, _, err = call("measure", "--import", changed, "--space", "mobile")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "was measured for the space 'own.py:space'; expected 'mobile', as --space says" in err
    assert not Path("executed").exists()
    assert call("measure", "--import", changed, "--space", "own.py:space")[0] == 0
    assert Path("executed").exists()


def test_memory_table_is_that_of_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "cache"))
    data = profile_data({"by_hand": True}) | {"budget": {"peak_memory": {"max": "60%"}}}
    profile = HardwareProfile.from_dict(data)
    pack_table(profile, tmp_path / "p.zip", num_classes=4, seed=3)
    import_result(MadeUpDevice().run_pack(tmp_path / "p.zip", tmp_path / "latency.json"))
    space = make_space("mobile", (1, 28, 28), 4)
    assert set(quick_memory_tables(space, profile, seed=3)) == {"peak_memory"}
    with pytest.raises(NotMeasuredError):
        quick_memory_tables(space, profile)


# --- what is kept


def kept(device: MadeUpDevice, pack: Path, folder: Path, *, age: int = 0) -> Path:
    """Keep what ``device`` makes of ``pack``, as if that had been ``age`` seconds ago."""
    result = read_result(device.run_pack(pack, folder / "latency.json"))
    path = keep_result(result, "board")
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


@pytest.fixture
def own_cache_of_a_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache_of_a_test")
@pytest.mark.parametrize(
    "other", [MadeUpDevice(machine={**MACHINE, "onnxruntime": "1.21.0"}), MadeUpDevice(cores=(3,))]
)
def test_only_results_of_the_newest_machine_count(
    requests: list[Request], other: MadeUpDevice, tmp_path: Path
) -> None:
    profile = profile_of({"by_hand": True})
    for name, count in (("all", 3), ("one", 1)):
        pack = Pack()
        pack.add(requests[:count])
        pack.write(tmp_path / f"{name}.zip", purpose={})
    kept(MadeUpDevice(), tmp_path / "all.zip", tmp_path, age=10)
    assert len(device_of(profile).carry_out(requests).results) == 3
    kept(other, tmp_path / "one.zip", tmp_path)
    assert len(device_of(profile).carry_out(requests[:1]).results) == 1
    with pytest.raises(NotMeasuredError):
        device_of(profile).carry_out(requests)
    kept(MadeUpDevice(), tmp_path / "one.zip", tmp_path, age=-10)  # it is the old machine again
    assert len(device_of(profile).carry_out(requests).results) == 3


@pytest.mark.usefixtures("own_cache_of_a_test")
def test_kept_result_that_is_damaged_or_old_is_told_of_and_not_used(
    requests: list[Request], tmp_path: Path
) -> None:
    pack = Pack()
    pack.add(requests)
    pack.write(tmp_path / "p.zip", purpose={})
    good = kept(MadeUpDevice(), tmp_path / "p.zip", tmp_path)
    (good.parent / "cut.json").write_bytes(good.read_bytes()[:-9])
    (good.parent / "old.json").write_text('{"schema": "nasdeploy/pack-result/0"}')
    notes: list[str] = []
    device = device_of(profile_of({"by_hand": True}), note=notes.append)
    assert len(device.carry_out(requests).results) == 3
    assert sorted(note.partition(": ")[0] for note in notes) == [
        str(good.parent / name) for name in ("cut.json", "old.json")
    ]
    assert all(note.endswith("; it is not used, and may be deleted") for note in notes)


def test_result_that_cannot_be_kept_is_one_line(
    table_result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot be written .*: NASDEPLOY_CACHE=FOLDER chooses") as caught:
        keep_result(read_result(table_result), "board")
    assert str(caught.value).startswith(f"{tmp_path}/file/devices/board/")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.usefixtures("own_cache_of_a_test")
def test_commands_that_write_no_packs_name_the_one_that_does() -> None:
    with pytest.raises(
        NotMeasuredError, match=r"nasdeploy measure -p board .* --pack board\.zip, there python3"
    ):
        check_profile(profile_of({"by_hand": True}), num_classes=4)


@pytest.mark.usefixtures("own_cache_of_a_test")
def test_pack_of_a_certification_also_asks_why_a_reduced_file_is_slow(
    requests: list[Request], tmp_path: Path
) -> None:
    profile = HardwareProfile.from_dict(profile_data({"by_hand": True}) | {"runtime": {"precision": "int8"}})
    job: Any = SimpleNamespace(folder=RunFolder(tmp_path / "run"))
    folder = job.folder.model("board")
    folder.path.mkdir(parents=True)
    write_reference_model(folder.model)
    pack = Pack()
    pack.add(requests)
    await_device(job, profile, pack)
    assert len(read_manifest(folder.pack)["requests"]) == 3  # there is no reduced file
    write_reference_model(folder.file("int8"), batch_size=2)
    await_device(job, profile, pack)
    *_, plain, reduced = read_manifest(folder.pack)["requests"]
    expected = Pack()
    expected.add([operator_request(path, profile.runtime) for path in (folder.model, folder.file("int8"))])
    assert [plain, reduced] == expected.requests
    kept(MadeUpDevice(), folder.pack, tmp_path)
    reason = slowness(folder.model, folder.file("int8"), profile.runtime, device=device_of(profile))
    assert [(row.operator, row.fp32_ms, row.ms) for row in reason.times] == [("Conv", 0.003, 0.003)]
    await_device(job, profile, pack)
    assert len(read_manifest(folder.pack)["requests"]) == 3  # answered: it is not asked again


# --- a build


def bars(folder: Path) -> Path:
    """Write images of rows and columns in four classes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:28, 0:28]
    directions = np.stack([rows, columns, rows + columns, rows - columns])
    labels = rng.permutation(np.arange(400) % 4)
    clean = np.where((directions[labels] + rng.integers(0, 6, size=(400, 1, 1))) % 6 < 3, 200, 50)
    images = np.clip(clean + rng.normal(0, 25, size=clean.shape), 0, 255).astype(np.uint8)
    np.savez(folder / "bars.npz", train_images=images, train_labels=labels, class_names=["a", "b", "c", "d"])
    return folder / "bars.npz"


class Waiting:
    """A build of a profile by hand that waits for its device; tests change copies of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        toml = folder / "board.toml"
        toml.write_text('name = "board"\n[device]\nby_hand = true\n[budget]\nlatency = { max = "60%" }\n')
        self.settings = BuildSettings(
            data=str(bars(folder)),
            profiles=(str(toml),),
            device="cpu",
            threads=1,
            search={
                "num_steps": 6,
                "batch_size": 16,
                "loss_batch_size": 32,
                "num_loss_samples": 6,
                "num_finalists": 2,
            },
            retrain={"num_steps": 4, "batch_size": 16},
            measure={"min_runs": 200, "min_seconds": 0.05},
        )
        self.result = build(self.settings, output_dir=folder / "run")

    def copy(self, folder: Path) -> tuple[BuildSettings, Path]:
        """Return the settings and a copy of the run that may be changed."""
        return self.settings, Path(shutil.copytree(self.folder / "run", folder / "run"))


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory, imported: MeasureResult) -> Waiting:
    return Waiting(tmp_path_factory.mktemp("build"))


def model_folder(run: Path) -> ModelFolder:
    return RunFolder(run).model("board")


@pytest.fixture
def device_results(monkeypatch: pytest.MonkeyPatch, table_result: Path, tmp_path: Path) -> None:
    """A cache of this test alone, with the table."""
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "cache"))
    keep_result(read_result(table_result), "board")


def answer(run: Path, device: MadeUpDevice) -> None:
    """Run the pack of a run folder on ``device`` and import what it says."""
    import_result(device.run_pack(model_folder(run).pack, run.parent / "latency.json"))


def test_build_without_a_table_says_how_to_get_one(
    waiting: Waiting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as caught:
        build(waiting.settings, output_dir=tmp_path / "run")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (
        f"nasdeploy measure -p {waiting.folder}/board.toml --data {waiting.folder}/bars.npz --pack board.zip",
        "there python3 board.zip",
        "here nasdeploy measure --import latency.json",
    ):
        assert part in message


def test_build_waits_for_its_device(waiting: Waiting) -> None:
    (profile,) = waiting.result.profiles
    folder = model_folder(waiting.folder / "run")
    assert (waiting.result.exit_code, profile.status, profile.latency_ms) == (5, "noisy", None)
    assert f"run {folder.pack} there (python3 certify.zip)" in profile.message
    assert not folder.latency.exists()
    manifest = read_manifest(folder.pack)
    assert set(manifest["requests"][0]["models"]) == {"board", SMALLEST, LARGEST, REFERENCE}
    assert manifest["purpose"]["kind"] == "certify"
    metrics = json.loads(folder.metrics.read_text())
    assert [e.message for e in Draft202012Validator(load_schema("metrics")).iter_errors(metrics)] == []


@pytest.mark.usefixtures("device_results")
def test_build_is_certified_by_what_the_device_says(waiting: Waiting, tmp_path: Path) -> None:
    settings, run = waiting.copy(tmp_path)
    trained = model_folder(run).weights.stat().st_mtime_ns
    answer(run, MadeUpDevice())
    result: BuildResult = build(settings, output_dir=run)
    assert (result.exit_code, result.profiles[0].status) == (0, "certified")
    assert result.profiles[0].latency_ms == pytest.approx(0.01 + 1e-6 * result.profiles[0].file_size)
    assert model_folder(run).weights.stat().st_mtime_ns == trained
    assert not model_folder(run).pack.exists()
    assert build(settings, output_dir=run).exit_code == 0


@pytest.mark.usefixtures("device_results")
def test_file_that_breaks_the_cap_there_is_selected_again(waiting: Waiting, tmp_path: Path) -> None:
    settings, run = waiting.copy(tmp_path)
    first = json.loads(model_folder(run).architecture.read_text())
    answer(run, MadeUpDevice(factors={"board": 10.0}))
    result = build(settings, output_dir=run)
    second = json.loads(model_folder(run).architecture.read_text())
    assert (result.exit_code, first["attempt"], second["attempt"]) == (5, 1, 2)
    assert second["hash"] != first["hash"]
    assert "waits for its device" in result.profiles[0].message


@pytest.mark.usefixtures("device_results")
def test_undecided_file_is_measured_there_again_with_twice_the_runs(waiting: Waiting, tmp_path: Path) -> None:
    settings, run = waiting.copy(tmp_path)
    before = read_manifest(model_folder(run).pack)["requests"][0]["plan"]
    answer(run, astride(run))
    result = build(settings, output_dir=run)
    after = read_manifest(model_folder(run).pack)["requests"][0]["plan"]
    assert (result.exit_code, after["min_runs"]) == (5, 2 * before["min_runs"])
    assert result.profiles[0].latency_ms is not None
    answer(run, MadeUpDevice())
    assert build(settings, output_dir=run).exit_code == 0


def astride(run: Path) -> MadeUpDevice:
    """Return a device on which the blocks of the file lie on both sides of its cap, their median below."""
    (cap,) = json.loads(model_folder(run).metrics.read_text())["caps"]
    with zipfile.ZipFile(model_folder(run).pack) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    models = read_manifest(model_folder(run).pack)["requests"][0]["models"]
    low, high = (
        0.01 + 1e-6 * sizes[models[name]] for name in ("the smallest network", "the largest network")
    )
    at_cap = low + cap["cap"] * (high - low)
    return MadeUpDevice(
        factors={"board": at_cap / (0.01 + 1e-6 * sizes[models["board"]])},
        gaps=(0.99, 0.99, 0.99, 0.99, 1.01),
    )


@pytest.mark.usefixtures("device_results")
def test_certification_counts_only_on_the_machine_of_the_table(waiting: Waiting, tmp_path: Path) -> None:
    settings, run = waiting.copy(tmp_path)
    answer(run, MadeUpDevice(machine={**MACHINE, "cpu": "B"}))
    with pytest.raises(
        ConfigError, match=r"board: is not the machine that the latency table was measured on .cpu: A"
    ) as caught:
        build(settings, output_dir=run)
    message = str(caught.value)
    assert f"measure the table again (nasdeploy measure -p {waiting.folder}/board.toml --data " in message
    assert message.endswith("--import latency.json) and then nasdeploy build --no-resume")
    with pytest.raises(
        NotMeasuredError, match=r"--pack board\.zip"
    ):  # the table of the other one says nothing
        build(settings, output_dir=run, resume=False)


@pytest.mark.usefixtures("device_results")
def test_import_of_a_certification_writes_where_it_is_kept(waiting: Waiting, tmp_path: Path) -> None:
    run = waiting.copy(tmp_path)[1]
    result = MadeUpDevice().run_pack(model_folder(run).pack, tmp_path / "latency.json")
    code, out, err = call("measure", "--import", result, "--json", "-o", tmp_path / "kept.json")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "kept.json").read_text()) == json.loads(out)
    assert json.loads(out)["schema"] == "nasdeploy/kept-result/1"
    assert Path(json.loads(out)["path"]).exists()
    code, _, err = call("measure", "--import", result, "--space", "mobile")
    assert code == 2
    assert "certifies files, which needs no search space; leave out --space mobile" in err


# --- the command line


def call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


def test_measure_writes_a_pack_and_imports_it(table_result: Path, tmp_path: Path, waiting: Waiting) -> None:
    toml = waiting.folder / "board.toml"
    code, out, _ = call("measure", "-p", toml, "--classes", 4, "--pack", tmp_path / "b.zip")
    assert (code, out.startswith(f"{tmp_path / 'b.zip'}: 210 models in ")) == (0, True)
    assert "python3 b.zip" in out
    code, out, _ = call("measure", "--import", table_result, "-p", toml, "--json")
    assert code == 0
    assert json.loads(out)["runtimes"][0]["table"]["machine"]["cpu"] == "A"
    (tmp_path / "cut.json").write_bytes(table_result.read_bytes()[:-9])
    code, _, err = call("measure", "--import", tmp_path / "cut.json")
    assert (code, len(err.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["measure", "--import", "x.json", "--data", "d"], "--data: says nothing beside --import"),
        (["measure", "--import", "x.json", "--pack", "y"], "--pack: says nothing beside --import"),
        (["measure", "--pack", "x.zip"], "--pack is for one device; expected one --profile"),
        (["measure", "--pack", "x.zip", "-p", "cpu-tight", "--fresh"], "--fresh: says nothing beside --pack"),
        (["bench", "--import", "x.json", "--quick"], "--quick: says nothing beside --import"),
        (["bench", "m.onnx", "--import", "x.json"], "MODEL.onnx...: says nothing beside --import"),
        (["bench", "m.onnx", "--pack", "x.zip", "-o", "y"], "--output: says nothing beside --pack"),
        (["bench", "--pack", "x.zip"], "Missing argument 'MODEL.onnx...'"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments: list[str], expected: str) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert expected in err


def test_bench_writes_a_pack_and_imports_it(tmp_path: Path) -> None:
    for name, batch in (("one.onnx", 1), ("two.onnx", 2)):
        write_reference_model(tmp_path / name, batch_size=batch)
    models = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    code, out, err = call("bench", *models, "--pack", tmp_path / "b.zip", "--quick")
    assert (code, err) == (0, "")
    result = MadeUpDevice(factors={"two.onnx": 2.0}).run_pack(tmp_path / "b.zip", tmp_path / "latency.json")
    code, out, err = call("bench", "--import", result, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert [e.message for e in Draft202012Validator(load_schema("bench")).iter_errors(data)] == []
    assert data["machine"]["cpu"] == "A"
    assert data["models"][1]["relative"]["verdict"] == "slower"
    write_reference_model(models[0], batch_size=3)
    code, _, err = call("bench", "--import", result)
    assert code == 2
    assert "expected the files of its pack, unchanged" in err.splitlines()[-1]
