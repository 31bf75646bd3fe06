"""``events.jsonl``: one line for every step, under names that stay; and a stored configuration that works again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import nasdeploy
from nasdeploy.cli.merging import file_layer, merge_layers
from nasdeploy.runs import EventLog, RunFolder
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS = 12
PROFILES = ("one", "two.b")
LINE = Draft202012Validator(load_schema("event"))

SPACE = """
from nasdeploy.spaces import Decision, LayerSpec, SearchSpace, make_slot

def space(image_shape, num_classes):
    channels, size, _ = image_shape
    decisions = (
        Decision(name="width", candidates=("8", "16", "24"), channels=(8, 16, 24)),
        *(Decision(name=f"block{i}", candidates=("skip", "3", "5")) for i in (1, 2)),
    )
    half = -(-size // 2)

    def stem(w):
        return LayerSpec(kind="stem", in_channels=channels, out_channels=int(w), size=size, kernel=3, stride=2)

    def block(w, k):
        if k == "skip":
            return None
        return LayerSpec(
            kind="inverted_residual", in_channels=int(w), out_channels=int(w), size=half, kernel=int(k), expand=2
        )

    def classifier(w):
        return LayerSpec(kind="classifier", in_channels=int(w), out_channels=num_classes, size=half)

    slots = (
        make_slot("stem", decisions, ["width"], stem),
        make_slot("block1", decisions, ["width", "block1"], block),
        make_slot("block2", decisions, ["width", "block2"], block),
        make_slot("classifier", decisions, ["width"], classifier),
    )
    return SearchSpace(
        name="small", decisions=decisions, slots=slots, image_shape=image_shape, num_classes=num_classes
    )
"""


class Run:
    """A search of seconds in a space of its own; tests only read it."""

    def __init__(self, folder: Path) -> None:
        (folder / "my_space.py").write_text(SPACE, encoding="utf-8")
        rng = np.random.default_rng(0)
        labels = np.arange(120) % 3
        images = rng.integers(0, 150, (120, 16, 16)) + 30 * labels[:, None, None]
        np.savez(folder / "made.npz", train_images=images.astype(np.uint8), train_labels=labels)
        for name in PROFILES:
            text = f'name = "{name}"\n[runtime]\nthreads = 1\n[budget]\nparams = {{ max = "90%" }}\n'
            (folder / f"{name}.toml").write_text(text, encoding="utf-8")
        self.settings = BuildSettings(
            data=str(folder / "made.npz"),
            space=f"{folder / 'my_space.py'}:space",
            profiles=tuple(str(folder / f"{name}.toml") for name in PROFILES),
            device="cpu",
            threads=1,
            search={"num_steps": NUM_STEPS, "batch_size": 16, "loss_batch_size": 16, "num_finalists": 1},
            retrain={"num_steps": NUM_STEPS, "batch_size": 16},
            measure={"min_runs": 50, "min_seconds": 0.05},
        )
        self.folder = RunFolder(folder / "run")
        nasdeploy.build(self.settings, output_dir=self.folder.path)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.events.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Run:
    return Run(tmp_path_factory.mktemp("events"))


# ── what a run writes ────────────────────────────────────────────────────────────────────────────


def test_every_line_of_a_run_follows_the_schema(run: Run) -> None:
    events = run.events()
    assert events
    assert {
        json.dumps(event): [e.message for e in LINE.iter_errors(event)]
        for event in events
        if not LINE.is_valid(event)
    } == {}


def test_phases_begin_and_end_in_their_order(run: Run) -> None:
    borders = [(e["event"], e["phase"]) for e in run.events() if e["event"] in ("start", "finish")]
    assert borders == [
        (event, phase)
        for phase in ("latency table", "search", "select", "retrain one", "retrain two.b", "certify")
        for event in ("start", "finish")
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_step_of_a_retraining_is_a_line(run: Run, profile: str) -> None:
    steps = [e for e in run.events() if e["event"] == "step" and e["phase"] == f"retrain {profile}"]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert len({step["loss"] for step in steps}) == NUM_STEPS  # each its own, not one of ten


def test_every_step_of_the_search_is_a_line(run: Run) -> None:
    steps = [e for e in run.events() if e["event"] == "step" and e["phase"] == "search"]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    per_profile = (
        *("ess", "stepped", "entropy", "own_share", "r_squared", "gate_openings"),
        *("latency", "flops", "params"),
    )
    assert set(steps[-1]) == {
        *("time", "event", "phase", "step", "stage", "seconds", "loss"),
        *(f"{name}.{profile}" for name in per_profile for profile in PROFILES),
    }


def test_time_goes_forward(run: Run) -> None:
    events = run.events()
    assert all(before["time"] <= after["time"] for before, after in pairwise(events))


def test_the_stored_configuration_means_the_same_run(run: Run) -> None:
    settings = merge_layers([file_layer(run.folder.config)])
    assert settings == run.settings
    assert settings.fingerprint() == run.settings.fingerprint()


def test_the_stored_configuration_continues_its_run(run: Run) -> None:
    settings = merge_layers([file_layer(run.folder.config)])
    before = run.folder.search_result.read_bytes()
    found = nasdeploy.search(settings, output_dir=run.folder.path)
    assert set(found.architectures) == set(PROFILES)
    assert run.folder.search_result.read_bytes() == before


# ── what the schema takes ────────────────────────────────────────────────────────────────────────

START = {"event": "start", "phase": "search", "total": 9}
SEARCH_STEP = {
    "event": "step",
    "phase": "search",
    "step": 3,
    "stage": "search",
    "seconds": 0.5,
    "loss": 1.5,
    "ess.cpu-tight": 3.2,
    "stepped.cpu-tight": 1,
    "entropy.cpu-tight": 1.1,
    "own_share.cpu-tight": 0.5,
    "r_squared.cpu-tight": 0.7,
    "gate_openings.cpu-tight": 2,
    "latency.cpu-tight": 0.03,
    "flops.cpu-tight": 2e6,
    "params.cpu-tight": 6e4,
}
RETRAIN_STEP = {"event": "step", "phase": "retrain cpu-tight", "step": 1, "loss": 1.5}
RETRAIN_FINISH = {
    "event": "finish",
    "phase": "retrain cpu-tight",
    "seconds": 3.0,
    "validation_accuracy": 0.8,
}
LINES = (
    START,
    START | {"phase": "latency table", "total": None},
    START | {"phase": "adapt my.device-2"},
    SEARCH_STEP,
    SEARCH_STEP | {"stage": "warm-up", "ess.cpu-tight": "", "stepped.cpu-tight": "", "entropy.cpu-tight": ""},
    SEARCH_STEP | {"own_share.cpu-tight": "", "r_squared.cpu-tight": "", "gate_openings.cpu-tight": ""},
    RETRAIN_STEP,
    RETRAIN_STEP | {"loss": "not finite"},
    RETRAIN_STEP | {"phase": "retrain cpu-tight (random baseline)"},
    {"event": "step", "phase": "latency table", "step": 40},
    {"event": "finish", "phase": "search", "seconds": 3.0},
    {"event": "finish", "phase": "latency table", "seconds": 3.0, "mape": 0.01, "spearman": 0.99},
    {"event": "finish", "phase": "adapt my.device-2", "seconds": 3.0, "recorded_within_its_caps": 4},
    RETRAIN_FINISH,
    {"event": "finish", "phase": "certify"},
    {"event": "note", "message": "ü"},
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(map(str, list(line.values())[:2])))
def test_a_line_is_accepted_and_every_key_of_it_is_needed(line: dict[str, Any]) -> None:
    line = line | {"time": 1.5}
    assert LINE.is_valid(line)
    for key in line:
        if "." not in key:  # of a profile: a run has those of its own
            assert not LINE.is_valid({name: value for name, value in line.items() if name != key}), key
            assert not LINE.is_valid({f"{name}s" if name == key else name: v for name, v in line.items()}), (
                key
            )
    assert not LINE.is_valid(line | {"more": 1})


@pytest.mark.parametrize(
    "line",
    [
        START | {"event": "begin"},
        START | {"phase": "training"},
        START | {"total": 1.5},
        SEARCH_STEP | {"loss": "nan"},
        SEARCH_STEP | {"stage": "cool-down"},
        SEARCH_STEP | {"ess.cpu-tight": "3.2"},
        RETRAIN_STEP | {"phase": "retrain"},
        RETRAIN_STEP | {"phase": "retrain <b>"},
        RETRAIN_FINISH | {"validation_accuracy": 80.0},
    ],
)
def test_other_values_are_refused(line: dict[str, Any]) -> None:
    assert not LINE.is_valid(line | {"time": 1.5})


def test_the_log_writes_such_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.start("retrain cpu-tight", 1)
    log.advance("retrain cpu-tight", 1, {"loss": 1.5})
    log.finish("retrain cpu-tight", {"seconds": 3.0, "validation_accuracy": 0.8})
    log.start("certify")
    log.note("two\nlines")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text("utf-8").splitlines()]
    assert len(events) == 5
    assert [event for event in events if not LINE.is_valid(event)] == []
