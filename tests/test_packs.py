"""Packs: one zip file that measures on a device with numpy and onnxruntime only, and the file that comes back."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nasdeploy.costs import device
from nasdeploy.costs.device.pack_runner import digest_of
from nasdeploy.costs.device.timing import Plan
from nasdeploy.costs.latency import collect, write_reference_model
from nasdeploy.costs.machine import describe_difference, fingerprint_hash
from nasdeploy.costs.packs import MAIN, manifest_bytes, read_answers, read_result, write_pack
from nasdeploy.costs.sessions import Answers, Request, block_requests, choose_cores, start_requests
from nasdeploy.costs.startup import summarise_starts
from nasdeploy.errors import UsageError
from nasdeploy.profiles import Runtime

PLAN = Plan(rounds=2, min_runs=30, min_seconds=0.0, max_seconds=0.5)
PURPOSE = {"kind": "test", "number": 3}


def write_models(folder: Path) -> dict[str, Path]:
    """Return two models, the first of them under two names and in two files of the same content."""
    paths = {"one": folder / "one.onnx", "two": folder / "two.onnx", "again": folder / "again.onnx"}
    write_reference_model(paths["one"])
    write_reference_model(paths["again"])
    write_reference_model(paths["two"], batch_size=2)
    return paths


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    paths = write_models(tmp_path_factory.mktemp("models"))
    return [
        *block_requests(paths, Runtime(), plan=PLAN, blocks=2, seed=0),
        *start_requests(paths["two"], Runtime(), count=1, seed=5),
    ]


@pytest.fixture(scope="module")
def pack(requests: list[Request], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "pack.zip"
    write_pack(path, requests, purpose=PURPOSE)
    return path


def read_manifest(pack: Path) -> dict[str, Any]:
    with zipfile.ZipFile(pack) as archive:
        manifest: dict[str, Any] = json.loads(archive.read("pack.json"))
    return manifest


def run_pack(python: Path, pack: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``pack`` as on a device: nothing of this process's environment but the place for temporary files."""
    return subprocess.run(
        [python, pack, *arguments],
        env={"TMPDIR": os.environ.get("TMPDIR", "/tmp")},
        cwd=pack.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def measured(bare_python: Path, pack: Path) -> Path:
    """A result of the pack, from a Python without nasdeploy."""
    output = pack.parent / "latency.json"
    done = run_pack(bare_python, pack, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a pack that was refused."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("ready: ")]
    return line


@pytest.mark.parametrize("name", ["nasdeploy", "torch", "onnx"])
def test_bare_python_has_nothing_else(bare_python: Path, name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [bare_python, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, env={}, check=False
    )
    assert b"No module named" in done.stderr


def test_same_requests_make_the_same_bytes(requests: list[Request], pack: Path, tmp_path: Path) -> None:
    manifest = write_pack(tmp_path / "again.zip", requests, purpose=PURPOSE)
    assert (tmp_path / "again.zip").read_bytes() == pack.read_bytes()
    assert read_manifest(pack) == manifest


def test_models_of_one_content_are_stored_once(pack: Path) -> None:
    with zipfile.ZipFile(pack) as archive:
        assert sum(name.endswith(".onnx") for name in archive.namelist()) == 2
    models = read_manifest(pack)["requests"][0]["models"]
    assert models["one"] == models["again"] != models["two"]


def test_pack_holds_no_path_of_this_machine(requests: list[Request], pack: Path) -> None:
    with zipfile.ZipFile(pack) as archive:
        texts = [archive.read(name).decode() for name in archive.namelist() if not name.endswith(".onnx")]
    folder = str(Path(requests[0]["models"]["one"]).parent)
    assert not any(folder in text for text in texts)


def test_answers_are_those_of_the_requests(measured: Path, pack: Path) -> None:
    answers = read_answers(measured, read_manifest(pack))
    times = collect(Answers(results=answers.results[:2], machine=answers.machine), Runtime())
    assert set(times) == {"one", "two", "again"}
    assert all(0.0 < latency.p50_ms < 100.0 and len(latency.blocks) == 2 for latency in times.values())
    assert summarise_starts(answers.results[2:]).cold_start_ms > 0.0
    assert answers.machine["onnx"] is None
    assert answers.machine["onnxruntime"] is not None
    result = read_result(measured)
    assert (result.purpose, result.answers) == (PURPOSE, answers)
    assert 0.0 < result.seconds < 120.0


def test_result_is_of_these_requests_and_of_no_others(measured: Path, requests: list[Request]) -> None:
    result = read_result(measured)
    assert result.answers_to(requests) is not None
    swapped = [
        {**request, "models": {**request["models"], "one": request["models"]["two"]}}
        for request in requests[:2]
    ]
    assert result.answers_to([*swapped, *requests[2:]]) is None
    assert result.answers_to([{**requests[0], "seed": 7}, *requests[1:]]) is None
    assert result.answers_to([*requests, *requests[:1]]) is None
    found = result.answers_to(requests[:1])
    assert found is not None
    assert found.results == result.answers.results[:1]


@pytest.mark.parametrize("change", ["other code", "a file more", "a file less"])
def test_result_of_other_code_is_refused(measured: Path, tmp_path: Path, change: str) -> None:
    data = json.loads(measured.read_text())
    files = data["pack"]["files"]
    if change == "a file less":
        del files["device/timing.py"]
    else:
        files["device/timing.py" if change == "other code" else "device/more.py"] = "0" * 64
    data["pack_sha256"] = hashlib.sha256(manifest_bytes(data["pack"])).hexdigest()
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(digested(data)))
    with pytest.raises(
        UsageError, match=r"by the code of another nasdeploy .*: write the pack again"
    ) as caught:
        read_result(path)
    assert len(str(caught.value).splitlines()) == 1


def test_cores_that_were_asked_for_are_a_part_of_the_machine(
    bare_python: Path, measured: Path, requests: list[Request], tmp_path: Path
) -> None:
    core = choose_cores(1)
    if core is None:
        pytest.skip("cores cannot be bound here")
    write_pack(tmp_path / "p.zip", requests[2:], purpose={})
    output = tmp_path / "latency.json"
    assert run_pack(bare_python, tmp_path / "p.zip", "--cores", str(core[0]), "-o", output).returncode == 0
    there, here = read_result(measured).answers.machine, read_result(output).answers.machine
    assert describe_difference(there, here) == f"cores: None there, {core[0]} here"
    assert fingerprint_hash(there) != fingerprint_hash(here)


NO_FOLDERS = "tempfile._candidate_tempdir_list = list"


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (
            "tempfile.tempdir = '/no/such'",
            "error: /no/such: cannot be written to (No such file or directory); expected",
        ),
        (
            NO_FOLDERS,
            "error: no folder for temporary files (No usable temporary directory found in []); expected",
        ),
    ],
)
def test_no_room_for_temporary_files_gets_one_line(
    bare_python: Path, pack: Path, tmp_path: Path, unpacked: bool, setup: str, expected: str
) -> None:
    if unpacked:
        with zipfile.ZipFile(pack) as archive:
            archive.extractall(tmp_path / "unpacked")
    source = tmp_path / "unpacked" if unpacked else pack
    code = (
        f"import runpy, sys, tempfile; {setup}; sys.argv = ['pack', '-o', {str(tmp_path / 'latency.json')!r}]; "
        f"runpy.run_path({str(source)!r}, run_name='__main__')"
    )
    done = subprocess.run([bare_python, "-c", code], capture_output=True, text=True, check=False)
    message = error_of(done)
    assert message.startswith(expected)
    assert message.endswith("TMPDIR=FOLDER")


