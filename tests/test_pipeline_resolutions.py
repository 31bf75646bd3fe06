"""A build in which the search chooses the image size of each profile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from nasdeploy.data import load_dataset
from nasdeploy.exporters.metadata import read_metadata
from nasdeploy.exporters.runtime import onnx_accuracy
from nasdeploy.pipeline import BuildResult, build, export_run, verify_run
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (32, 56)
BUDGETS = {
    "cheap": 'flops = { max = "1.3%" }',
    "open": 'flops = { max = "100%" }',
}  # from 1.4 % on 56 pixels can be paid


def write_images(folder: Path) -> None:
    """Write RGB images of 60x72 pixels in two classes of different size: stripes across and along."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:72, 0:60]
    for label, (pattern, count) in enumerate([(rows, 90), (columns, 45)]):
        target = folder / ("across", "along")[label]
        target.mkdir(parents=True)
        for n in range(count):
            clean = np.where((pattern + rng.integers(0, 12)) % 12 < 6, 200, 50)
            noisy = np.clip(clean[:, :, None] + rng.normal(0, 20, size=(72, 60, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(target / f"{n:03}.png")


class Notes:
    """An observer that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, phase: str, total: int | None = None) -> None:
        pass

    def advance(self, phase: str, step: int, values: object) -> None:
        pass

    def finish(self, phase: str, values: object) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


class Run:
    """One small build for two profiles."""

    def __init__(self, folder: Path) -> None:
        write_images(folder / "photos")
        for name, budget in BUDGETS.items():
            text = f'name = "{name}"\n[runtime]\nthreads = 1\n[budget]\n{budget}\n'
            (folder / f"{name}.toml").write_text(text, encoding="utf-8")
        self.settings = BuildSettings(
            data=str(folder / "photos"),
            image_size=SIZES,
            profiles=tuple(str(folder / f"{name}.toml") for name in BUDGETS),
            device="cpu",
            threads=1,
            search={"num_steps": 12, "batch_size": 16, "loss_batch_size": 16, "num_finalists": 2},
            retrain={"num_steps": 12, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )
        self.observer = Notes()
        self.folder = RunFolder(folder / "run")
        self.result: BuildResult = build(self.settings, output_dir=self.folder.path, observer=self.observer)

    def resolution(self, profile: str) -> int:
        """Return the chosen size."""
        return int(read_json(self.folder.model(profile).architecture)["architecture"]["resolution"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Run:
    """Build once for all tests."""
    return Run(tmp_path_factory.mktemp("resolutions"))


def test_every_profile_is_certified(run: Run) -> None:
    assert [one.status for one in run.result.profiles] == ["certified", "certified"]


def test_a_tight_budget_leads_to_small_images(run: Run) -> None:
    assert run.resolution("cheap") == SIZES[0]


@pytest.mark.parametrize("profile", BUDGETS)
def test_a_file_takes_images_of_its_own_size(run: Run, profile: str) -> None:
    size, model = run.resolution(profile), run.folder.model(profile)
    (value,) = onnxruntime.InferenceSession(str(model.model)).get_inputs()
    assert value.shape[1:] == [3, size, size]
    assert read_metadata(model.model)["preprocessing"]["image_size"] == size
    assert (
        f"(1, 3, {size}, {size})" in model.card.read_text()
        or f"[1, 3, {size}, {size}]" in model.card.read_text()
    )


@pytest.mark.parametrize("profile", BUDGETS)
def test_the_accuracy_is_that_of_images_read_at_that_size(run: Run, profile: str) -> None:
    test = load_dataset(run.settings.data, image_size=run.resolution(profile), seed=0).test
    found = onnx_accuracy(run.folder.model(profile).model, test.images, test.labels)
    stored = read_json(run.folder.model(profile).metrics)["accuracy"]
    assert stored["top1"] == pytest.approx(found.accuracy)


def test_a_run_with_two_sizes_is_verified_and_exported_again(run: Run, tmp_path: Path) -> None:
    assert all(one.passed for one in verify_run(run.folder.path).values())
    found = export_run(run.folder.path, profiles=("cheap",), output_dir=tmp_path)
    assert found.exit_code == 0
    assert (tmp_path / "cheap.fp32.onnx").read_bytes() == run.folder.model("cheap").model.read_bytes()


def test_the_smaller_size_is_really_trained_on(run: Run) -> None:
    weights = run.folder.load_tensors(run.folder.model("cheap").weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
    facts = read_json(run.folder.model("cheap").training)
    assert facts["validation"]["accuracy"] >= 0.5


def test_unbalanced_classes_are_mentioned(run: Run) -> None:
    assert any("--class-weights balanced" in note for note in run.observer.notes)
