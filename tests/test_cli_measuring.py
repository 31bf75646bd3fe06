"""``nasdeploy bench`` and ``export``: arguments in, calls, text and exit codes out. The pipeline is a fake."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nasdeploy.cli import exporting as cli_exporting
from nasdeploy.cli import main
from nasdeploy.costs.certification import CapCheck
from nasdeploy.costs.comparison import FULL, QUICK, Comparison, Relative
from nasdeploy.costs.latency import BlockStats, Conditions, ModelLatency
from nasdeploy.costs.operators import summarise_nodes
from nasdeploy.costs.startup import StartUp
from nasdeploy.exporters import ExportedModel
from nasdeploy.exporters.structure import Check
from nasdeploy.pipeline import exporting
from nasdeploy.pipeline.bench_files import ModelFile
from nasdeploy.pipeline.bench_results import BenchedModel, BenchResult
from nasdeploy.pipeline.export_results import ExportOptions
from nasdeploy.pipeline.exporting import ExportResult, MeasuredLatency, ProfileExport
from nasdeploy.profiles import Runtime


def measured(*cpu_ms: float, batch_size: int = 1, p90_ms: float | None = None) -> ModelLatency:
    """Return a model with these medians of its blocks."""
    blocks = [
        BlockStats(
            n=40,
            min_ms=0.5 * ms,
            mean_ms=1.5 * ms,
            wall_ms={50: ms, 90: p90_ms, 95: None, 99: None},
            cpu_ms={50: ms, 90: p90_ms, 95: None, 99: None},
            cpu_p25_ms=ms,
            wall_over_cpu=1.0,
            session_ms=3.0,
            first_run_ms=1.0,
            peak_memory_bytes=None,
        )
        for ms in cpu_ms
    ]
    conditions = Conditions(
        provider="CPUExecutionProvider",
        threads=1,
        batch_size=batch_size,
        pinned=True,
        spinning=True,
        shared_pool=False,
        onnxruntime="1.20.0",
    )
    return ModelLatency(conditions=conditions, blocks=tuple(blocks))


def benched(label: str, comparison: Comparison) -> BenchedModel:
    return BenchedModel(
        file=ModelFile(
            label=label,
            path=Path(label),
            sha256="0" * 64,
            file_size=1000,
            inputs=(),
            shapes={"x": (1, 3)},
            precision="fp32" if label == "a.onnx" else None,
        ),
        latency=comparison.models[label],
        start_up=StartUp(
            num_processes=3,
            cold_start_ms=12.5,
            session_ms=12.0,
            first_run_ms=0.5,
            peak_memory_bytes=61_000_000,
            memory_before_bytes=52_000_000,
            added_memory_bytes=9_500_000,
        ),
        relative=None if label == "a.onnx" else comparison.relative(label),
    )


def bench_result(*, stable: bool = True, batches: tuple[int, int] = (1, 1)) -> BenchResult:
    comparison = Comparison(
        models={
            "a.onnx": measured(1.0, 1.25, batch_size=batches[0], p90_ms=2.0),
            "b.onnx": measured(0.5, 0.625, batch_size=batches[1]),
        },
        again=measured(1.01, 1.25),
        reference=measured(0.02, 0.02 if stable else 0.03),
    )
    return BenchResult(
        profile=None,
        runtime=Runtime(),
        protocol=QUICK,
        seed=0,
        machine={"cpu": "a processor", "logical_cores": 2, "cpu_quota": None, "governor": None},
        load=(0.25, None),
        models=tuple(benched(label, comparison) for label in comparison.models),
        comparison=comparison,
    )


def exported(name: str, *, passed: bool = True, message: str = "") -> ProfileExport:
    path = Path("out") / f"{name}.int8.onnx"
    model = ExportedModel(path=path, opset=18, exporter="graph", file_size=94_000, sha256="0" * 64)
    latency = MeasuredLatency(
        p50_ms=0.04,
        num_runs=500,
        provider="CPUExecutionProvider",
        threads=1,
        batch_size=1,
        baseline="fp32",
        baseline_p50_ms=0.05,
        relative=Relative(ratio=0.8, smallest_ratio=0.79, largest_ratio=0.81, verdict="faster"),
        noise_floor=0.01,
        stable=True,
        contended_blocks=0,
    )
    return ProfileExport(
        profile=name,
        message=message,
        precision="int8",
        options=ExportOptions(
            precision="int8",
            opset=None,
            exporter=None,
            batch_size=None,
            dynamic_batch=False,
            max_accuracy_drop=0.01,
            protocol=QUICK,
        ),
        opset=18,
        exporter="graph",
        batch_size=1,
        model=model if passed else None,
        record=path.with_suffix(".json"),
        checks=(Check(name="accuracy_drop", value=0.004 if passed else 0.02, relation="<=", limit=0.01),),
        validation_before=0.9,
        validation_accuracy=0.896 if passed else 0.88,
        num_validation=500,
        test_accuracy=0.89 if passed else None,
        num_test=1000,
        calibration_images=512,
        latency=latency if passed else None,
    )


@dataclass
class FakePipeline:
    """Records what it is asked."""

    bench_result: BenchResult = field(default_factory=bench_result)
    exports: tuple[ProfileExport, ...] = (exported("edge"),)
    calls: list[tuple[object, dict[str, Any]]] = field(default_factory=list)

    def bench(self, models: tuple[Path, ...], *, observer: object, **options: object) -> BenchResult:
        self.calls.append((models, options))
        return self.bench_result

    def export_run(self, run_dir: Path, *, observer: object, **options: object) -> ExportResult:
        self.calls.append((run_dir, options))
        return ExportResult(run_dir=run_dir, output_dir=Path("out"), exports=self.exports)


def run(*arguments: str | Path, pipeline: FakePipeline | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), obj=pipeline or FakePipeline())


# ---- bench ----------------------------------------------------------------------------------------------------


def test_bench_passes_its_options_on() -> None:
    pipeline = FakePipeline()
    run("bench", "a.onnx", "b.onnx", pipeline=pipeline)
    run(
        *(
            "bench",
            "a.onnx",
            "-p",
            "edge-cpu-1t",
            "--threads",
            "2",
            "--batch-size",
            "4",
            "--quick",
            "--seed",
            "7",
        ),
        *("--shape", "x=1x3", "--shape", "a=b=2", "--interval", "33ms", "--attempts", "2"),
        *("--check-cap", "--operators"),
        pipeline=pipeline,
    )
    defaults = {
        "profile": None,
        "threads": None,
        "batch_size": None,
        "shapes": {},
        "protocol": FULL,
        "check_cap": False,
        "operators": False,
        "seed": 0,
    }
    assert pipeline.calls[0] == ((Path("a.onnx"), Path("b.onnx")), defaults)
    assert pipeline.calls[1][1] == {
        "profile": "edge-cpu-1t",
        "threads": 2,
        "batch_size": 4,
        "shapes": {"x": (1, 3), "a=b": (2,)},
        "protocol": replace(QUICK, interval_ms=33.0, attempts=2),
        "check_cap": True,
        "operators": True,
        "seed": 7,
    }


def test_bench_prints_a_line_a_model_and_the_conditions() -> None:
    result = run("bench", "a.onnx")
    header, first, second, _, *conditions = result.stdout.splitlines()
    assert result.exit_code == 0
    assert header.split()[:6] == ["model", "weights", "n", "p50", "(blocks)", "p90"]
    assert " ".join(first.split()) == (
        "a.onnx fp32 80 1.12ms (1ms-1.25ms) 2ms n/a n/a 1.69ms 500us 888.9 1.12ms 1.00 (0/2) 12.5ms 9.5MB the first"
    )
    assert second.split()[1:3] == ["-", "80"]
    assert second.split()[5:8] == ["n/a", "n/a", "n/a"]
    assert second.endswith("x0.5, faster")
    text = "\n".join(conditions)
    assert "ONNX Runtime 1.20.0, CPUExecutionProvider, 1 thread (pinned), batch 1" in text
    assert "a processor, 2 cores, governor n/a, load 0.25 and - before and after" in text
    assert "noise floor: 1.00 % (the first model measured twice); up to 2.00 % is no difference" in text
    assert "reference model: 20us, spread 0.0 % over 2 blocks: stable" in text
    assert "what the file adds at most to a process that has 52MB with Python and ONNX Runtime loaded" in text
    assert "batches differ" not in text
    assert "paced" not in text
    assert "attempts" not in text


def test_bench_of_different_batches_says_so() -> None:
    result = run("bench", "a.onnx", pipeline=FakePipeline(bench_result=bench_result(batches=(1, 16))))
    assert "batch 1, 16\nbatches differ: times are those of one run" in result.stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_bench_on_an_unstable_machine_prints_and_exits_with_5(as_json: list[str]) -> None:
    pipeline = FakePipeline(bench_result=bench_result(stable=False))
    result = run("bench", "-q", "a.onnx", *as_json, pipeline=pipeline)
    assert result.exit_code == 5
    assert "a.onnx" in result.stdout
    assert result.stderr.startswith("error: unstable machine: the reference model took 50.0 % longer")
    assert result.stderr.count("\n") == 1
    if as_json:
        assert json.loads(result.stdout)["stable"] is False
    else:
        assert "spread 50.0 % over 2 blocks: UNSTABLE" in result.stdout


def changed(**latency: object) -> BenchResult:
    """Return a result whose first model was measured so, and the reference model under the same conditions."""
    result = bench_result()
    first, second = result.models
    first = replace(first, latency=replace(first.latency, **latency))
    conditions = latency.get("conditions", first.latency.conditions)
    reference = replace(result.comparison.reference, conditions=conditions)
    return replace(result, models=(first, second), comparison=replace(result.comparison, reference=reference))


def test_bench_marks_a_file_that_a_rival_disturbed() -> None:
    blocks = tuple(replace(block, wall_over_cpu=1.5) for block in measured(1.0, 1.25).blocks)
    result = run("bench", "a.onnx", pipeline=FakePipeline(bench_result=changed(blocks=blocks)))
    assert "1.50 (2/2 CONTENDED)" in result.stdout.splitlines()[1]
    assert "CONTENDED" not in result.stdout.splitlines()[2]
    assert result.exit_code == 0


def test_bench_of_paced_runs_says_so_and_how_many_were_late() -> None:
    latency = measured(1.0, 1.25)
    found = changed(
        conditions=replace(latency.conditions, interval_ms=33.0),
        blocks=tuple(replace(block, late=2) for block in latency.blocks),
    )
    result = run("bench", "a.onnx", pipeline=FakePipeline(bench_result=found))
    assert "reference model (without pauses): 20us" in result.stdout
    assert (
        "paced: a run every 33ms, asleep between; runs that took longer: 5.0 % of a.onnx, 0.0 %"
        in result.stdout
    )


def cap(status: str, *, estimate: float | None = 1.1, reason: str = "") -> CapCheck:
    return CapCheck(
        status=status,
        cap=1.0,
        unit="ms",
        percentile=50,
        estimate=estimate,
        bound=estimate,
        num_blocks=5,
        reason=reason,
    )


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (("holds", "holds"), 0),
        (("violated", "holds"), 3),
        (("undecided", "violated"), 3),
        (("holds", "undecided"), 5),
    ],
)
def test_bench_with_caps_exits_with_the_most_serious_and_names_each(
    statuses: tuple[str, str], code: int
) -> None:
    result = bench_result()
    models = tuple(replace(one, cap=cap(status)) for one, status in zip(result.models, statuses, strict=True))
    decided = replace(result, profile="edge", models=models, check_cap=True)
    shown = run("bench", "-q", "a.onnx", pipeline=FakePipeline(bench_result=decided))
    assert shown.exit_code == code
    assert len(shown.stderr.splitlines()) == sum(status != "holds" for status in statuses)
    assert all(line.startswith("error: ") for line in shown.stderr.splitlines())
    assert "cap of edge" in shown.stdout
    told = run("bench", "-q", "a.onnx", pipeline=FakePipeline(bench_result=replace(decided, check_cap=False)))
    assert (told.exit_code, told.stderr, told.stdout) == (0, "", shown.stdout)


def test_bench_shows_a_violated_cap_with_its_numbers() -> None:
    result = bench_result()
    first = replace(result.models[0], cap=cap("violated"))
    shown = run(
        "bench",
        "a.onnx",
        pipeline=FakePipeline(bench_result=replace(result, profile="edge", models=(first,), check_cap=True)),
    )
    assert shown.stderr.splitlines() == ["error: a.onnx: latency p50 1.1ms (largest block 1.1ms) > 1ms"]


def test_bench_shows_where_the_time_goes() -> None:
    result = bench_result()
    rows = [
        {"name": name, "op_type": op_type, "provider": "CPU", "calls": 1, "median_us": us}
        for name, op_type, us in (("q", "QLinearConv", 30.0), ("", "Cast", 10.0))
    ]
    profile = summarise_nodes(
        {"models": {"model": {"operators": {"runs": 50, "run_us": 60.0, "nodes": rows}}}}
    )
    first = replace(result.models[0], operators=profile)
    found = replace(result, models=(first, result.models[1]))
    lines = run("bench", "a.onnx", pipeline=FakePipeline(bench_result=found)).stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("a.onnx: operators"))
    assert lines[start].endswith("medians of 50 runs under its profiler, which slows a run down to 60us")
    assert [line.split() for line in lines[start + 2 : start + 4]] == [
        ["QLinearConv", "1", "1", "30us", "75.0", "%"],
        ["Cast", "1", "1", "10us", "25.0", "%"],
    ]
    assert [line.split()[0] for line in lines[start + 5 : start + 7]] == ["q", "-"]
    assert not any(line.startswith("b.onnx: operators") for line in lines)


def test_bench_draws_a_chart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.SVG"
    assert run("bench", "a.onnx", "--chart", path).exit_code == 0
    text = path.read_text()
    assert text.startswith("<?xml")
    for shown in ("a.onnx", "b.onnx", "x0.5, faster", "fp32", "not known"):
        assert shown in text


def test_bench_refuses_a_chart_of_another_kind_and_an_interval_without_a_unit_before_it_measures(
    tmp_path: Path,
) -> None:
    pipeline = FakePipeline()
    for arguments, message in (
        (("--chart", tmp_path / "c.pdf"), "c.pdf: expected a name that ends in .png or .svg"),
        (("--interval", "33"), '--interval = "33": expected a time such as "15ms", "800us" or "1.2s"'),
    ):
        result = run("bench", "a.onnx", *arguments, pipeline=pipeline)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    result = run("bench", "a.onnx", "--chart", folder, pipeline=pipeline)
    assert "is a folder; expected a file name, such as" in result.stderr
    assert pipeline.calls == []


def test_bench_writes_the_same_json_as_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    result = run("bench", "a.onnx", "--json", "-o", path)
    assert path.read_text() == result.stdout
    assert json.loads(result.stdout)["schema"] == "nasdeploy/bench/1"
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]


def test_bench_refuses_a_place_that_cannot_be_written_before_it_measures(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    pipeline = FakePipeline()
    for output, message in ((tmp_path, "is a folder"), (file / "b.json", "its folder cannot be made")):
        result = run("bench", "a.onnx", "-o", output, pipeline=pipeline)
        assert result.exit_code == 2
        assert f"error: --output {output}: {message}" in result.stderr
        assert result.stderr.count("\n") == 1
    assert pipeline.calls == []


@pytest.mark.parametrize(
    "arguments",
    [["--attempts", "0"], ["--threads", "0"], ["--batch-size", "0"], ["--seed", "-1"], ["-v", "-q"]],
)
def test_bench_with_wrong_options_is_a_usage_error(arguments: list[str]) -> None:
    pipeline = FakePipeline()
    assert run("bench", "a.onnx", *arguments, pipeline=pipeline).exit_code == 2
    assert run("bench", pipeline=pipeline).exit_code == 2
    assert pipeline.calls == []


# ---- export ---------------------------------------------------------------------------------------------------


def test_export_passes_its_options_on(tmp_path: Path) -> None:
    pipeline = FakePipeline()
    run("export", tmp_path, pipeline=pipeline)
    run(
        *(
            "export",
            tmp_path,
            "-p",
            "a",
            "-p",
            "b",
            "--precision",
            "int8",
            "--opset",
            "20",
            "--exporter",
            "torch",
        ),
        *("--batch-size", "4", "--max-accuracy-drop", "2", "-o", tmp_path / "out"),
        pipeline=pipeline,
    )
    run("export", tmp_path, "--dynamic-batch", pipeline=pipeline)
    defaults = {
        "profiles": None,
        "precision": "fp32",
        "opset": None,
        "exporter": None,
        "batch_size": None,
        "dynamic_batch": False,
        "max_accuracy_drop": None,
        "output_dir": None,
    }
    assert pipeline.calls == [
        (tmp_path, defaults),
        (
            tmp_path,
            {
                "profiles": ("a", "b"),
                "precision": "int8",
                "opset": 20,
                "exporter": "torch",
                "batch_size": 4,
                "dynamic_batch": False,
                "max_accuracy_drop": 0.02,
                "output_dir": tmp_path / "out",
            },
        ),
        (tmp_path, defaults | {"dynamic_batch": True}),
    ]


def test_export_prints_a_line_a_profile(tmp_path: Path) -> None:
    result = run("export", tmp_path)
    assert result.exit_code == 0
    header, row, _, folder = result.stdout.splitlines()
    assert header.split()[0] == "profile"
    assert " ".join(row.split()) == (
        "edge edge.int8.onnx 94kB 90.00 % 89.60 % 89.00 % 40us x0.8 of fp32, faster"
    )
    assert folder == "folder: out"
    assert result.stderr == ""


def test_export_with_a_failed_profile_names_it_and_exits_with_4(tmp_path: Path) -> None:
    exports = (
        exported("good", message="int8 is not faster than fp32 on this machine"),
        exported("bad", passed=False, message="int8: accuracy_drop = 0.02; expected <= 0.01"),
    )
    result = run("export", tmp_path, pipeline=FakePipeline(exports=exports))
    assert result.exit_code == 4
    assert result.stdout.splitlines()[2].split()[:3] == ["bad", "none", "(failed)"]
    assert result.stderr.splitlines() == [
        "note: good: int8 is not faster than fp32 on this machine",
        "error: bad: int8: accuracy_drop = 0.02; expected <= 0.01",
    ]


def test_export_as_json(tmp_path: Path) -> None:
    made = json.loads(run("export", tmp_path, "--json").stdout)
    assert made["schema"] == "nasdeploy/export-result/1"
    assert made["exports"][0]["latency"]["relative"]["verdict"] == "faster"
    assert made["exports"][0]["calibration"] == {"method": "minmax", "num_images": 512}


def test_export_that_was_not_measured_leaves_the_time_open(tmp_path: Path) -> None:
    one = replace(exported("edge"), latency=None)
    result = run("export", tmp_path, pipeline=FakePipeline(exports=(one,)))
    assert result.stdout.splitlines()[1].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--precision", "int4"],
        ["--batch-size", "2", "--dynamic-batch"],
        ["--max-accuracy-drop", "1"],
        ["--precision", "int8", "--max-accuracy-drop", "-1"],
    ],
)
def test_export_with_wrong_options_is_a_usage_error(arguments: list[str], tmp_path: Path) -> None:
    pipeline = FakePipeline()
    result = run("export", tmp_path, *arguments, pipeline=pipeline)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert pipeline.calls == []


def test_precisions_are_those_of_the_pipeline() -> None:
    assert cli_exporting.PRECISIONS == exporting.PRECISIONS
