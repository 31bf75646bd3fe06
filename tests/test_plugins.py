"""Parts of others, by file and by entry point: what is loaded, and the one line for every mistake."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import nasdeploy.data.loading
import nasdeploy.exporters.base
import nasdeploy.profiles.loading
import nasdeploy.spaces
import nasdeploy.testing
from nasdeploy.errors import ConfigError, DataError
from nasdeploy.exporters import make_exporter
from nasdeploy.plugins import call_plugin, entry_points_of, is_reference, load_entry_point, load_reference
from nasdeploy.spaces import make_space, space_names

GREY = (1, 28, 28)

SPACE = """
from dataclasses import dataclass, replace
from nasdeploy.spaces import mobile_space

@dataclass(frozen=True)
class Options:
    name: str = "mine"

def mine(image_shape, num_classes):
    return replace(mobile_space(image_shape, num_classes), name=Options().name)
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Write a Python file; forget afterwards what was imported."""
    before = set(sys.modules)

    def file(name: str, code: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
        return path

    yield file
    for name in set(sys.modules) - before:
        if name.startswith("nasdeploy_file_"):
            del sys.modules[name]


def message_of(function: Callable[[], object]) -> str:
    """Return the message, one line, of the ConfigError that ``function`` raises."""
    with pytest.raises(ConfigError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("my_space.py:space", True),
        ("./a b/my-space.py:_Space2", True),
        ("C:\\spaces\\mine.py:space", True),
        ("a.py:b.py:space", True),
        ("my_space.py", False),
        ("my_space.py:", False),
        ("my_space.py:2nd", False),
        ("my_space.py:a.b", False),
        (".py:space", False),
        ("my_space:space", False),
        ("mobile", False),
        ("a.py:space\n", False),
        ("", False),
    ],
)
def test_references_are_told_from_names(text: str, expected: bool) -> None:
    assert is_reference(text) is expected


def test_a_file_is_imported_once(write: Write) -> None:
    path = write("mine.py", "made = object()\n")
    first = load_reference(f"{path}:made", what="space")
    path.write_text("made = None\n")
    assert load_reference(f"{path.parent}/./mine.py:made", what="space") is first


def test_two_files_of_one_name_are_two_modules(write: Write) -> None:
    one, two = write("one/mine.py", "made = 1\n"), write("two/mine.py", "made = 2\n")
    assert [load_reference(f"{path}:made", what="space") for path in (one, two)] == [1, 2]


def test_a_file_never_takes_the_place_of_an_installed_module(write: Write) -> None:
    path = write("json.py", "made = 1\n")
    load_reference(f"{path}:made", what="space")
    import json

    assert json.loads("1") == 1
    assert str(path) not in sys.path
    assert str(path.parent) not in sys.path


def test_objects_of_a_file_can_be_pickled(write: Write) -> None:
    made = load_reference(f"{write('my-space v2.py', SPACE)}:Options", what="space")
    assert callable(made)
    assert pickle.loads(pickle.dumps(made())) == made()


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("x = 1\ny = 1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero (mine.py, line 2)"),
        ("def f(:\n", "cannot be imported: SyntaxError: "),
        ("\nimport no_such_module_here\n", "No module named 'no_such_module_here' (mine.py, line 2)"),
        ("import sys\nsys.exit(0)\n", "cannot be imported: SystemExit: 0 (mine.py, line 2)"),
        ("raise ValueError('one\\n  two')\n", "ValueError: one two (mine.py, line 1)"),
        ("assert False\n", "cannot be imported: AssertionError (mine.py, line 1)"),
        (f"raise ValueError({'x' * 900!r})\n", "xxx… (mine.py, line 1)"),
        ("import json\njson.loads('{')\n", "(mine.py, line 2)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(write: Write, code: str, wanted: str) -> None:
    path = write("mine.py", code)
    for _ in range(2):  # and stays so: a half imported module is forgotten
        message = message_of(lambda: load_reference(f"{path}:space", what="space"))
        assert message.startswith(f"space: {path} cannot be imported: ")
        assert wanted in message


def test_the_line_of_a_syntax_error_is_named(write: Write) -> None:
    path = write("mine.py", "x = 1\ndef f(:\n")
    assert message_of(lambda: load_reference(f"{path}:space", what="space")).endswith("(mine.py, line 2)")


def test_a_file_that_is_interrupted_can_be_imported_again(write: Write) -> None:
    path = write("mine.py", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_reference(f"{path}:made", what="space")
    path.write_text("made = 'a longer file, so that Python sees the change'\n")
    assert load_reference(f"{path}:made", what="space")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = message_of(lambda: load_reference(f"{tmp_path}/mine.py:space", what="space"))
    assert message == f"space: {tmp_path}/mine.py: not found; expected a Python file, as in my_space.py:make"
    (tmp_path / "folder.py").mkdir()
    assert "folder.py: not found" in message_of(
        lambda: load_reference(f"{tmp_path}/folder.py:space", what="space")
    )


def test_a_missing_name_lists_what_the_file_defines(write: Write) -> None:
    path = write("mine.py", SPACE + "\ndef _hidden(): ...\n")
    message = message_of(lambda: load_reference(f"{path}:space", what="space"))
    assert message == f"space: {path} defines no 'space'; expected one of Options, mine"


def test_a_file_that_defines_nothing_says_so(write: Write) -> None:
    path = write("mine.py", "from json import loads\nx = 1\n")
    assert "it defines none" in message_of(lambda: load_reference(f"{path}:space", what="space"))


def test_long_lists_of_names_are_cut(write: Write) -> None:
    path = write("mine.py", "".join(f"def f{i}(): ...\n" for i in range(20)))
    assert message_of(lambda: load_reference(f"{path}:g", what="space")).endswith("f6, f7 and 12 more")


def test_other_text_is_no_reference() -> None:
    assert "'mobile'; expected a Python file and a name" in message_of(
        lambda: load_reference("mobile", what="space")
    )


# ── calling ──────────────────────────────────────────────────────────────────────────────────────


def test_a_space_comes_from_a_file(write: Write) -> None:
    space = make_space(f"{write('mine.py', SPACE)}:mine", GREY, 10)
    assert (space.name, space.image_shape, space.num_classes) == ("mine", GREY, 10)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("def make(shape, n):\n    return 3\n", "gives a int; expected a nasdeploy.spaces.SearchSpace"),
        (
            "def make():\n    return 3\n",
            "failed: TypeError: make() takes 0 positional arguments but 2 were given",
        ),
        (
            "def make(shape, n):\n    x = 0\n    return n / x\n",
            "failed: ZeroDivisionError: division by zero (mine.py, line 3)",
        ),
        ("make = 'mobile'\n", "is a str; expected a function or a class"),
        (
            "from nasdeploy.spaces import mobile_space\ndef make(shape, n):\n    return mobile_space((3, 32, 32), 7)\n",
            "for images of (3, 32, 32) and 7 classes; expected what it was asked for: (1, 28, 28) and 10",
        ),
        ("from functools import partial\nmake = partial(print, sep=3)\n", "failed: TypeError: sep must be"),
    ],
)
def test_what_a_factory_of_a_space_does_wrong_is_one_line(write: Write, code: str, wanted: str) -> None:
    text = f"{write('mine.py', code)}:make"
    message = message_of(lambda: make_space(text, GREY, 10))
    assert message.startswith(f"space: {text} ")
    assert wanted in message


def test_the_line_of_the_file_is_named_where_nasdeploy_refuses_its_arguments(write: Write) -> None:
    code = (
        "from nasdeploy.spaces import Decision, make_slot\n"
        "def make(shape, n):\n"
        "    return make_slot('stem', [Decision(name='a', candidates=('1',))], ['b'], print)\n"
    )
    text = f"{write('mine.py', code)}:make"
    assert message_of(lambda: make_space(text, GREY, 10)).endswith("(mine.py, line 3)")


def test_the_line_is_named_where_arguments_are_bound_before(write: Write) -> None:
    path = write("mine.py", "def load(*, seed):\n    return 1 / seed\n")
    load = load_reference(f"{path}:load", what="dataset")
    assert callable(load)
    message = message_of(lambda: call_plugin(partial(load, seed=0), what="dataset", source="mine.py:load"))
    assert message == "dataset: mine.py:load failed: ZeroDivisionError: division by zero (mine.py, line 2)"


def test_errors_of_nasdeploy_pass_a_plugin_unchanged() -> None:
    error = DataError("photos: not found")

    def plugin() -> None:
        raise error

    with pytest.raises(DataError) as caught:
        call_plugin(plugin, what="space", source="mine")
    assert caught.value is error


def test_an_exporter_comes_from_a_file(write: Write) -> None:
    path = write("mine.py", "from nasdeploy.exporters.graph import GraphExporter\n")
    assert make_exporter(f"{path}:GraphExporter").name == "graph"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (
            "def Mine():\n    return object()\n",
            "gives a object; expected an object with a name and a method export",
        ),
        (
            "class Mine:\n    name = 'mine'\n",
            "gives a Mine; expected an object with a name and a method export",
        ),
        ("class Mine:\n    def export(self): ...\n", "gives a Mine; expected an object with a name"),
        ("class Mine:\n    def __init__(self, x): ...\n", "failed: TypeError: "),
    ],
)
def test_what_is_no_exporter_is_refused(write: Write, code: str, wanted: str) -> None:
    text = f"{write('mine.py', code)}:Mine"
    assert wanted in message_of(lambda: make_exporter(text))


@pytest.mark.parametrize(
    ("make", "what"), [(lambda t: make_space(t, GREY, 10), "space"), (make_exporter, "exporter")]
)
def test_an_unknown_name_says_that_files_work_too(make: Callable[[str], object], what: str) -> None:
    message = message_of(lambda: make("mine.py"))
    assert message.startswith(f"{what}: 'mine.py' is not known; expected one of ")
    assert message.endswith(f"or a Python file and a name in it, such as my_{what}.py:make")


# ── entry points ─────────────────────────────────────────────────────────────────────────────────


class Packages:
    """Installed distributions, as importlib.metadata sees them, in a folder on sys.path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, group: str, point: str, *, code: str = "") -> None:
        info = self.folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{point}\n")
        (self.folder / f"{name}.py").write_text(code)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Packages(tmp_path)


