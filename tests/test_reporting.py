"""Reports: complete, unfinished and failed runs, hostile names, the same bytes again. All figures here are made up."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from nasdeploy.costs.calibration import Accuracy, Calibration
from nasdeploy.costs.certification import check_percent_cap
from nasdeploy.costs.latency import BlockStats, Conditions, ModelLatency
from nasdeploy.costs.latency_table import LatencyTable, LayerTime, NetworkTime
from nasdeploy.errors import ConfigError, RunFolderError
from nasdeploy.exporters.structure import Check, StructureReport, TensorInfo
from nasdeploy.exporters.verification import Verification
from nasdeploy.files import write_json, write_whole
from nasdeploy.profiles import format_quantity, load_profile
from nasdeploy.reporting import collect_report, write_checksums, write_model_card, write_report
from nasdeploy.reporting import history as history_module
from nasdeploy.reporting.text import escape_markdown, margin, milliseconds
from nasdeploy.runs import RunFolder
from nasdeploy.schemas import load_schema
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import SearchSpace, make_space

PROFILES = ("cpu-tight", "cpu-middle", "cpu-roomy")
MEDIANS = {"cpu-tight": 0.105, "cpu-middle": 0.214, "cpu-roomy": 0.391}
TOP1 = {"cpu-tight": 0.8715, "cpu-middle": 0.8955, "cpu-roomy": 0.907}
NUM_TEST = 2000
CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
SPACE = make_space("mobile", (1, 28, 28), 10)
MACHINE = {
    "cpu": "Made-up CPU @ 2 GHz",
    "architecture": "x86_64",
    "logical_cores": 2,
    "allowed_cores": 2,
    "cpu_quota": None,
    "governor": None,
    "system": "Linux",
    "release": "6.1",
    "python": "3.11.9",
    "onnxruntime": "1.22.0",
    "onnx": "1.18.0",
    "numpy": "2.2.0",
}


class Builder:
    """Writes a run folder file by file, in the shapes of the real ones."""

    def __init__(self, path: Path, *, class_names: list[str] | None = None, balanced: bool = True) -> None:
        self.run = RunFolder(path)
        self.class_names = class_names or CLASSES
        self.balanced = balanced
        self.rng = np.random.default_rng(0)

    def identity(self, **changes: Any) -> None:
        settings = BuildSettings(profiles=PROFILES, baselines=True).model_dump(mode="json")
        dataset = {
            "name": "fashion-mnist",
            "source": "embedded",
            "fingerprint": "5e1f00d5e1f00d00",
            "image_shape": [1, 28, 28],
            "num_classes": 10,
            "class_names": self.class_names,
            "num_train": 8000,
            "num_valid": 2000,
            "num_test": NUM_TEST,
            "balanced": self.balanced,
        }
        run = {
            "schema": "nasdeploy/run/2",
            "fingerprint": "00112233aabbccdd",
            "created": "2025-01-02T03:04:05+00:00",
            "command": ["nasdeploy", "build", "-p", "cpu-tight"],
            "versions": {"nasdeploy": "0.1.0", "torch": "2.7.0", "onnxruntime": "1.22.0"},
            "machine": MACHINE,
            "threads": 2,
            "steps": {"search": 400, "retrain": 700},
            "device": "cpu",
            "dataset": dataset,
            "space": {
                "name": SPACE.name,
                "fingerprint": SPACE.fingerprint(),
                "num_decisions": len(SPACE.decisions),
                "num_architectures": str(int(np.prod(SPACE.num_candidates(), dtype=object))),
            },
            "profiles": {name: load_profile(name).to_dict() for name in PROFILES},
            "searched": list(PROFILES),
            "settings": settings,
        }
        write_json(self.run.run, run | changes)

    def table(self, profile: str) -> None:
        held_out = tuple(
            NetworkTime(
                choices=(0,) * 13, predicted_ms=float(ms * self.rng.normal(1, 0.03)), measured_ms=float(ms)
            )
            for ms in np.linspace(0.09, 0.45, 20)
        )
        table = LatencyTable(
            runtime_key="onnxruntime-CPUExecutionProvider-t1-b1-fp32-opset18",
            channel_multiple=8,
            space_name=SPACE.name,
            space_fingerprint=SPACE.fingerprint(),
            machine=MACHINE,
            seed=0,
            measured_at="2026-01-02T03:04:05+00:00",
            seconds=48.2,
            entries=tuple(LayerTime(spec=spec, ms=0.01, spread=0.02) for spec in SPACE.distinct_layers()),
            bridge=None,
            calibration=Calibration(constant_ms=0.01, coefficients={"table": 0.9}),
            accuracy=Accuracy(
                mape=0.031,
                quantile90=0.055,
                max_error=0.081,
                spearman=0.994,
                flops_mape=0.143,
                flops_spearman=0.941,
                ceiling=0.012,
                ceiling_spearman=0.999,
                num_calibration=40,
                num_held_out=20,
            ),
            held_out=held_out,
            smallest_ms=0.08,
            largest_ms=0.47,
        )
        probe = check_percent_cap(latency(0.1), 0.15, smallest=latency(0.08), largest=latency(0.47)).to_json()
        probes = {"0123456789abcdef": probe}
        write_json(
            self.run.latency(profile),
            {
                "schema": "nasdeploy/profile-latency/2",
                "profile": profile,
                "origin": "measured",
                "table": table.to_json(),
                "probes": probes,
            },
        )

    def history(self, steps: int = 400) -> None:
        keys = ("ess", "stepped", "entropy", "latency", "flops", "params")
        header = ["step", "stage", "seconds", "loss", *(f"{key}.{p}" for p in PROFILES for key in keys)]
        lines = [",".join(header)]
        for step in range(steps):
            share = min(1.0, max(0.0, (step - steps // 5) / steps))
            warm = step < steps // 5
            cells = [str(step), "warm-up" if warm else "search", f"{step * 0.4:.3f}", f"{2.3 - share:.4f}"]
            for p in PROFILES:
                end = MEDIANS[p]
                expected = 0.25 + (end - 0.25) * share * 1.2
                cells += ["", "0"] if warm else [f"{3 + 9 * (1 - share):.3f}", "1"]
                cells += [
                    f"{14 - 9 * share:.3f}",
                    f"{expected:.4f}",
                    f"{expected * 9e6:.0f}",
                    f"{expected * 3e5:.0f}",
                ]
            lines.append(",".join(cells))
        write_whole(self.run.search_history, ("\n".join(lines) + "\n").encode())

    def search(self) -> None:
        rows = {
            name: {
                "mode": names_of(SPACE, name),
                "entropy": 5.1,
                "ess": 6.4,
                "expected_costs": {"latency": MEDIANS[name], "flops": 2.1e6, "params": 61_000.0},
            }
            for name in PROFILES
        }
        write_json(
            self.run.search_result,
            {
                "schema": "nasdeploy/search/1",
                "num_steps": 400,
                "seconds": 171.3,
                "images_per_second": 1890.0,
                "num_evaluations": 4800,
                "estimator": "importance",
                "profiles": rows,
            },
        )

    def architecture(self, profile: str) -> None:
        write_json(
            self.run.model(profile).architecture,
            {
                "schema": "nasdeploy/architecture/1",
                "profile": profile,
                "space": SPACE.name,
                "architecture": names_of(SPACE, profile),
                "hash": "0123456789abcdef",
                "predicted": {
                    "params": 31_000,
                    "flops": 1.4e6,
                    "latency": MEDIANS[profile] * 1.02,
                    "file_size": 130e3,
                },
                "validation": {"loss": 0.41, "accuracy": 0.852},
                "objective": 0.42,
                "num_candidates": 214,
                "num_evaluated": 8,
                "attempt": 1,
                "tightened": {},
            },
        )

    def metrics(self, profile: str, **changes: Any) -> None:
        size = {"cpu-tight": 1, "cpu-middle": 3, "cpu-roomy": 8}[profile]
        caps = [
            percent_latency_cap(profile),
            *count_caps(profile, params=31_400 * size, flops=1_420_000 * size),
        ]
        per_class = {label: 0.8 + 0.018 * i for i, label in enumerate(self.class_names)}
        write_json(
            self.run.model(profile).metrics,
            {
                "schema": "nasdeploy/metrics/2",
                "profile": profile,
                "status": "certified",
                "exit_code": 0,
                "message": "",
                "shipped": "model.onnx",
                "precision": "fp32",
                "gates": None,
                "accuracy": {
                    "top1": TOP1[profile],
                    "macro": TOP1[profile] - 0.01,
                    "per_class": per_class,
                    "num_images": NUM_TEST,
                },
                "validation_accuracy": TOP1[profile] + 0.004,
                "params": 31_400 * size,
                "flops": 1_420_000 * size,
                "macs": 1_310_000 * size,
                "file_size": 133_120 * size,
                "peak_memory": None,
                "caps": caps,
                "retraining": {
                    "start": "supernet",
                    "num_steps": 700,
                    "seconds": 62.5,
                    "images_per_second": 717.0,
                },
                "exporter": "graph",
                "opset": 18,
                "sha256": hashlib.sha256(b"model").hexdigest(),
                "sha256_fp32": hashlib.sha256(b"model").hexdigest(),
            }
            | changes,
        )

    def measured(self, profile: str) -> None:
        folder = self.run.model(profile)
        retraining = {"start": "supernet", "num_steps": 700, "seconds": 62.5, "images_per_second": 717.0}
        training = {
            "profile": profile,
            "validation": {"loss": 0.3, "accuracy": 0.9},
            "retraining": retraining,
        }
        write_json(folder.training, {"schema": "nasdeploy/training/1", **training})
        write_json(folder.latency, latency(MEDIANS[profile]).to_json())
        write_json(folder.verify, verification(folder.model).to_json())
        write_whole(folder.model, b"model")

    def baselines(self, profile: str) -> None:
        for kind, loss in (("random", 0.021), ("uniform", 0.013)):
            write_json(
                self.run.baseline(profile, kind),
                {
                    "schema": "nasdeploy/baseline/1",
                    "profile": profile,
                    "kind": kind,
                    "architecture": names_of(SPACE, profile),
                    "predicted": {
                        "params": 30_000,
                        "flops": 1.3e6,
                        "latency": MEDIANS[profile] * 0.97,
                        "file_size": 1e5,
                    },
                    "top1": TOP1[profile] - loss,
                    "macro": TOP1[profile] - loss,
                },
            )

    def events(self) -> None:
        rows: list[dict[str, Any]] = [
            {"time": 100.0, "event": "note", "message": "hello"},
            {"time": 100.0, "event": "start", "phase": "latency tables", "total": 3},
            {"time": 148.0, "event": "finish", "phase": "latency tables"},
            {"time": 148.0, "event": "start", "phase": "search", "total": 400},
            {"time": 200.0, "event": "step", "phase": "search", "step": 120, "loss": 1.9},
            # An interruption of about a day.
            {"time": 90_000.0, "event": "start", "phase": "search", "total": 400},
            {"time": 90_119.0, "event": "finish", "phase": "search"},
        ]
        write_whole(self.run.events, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def complete(self) -> RunFolder:
        self.identity()
        self.history()
        self.search()
        self.events()
        for profile in PROFILES:
            self.table(profile)
            self.architecture(profile)
            self.metrics(profile)
            self.measured(profile)
            self.baselines(profile)
            write_model_card(self.run, profile)
            write_checksums(self.run.model(profile).path)
        return self.run


def names_of(space: SearchSpace, profile: str) -> dict[str, str]:
    smallest, largest = space.smallest(), space.largest()
    chosen = {"cpu-tight": smallest.choices, "cpu-roomy": largest.choices}.get(
        profile, tuple(c // 2 for c in largest.choices)
    )
    return space.to_names(replace(smallest, choices=chosen))


def latency(median_ms: float, blocks: int = 5) -> ModelLatency:
    rows = []
    for b in range(blocks):
        ms = median_ms * (1 + 0.006 * b)
        percentiles = {50: ms, 90: 1.06 * ms, 95: 1.1 * ms, 99: None}
        rows.append(
            BlockStats(
                n=200,
                min_ms=0.97 * ms,
                mean_ms=1.01 * ms,
                wall_ms=percentiles,
                cpu_ms={50: 0.995 * ms, 90: 1.05 * ms, 95: 1.09 * ms, 99: None},
                cpu_p25_ms=0.98 * ms,
                wall_over_cpu=1.004,
                session_ms=9.0,
                first_run_ms=0.8,
                peak_memory_bytes=81_000_000,
            )
        )
    conditions = Conditions(
        provider="CPUExecutionProvider",
        threads=1,
        batch_size=1,
        pinned=True,
        spinning=False,
        shared_pool=True,
        onnxruntime="1.22.0",
    )
    return ModelLatency(conditions=conditions, blocks=tuple(rows))


def percent_latency_cap(profile: str) -> dict[str, Any]:
    cap = {"cpu-tight": 0.15, "cpu-middle": 0.4, "cpu-roomy": 0.85}[profile]
    value = (MEDIANS[profile] - 0.08) / 0.39
    return {
        "metric": "latency",
        "cap": cap,
        "value": value,
        "bound": value + 0.012,
        "status": "holds",
        "unit": "fraction",
        "text": f"{100 * value:.1f} % of the range, bound {100 * value + 1.2:.1f} % (p50, 5 blocks)",
    }


def count_caps(profile: str, **values: int) -> list[dict[str, Any]]:
    budget = load_profile(profile).budget
    return [
        {
            "metric": metric,
            "cap": 1.21 * values[metric],
            "value": values[metric],
            "bound": None,
            "status": "holds",
            "unit": "count",
            "text": f"{format_quantity(values[metric], metric)}, exact",
        }
        for metric, limits in budget.items()
        if metric in values and limits.max is not None
    ]


def verification(model: Path) -> Verification:
    checks = (
        Check(name="onnx_checker", value="valid", relation="==", limit="valid"),
        Check(name="runs_alone", value="runs", relation="==", limit="runs"),
        Check(name="real_images", value=2000, relation=">=", limit=1000),
        Check(name="max_difference", value=2.1e-7, relation="<=", limit=1e-4),
        Check(name="top1_agreement", value=1.0, relation=">=", limit=0.999),
    )
    structure = StructureReport(
        path=model,
        sha256=hashlib.sha256(b"model").hexdigest(),
        file_size=133_120,
        opset=18,
        ir_version=10,
        inputs=(TensorInfo(name="images", dtype="float32", shape=("N", 1, 28, 28)),),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=("N", 10)),),
        operators={"Conv": 27, "Clip": 18, "Add": 4},
        stored_values=31_000,
        checks=checks,
    )
    return Verification(
        structure=structure,
        checks=checks,
        num_images=2000,
        output_range=31.2,
        max_difference=2.1e-7,
        top1_agreement=1.0,
        accuracy=0.87,
        network_accuracy=0.87,
    )


def is_valid(name: str, data: dict[str, Any]) -> list[str]:
    """Return what is wrong with ``data`` by the schema ``name``."""
    return [
        f"{error.json_path}: {error.message}"
        for error in Draft202012Validator(load_schema(name)).iter_errors(data)
    ]


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A complete run with its report; not to be changed."""
    run = Builder(tmp_path_factory.mktemp("runs") / "demo").complete()
    write_report(run)
    return run


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    """A run folder with run.json alone."""
    builder = Builder(tmp_path / "demo")
    builder.identity()
    return builder


class Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: RunFolder) -> Page:
    page = Page(run.report_html.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_files_of_a_complete_run_follow_their_schemas(finished: RunFolder) -> None:
    assert is_valid("run", load(finished.run)) == []
    assert is_valid("settings", load(finished.run)["settings"]) == []
    assert is_valid("search", load(finished.search_result)) == []
    assert is_valid("report", load(finished.report_json)) == []
    for profile in PROFILES:
        folder = finished.model(profile)
        assert is_valid("profile", load(finished.run)["profiles"][profile]) == []
        assert is_valid("profile-latency", load(finished.latency(profile))) == []
        assert is_valid("baseline", load(finished.baseline(profile, "random"))) == []
        for name in ("architecture", "training", "metrics", "latency", "verify"):
            assert is_valid(name, load(getattr(folder, name))) == [], name


def test_a_cap_is_shown_as_written_resolved_and_measured(finished: RunFolder) -> None:
    tight = collect_report(finished)["profiles"][0]
    params_cap, _, latency_cap = tight["caps"]
    assert (latency_cap["written"], latency_cap["cap"], latency_cap["percentile"]) == ("15%", 0.15, 50)
    assert latency_cap["cap_ms"] == pytest.approx(0.08 + 0.15 * (0.47 - 0.08))
    assert latency_cap["margin"] == pytest.approx(0.15 - latency_cap["bound"])
    assert params_cap["relative_margin"] == pytest.approx(1 - 1 / 1.21)


def test_accuracy_has_its_interval_and_macro_only_for_unbalanced_data(tmp_path: Path) -> None:
    for balanced in (True, False):
        builder = Builder(tmp_path / str(balanced), balanced=balanced)
        builder.identity()
        builder.metrics("cpu-tight")
        accuracy = collect_report(builder.run)["profiles"][0]["accuracy"]
        assert accuracy["macro"] == (None if balanced else TOP1["cpu-tight"] - 0.01)
        # Wilson's interval for 1743 of 2000, computed by hand from its formula.
        assert accuracy["interval95"] == pytest.approx([0.85611, 0.88547], abs=2e-5)
        assert accuracy["per_class"][3] == {"label": "Dress", "accuracy": pytest.approx(0.854)}


def test_the_table_is_compared_with_the_measured_cpu_time(finished: RunFolder) -> None:
    prediction = collect_report(finished)["profiles"][1]["latency_prediction"]
    measured = latency(MEDIANS["cpu-middle"]).cpu_p50_ms
    assert prediction["measured_ms"] == measured
    assert prediction["relative_error"] == pytest.approx(MEDIANS["cpu-middle"] * 1.02 / measured - 1)


def test_the_chain_is_that_of_the_space(finished: RunFolder) -> None:
    layers = collect_report(finished)["profiles"][0]["architecture"]["layers"]
    specs = [spec for _, spec in SPACE.named_layers(SPACE.smallest())]
    assert [row["slot"] for row in layers] == [slot.name for slot in SPACE.slots]
    assert [row["out_channels"] for row in layers if row["kind"] != "skip"] == [s.out_channels for s in specs]


def test_a_space_that_is_not_installed_costs_only_the_drawing(builder: Builder) -> None:
    stored = load(builder.run.run)
    builder.identity(space=stored["space"] | {"name": "somebody's"})
    builder.architecture("cpu-tight")
    write_report(builder.run)
    profile = load(builder.run.report_json)["profiles"][0]
    assert profile["architecture"]["layers"] is None
    assert "block1 k3e2" in page_of(builder.run).text


def test_time_counts_no_pauses_and_no_second_twice(finished: RunFolder) -> None:
    totals = collect_report(finished)["totals"]
    assert totals["seconds"] == 48 + (200 - 148) + 119
    assert totals["phases"][1] == {"phase": "search", "seconds": 171, "starts": 2, "finished": True}


def test_history_is_thinned_out_to_its_ends(builder: Builder) -> None:
    builder.history(steps=1000)
    history = collect_report(builder.run)["search"]["history"]
    assert history["num_rows"] == 1000
    assert len(history["step"]) == history_module.MAX_HISTORY_ROWS
    assert (history["step"][0], history["step"][-1]) == (0, 999)
    assert (history["profiles"]["cpu-tight"]["ess"][0], history["stage"][0]) == (None, "warm-up")


def test_a_line_that_was_cut_off_is_left_out(builder: Builder) -> None:
    builder.history(steps=50)
    builder.events()
    for path in (builder.run.search_history, builder.run.events):
        path.write_bytes(path.read_bytes()[:-5])
    report = collect_report(builder.run)
    assert report["search"]["history"]["num_rows"] == 49
    assert report["totals"]["phases"][1]["finished"] is False


@pytest.mark.parametrize("stage", ["nothing", "table", "history", "search", "architecture", "metrics"])
def test_an_unfinished_run_has_a_report_of_what_there_is(builder: Builder, stage: str) -> None:
    steps = {
        "nothing": lambda: None,
        "table": lambda: builder.table("cpu-tight"),
        "history": builder.history,
        "search": builder.search,
        "architecture": lambda: builder.architecture("cpu-tight"),
        "metrics": lambda: builder.metrics("cpu-tight"),
    }
    for name, step in steps.items():
        step()
        if name == stage:
            break
    assert write_report(builder.run) == builder.run.report_html
    report = load(builder.run.report_json)
    assert is_valid("report", report) == []
    assert (report["complete"], report["profiles"][2]["status"]) == (False, "unfinished")
    assert "not finished" in page_of(builder.run).text


def failed(**changes: Any) -> dict[str, Any]:
    figures = (
        "validation_accuracy",
        "params",
        "flops",
        "macs",
        "file_size",
        "peak_memory",
        "retraining",
        "exporter",
        "opset",
        "sha256",
    )
    return dict.fromkeys((*figures, "accuracy")) | {"caps": []} | changes


def test_a_profile_that_failed_says_why_and_the_others_stay(builder: Builder) -> None:
    message = "latency: 0.01ms; the smallest network takes 0.08ms; --set budget.latency.max=0.09ms would work"
    builder.metrics("cpu-tight", **failed(status="infeasible", exit_code=3, message=message))
    builder.metrics("cpu-middle")
    undecided = percent_latency_cap("cpu-roomy") | {"status": "undecided", "value": None, "bound": None}
    builder.metrics("cpu-roomy", status="noisy", exit_code=5, message="too noisy", caps=[undecided])
    write_report(builder.run)
    report = load(builder.run.report_json)
    assert is_valid("report", report) == []
    assert is_valid("metrics", load(builder.run.model("cpu-tight").metrics)) == []
    assert report["complete"] is True
    assert message in page_of(builder.run).text
    assert [cap["margin"] for cap in report["profiles"][2]["caps"]] == [None, None]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": "nasdeploy/metrics/3"}', '{"schema": "nasdeploy/metrics/2"}']
)
def test_a_damaged_file_is_named(builder: Builder, content: str) -> None:
    path = builder.run.model("cpu-tight").metrics
    write_whole(path, content.encode())
    with pytest.raises(RunFolderError, match=re.escape(str(path))):
        collect_report(builder.run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("events.jsonl", "{\n"),
        ("events.jsonl", "3\n"),
        ("search/history.csv", "step,phase\n0\n"),
        ("search/history.csv", "step,stage\n0,search\n"),
        ("search/history.csv", "step,phase\nx,search\n"),
        ("models/cpu-tight/SHA256SUMS", "nonsense\n"),
    ],
)
def test_damage_in_other_files_is_named(builder: Builder, name: str, content: str) -> None:
    path = builder.run.path / name
    write_whole(path, content.encode())
    with pytest.raises(RunFolderError, match=re.escape(str(path))):
        collect_report(builder.run)