def test_unpacked_pack_runs_too_and_names_a_damaged_file(
    bare_python: Path, pack: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(pack) as archive:
        archive.extractall(folder)
    done = run_pack(bare_python, folder, "--check")
    assert done.returncode == 0, done.stderr
    assert "2 models, 3 requests" in done.stderr
    model = next(folder.glob("models/*.onnx"))
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert f"error: models/{model.name}: its checksum is " in error_of(run_pack(bare_python, folder))
    model.unlink()
    assert f"error: models/{model.name}: No such file" in error_of(run_pack(bare_python, folder))


def test_check_measures_and_writes_nothing(bare_python: Path, pack: Path, tmp_path: Path) -> None:
    done = run_pack(bare_python, pack, "--check", "--output", tmp_path / "latency.json")
    assert done.returncode == 0
    assert "ready: Python 3." in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cores", "x"], "error: --cores x: expected different numbers of cores, such as 3 or 2,3"),
        (["--cores", "0,0"], "error: --cores 0,0: expected different numbers of cores, such as 3 or 2,3"),
        (["--cores", "0,1"], "error: --cores 0,1: expected 1, one for each thread of the profile"),
        (["--cores", "4095"], "error: --cores 4095: expected some of "),
        (
            ["--output", "/no/such/folder/latency.json"],
            "error: --output /no/such/folder/latency.json: cannot be",
        ),
    ],
)
def test_wrong_options_get_one_line(
    bare_python: Path, pack: Path, arguments: list[str], expected: str
) -> None:
    assert error_of(run_pack(bare_python, pack, *arguments)).startswith(expected)


