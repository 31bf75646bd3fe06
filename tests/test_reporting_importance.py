"""Which decisions matter: what is stored after a search, and how the report shows it. All losses here are made up."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from nasdeploy.errors import RunFolderError
from nasdeploy.files import write_json
from nasdeploy.optim import categorical
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.gaussian_process import GaussianProcess
from nasdeploy.optim.ladder import Ladder, ridge_rungs
from nasdeploy.pipeline.importance import store_importance
from nasdeploy.profiles import load_profile
from nasdeploy.reporting import collect_report, write_report
from nasdeploy.runs import RunFolder
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import SearchSpace, make_space
from nasdeploy.spaces.base import Decision

SPACE = make_space("mobile", (1, 28, 28), 10)
SIZES = SPACE.num_candidates()
MASK = categorical.mask_array(SIZES, None)[None].repeat(2, axis=0)  # (K, D, C)
HEAD = len(SIZES) - 1
PROFILE = "cpu-tight"


def identity(space: SearchSpace = SPACE) -> dict[str, Any]:
    """Return a run.json."""
    return {
        "schema": "nasdeploy/run/2",
        "fingerprint": "00112233aabbccdd",
        "created": "2025-01-02T03:04:05+00:00",
        "command": ["nasdeploy", "search"],
        "versions": {"nasdeploy": "0.1.0"},
        "machine": {
            "cpu": "Made-up CPU",
            "architecture": "x86_64",
            "logical_cores": 2,
            "system": "Linux",
            "onnxruntime": "1",
        },
        "threads": 1,
        "steps": {"search": 100, "retrain": 100},
        "device": "cpu",
        "dataset": {
            "name": "fashion-mnist",
            "source": "embedded",
            "fingerprint": "5e1f00d5e1f00d00",
            "image_shape": [1, 28, 28],
            "num_classes": 10,
            "class_names": [str(i) for i in range(10)],
            "num_train": 8000,
            "num_valid": 2000,
            "num_test": 2000,
            "balanced": True,
        },
        "space": {
            "name": space.name,
            "fingerprint": space.fingerprint(),
            "num_decisions": len(space.decisions),
            "num_architectures": "1000",
        },
        "profiles": {PROFILE: load_profile(PROFILE).to_dict()},
        "searched": [PROFILE],
        "settings": BuildSettings(profiles=(PROFILE,)).model_dump(mode="json"),
    }


def archive() -> Archive:
    """Return 25 steps of losses, which the last decision alone moves by much: 0.3 in all."""
    rng = np.random.default_rng(0)
    found = Archive(len(SIZES), 1000)
    for step in range(1, 26):
        choices = rng.integers(0, 100, (6, len(SIZES))) % np.array(SIZES)
        found.add(step, choices, 1.0 - 0.15 * choices[:, HEAD] + rng.normal(0.0, 0.02, 6))
    return found


@pytest.fixture(scope="module")
def evaluated() -> Archive:
    return archive()


@pytest.fixture(scope="module")
def process(evaluated: Archive) -> GaussianProcess:
    model = GaussianProcess(SIZES)
    model.fit(evaluated.choices, evaluated.losses, evaluated.steps)
    return model


@pytest.fixture(scope="module")
def ladder(evaluated: Archive) -> Ladder:
    model = Ladder(ridge_rungs(SIZES), num_candidates=SIZES, num_repeats=1)
    model.fit(evaluated.choices, evaluated.losses, evaluated.steps)
    return model


def new_run(path: Path) -> RunFolder:
    """Return a run folder with run.json alone."""
    folder = RunFolder(path / "demo")
    write_json(folder.run, identity())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with run.json alone."""
    return new_run(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, evaluated: Archive, process: GaussianProcess) -> RunFolder:
    """A run with a report, of the model of a default search; not to be changed."""
    folder = new_run(tmp_path_factory.mktemp("plain"))
    store_importance(folder, SPACE, process, archive=evaluated, mask=MASK)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def climbed(tmp_path_factory, evaluated: Archive, ladder: Ladder) -> RunFolder:
    """A run with a report, of a model that was chosen among two; not to be changed."""
    folder = new_run(tmp_path_factory.mktemp("climbed"))
    store_importance(folder, SPACE, ladder, archive=evaluated, mask=MASK)
    write_report(folder)
    return folder


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def errors_of(name: str, data: dict[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(load_schema(name)).iter_errors(data)]


class Page(HTMLParser):
    """The text of a page, and what is open at its end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open = "", list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: RunFolder) -> Page:
    """Return the page of a report that is written."""
    page = Page(run.report_html.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_model_of_a_default_search_tells_effects_and_how_sure_it_is(plain):
    stored = load(plain.importance)
    assert errors_of("importance", stored) == []
    assert (stored["model"], stored["num_evaluations"], stored["rungs"]) == ("gaussian-process", 150, [])
    assert [row["name"] for row in stored["decisions"]] == [one.name for one in SPACE.decisions]
    head = stored["decisions"][HEAD]
    assert abs(head["range"] - 0.3) < 4 * head["error"] < 0.2
    assert [one["name"] for one in head["candidates"]] == ["64", "128", "192"]
    assert head["candidates"][0]["effect"] > 0.0 > head["candidates"][2]["effect"]
    assert {one["weight"] for row in stored["decisions"] for one in row["candidates"]} == {None}


def test_a_model_that_was_chosen_tells_its_rivals_and_its_weights(climbed, ladder):
    stored = load(climbed.importance)
    assert errors_of("importance", stored) == []
    assert stored["model"] == ladder.choice.rung
    assert [(rung["name"], rung["chosen"]) for rung in stored["rungs"]] == [
        (name, name == ladder.choice.rung) for name in ("ridge", "pairs")
    ]
    assert stored["rungs"][0]["tau"] == ladder.choice.taus["ridge"][0] > 0.5
    weights = [one["weight"] for one in stored["decisions"][HEAD]["candidates"]]
    assert weights == ladder.importance()[HEAD, :3].tolist()
    assert max(weights) > 0.5


def test_candidates_that_no_profile_allows_have_no_effect(run, evaluated, process):
    mask = MASK.copy()
    mask[0, HEAD, 2] = False  # another profile allows it
    mask[:, HEAD, 0] = False
    store_importance(run, SPACE, process, archive=evaluated, mask=mask)
    head = load(run.importance)["decisions"][HEAD]
    assert [one["effect"] is None for one in head["candidates"]] == [True, False, False]
    assert errors_of("importance", load(run.importance)) == []
    write_report(run)
    assert "nan" not in page_of(run).text.lower()


def test_nothing_is_stored_where_nothing_was_evaluated(run):
    store_importance(run, SPACE, GaussianProcess(SIZES), archive=Archive(len(SIZES), 10), mask=MASK)
    assert not run.importance.exists()


def test_a_run_without_the_file_has_a_report_without_the_section(run):
    write_report(run)
    page = page_of(run)
    assert "Which decisions matter" not in page.text + run.report_markdown.read_text()
    report = load(run.report_json)
    assert report["search"]["importance"] is None
    assert errors_of("report", report) == []


def test_the_report_holds_what_the_file_says(climbed):
    report, stored = load(climbed.report_json), load(climbed.importance)
    assert errors_of("report", report) == []
    assert {"schema": "nasdeploy/importance/1", **report["search"]["importance"]} == stored


def test_schemas_tell_it_alike() -> None:
    alone, inside = load_schema("importance"), load_schema("report")["$defs"]["importance"]
    assert {"schema": {"const": "nasdeploy/importance/1"}, **inside["properties"]} == alone["properties"]
    assert ["schema", *inside["required"]] == alone["required"]


def test_the_page_names_what_matters_most_and_draws_every_candidate(plain):
    page = page_of(plain)
    assert re.search(r"depends most on head\.width \(192 loses 0\.\d{3} less than 64\), then on ", page.text)
    html = plain.report_html.read_text(encoding="utf-8")
    picture = re.search(r'<svg[^>]*aria-label="change of the modelled loss.*?</svg>', html, re.DOTALL)
    assert picture is not None
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture[0])
    for decision in SPACE.decisions:
        assert decision.name in texts
    cells = sum(texts.count(name) for name in {c for one in SPACE.decisions for c in one.candidates})
    assert cells == sum(SIZES)
    assert "a Gaussian process models them from 150 evaluations" in page.text
    assert 'aria-label="importance weights' not in html
    assert plain.report_html.read_bytes() == write_report(plain).read_bytes()


def test_the_page_draws_weights_and_says_how_the_model_was_chosen(climbed, ladder):
    page = page_of(climbed)
    weights = ladder.importance()[HEAD, :3]
    assert ", ".join(f"{weight:.2f}" for weight in weights) in page.text
    tau, error = ladder.choice.taus["ridge"]
    assert f"ridge {tau:.3f} ± {error:.3f} (chosen), pairs" in page.text
    assert "two standard errors" not in page.text  # this model does not tell


def test_what_profiles_took_is_marked(run, plain, evaluated, process):
    store_importance(run, SPACE, process, archive=evaluated, mask=MASK)
    architecture = {
        "schema": "nasdeploy/architecture/1",
        "profile": PROFILE,
        "space": SPACE.name,
        "architecture": SPACE.to_names(SPACE.largest()),
        "hash": "0123456789abcdef",
        "predicted": {"params": 31_000, "flops": 1.4e6, "latency": 0.1, "file_size": 130e3},
        "validation": {"loss": 0.41, "accuracy": 0.852},
        "objective": 0.42,
        "num_candidates": 214,
        "num_evaluated": 8,
        "attempt": 1,
        "tightened": {},
    }
    write_json(run.model(PROFILE).architecture, architecture)
    marks = [len(re.findall("<use ", page.read_text())) for page in (plain.report_html, write_report(run))]
    assert marks[1] == marks[0] + len(SIZES) + 1  # one in the legend


def test_markdown_lists_the_decisions_that_matter_most_first(plain):
    section = plain.report_markdown.read_text(encoding="utf-8").split("## Which decisions matter")[1]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 8
    assert rows[0][0] == "| head.width"
    assert rows[0][3:] == ["192", "64 |"]
    ranges = [float(row[1]) for row in rows]
    assert ranges == sorted(ranges, reverse=True)
    assert f"The 8 of {len(SIZES)} decisions" in section


def test_a_search_that_tells_nothing_apart_says_so(run):
    rng = np.random.default_rng(1)
    few = Archive(len(SIZES), 100)
    few.add(1, rng.integers(0, 100, (12, len(SIZES))) % np.array(SIZES), rng.normal(1.0, 0.1, 12))
    model = GaussianProcess(SIZES)
    model.fit(few.choices, few.losses, few.steps)
    store_importance(run, SPACE, model, archive=few, mask=MASK)
    write_report(run)
    assert "too few losses to tell candidates apart" in page_of(run).text


def test_names_from_outside_are_escaped(run, evaluated, process):
    store_importance(run, SPACE, process, archive=evaluated, mask=MASK)
    stored = load(run.importance)
    stored["decisions"][HEAD]["name"] = "<script>$x$|"
    stored["decisions"][HEAD]["candidates"][2]["name"] = "<b>&"
    write_json(run.importance, stored)
    write_report(run)
    page = page_of(run)
    html = run.report_html.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>" not in html
    assert "<script>$x$|" in page.text
    assert r"| &lt;script&gt;\$x\$\| |" in run.report_markdown.read_text(encoding="utf-8")


def test_a_damaged_file_is_one_clear_line(run, evaluated, process):
    store_importance(run, SPACE, process, archive=evaluated, mask=MASK)
    stored = load(run.importance)
    del stored["decisions"][0]["range"]
    write_json(run.importance, stored)
    with pytest.raises(RunFolderError, match=r"importance\.json: the key 'range' is missing") as found:
        collect_report(run)
    assert "\n" not in str(found.value)


def test_decisions_without_a_choice_and_equal_losses_are_drawn(run):
    decisions = (Decision(name="only", candidates=("one",)), Decision(name="two", candidates=("a", "b")))
    space = SearchSpace(name="tiny", decisions=decisions, slots=(), image_shape=(1, 8, 8), num_classes=2)
    same = Archive(2, 100)
    same.add(1, np.array([[0, 0], [0, 1], [0, 1]]), np.ones(3))
    model = Ladder(ridge_rungs((1, 2)), num_candidates=(1, 2))
    model.fit(same.choices, same.losses, same.steps)
    store_importance(run, space, model, archive=same, mask=categorical.mask_array((1, 2), None)[None])
    assert load(run.importance)["rungs"] == []  # too few to compare on
    write_report(run)
    assert "depends most on only (one loses 0.000 less than one)" in page_of(run).text