def test_an_architecture_that_the_space_does_not_have_is_damage(builder: Builder) -> None:
    builder.architecture("cpu-tight")
    path = builder.run.model("cpu-tight").architecture
    write_json(path, load(path) | {"architecture": {"stem.width": "7"}})
    with pytest.raises(RunFolderError, match=re.escape(str(path))):
        collect_report(builder.run)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.json"):
        write_report(RunFolder(tmp_path))


def test_the_page_needs_nothing_from_outside(finished: RunFolder) -> None:
    page = page_of(finished)
    assert {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags} == set()
    html = finished.report_html.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/1999/xlink"}
    assert "@import" not in html


def test_the_page_has_unique_ids_and_no_dead_references(finished: RunFolder) -> None:
    page = page_of(finished)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    references = [value for _, a in page.tags for key, value in a.items() if key in ("href", "xlink:href")]
    used = {reference.removeprefix("#") for reference in references if reference}
    assert len(ids) == len(set(ids))
    assert used - set(ids) == set()


def test_every_picture_is_drawn_with_units(finished: RunFolder) -> None:
    page = page_of(finished)
    assert [tag for tag, _ in page.tags].count("svg") == 4
    for label in ("latency of one run [ms]", "test images [%]", "effective sample size", "by the table [ms]"):
        assert label in page.text