def test_a_space_comes_by_entry_point(packages: Packages) -> None:
    packages.add("space_package", "nasdeploy.spaces", "mine = space_package:mine", code=SPACE)
    assert space_names() == ["mobile", "cell", "mine"]
    assert make_space("mine", GREY, 10).name == "mine"


def test_a_name_that_nasdeploy_has_is_refused_and_both_are_shown(packages: Packages) -> None:
    packages.add("space_clash", "nasdeploy.spaces", "mobile = space_clash:mine")
    message = message_of(lambda: make_space("mobile", GREY, 10))
    assert message == (
        "space 'mobile' is defined twice: by nasdeploy itself and by space_clash:mine (package space_clash); "
        "expected one of each name: uninstall or rename one"
    )


def test_a_name_of_two_packages_is_refused_and_both_are_shown(packages: Packages) -> None:
    packages.add("space_one", "nasdeploy.spaces", "mine = space_one:mine")
    packages.add("space_two", "nasdeploy.spaces", "mine = space_two:mine")
    message = message_of(lambda: entry_points_of("nasdeploy.spaces", builtin_names=(), what="space"))
    assert "space_one:mine (package space_one)" in message
    assert "space_two:mine (package space_two)" in message


@pytest.mark.parametrize("group", ["nasdeploy.spaces", "nasdeploy.exporters", "nasdeploy.profiles"])
def test_a_group_holds_only_its_own(packages: Packages, group: str) -> None:
    packages.add("package_of_one_kind", group, "mine = package_of_one_kind:mine")
    found = {
        other: list(entry_points_of(other, builtin_names=(), what="part"))
        for other in ("nasdeploy.spaces", "nasdeploy.exporters", "nasdeploy.profiles")
    }
    assert {other for other, names in found.items() if names == ["mine"]} == {group}


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("", "cannot be loaded (AttributeError: "),
        ("import no_such_module_here", "cannot be loaded (ModuleNotFoundError: No module named"),
        ("1 / 0", "cannot be loaded (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_broken_package_is_named(packages: Packages, code: str, wanted: str) -> None:
    name = f"broken_{len(code)}"
    packages.add(name, "nasdeploy.spaces", f"mine = {name}:mine", code=code)
    message = message_of(lambda: make_space("mine", GREY, 10))
    assert message.startswith(f"space 'mine': {name}:mine (package {name}) {wanted}")


def test_an_entry_point_without_its_package_is_named_by_its_value() -> None:
    point = EntryPoint("mine", "no_such_package_here:mine", "nasdeploy.spaces")
    message = message_of(lambda: load_entry_point(point, what="space"))
    assert message.startswith("space 'mine': no_such_package_here:mine cannot be loaded")


# ── what CONTRIBUTING.md promises ────────────────────────────────────────────────────────────────


def test_the_guide_names_groups_tables_and_contracts_that_exist() -> None:
    root = Path(__file__).resolve().parent.parent
    guide = (root / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    homes = (nasdeploy.spaces, nasdeploy.exporters.base, nasdeploy.profiles.loading, nasdeploy.data.loading)
    assert set(re.findall(r"`(nasdeploy\.\w+)` = ", guide)) == {home.ENTRY_POINT_GROUP for home in homes}
    assert set(re.findall(r"`(\w+Contract)`", guide)) == set(nasdeploy.testing.__all__)
    tables = {"BUILTIN_SPACES", "EXPORTERS", "BUILTIN_PROFILES", "BUILTIN_DATASETS"}
    assert set(re.findall(r"`(BUILTIN_\w+|EXPORTERS)`", guide)) == tables
    assert all(any(hasattr(home, table) for home in homes) for table in tables)
    for path in re.findall(r"`((?:examples|exporters|nasdeploy|profiles)/[\w./]+)`", guide):
        assert (root / path).exists(), path
