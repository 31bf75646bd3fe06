"""The run folder: one build at a time, one build a folder, whole files, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdeploy.errors import RunFolderError
from nasdeploy.files import write_json, write_whole
from nasdeploy.runs import EventLog, RunFolder, read_json
from nasdeploy.settings import BuildSettings


def claim(folder: RunFolder, settings: BuildSettings | None = None) -> bool:
    """Claim ``folder`` for a build with ``settings``."""
    settings = settings or BuildSettings()
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder.claim(
        settings=settings.model_dump(mode="json"),
        fingerprint=settings.fingerprint(),
        facts=lambda: {"threads": 1},
    )


def one_line(error: pytest.ExceptionInfo[RunFolderError]) -> str:
    """Return the message, which is one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from nasdeploy.errors import RunFolderError
from nasdeploy.runs import RunFolder
try:
    with RunFolder(Path(sys.argv[1])).locked():
        pass
except RunFolderError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_second_process_is_refused_while_a_build_runs(tmp_path: Path) -> None:
    def enter() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with RunFolder(tmp_path).locked():
        refused = enter()
    assert refused.returncode == 2, refused.stderr
    assert "another build is running here" in refused.stdout
    assert enter().returncode == 0


def test_a_second_build_of_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked(), pytest.raises(RunFolderError, match="another build"):  # noqa: SIM117
        with RunFolder(tmp_path).locked():
            pass
    with RunFolder(tmp_path).locked():
        pass


def test_only_own_leftovers_are_deleted_and_only_in_a_run(tmp_path: Path) -> None:
    strangers = [tmp_path / ".notes.tmp", tmp_path / "deep" / ".run.json.tmp"]
    own = tmp_path / "latency" / ".table.json.123.tmp"
    for path in (*strangers, own):
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(RunFolderError, match="no run of nasdeploy"):
        claim(folder)
    assert all(path.exists() for path in (*strangers, own))
    shutil.rmtree(tmp_path / "deep")
    (tmp_path / ".notes.tmp").unlink()
    assert not claim(folder)
    assert claim(folder)
    assert not own.exists()


def test_the_lock_is_released_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path).locked():
        raise KeyboardInterrupt
    with RunFolder(tmp_path).locked():
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(RunFolderError, match=r"--output-dir .* cannot be made") as refused,
            RunFolder(path).locked(),
        ):
            pass
        one_line(refused)


def test_a_claimed_folder_is_resumed_by_the_same_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not claim(folder)
    before = folder.run.read_bytes()
    assert claim(folder)
    assert folder.run.read_bytes() == before
    stored = read_json(folder.run, schema="nasdeploy/run/2")
    assert (stored["threads"], stored["fingerprint"]) == (1, BuildSettings().fingerprint())


def test_the_stored_configuration_gives_the_settings_back(tmp_path: Path) -> None:
    settings = BuildSettings(seed=4, image_size=32, search={"num_steps": 7, "estimator": "independent"})
    folder = RunFolder(tmp_path)
    claim(folder, settings)
    assert BuildSettings.model_validate(tomllib.loads(folder.config.read_text("utf-8"))) == settings
    assert BuildSettings.model_validate(read_json(folder.run)["settings"]) == settings


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 3}, "seed = 0 there, 3 here"),
        ({"data": "photos", "seed": 3}, 'data = "fashion-mnist" there, "photos" here'),
        ({"image_size": 32}, "image_size = null there, 32 here"),
        ({"search": {"num_steps": 12}}, "search.num_steps = 900 there, 12 here"),
        ({"retrain": {"ema_decay": 0.5}}, "retrain.ema_decay = 0.99 there, 0.5 here"),
    ],
)
def test_other_settings_are_refused_with_the_first_key_that_differs(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    folder = RunFolder(tmp_path)
    claim(folder)
    with pytest.raises(RunFolderError) as refused:
        claim(folder, BuildSettings(**change))
    message = one_line(refused)
    assert difference in message
    assert "--no-resume" in message


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("picture")
    with pytest.raises(
        RunFolderError, match=r"is not empty \(holiday\.jpg\) and no run of nasdeploy"
    ) as refused:
        claim(RunFolder(tmp_path))
    one_line(refused)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_an_empty_folder_with_a_lock_is_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    with folder.locked():
        assert not claim(folder)


def test_a_first_start_that_was_killed_is_started_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def killed() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.claim(settings={"seed": 0}, fingerprint="f", facts=killed)
    assert not claim(folder)


def test_a_half_written_file_of_a_killed_start_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / ".config.toml.4711.tmp").write_text("seed")  # what write_whole leaves when it is killed
    assert not claim(RunFolder(tmp_path))


def test_starting_over_keeps_the_files_of_others(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    claim(folder)
    strangers = [tmp_path / "notes.txt", tmp_path / "plots" / "a.png"]
    for path in (*strangers, folder.supernet, folder.model("a").model, folder.latency("a"), folder.events):
        write_whole(path, b"x")
    write_whole(folder.baseline("a", "random"), b"x")
    write_whole(folder.report_html, b"x")
    folder.discard()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(strangers)


def test_starting_over_in_a_run_with_a_file_of_somebody_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    claim(folder)
    (tmp_path / "notes.txt").write_text("mine")
    folder.discard()
    assert not claim(folder)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_discarded_model_leaves_an_empty_folder(tmp_path: Path) -> None:
    model = RunFolder(tmp_path).model("tight")
    files = [value for name, value in vars(model).items() if name != "path"]
    for path in files:
        write_whole(path, b"x")
    model.discard()
    assert list(model.path.iterdir()) == []


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "weights": torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last),
        "slice": torch.arange(12).reshape(3, 4)[:, ::2],
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    folder = RunFolder(tmp_path)
    folder.save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = folder.load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("content", [b"", b"not tensors", None])
def test_damaged_tensors_are_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.safetensors"
    if content is None:  # cut in the middle
        RunFolder(tmp_path).save_tensors(path, {"a": torch.zeros(100)})
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"t\.safetensors: cannot be read") as refused:
        RunFolder(tmp_path).load_tensors(path)
    one_line(refused)


@pytest.mark.parametrize(
    "content", [b"", b'{"schema": "x", ', b"[1, 2]", b'{"schema": "b"}', b"\xff\xfe{}", b"\0" * 40]
)
def test_damaged_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError) as refused:
        read_json(path, schema="a")
    message = one_line(refused)
    assert message.startswith(str(path))
    assert "delete it and build again" in message


def test_missing_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.json: cannot be read") as refused:
        read_json(tmp_path / "run.json")
    one_line(refused)


def test_numbers_that_json_does_not_have_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 0.1 + 0.2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 0.1 + 0.2}


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="target"):
        write_whole(tmp_path / "target", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_events_are_one_json_object_a_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.start("search", 2)
    log.advance("search", 1, {"loss": 1.5})
    log.note("two\nlines and an ü")
    log.finish("search", {"seconds": 2})
    EventLog(tmp_path / "events.jsonl").start("select")  # a second start appends
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text("utf-8").splitlines()]
    assert [row["event"] for row in rows] == ["start", "step", "note", "finish", "start"]
    assert rows[1] == {"time": rows[1]["time"], "event": "step", "phase": "search", "step": 1, "loss": 1.5}
    assert rows[2]["message"] == "two\nlines and an ü"
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