def test_the_page_states_figures_with_their_conditions(finished: RunFolder) -> None:
    text = " ".join(page_of(finished).text.split())
    assert "87.2 %" in text or "87.1 %" in text
    assert "n = 2000" in text
    assert (
        "1 thread, pinned to as many cores; idle threads sleep; batch of 1; fp32; 5 blocks, n = 1000 runs"
        in text
    )
    assert "nasdeploy build -p cpu-tight" in text
    assert "one multiply-add is one FLOP" in text


def test_the_same_run_gives_the_same_bytes(finished: RunFolder) -> None:
    paths = (finished.report_html, finished.report_json, finished.report_markdown, finished.pareto)
    before = [path.read_bytes() for path in paths]
    write_report(finished)
    assert [path.read_bytes() for path in paths] == before


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "`c`",
    'd"e',
    "f'g",
    "[h](i)",
    "<img src=x>",
    "&amp;",
    "{{ 7 * 7 }}",
    "k\nl",
]


@pytest.fixture
def hostile(tmp_path: Path) -> RunFolder:
    """A run with names that are markup."""
    builder = Builder(tmp_path / "demo <b>|`x`", class_names=HOSTILE)
    builder.identity()
    identity = load(builder.run.run)
    dataset = identity["dataset"] | {"name": '"><script>x</script>', "source": '/data/it\'s "mine"/<b>'}
    command = ["nasdeploy", "build", "--data", '/data/it\'s "mine"/<b>\n```']
    builder.identity(dataset=dataset, command=command)
    for profile in PROFILES:
        builder.metrics(profile, status="noisy", exit_code=5, message="<script>|`")
        builder.measured(profile)
    write_report(builder.run)
    return builder.run