def test_missing_provider_and_packages_get_one_line(pack: Path, bare_python: Path, tmp_path: Path) -> None:
    models = write_models(tmp_path)
    runtime = Runtime(provider="NnapiExecutionProvider")
    write_pack(tmp_path / "p.zip", start_requests(models["one"], runtime, count=1, seed=0), purpose={})
    message = error_of(run_pack(bare_python, tmp_path / "p.zip"))
    assert message.startswith(
        "error: NnapiExecutionProvider: the ONNX Runtime of this device does not have it; it has"
    )
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    message = error_of(run_pack(empty / "bin" / "python", pack))
    assert "cannot import numpy and onnxruntime (ModuleNotFoundError: No module named 'numpy')" in message


def test_model_that_cannot_be_loaded_is_named(bare_python: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    requests = start_requests(tmp_path / "bad.onnx", Runtime(), count=1, seed=0)
    name = write_pack(tmp_path / "p.zip", requests, purpose={})["requests"][0]["models"]["model"]
    assert error_of(run_pack(bare_python, tmp_path / "p.zip")).startswith(
        f"error: {name}: onnxruntime cannot load it"
    )


def test_old_python_is_told_so_before_anything_is_imported(pack: Path) -> None:
    code = (
        f"import runpy, sys; sys.version_info = (3, 7, 9); runpy.run_path({str(pack)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: Python 3.7; expected 3.8 or newer\n")


@pytest.mark.parametrize(
    "file", sorted(Path(next(iter(device.__path__))).glob("*.py")), ids=lambda path: path.name
)
def test_code_on_the_device_is_python_3_8(file: Path) -> None:
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_main_is_text_that_every_python_can_read() -> None:
    tree = ast.parse(MAIN)
    assert not any(isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr) for node in ast.walk(tree))


