"""What the wheel and the source distribution contain."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]
TOP_LEVEL_FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
TOP_LEVEL_FOLDERS = ("nasdeploy", "profiles", "exporters", "cli", "tests", "examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The two files of a build and the names inside them; those of the sdist without its first folder."""

    wheel: Path
    wheel_names: frozenset[str]
    sdist_names: frozenset[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build once, offline, from a copy: a ``build`` folder left in the checkout can ship deleted modules."""
    tree = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("dist")
    for name in TOP_LEVEL_FILES:
        shutil.copy(ROOT / name, tree / name)
    for name in TOP_LEVEL_FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    result = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        wheel_names = frozenset(archive.namelist())
    with tarfile.open(sdist) as archive:
        sdist_names = frozenset(name.partition("/")[2] for name in archive.getnames())
    return Built(wheel=wheel, wheel_names=wheel_names, sdist_names=sdist_names)


def folder_of(package: str) -> Path:
    """Return where the sources of ``package`` are, by the longest entry of package-dir."""
    folders = {"nasdeploy": "nasdeploy"} | PYPROJECT["tool"]["setuptools"]["package-dir"]
    root = max((name for name in folders if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT.joinpath(folders[root], *package.removeprefix(root).strip(".").split("."))


def expected_files(pattern: str, *, packages: list[str]) -> dict[str, str]:
    """Return {path in the wheel: path in the checkout} of the files of ``packages`` that match."""
    found = {}
    for package in packages:
        for path in folder_of(package).glob(pattern):
            found[f"{package.replace('.', '/')}/{path.name}"] = str(path.relative_to(ROOT))
    return found


def test_version_is_that_of_pyproject(built: Built):
    assert built.wheel.name == f"nasdeploy-{VERSION}-py3-none-any.whl"


def test_every_package_has_all_its_modules_in_wheel_and_sdist(built: Built):
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    expected = expected_files("*.py", packages=packages)
    assert expected.keys() == {name for name in built.wheel_names if name.endswith(".py")}
    assert set(expected.values()) - built.sdist_names == set()
    for package in packages:
        assert any(name.startswith(package.replace(".", "/") + "/") for name in built.wheel_names), package


@pytest.mark.parametrize(
    ("package", "pattern"),
    [
        ("nasdeploy", "py.typed"),
        ("nasdeploy.data.embedded", "*.npz"),
        ("nasdeploy.profiles.builtin", "*.toml"),
        ("nasdeploy.reporting", "*.j2"),
        ("nasdeploy.schemas", "*.json"),
    ],
)
def test_data_files_are_in_wheel_and_sdist(built: Built, package: str, pattern: str):
    expected = expected_files(pattern, packages=[package])
    assert expected
    assert expected.keys() - built.wheel_names == set()
    assert set(expected.values()) - built.sdist_names == set()


def test_every_file_of_the_packages_is_shipped(built: Built):
    """Catches a data file whose pattern is missing from package-data."""
    expected = expected_files("[!_.]*.*", packages=PYPROJECT["tool"]["setuptools"]["packages"])
    assert expected.keys() - built.wheel_names == set()


def test_licences_are_in_the_wheel(built: Built):
    folder = f"nasdeploy-{VERSION}.dist-info/licenses"
    expected = {f"{folder}/LICENSE", f"{folder}/nasdeploy/data/embedded/LICENSE.fashion-mnist"}
    assert expected - built.wheel_names == set()


def test_wheel_holds_nothing_but_the_package(built: Built):
    assert {name.split("/")[0] for name in built.wheel_names} == {
        "nasdeploy",
        f"nasdeploy-{VERSION}.dist-info",
    }
    assert [name for name in built.wheel_names if "tests/" in name or "__pycache__" in name] == []


@pytest.fixture
def run_unpacked(built: Built, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python where the wheel lies unpacked, without the links and folders of the checkout."""
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def test_unpacked_wheel_finds_its_profiles(
    run_unpacked: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
):
    code = (
        "import nasdeploy.profiles as p; print(p.__file__); print(p.load_profile(p.DEFAULT_PROFILES[0]).name)"
    )
    result = run_unpacked("-c", code)
    assert result.returncode == 0, result.stderr[-2000:]
    where, name = result.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path.resolve())
    assert name == "cpu-tight"


def test_unpacked_wheel_has_a_command_line(run_unpacked: Callable[..., subprocess.CompletedProcess[str]]):
    result = run_unpacked("-m", "nasdeploy", "--version")
    assert result.returncode == 0, result.stderr[-2000:]
    assert VERSION in result.stdout
