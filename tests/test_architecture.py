"""The rules of the code base that can be read from its text, and the weight of its imports."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import nasdeploy

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# A module imports lower levels, and its own package up to its own level. The longest matching name counts.
LEVELS = {
    "nasdeploy.errors": 0,
    "nasdeploy.files": 0,
    "nasdeploy.interruption": 0,
    "nasdeploy.plugins": 0,
    "nasdeploy.progress": 0,
    "nasdeploy.schemas": 0,
    "nasdeploy.spaces": 1,
    "nasdeploy.profiles": 1,
    "nasdeploy.settings": 2,
    "nasdeploy.costs.derived": 2,
    "nasdeploy.costs.descent": 2,
    "nasdeploy.costs.elimination": 2,
    "nasdeploy.costs.table": 2,
    "nasdeploy.optim": 2,
    "nasdeploy.checkpoints": 3,
    "nasdeploy.networks": 3,
    "nasdeploy.data": 3,
    "nasdeploy.costs": 4,
    "nasdeploy.predictors": 4,
    "nasdeploy.training": 4,
    "nasdeploy.searchers": 5,
    "nasdeploy.exporters": 5,
    "nasdeploy.runs": 6,
    "nasdeploy.reporting": 7,
    "nasdeploy.pipeline": 8,
    "nasdeploy.cli": 9,
    "nasdeploy.testing": 9,
    "nasdeploy.__main__": 10,
}
# Within level 2 the table comes first: what is optimised is looked up in it. Within level 0 the errors come first.
SAME_LEVEL = {("nasdeploy.optim", "nasdeploy.costs.table"), ("nasdeploy.plugins", "nasdeploy.errors")}
LAST_LEVEL_WITHOUT_TORCH = 2
LOW_PARTS = [part for part, number in LEVELS.items() if number <= LAST_LEVEL_WITHOUT_TORCH]
LIBRARIES_WITHOUT_TORCH = {"numpy", "pydantic"}

MATHEMATICS = ("nasdeploy.spaces", "nasdeploy.optim", "nasdeploy.costs.table")
FILES_AND_CLOCKS = {"datetime", "io", "os", "pathlib", "shutil", "socket", "subprocess", "tempfile", "time"}

# Library -> beginnings of the names of the modules that may import it.
SOLE_IMPORTERS = {
    "fvcore": ("nasdeploy.costs.counting",),
    "onnxruntime": ("nasdeploy.costs.sessions", "nasdeploy.costs.device", "nasdeploy.exporters"),
    "click": ("nasdeploy.cli",),
    "PIL": ("nasdeploy.data.images",),
    "pyarrow": ("nasdeploy.data.parquet",),
    "pymoo": ("nasdeploy.searchers.evolution",),
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.cuda.manual_seed"}
OWN_GENERATORS = {"BitGenerator", "Generator", "PCG64", "SeedSequence", "default_rng"}
# The contracts look at the state of the global generators, to find out who drew from them.
STATE_READERS = {"get_state", "getstate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module of the product: its dotted name, its file and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @property
    def own_part(self) -> str:
        """The part of the product that it belongs to: nasdeploy.costs for nasdeploy.costs.table."""
        return ".".join(self.name.split(".")[:2])


def package_roots() -> dict[str, Path]:
    """Return {dotted name: folder} of nasdeploy and of the sub-packages that lie beside it."""
    return {"nasdeploy": ROOT / "nasdeploy"} | {
        name: ROOT / folder for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()
    }


def python_files(folder: Path) -> list[Path]:
    """Return the Python files below ``folder``, not following links."""
    found = []
    for parent, _, files in os.walk(folder):
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    return sorted(found)


@cache
def product() -> dict[str, Module]:
    """Return every module of the product by its dotted name."""
    modules = {}
    for package, folder in package_roots().items():
        for path in python_files(folder):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts).removesuffix(".__init__")
            modules[name] = Module(name=name, path=path, tree=ast.parse(path.read_text(encoding="utf-8")))
    return modules


def walk_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that can run: everything, in functions too, but the body of ``if TYPE_CHECKING``."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield from walk_run_time(child)


def imported_names(tree: ast.AST, package: str) -> set[tuple[str, str]]:
    """Return (module, name) for each import that can run; the name is '' for a plain import."""
    names = set()
    for node in walk_run_time(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package)
            names |= {(module, alias.name) for alias in node.names}
    return names


def own_imports(module: Module) -> set[str]:
    """Return the modules of the product that ``module`` imports."""
    found = set()
    for base, name in imported_names(module.tree, module.package):
        if base.split(".")[0] == "nasdeploy":
            whole = f"{base}.{name}"
            found.add(whole if whole in product() else base)
    return found


def libraries(module: Module) -> set[str]:
    """Return the top-level names that ``module`` imports from elsewhere."""
    roots = {base.split(".")[0] for base, _ in imported_names(module.tree, module.package)}
    return roots - {"nasdeploy", "__future__"}


def with_packages(name: str) -> set[str]:
    """Return ``name`` and the packages around it, whose __init__.py Python runs first."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def reachable(name: str) -> set[str]:
    """Return the modules of the product that run once ``name`` is imported and its functions are called."""
    seen: set[str] = set()
    waiting = with_packages(name)
    while waiting:
        current = waiting.pop()
        seen.add(current)
        if current in product():
            for target in own_imports(product()[current]):
                waiting |= with_packages(target) - seen
    return seen


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def level(name: str) -> int:
    """Return the level of a module. Raises ValueError for one that the table does not know."""
    if name == "nasdeploy":
        return 0
    return LEVELS[max((prefix for prefix in LEVELS if starts_with(name, prefix)), key=len)]


