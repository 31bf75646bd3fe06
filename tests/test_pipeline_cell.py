"""The whole build on a space of cells: a graph of layers whose costs are no sum over decisions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nasdeploy.costs.counting import count_network, counting_tables
from nasdeploy.networks import Normalise, build_network
from nasdeploy.pipeline import BuildResult, build
from nasdeploy.progress import Silent, Value
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import SearchSpace, make_space

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = """
from nasdeploy.spaces.cell import CellConfig, cell_space

def space(image_shape, num_classes):
    config = CellConfig(channels=(8, 16, 24), cells=("normal", "reduction"), num_nodes=2)
    return cell_space(image_shape, num_classes, config)
"""
BUDGETS = {
    "tight": 'params = { max = "12%" }\nflops = { max = "40%" }\nlatency = { max = "95%" }\n'
    'file_size = { max = "12kB" }\n',
    "roomy": 'params = { max = "70%" }\nlatency = { max = "99%" }\n',
}
FILES = ("model.onnx", "weights.safetensors")


class KilledError(BaseException):
    """Ends a run like a kill does: nothing catches it."""


class Killing(Silent):
    """Kills the run behind a step of a phase; with no phase it only counts the steps of all."""

    def __init__(self, phase: str = "", step: int = 0) -> None:
        self.steps: dict[str, int] = {}
        self._at = (phase, step)

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        self.steps[phase] = step
        if (phase, step) == self._at:
            raise KilledError


class Built:
    """A small finished build of two profiles; others borrow its latency tables."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "cells.py").write_text(SPACE, encoding="utf-8")
        for name, budget in BUDGETS.items():
            text = f'name = "{name}"\n[runtime]\nthreads = 1\n[budget]\n{budget}'
            (root / f"{name}.toml").write_text(text, encoding="utf-8")
        rng = np.random.default_rng(0)
        labels = rng.permutation(np.arange(300) % 3)
        rows, columns = np.mgrid[0:28, 0:28]
        stripes = np.stack([rows, columns, rows + columns])[labels] + rng.integers(0, 6, size=(300, 1, 1))
        images = np.where(stripes % 6 < 3, 170, 80) + rng.normal(0, 40, size=stripes.shape)
        np.savez(
            root / "data.npz", train_images=np.clip(images, 0, 255).astype(np.uint8), train_labels=labels
        )
        self.folder, self.observer = RunFolder(root / "run"), Killing()
        self.result: BuildResult = build(self.settings(), output_dir=self.folder.path, observer=self.observer)

    def settings(self, *, borrowing: bool = False) -> BuildSettings:
        return BuildSettings(
            data=str(self.root / "data.npz"),
            space=f"{self.root / 'cells.py'}:space",
            profiles=tuple(str(self.root / f"{name}.toml") for name in BUDGETS),
            device="cpu",
            threads=1,
            latency_from=str(self.folder.path) if borrowing else None,
            search={
                "num_steps": 12,
                "batch_size": 16,
                "loss_batch_size": 32,
                "num_loss_samples": 4,
                "num_finalists": 2,
            },
            retrain={"num_steps": 6, "batch_size": 16, "learning_rate": 0.05},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )

    def space(self) -> SearchSpace:
        return make_space(f"{self.root / 'cells.py'}:space", (1, 28, 28), 3)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("cell"))


def digests(folder: RunFolder) -> dict[str, str]:
    paths = {f"{name}/{file}": folder.model(name).path / file for name in BUDGETS for file in FILES}
    return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in paths.items()}


def test_every_profile_gets_a_certified_file(built: Built) -> None:
    assert {p.profile: (p.status, p.exit_code) for p in built.result.profiles} == dict.fromkeys(
        BUDGETS, ("certified", 0)
    )
    for name in BUDGETS:
        caps = read_json(built.folder.model(name).metrics)["caps"]
        assert caps
        assert {row["status"] for row in caps} == {"holds"}, caps


def test_the_search_reports_every_step(built: Built) -> None:
    assert built.observer.steps["search"] == 12
    assert built.observer.steps["retrain tight"] == built.observer.steps["retrain roomy"] == 6


def test_counts_are_those_of_the_network_that_ships(built: Built) -> None:
    space = built.space()
    tables = counting_tables(space)
    for name in BUDGETS:
        stored = read_json(built.folder.model(name).architecture)
        architecture = space.from_names(stored["architecture"])
        network = build_network(space, architecture, Normalise((127.5,), (127.5,)))
        count = count_network(network, space.input_shape(architecture))
        assert (stored["predicted"]["params"], stored["predicted"]["flops"]) == (count.params, count.flops)
        choices = np.array([architecture.choices])
        assert float(tables["params"].of(choices)[0]) == count.params


def test_a_file_size_cap_is_that_of_the_file(built: Built) -> None:
    assert built.folder.model("tight").model.stat().st_size <= 12_000


def test_a_killed_build_ends_with_the_same_files(built: Built, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "killed")
    for phase, step in (("search", 10), ("retrain roomy", 5)):
        with pytest.raises(KilledError):
            build(built.settings(borrowing=True), output_dir=folder.path, observer=Killing(phase, step))
    build(built.settings(borrowing=True), output_dir=folder.path)
    assert digests(folder) == digests(built.folder)
