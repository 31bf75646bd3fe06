"""The whole build on images that take seconds to learn: one shared build, copies of it, and further processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

import nasdeploy
from nasdeploy.costs.counting import count_network, counting_tables
from nasdeploy.data import load_dataset
from nasdeploy.errors import ConfigError, InfeasibleError, RunFolderError, UsageError
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.networks import Network, Normalise, build_network
from nasdeploy.pipeline import BuildResult, build, plan, report, search, verify_run
from nasdeploy.profiles import HardwareProfile, Percent, load_profile
from nasdeploy.progress import Value
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import Architecture, SearchSpace, make_space

pytestmark = pytest.mark.usefixtures("one_thread")

PROFILES = ("tight", "roomy")
HOSTILE = "<script>alert(1)</script>"
CLASSES = ["rows", "columns", HOSTILE, "falling"]

# The caps on the latency are wide: what a busy machine measures must not change what is built.
TOMLS = {
    "tight": 'params = { max = "15%" }\nflops = { max = "15%" }\nlatency = { max = "60%" }\n'
    'file_size = { max = "150kB" }\n',
    "roomy": 'params = { max = "85%" }\nflops = { coefficient = 0.05 }\nlatency = { max = "99%" }\n',
}


def write_profile(folder: Path, name: str, budget: str) -> str:
    """Write a profile; return its path."""
    path = folder / f"{name}.toml"
    path.write_text(f'name = "{name}"\n[runtime]\nthreads = 1\n[budget]\n{budget}', encoding="utf-8")
    return str(path)


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, 28, 28) of bars in four directions, with noise, and labels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:28, 0:28]
    directions = np.stack([rows, columns, rows + columns, rows - columns])  # (4, 28, 28)
    labels = rng.permutation(np.arange(count) % 4)
    clean = np.where((directions[labels] + rng.integers(0, 6, size=(count, 1, 1))) % 6 < 3, 200, 50)
    images = np.clip(clean + rng.normal(0, 25, size=clean.shape), 0, 255).astype(np.uint8)
    return images, labels


class StoppedError(BaseException):
    """Like a key press, no Exception: nothing may catch it on its way."""


class Recorder:
    """An observer that notes what began, and stops the build where ``stop_at`` begins."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.started: list[str] = []
        self.notes: list[str] = []
        self.stop_at = stop_at

    def start(self, phase: str, total: int | None = None) -> None:
        if phase == self.stop_at:
            raise StoppedError
        self.started.append(phase)

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        pass

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