def without_level(name: str) -> bool:
    return name != "nasdeploy" and not any(starts_with(name, prefix) for prefix in LEVELS)


def may_import(module: Module, target: str) -> bool:
    """Whether the direction is right. The root package is lazy and no home of anything but the version."""
    if target == "nasdeploy":
        names = {name for base, name in imported_names(module.tree, module.package) if base == target}
        return all(name == "__version__" or f"{target}.{name}" in product() for name in names)
    if level(target) == level(module.name):
        return starts_with(target, module.own_part) or (module.own_part, target) in SAME_LEVEL
    return level(target) < level(module.name)


def test_imports_in_functions_count_and_type_checking_ones_do_not():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import json\n"
        "def f():\n    from . import graphs\n    from nasdeploy.costs.table import CostTable\n"
    )
    assert imported_names(tree, "nasdeploy.costs") == {
        ("typing", "TYPE_CHECKING"),
        ("json", ""),
        ("nasdeploy.costs", "graphs"),
        ("nasdeploy.costs.table", "CostTable"),
    }


def test_every_module_has_a_level():
    assert [name for name in product() if without_level(name)] == []


def test_every_imported_module_of_the_product_exists():
    wrong = [f"{m.name} -> {t}" for m in product().values() for t in own_imports(m) if t not in product()]
    assert wrong == []


def test_modules_import_only_lower_levels():
    wrong = [
        f"{module.name} -> {target}"
        for module in product().values()
        for target in own_imports(module)
        if not without_level(target) and not may_import(module, target)
    ]
    assert wrong == []


@pytest.mark.parametrize("part", LOW_PARTS)
def test_low_levels_reach_no_heavy_library(part: str):
    allowed = LIBRARIES_WITHOUT_TORCH | set(sys.stdlib_module_names)
    wrong = {
        f"{name} -> {other}: {', '.join(sorted(extra))}"
        for name in product()
        if starts_with(name, part)
        for other in reachable(name) & set(product())
        if (extra := libraries(product()[other]) - allowed)
    }
    assert wrong == set()


@pytest.mark.parametrize("part", MATHEMATICS)
def test_mathematics_use_numpy_only_and_no_files_or_clocks(part: str):
    allowed = {"numpy"} | (set(sys.stdlib_module_names) - FILES_AND_CLOCKS)
    modules = [module for name, module in product().items() if starts_with(name, part)]
    assert modules
    assert {module.name: extra for module in modules if (extra := libraries(module) - allowed)} == {}
    assert [module.name for module in modules if "open" in called_names(module.tree)] == []


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_library_is_imported_only_by_its_home(library: str):
    importers = [name for name, module in product().items() if library in libraries(module)]
    assert importers
    assert [name for name in importers if not name.startswith(SOLE_IMPORTERS[library])] == []