def test_names_from_outside_are_text_on_the_page(hostile: RunFolder) -> None:
    page = page_of(hostile)
    assert {"script", "img", "b"} & {tag for tag, _ in page.tags} == set()
    assert "<script>alert(1)</script>" in page.text
    assert '/data/it\'s "mine"/<b>' in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "<script>|`" in page.text


def test_names_from_outside_are_text_in_markdown(hostile: RunFolder) -> None:
    report = hostile.report_markdown.read_text(encoding="utf-8")
    card = write_model_card(hostile, "cpu-tight").read_text(encoding="utf-8")
    for text in (report, card):
        prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
        assert "<" not in prose.replace("<=", "")
        assert re.search(r"(?<!\\)`", prose) is None
        rows = [line for line in text.splitlines() if line.startswith("|")]
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert widths <= {4, 5, 8}
    assert r"\[h\](i)" in card
    assert "    ```'" in report, "the command stays inside its code block"


def test_markdown_escapes_keep_plain_text() -> None:
    assert escape_markdown("a_b|c") == r"a\_b\|c"
    assert escape_markdown("15 % of 3.5M (p50)") == "15 % of 3.5M (p50)"
    assert escape_markdown("a\n# b") == r"a \# b"


def test_pareto_has_a_row_for_every_network(finished: RunFolder) -> None:
    rows = list(csv.DictReader(finished.pareto.read_text(encoding="utf-8").splitlines()))
    assert [(row["profile"], row["kind"]) for row in rows] == [
        (profile, kind) for profile in PROFILES for kind in ("searched", "random", "uniform")
    ]
    assert float(rows[0]["latency_p50_ms"]) == latency(MEDIANS["cpu-tight"]).p50_ms
    assert (rows[1]["latency_p50_ms"], rows[1]["status"]) == ("", "")