class Reference:
    """The shared build: its settings, its folder and what it returned. Tests change copies of it only."""

    def __init__(self, folder: Path) -> None:
        images, labels = bars(600, seed=0)
        np.savez(folder / "bars.npz", train_images=images, train_labels=labels, class_names=CLASSES)
        self.settings = BuildSettings(
            data=str(folder / "bars.npz"),
            profiles=tuple(write_profile(folder, name, budget) for name, budget in TOMLS.items()),
            device="cpu",
            threads=1,
            search={
                "num_steps": 12,
                "batch_size": 16,
                "loss_batch_size": 32,
                "num_loss_samples": 6,
                "num_finalists": 2,
            },
            retrain={"num_steps": 20, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )
        self.folder = RunFolder(folder / "run")
        self.observer = Recorder()
        self.result: BuildResult = build(self.settings, output_dir=self.folder.path, observer=self.observer)
        dataset = load_dataset(self.settings.data, seed=0)
        self.test, normalisation = dataset.test, dataset.normalisation()
        self.normalise: Callable[[], Normalise] = lambda: Normalise(normalisation.mean, normalisation.std)

    @property
    def space(self) -> SearchSpace:
        """The space of the build."""
        return make_space("mobile", (1, 28, 28), 4)

    def architecture(self, profile: str) -> Architecture:
        """Return what was selected for ``profile``."""
        return self.space.from_names(read_json(self.folder.model(profile).architecture)["architecture"])

    def network(self, profile: str) -> Network:
        """Return the network of ``profile``, rebuilt from its stored weights."""
        network = build_network(self.space, self.architecture(profile), self.normalise())
        network.load_state_dict(load_file(self.folder.model(profile).weights))
        return network.eval()

    def borrowing(self, **changes: Any) -> BuildSettings:
        """Return the same settings with the latency tables of the shared build: nothing is measured again."""
        return self.settings.model_copy(update={"latency_from": str(self.folder.path), **changes})

    def copy(self, folder: Path) -> RunFolder:
        """Return a copy of the run that may be changed."""
        return RunFolder(Path(shutil.copytree(self.folder.path, folder / "copy")))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Build once for all tests."""
    threads = torch.get_num_threads()
    made = Reference(tmp_path_factory.mktemp("reference"))
    assert torch.get_num_threads() == threads
    return made


def model_bytes(folder: RunFolder) -> dict[str, bytes]:
    """Return the files that a seed decides."""
    names = ("model.onnx", "weights.safetensors", "architecture.json")
    return {f"{p}/{name}": (folder.model(p).path / name).read_bytes() for p in PROFILES for name in names}


def test_every_file_of_the_run_folder_is_there(reference: Reference) -> None:
    json_files = [f"{name}.json" for name in ("architecture", "training", "metrics", "latency", "verify")]
    model_files = ["model.onnx", "weights.safetensors", *json_files, "MODEL_CARD.md", "SHA256SUMS"]
    expected = {
        *("run.json", "config.toml", "events.jsonl", ".lock"),
        *(f"latency/{profile}.json" for profile in PROFILES),
        *(f"search/{name}" for name in ("supernet.safetensors", "state.json", "result.json")),
        *(f"search/{name}" for name in ("history.csv", "evaluations.csv", "importance.json")),
        *(f"models/{profile}/{name}" for profile in PROFILES for name in model_files),
        *(f"report/{name}" for name in ("index.html", "report.json", "report.md", "pareto.csv")),
    }
    path = reference.folder.path
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == expected


def test_every_json_file_follows_its_schema(reference: Reference) -> None:
    folder = reference.folder
    files = {
        "run": [folder.run],
        "search": [folder.search_result],
        "importance": [folder.importance],
        "report": [folder.report_json],
        "profile-latency": [folder.latency(profile) for profile in PROFILES],
    }
    for name in ("architecture", "training", "metrics", "latency", "verify"):
        files[name] = [folder.model(profile).path / f"{name}.json" for profile in PROFILES]
    errors = []
    for name, paths in files.items():
        validator = Draft202012Validator(load_schema(name))
        for path in paths:
            found = validator.iter_errors(json.loads(path.read_bytes()))
            errors += [f"{path.name}: {error.json_path}: {error.message}" for error in found]
    assert errors == []


def test_the_result_is_that_of_the_files(reference: Reference) -> None:
    result = reference.result
    assert (result.run_dir, result.report) == (reference.folder.path, reference.folder.report_html)
    assert [profile.profile for profile in result.profiles] == list(PROFILES)
    assert [(p.status, p.exit_code, p.message) for p in result.profiles] == [
        ("certified", 0, f"{name}: every cap holds") for name in PROFILES
    ]
    assert result.exit_code == 0
    for profile in result.profiles:
        assert profile.model == reference.folder.model(profile.profile).model
        assert profile.file_size == profile.model.stat().st_size
        assert profile.latency_ms > 0.0


def test_the_phases_follow_one_another(reference: Reference) -> None:
    assert reference.observer.started == [
        "latency table",  # once: both profiles have one runtime
        "search",
        "select",
        "retrain tight",
        "retrain roomy",
        "certify",
    ]


def by_hand(limit: object, low: float, high: float) -> float:
    """Return a limit in absolute numbers."""
    return low + limit.fraction * (high - low) if isinstance(limit, Percent) else limit.value


@pytest.mark.parametrize("name", PROFILES)
def test_what_ships_is_within_every_cap_by_recomputation(reference: Reference, name: str) -> None:
    profile: HardwareProfile = load_profile(reference.settings.profiles[PROFILES.index(name)])
    space, model = reference.space, reference.folder.model(name)
    ends = [build_network(space, a, reference.normalise()) for a in (space.smallest(), space.largest())]
    networks = [*ends, reference.network(name)]
    params = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    flops = [count_network(network, (1, 28, 28)).flops for network in networks]
    table = read_json(reference.folder.latency(name))["table"]
    latency = [table["smallest_ms"], table["largest_ms"], read_json(model.latency)["summary"]["cpu_p50_ms"]]
    found = {
        "params": params,
        "flops": flops,
        "latency": latency,
        "file_size": [0, 0, model.model.stat().st_size],
    }
    for metric, budget in profile.budget.items():
        if budget.max is not None:
            low, high, shipped = found[metric]
            assert shipped <= by_hand(budget.max, low, high), metric
    metrics = read_json(model.metrics)
    assert (metrics["params"], metrics["flops"]) == (params[2], flops[2])
    assert {cap["status"] for cap in metrics["caps"]} == {"holds"}
    assert {cap["metric"] for cap in metrics["caps"]} == {
        m for m, b in profile.budget.items() if b.max is not None
    }


@pytest.mark.parametrize("name", PROFILES)
def test_costs_that_were_predicted_are_those_of_the_file(reference: Reference, name: str) -> None:
    stored = read_json(reference.folder.model(name).architecture)
    metrics = read_json(reference.folder.model(name).metrics)
    predicted = stored["predicted"]
    assert (predicted["params"], predicted["flops"]) == (metrics["params"], metrics["flops"])
    assert predicted["file_size"] == pytest.approx(metrics["file_size"], rel=0.02)
    choices = np.array([reference.architecture(name).choices])
    assert counting_tables(reference.space)["params"].of(choices)[0] == metrics["params"]


def test_the_tight_network_is_the_cheaper_one(reference: Reference) -> None:
    tight, roomy = reference.result.profiles
    assert tight.params < roomy.params
    assert tight.flops < roomy.flops
    assert tight.file_size < roomy.file_size


ALONE = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = numpy.load(sys.argv[2])
(logits,) = session.run(None, {session.get_inputs()[0].name: images})
loaded = [name for name in ("torch", "nasdeploy", "onnx") if name in sys.modules]
print(json.dumps({"logits": logits.tolist(), "loaded": loaded}))
"""


@pytest.mark.parametrize("name", PROFILES)
def test_the_file_runs_in_a_fresh_process_without_torch(
    reference: Reference, name: str, tmp_path: Path
) -> None:
    images = reference.test.images.float()
    shutil.copy(reference.folder.model(name).model, tmp_path / "m.onnx")
    np.save(tmp_path / "images.npy", images.numpy())
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, "m.onnx", "images.npy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["loaded"] == []
    logits = np.array(answer["logits"])
    with torch.no_grad():
        expected = reference.network(name)(images).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.ptp(expected))
    top1 = float((logits.argmax(axis=1) == reference.test.labels.numpy()).mean())
    stored = read_json(reference.folder.model(name).metrics)["accuracy"]
    assert stored["top1"] == pytest.approx(top1)
    assert stored["num_images"] == len(images)
    assert top1 > 0.5  # chance is 0.25