def start_and_interrupt(python: Path, pack: Path, output: Path) -> None:
    """Start the pack and stop it behind its first request."""
    process = subprocess.Popen([python, pack, "--output", output], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[1/"):
            break
    process.send_signal(signal.SIGTERM)
    assert process.stderr.read().splitlines()[-1] == "interrupted; the same command continues"
    process.stderr.close()
    assert process.wait(timeout=60) == 6


def test_interrupted_pack_continues_behind_what_it_has(bare_python: Path, tmp_path: Path) -> None:
    models, pack, output = write_models(tmp_path), tmp_path / "pack.zip", tmp_path / "latency.json"
    plan = Plan(rounds=2, min_runs=30, min_seconds=0.5, max_seconds=1.0)
    write_pack(pack, block_requests(models, Runtime(), plan=plan, blocks=2, seed=0), purpose={})
    start_and_interrupt(bare_python, pack, output)
    part = json.loads((tmp_path / "latency.json.part").read_text())
    assert not output.exists()
    done = run_pack(bare_python, pack, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "continuing behind 1 of 2 requests" in done.stderr
    result = read_result(output)
    assert list(result.answers.results[:1]) == part["results"]
    assert not (tmp_path / "latency.json.part").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": 3}', None])
def test_foreign_or_damaged_part_is_no_start(
    bare_python: Path, pack: Path, measured: Path, tmp_path: Path, content: str | None
) -> None:
    if content is None:  # of another pack
        stored = json.loads(measured.read_text())
        content = json.dumps(digested({**stored, "pack_sha256": "0" * 64, "results": stored["results"][:1]}))
    (tmp_path / "latency.json.part").write_text(content)
    done = run_pack(bare_python, pack, "--output", tmp_path / "latency.json")
    assert done.returncode == 0, done.stderr
    assert "continuing" not in done.stderr


def digested(data: dict[str, Any]) -> dict[str, Any]:
    """Return ``data`` with the digest of its content: as someone who knows how it is made would change it."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    return {**rest, "digest": digest_of(rest)}


def first_model(data: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = data["results"][0]["models"]["one"]
    return row


def slow_down(data: dict[str, Any]) -> None:
    for answer in data["results"][:2]:
        answer["models"]["one"].update(n=6)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another pack": (lambda d: d["pack"]["purpose"].update(number=4), "is of another pack than the one that it holds"),
    "no requests": (lambda d: d["results"].clear(), "0 of 3 requests are answered"),
    "a request less": (lambda d: d["results"].pop(), "2 of 3 requests are answered"),
    "a model less": (lambda d: d["results"][1]["models"].pop("two"), "request 2: no result for the model 'two'"),
    "no models": (lambda d: d["results"][1].pop("models"), "request 2: no result for the model"),
    "negative": (lambda d: first_model(d).update(mean_ms=-1.0), "mean_ms = -1.0: .* greater than 0"),
    "zero": (lambda d: first_model(d).update(cpu_p25_ms=0), "cpu_p25_ms = 0: .* greater than 0"),
    "text": (lambda d: first_model(d).update(mean_ms="0.1"), "mean_ms = \"0.1\": .* valid number"),
    "no number": (lambda d: first_model(d).pop("mean_ms"), "mean_ms = .*field required"),
    "few runs": (lambda d: first_model(d).update(n=4), "n = 4: .* 5"),
    "fewer runs than planned": (slow_down, "'one' has too few runs; expected 30 in each request"),
    "falling percentiles": (lambda d: first_model(d)["wall_ms"].update(p50=1e6), "percentiles of 'one'"),
    "no median": (lambda d: first_model(d)["wall_ms"].update(p50=None), "percentiles of 'one'"),
    "no pin": (lambda d: d["results"][0].update(pinned="yes"), "pinned = \"yes\""),
    "machine": (lambda d: d.update(machine=[]), "machine = \\[\\]"),
    "surplus key of a model": (lambda d: first_model(d).update(extra=1), "extra = 1: extra inputs are not permitted"),
    "operators nobody asked for": (lambda d: first_model(d).update(operators={}), "operators = {}: extra inputs"),
    "load": (lambda d: d["results"][0].update(load=1.5), "load = 1.5"),
    "unknown key": (lambda d: d.update(extra=1), "extra = 1"),
    "schema": (lambda d: d.update(schema="nasdeploy/pack-result/9"), "schema 'nasdeploy/pack-result/9'; expected"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_result_is_refused(measured: Path, tmp_path: Path, change: str) -> None:
    apply, expected = CHANGES[change]
    data = json.loads(measured.read_text())
    apply(data)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(digested(data)))
    with pytest.raises(UsageError, match=expected) as caught:
        read_result(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)


def test_one_changed_digit_is_seen(measured: Path, tmp_path: Path) -> None:
    data = json.loads(measured.read_text())
    first_model(data)["mean_ms"] *= 0.5
    (tmp_path / "latency.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="its digest is not that of its content: it was changed or damaged"):
        read_result(tmp_path / "latency.json")


def test_every_truncation_is_seen(measured: Path, tmp_path: Path) -> None:
    content, path = measured.read_bytes(), tmp_path / "latency.json"
    for length in [0, 1, *range(2, len(content), len(content) // 50), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"cannot be read|schema"):
            read_result(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_number_that_is_none_is_seen(measured: Path, tmp_path: Path, number: str) -> None:
    data = json.loads(measured.read_text())
    first_model(data)["mean_ms"] = "HERE"
    (tmp_path / "latency.json").write_text(json.dumps(data).replace('"HERE"', number))
    with pytest.raises(UsageError, match=r"cannot be read|digest"):
        read_result(tmp_path / "latency.json")


def test_answers_to_another_pack_are_refused(measured: Path, requests: list[Request], tmp_path: Path) -> None:
    other = write_pack(tmp_path / "other.zip", requests[:2], purpose=PURPOSE)
    with pytest.raises(UsageError, match="is of another pack; expected the answers to this one"):
        read_answers(measured, other)


def test_pack_that_cannot_be_written_gets_one_line(requests: list[Request], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_pack(tmp_path, requests, purpose={})