def test_the_card_says_how_to_use_the_model(finished: RunFolder) -> None:
    card = finished.model("cpu-tight").card.read_text(encoding="utf-8")
    assert "# Image classifier for cpu-tight" in card
    assert (
        "Input images: float32, NCHW, 28\N{MULTIPLICATION SIGN}28 pixels, 1 channel, values from 0 to 255"
        in card
    )
    assert '    session = onnxruntime.InferenceSession("model.onnx"' in card
    assert "numpy.zeros([1, 1, 28, 28], dtype=numpy.float32)" in card
    assert "n = 2000 test images" in card


def test_a_card_of_a_failed_profile_fills_nothing_in(builder: Builder) -> None:
    builder.metrics("cpu-tight", **failed(status="gate-failed", exit_code=4, message="max_difference"))
    card = write_model_card(builder.run, "cpu-tight").read_text(encoding="utf-8")
    assert "gate failed" in card
    assert "Not measured." in card
    with pytest.raises(ConfigError, match="expected one of cpu-tight"):
        write_model_card(builder.run, "nonsense")


def test_sha256sum_accepts_the_checksums_and_finds_a_change(finished: RunFolder, tmp_path: Path) -> None:
    source = finished.model("cpu-tight").path
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "a file with spaces").write_text("x", encoding="utf-8")
    sums = write_checksums(folder)
    names = {line[66:] for line in sums.read_text(encoding="utf-8").splitlines()}
    assert names == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 0
    (folder / "model.onnx").write_bytes(b"other")
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 1


