"""The examples: each complete in itself, and what it makes is what the product takes. ``.ci/run`` runs them whole."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

import pytest
import torch
from PIL import Image

import nasdeploy
from nasdeploy.data import load_dataset
from nasdeploy.plugins import load_reference
from nasdeploy.settings import BuildSettings
from nasdeploy.testing import SpaceContract

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MARK = "# CI: run"
RUN = sorted(path for path in EXAMPLES.glob("*.py") if MARK in path.read_text(encoding="utf-8").splitlines())

pytestmark = pytest.mark.usefixtures("one_thread")


def module_of(name: str) -> Any:
    """Return the module of an example."""
    main = cast(FunctionType, load_reference(f"{EXAMPLES / name}:main", what="example"))
    return cast(ModuleType, inspect.getmodule(main))


def test_the_examples_of_the_extension_points_are_run_by_ci() -> None:
    assert {"own_data.py", "own_profile.py", "own_space.py", "python_api.py"} <= {path.name for path in RUN}


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_an_example_is_complete_in_itself(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    assert f"python examples/{path.name}" in docstring, "says how it is run"
    siblings = {other.stem for other in EXAMPLES.glob("*.py")}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & siblings


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_importing_an_example_builds_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert callable(load_reference(f"{path}:main", what="example"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_settings_of_an_example_are_valid(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run up to the build, and no further: that takes most of the time."""
    built: list[BuildSettings] = []

    class StoppedError(Exception):
        pass

    def build(*, output_dir: Path, **settings: Any) -> None:
        built.append(BuildSettings(**settings))
        raise StoppedError

    module = module_of(path.name)
    monkeypatch.setattr(nasdeploy, "build", build)
    monkeypatch.setattr(nasdeploy, "check_profile", lambda profile: FEASIBLE)
    with pytest.raises(StoppedError):
        module.main(tmp_path)
    (settings,) = built
    assert settings.search.num_steps <= 50
    for name in settings.profiles:
        assert nasdeploy.load_profile(name).budget.items()


class Feasible:
    """What ``check_profile`` says when it measures nothing."""

    feasible, rows, message = True, (), ""


FEASIBLE = Feasible()


def test_own_data_are_grey_and_colour_of_three_shapes_and_unequal_classes(tmp_path: Path) -> None:
    module = module_of("own_data.py")
    module.write_images(tmp_path)
    facts = [image_facts(path) for path in tmp_path.rglob("*.*")]
    assert {fact[:2] for fact in facts} == {("PNG", "L"), ("JPEG", "RGB")}
    assert {fact[2] for fact in facts} == set(module.SHAPES)
    dataset = load_dataset(str(tmp_path), image_size=32, seed=0)
    assert dataset.image_shape == (3, 32, 32)
    labels = torch.cat([split.labels for split in (dataset.train, dataset.valid, dataset.test)])
    counts = torch.bincount(labels).tolist()
    assert dict(zip(dataset.class_names, counts, strict=True)) == module.IMAGES_PER_CLASS
    assert len(set(counts)) == 3


def image_facts(path: Path) -> tuple[str | None, str, tuple[int, int]]:
    """Return format, mode and (height, width) of an image file."""
    with Image.open(path) as image:
        return image.format, image.mode, (image.height, image.width)


class TestOwnSpace(SpaceContract):
    """The contract that the example inherits, and for colour images of an odd size too."""

    @pytest.fixture(autouse=True, params=[((1, 28, 28), 10), ((3, 33, 33), 3)], ids=["grey", "colour"])
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.image_shape, self.num_classes = request.param

    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> nasdeploy.SearchSpace:
        return nasdeploy.make_space(f"{EXAMPLES / 'own_space.py'}:space", image_shape, num_classes)


def test_own_space_brings_its_contract() -> None:
    contract = load_reference(f"{EXAMPLES / 'own_space.py'}:TestSpace", what="contract")
    assert isinstance(contract, type)
    assert issubclass(contract, SpaceContract)
    assert contract().factory((1, 28, 28), 10).name == "five-layers"