def test_no_path_of_this_machine_is_in_a_shipped_file(reference: Reference) -> None:
    checkout = Path(nasdeploy.__file__).resolve().parent.parent
    paths = {str(reference.folder.path.parent), str(checkout), sys.prefix, str(Path.home()) + "/"}
    for profile in PROFILES:
        for file in reference.folder.model(profile).path.iterdir():
            content = file.read_bytes()
            assert [path for path in paths if path.encode() in content] == [], file.name


@pytest.mark.parametrize("name", PROFILES)
def test_checksums_are_those_of_the_files(reference: Reference, name: str) -> None:
    folder = reference.folder.model(name)
    lines = [line.split("  ") for line in folder.checksums.read_text().splitlines()]
    assert {file for _, file in lines} == {path.name for path in folder.path.iterdir()} - {"SHA256SUMS"}
    for checksum, file in lines:
        assert hashlib.sha256((folder.path / file).read_bytes()).hexdigest() == checksum
    assert read_json(folder.metrics)["sha256"] == hashlib.sha256(folder.model.read_bytes()).hexdigest()


def test_hostile_class_names_are_escaped_in_the_report(reference: Reference) -> None:
    page = reference.folder.report_html.read_text("utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert HOSTILE in read_json(reference.folder.run)["dataset"]["class_names"]


BUILD = """
import sys
from nasdeploy.pipeline import build
from nasdeploy.settings import BuildSettings
print(build(BuildSettings.model_validate_json(sys.argv[1]), output_dir=sys.argv[2]).exit_code)
"""


def test_another_process_with_the_same_seed_builds_the_same_bytes(
    reference: Reference, tmp_path: Path
) -> None:
    settings = reference.borrowing().model_dump_json()
    command = [sys.executable, "-W", "error", "-W", "ignore:`torch.jit.script` is deprecated:FutureWarning"]
    done = subprocess.run(
        [*command, "-c", BUILD, settings, str(tmp_path / "again")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["0"]), done.stderr
    again, first = model_bytes(RunFolder(tmp_path / "again")), model_bytes(reference.folder)
    assert [name for name in first if again[name] != first[name]] == []


def test_a_finished_build_is_not_built_again(reference: Reference, tmp_path: Path) -> None:
    folder, observer = reference.copy(tmp_path), Recorder()
    before = {path: path.read_bytes() for path in (folder.path / "models").rglob("*") if path.is_file()}
    result = build(reference.settings, output_dir=folder.path, observer=observer)
    assert observer.started == []
    assert "continuing" in observer.notes[0]
    assert {
        path: path.read_bytes() for path in (folder.path / "models").rglob("*") if path.is_file()
    } == before
    assert [(p.accuracy, p.latency_ms) for p in result.profiles] == [
        (p.accuracy, p.latency_ms) for p in reference.result.profiles
    ]


def test_a_model_without_figures_is_exported_and_measured_again(reference: Reference, tmp_path: Path) -> None:
    folder, observer = reference.copy(tmp_path), Recorder()
    folder.model("tight").metrics.unlink()
    result = build(reference.settings, output_dir=folder.path, observer=observer)
    assert observer.started == ["certify"]
    assert model_bytes(folder) == model_bytes(reference.folder)
    assert result.profiles[0].accuracy == reference.result.profiles[0].accuracy


def test_an_interrupted_build_continues_to_the_same_bytes(reference: Reference, tmp_path: Path) -> None:
    settings, folder = reference.borrowing(), RunFolder(tmp_path / "run")
    for phase in ("select", "retrain roomy", "certify"):
        with pytest.raises(StoppedError):
            build(settings, output_dir=folder.path, observer=Recorder(stop_at=phase))
    observer = Recorder()
    assert build(settings, output_dir=folder.path, observer=observer).exit_code == 0
    assert observer.started == ["certify"]
    assert model_bytes(folder) == model_bytes(reference.folder)


def test_starting_over_forgets_what_was_there(reference: Reference, tmp_path: Path) -> None:
    folder, observer = reference.copy(tmp_path), Recorder(stop_at="retrain tight")
    with pytest.raises(StoppedError):
        build(reference.borrowing(seed=1), output_dir=folder.path, observer=observer, resume=False)
    assert observer.started == ["search", "select"]
    assert read_json(folder.run)["settings"]["seed"] == 1
    assert not folder.model("tight").weights.exists()
    assert not folder.report_html.exists()


def test_starting_over_never_deletes_the_folders_of_others(reference: Reference, tmp_path: Path) -> None:
    mine = tmp_path / "models" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises((RunFolderError, StoppedError)):
        build(reference.borrowing(), output_dir=tmp_path, resume=False, observer=Recorder(stop_at="search"))
    assert mine.exists()


def test_other_settings_in_the_same_folder_are_refused(reference: Reference) -> None:
    before = model_bytes(reference.folder)
    with pytest.raises(RunFolderError, match="seed = 0 there, 1 here"):
        build(reference.settings, seed=1, output_dir=reference.folder.path)
    assert model_bytes(reference.folder) == before


def begin(reference: Reference, folder: Path) -> BuildSettings:
    """Begin a build in ``folder``/run whose data and profiles lie in ``folder``; return its settings."""
    data = str(shutil.copy(reference.settings.data, folder))
    profiles = tuple(str(shutil.copy(path, folder)) for path in reference.settings.profiles)
    settings = reference.borrowing(data=data, profiles=profiles)
    for _ in range(2):  # the second time it is resumed
        with pytest.raises(StoppedError):
            build(settings, output_dir=folder / "run", observer=Recorder(stop_at="search"))
    return settings


def test_a_profile_that_changed_since_is_not_taken_for_the_old_one(
    reference: Reference, tmp_path: Path
) -> None:
    settings = begin(reference, tmp_path)
    write_profile(tmp_path, "roomy", TOMLS["tight"])
    with pytest.raises(RunFolderError, match="profile"):
        build(settings, output_dir=tmp_path / "run", observer=Recorder(stop_at="search"))


def test_data_that_changed_since_are_not_taken_for_the_old_ones(reference: Reference, tmp_path: Path) -> None:
    settings = begin(reference, tmp_path)
    images, labels = bars(600, seed=9)
    np.savez(settings.data, train_images=images, train_labels=labels, class_names=CLASSES)
    with pytest.raises(RunFolderError, match="has changed since the build"):
        verify_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="data"):
        build(settings, output_dir=tmp_path / "run", observer=Recorder(stop_at="search"))


def test_a_cap_that_cannot_be_met_ends_the_build_before_any_training(
    reference: Reference, tmp_path: Path
) -> None:
    space = reference.space
    cheapest = sum(
        p.numel() for p in build_network(space, space.smallest(), reference.normalise()).parameters()
    )
    path = write_profile(tmp_path, "tiny", 'params = { max = "100" }\n')
    observer = Recorder()
    with pytest.raises(InfeasibleError) as refused:
        build(reference.settings, profiles=(path,), output_dir=tmp_path / "run", observer=observer)
    message = str(refused.value)
    assert "tiny: budget.params.max = 100 " in message
    shown = f"{cheapest / 1000:.4g}k"  # four digits
    assert f"nearest cap that can be met is {shown}" in message
    assert observer.started == []
    assert not (tmp_path / "run" / "search").exists()
    assert not (tmp_path / "run" / "models").exists()


def test_a_latency_that_cannot_be_met_ends_the_build_before_any_training(
    reference: Reference, tmp_path: Path
) -> None:
    path = write_profile(tmp_path, "tight", 'latency = { max = "1us" }\n')  # named like one with a table
    observer = Recorder()
    with pytest.raises(InfeasibleError, match=r"budget\.latency\.max = 1us .* can be met is [0-9.]+(us|ms)$"):
        build(reference.borrowing(profiles=(path,)), output_dir=tmp_path / "run", observer=observer)
    assert observer.started == []
    assert not (tmp_path / "run" / "search").exists()


def test_the_files_of_a_run_are_verified_again(reference: Reference) -> None:
    found = verify_run(reference.folder.path)
    assert list(found) == list(PROFILES)
    for verification in found.values():
        assert verification.passed, verification.failures
        assert verification.num_images == 512  # all that are not for testing


def test_a_changed_weight_is_found_by_verification(reference: Reference, tmp_path: Path) -> None:
    folder = reference.copy(tmp_path)
    weights = load_file(folder.model("roomy").weights)
    weights["layers.classifier.linear.bias"][0] += 0.5
    save_file(weights, folder.model("roomy").weights)
    found = verify_run(folder.path)
    assert found["tight"].passed
    assert [check.name for check in found["roomy"].failures][:1] == ["max_difference"]


def test_there_is_nothing_to_verify_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.json: cannot be read"):
        verify_run(tmp_path)
    with pytest.raises(RunFolderError, match=r"run\.json: cannot be read"):
        report(tmp_path)


def test_the_report_is_written_again_as_it_was(reference: Reference, tmp_path: Path) -> None:
    folder = reference.copy(tmp_path)
    before = {path.name: path.read_bytes() for path in (folder.path / "report").iterdir()}
    shutil.rmtree(folder.path / "report")
    assert report(folder.path) == folder.report_html
    after = {path.name: path.read_bytes() for path in (folder.path / "report").iterdir()}
    assert after.keys() == before.keys()
    assert after["pareto.csv"] == before["pareto.csv"]
    assert json.loads(after["report.json"]) | {"name": "run"} == json.loads(before["report.json"])


def test_a_search_alone_gives_the_architectures_of_the_build(reference: Reference, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    found = search(reference.borrowing(), output_dir=folder.path)
    assert found.num_steps == 12
    for profile in PROFILES:
        stored = read_json(reference.folder.model(profile).architecture)
        assert found.architectures[profile] == stored["architecture"]
        assert found.costs[profile] == stored["predicted"]
        assert found.validation_accuracy[profile] == stored["validation"]["accuracy"]
        assert not folder.model(profile).weights.exists()
    again = search(reference.borrowing(), output_dir=folder.path)
    assert again == found


def test_a_time_budget_sets_the_steps_once(reference: Reference, tmp_path: Path) -> None:
    settings = reference.borrowing(time_budget="1s")
    observer = Recorder(stop_at="select")
    with pytest.raises(StoppedError):
        search(settings, output_dir=tmp_path / "run", observer=observer)
    folder = RunFolder(tmp_path / "run")
    assert read_json(folder.run)["steps"] == {"search": 10, "retrain": 10}  # the least there is
    assert read_json(folder.search_result)["num_steps"] == 10


def test_baselines_are_feasible_networks_with_figures(reference: Reference, tmp_path: Path) -> None:
    settings = reference.borrowing(profiles=reference.settings.profiles[:1], baselines=True)
    result = build(settings, output_dir=tmp_path / "run")
    folder, validator = RunFolder(tmp_path / "run"), Draft202012Validator(load_schema("baseline"))
    caps = {cap.metric: cap.cap for cap in result.profiles[0].caps}
    tables = counting_tables(reference.space)
    for kind in ("random", "uniform"):
        stored = read_json(folder.baseline("tight", kind))
        validator.validate(stored)
        assert stored["kind"] == kind
        choices = np.array([reference.space.from_names(stored["architecture"]).choices])
        for metric in ("params", "flops"):
            assert tables[metric].of(choices)[0] == stored["predicted"][metric] <= caps[metric]
        assert 0.0 <= stored["top1"] <= 1.0
    rows = json.loads(folder.report_json.read_text("utf-8"))["profiles"][0]["baselines"]
    assert [row["kind"] for row in rows] == ["random", "uniform"]


def test_a_build_by_the_other_options(reference: Reference, tmp_path: Path) -> None:
    settings = reference.borrowing(
        profiles=reference.settings.profiles[:1],
        search=reference.settings.search.model_copy(update={"estimator": "independent"}),
        retrain=reference.settings.retrain.model_copy(
            update={"start": "scratch", "distillation_weight": 0.0}
        ),
        exporter="torch",
        dynamic_batch=False,
        augment="none",
    )
    result = build(settings, output_dir=tmp_path / "run")
    assert result.exit_code == 0
    (profile,) = result.profiles
    assert OnnxClassifier(profile.model).input_shape == (1, 1, 28, 28)
    metrics = read_json(RunFolder(tmp_path / "run").model("tight").metrics)
    assert (metrics["retraining"]["start"], metrics["exporter"]) == ("scratch", "torch")
    found = verify_run(tmp_path / "run")
    assert found["tight"].passed, found["tight"].failures


def test_a_plan_says_what_a_build_would_do_and_writes_nothing(reference: Reference, tmp_path: Path) -> None:
    settings = reference.settings.model_copy(update={"profiles": reference.settings.profiles[:1]})
    found = plan(settings, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert found.total_seconds == pytest.approx(sum(phase.seconds for phase in found.phases))
    assert [one.profile for one in found.feasibility] == ["tight"]
    assert found.feasibility[0].feasible
    assert "436 images of 1x28x28 to train on, 76 to validate, 88 to test, 4 classes" in found.images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serach": {}}, 'serach: unknown key; did you mean "search"?'),
        ({"profiles": ("no-such-profile",)}, "no-such-profile"),
        ({"exporter": "tensorrt"}, "tensorrt"),
        ({"space": "huge"}, "space: 'huge' is not known"),
        ({"device": "tpu"}, 'device = "tpu"'),
        ({"time_budget": "soon"}, "soon"),
        ({"latency_from": "no-such-run"}, "no-such-run"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    reference: Reference, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        build(reference.settings, output_dir=tmp_path / "run", **change)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_two_profiles_of_one_name_are_refused(reference: Reference, tmp_path: Path) -> None:
    twice = (reference.settings.profiles[0], write_profile(tmp_path, "tight", TOMLS["roomy"]))
    with pytest.raises(ConfigError, match="is called 'tight'"):
        build(reference.settings, profiles=twice, output_dir=tmp_path / "run")