def test_checksums_refuse_what_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no files"):
        write_checksums(tmp_path)
    (tmp_path / "a\nb").touch()
    with pytest.raises(RunFolderError, match="printable"):
        write_checksums(tmp_path)


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        ({"margin": 0.03, "relative_margin": 0.2, "unit": "fraction"}, "3.0 points below"),
        ({"margin": -5.0, "relative_margin": -0.1, "unit": "count"}, "10.0 % above"),
        ({"margin": None, "relative_margin": None, "unit": "ms"}, ""),
    ],
)
def test_margins_in_words(cap: dict[str, Any], expected: str) -> None:
    assert margin(cap) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.2136, "0.214 ms"), (15.0, "15.0 ms"), (250.0, "250 ms"), (1234.5, "1234 ms"), (None, "\N{EN DASH}")],
)
def test_times_in_words(value: float | None, expected: str) -> None:
    assert milliseconds(value) == expected


def test_the_latency_table_stands_beside_flops_and_a_second_measurement(finished: RunFolder) -> None:
    write_report(finished)
    page, text = (
        page_of(finished).text,
        finished.report_html.with_name("report.md").read_text(encoding="utf-8"),
    )
    for number in ("3.1", "5.5", "0.994", "14.3", "0.941", "1.2", "0.999"):
        assert number in page
    header, _, row = text[text.index("| profile | mean error |") :].splitlines()[:3]
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert (cells["FLOPs: rank"], cells["measured twice: rank"]) == ("0.941", "0.999")
    assert cells["FLOPs: error"].startswith("14.3")
    assert "measured 2026-01-02T03:04:05+00:00 in" in page