def test_packages_of_pyproject_are_the_folders():
    folders = {module.package for module in product().values()}
    data_folders = set(PYPROJECT["tool"]["setuptools"]["package-data"])
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    assert folders - set(packages) == set(), "a package that would vanish from the wheel"
    assert set(packages) - folders - data_folders == set(), "a package without a module"
    assert packages == sorted(set(packages))


def test_links_tell_the_same_as_package_dir():
    for name, folder in package_roots().items():
        link = ROOT.joinpath(*name.split("."))
        assert link.resolve() == folder.resolve()


def test_top_level_folders_are_never_imported_by_their_bare_names():
    bare = {name.rpartition(".")[2] for name in package_roots()} - {"nasdeploy"}
    wrong = []
    for folder in ("nasdeploy", "profiles", "exporters", "cli", "tests", "examples"):
        for path in python_files(ROOT / folder):
            names = imported_names(ast.parse(path.read_text(encoding="utf-8")), "nasdeploy")
            wrong += [f"{path}: {base}" for base, _ in names if base.split(".")[0] in bare]
    assert bare == {"profiles", "exporters", "cli"}
    assert wrong == []


def product_and_example_files() -> list[Path]:
    return [module.path for module in product().values()] + python_files(ROOT / "examples")


def test_files_are_short():
    lengths = {
        str(path): path.read_text(encoding="utf-8").count("\n") for path in product_and_example_files()
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short():
    lengths = {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in product_and_example_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def called_names(tree: ast.AST) -> set[str]:
    """Return what is called, as written: {'open', 'np.random.rand'}."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def uses_global_generator(name: str) -> bool:
    """Whether calling ``name`` seeds or draws from a generator that the whole process shares."""
    for numpy_random in ("np.random.", "numpy.random."):
        if name.startswith(numpy_random):
            return name.removeprefix(numpy_random).split(".")[0] not in OWN_GENERATORS | STATE_READERS
    return name in GLOBAL_SEEDS or name == "torch.cuda.manual_seed_all"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("np.random.rand", True),
        ("numpy.random.seed", True),
        ("torch.manual_seed", True),
        ("np.random.default_rng", False),
        ("generator.manual_seed", False),
    ],
)
def test_global_generators_are_told_from_own_ones(name: str, expected: bool):
    assert uses_global_generator(name) is expected


def test_no_global_random_generator():
    wrong = []
    for module in product().values():
        wrong += [
            f"{module.name}: {name}" for name in called_names(module.tree) if uses_global_generator(name)
        ]
        for base, name in imported_names(module.tree, module.package):
            if (base == "random" and name not in {"Random", *STATE_READERS}) or (
                base == "numpy.random" and name not in OWN_GENERATORS
            ):
                wrong.append(f"{module.name}: {base}.{name}")
    assert wrong == []


def test_no_public_name_is_also_a_submodule():
    """Importing nasdeploy.search would replace a function of that name in the root package."""
    assert [name for name in nasdeploy.__all__ if f"nasdeploy.{name}" in product()] == []


def test_public_names_exist_and_others_do_not():
    for name in nasdeploy.__all__:
        assert getattr(nasdeploy, name) is not None
    assert set(nasdeploy.__all__) <= set(dir(nasdeploy))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nasdeploy.nonsense  # noqa: B018


def test_every_function_of_the_pipeline_is_public():
    from nasdeploy import pipeline

    functions = {name for name in pipeline.__all__ if name[0].islower()}
    assert functions <= set(nasdeploy.__all__)
    assert all(getattr(nasdeploy, name) is getattr(pipeline, name) for name in functions)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a bare checkout: the root is the working folder, and nothing else points to it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ["", ".profiles", ".optim", ".spaces", ".cli"])
def test_light_modules_stay_light(name: str):
    heavy = ("torch", "torchvision", "onnx", "onnxruntime", "matplotlib", "fvcore")
    code = f"import sys, nasdeploy{name}; print([m for m in {heavy} if m in sys.modules])"
    result = run_python("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_help_of_a_bare_checkout_needs_no_torch():
    result = run_python("-X", "importtime", "-m", "nasdeploy", "--help")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Usage" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "nasdeploy.cli" in imported
    assert not imported & {"torch", "onnxruntime", "matplotlib"}


def test_version_of_a_checkout_that_was_never_installed():
    result = run_python("-S", "-c", "import nasdeploy; print(nasdeploy.__version__)")
    assert result.stdout.strip() == PYPROJECT["project"]["version"], result.stderr
