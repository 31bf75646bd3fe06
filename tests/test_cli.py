"""The command line: arguments in, calls, text and exit codes out. The pipeline is a fake passed as ``obj``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import nasdeploy
from nasdeploy.cli import main
from nasdeploy.cli.app import VERBS
from nasdeploy.cli.output import NOTHING
from nasdeploy.costs.budgets import Feasibility, FeasibilityRow
from nasdeploy.errors import (
    BudgetViolatedError,
    ConfigError,
    DataError,
    GateError,
    InfeasibleError,
    InterruptedRunError,
    NasdeployError,
    NoisyMeasurementError,
    RunFolderError,
)
from nasdeploy.exporters.structure import Check, StructureReport
from nasdeploy.exporters.verification import Verification
from nasdeploy.pipeline import BuildResult, CapResult, Plan, PlannedPhase, ProfileResult, SearchResult
from nasdeploy.profiles import HardwareProfile, load_profile
from nasdeploy.progress import Observer
from nasdeploy.settings import BuildSettings

ROOT = Path(__file__).resolve().parent.parent


def profile_result(name: str = "edge", *, status: str = "certified", exit_code: int = 0) -> ProfileResult:
    cap = CapResult(
        metric="params", cap=60_000, value=51_000, bound=None, status="holds", unit="count", text=""
    )
    share = CapResult(
        metric="latency", cap=0.15, value=0.124, bound=0.13, status="holds", unit="fraction", text=""
    )
    return ProfileResult(
        profile=name,
        status=status,
        exit_code=exit_code,
        message="" if exit_code == 0 else f"params = 70k: expected <= 60k ({status})",
        model=Path("runs/x/models/edge/model.onnx"),
        shipped="model.onnx",
        precision="fp32",
        accuracy=0.8765,
        latency_ms=0.52,
        params=51_000,
        flops=2_000_000,
        macs=1_900_000,
        file_size=210_000,
        peak_memory=None,
        caps=(cap, share),
    )


def feasibility(name: str, *, feasible: bool = True) -> Feasibility:
    row = FeasibilityRow(
        metric="latency",
        smallest=0.3,
        median=0.6,
        largest=1.2,
        cap=2.0 if feasible else 0.1,
        coefficient=None,
        satisfiable=feasible,
        nearest=None if feasible else 0.3,
    )
    message = "" if feasible else f"{name}: latency <= 100us cannot be met; nearest: 300us"
    return Feasibility(profile=name, rows=(row,), feasible=feasible, message=message)


def verification(*, passed: bool = True) -> Verification:
    structure = StructureReport(
        path=Path("model.onnx"),
        sha256="0" * 64,
        file_size=1,
        opset=18,
        ir_version=8,
        inputs=(),
        outputs=(),
        operators={},
        stored_values=0,
        checks=(),
    )
    check = Check(name="top1_agreement", value=1.0 if passed else 0.5, relation=">=", limit=0.999)
    return Verification(structure=structure, checks=(check,))


@dataclass
class FakePipeline:
    """Records what it is asked; ``error`` is raised by every call."""

    error: BaseException | None = None
    result: BuildResult = field(
        default_factory=lambda: BuildResult(
            run_dir=Path("runs/x"), profiles=(profile_result(),), report=Path("runs/x/report/index.html")
        )
    )
    feasible: bool = True
    passed: bool = True
    calls: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)

    def _record(self, verb: str, what: object, **options: object) -> None:
        self.calls.append((verb, what, options))
        if self.error is not None:
            raise self.error

    @property
    def settings(self) -> BuildSettings:
        (_, settings, _), *_ = self.calls
        assert isinstance(settings, BuildSettings)
        return settings

    def build(self, settings: BuildSettings, *, observer: Observer, **options: object) -> BuildResult:
        observer.start("search", 10)
        observer.note("a note")
        print("a library that prints")
        observer.finish("search", {"loss": 0.5})
        self._record("build", settings, **options)
        return self.result

    def search(self, settings: BuildSettings, *, observer: Observer, **options: object) -> SearchResult:
        self._record("search", settings, **options)
        return SearchResult(
            run_dir=Path("runs/x"),
            num_steps=400,
            seconds=75.0,
            architectures={"edge": {"width": "8"}},
            validation_accuracy={"edge": 0.81},
            costs={"edge": {"params": 51_000.0, "latency": 0.5}},
        )

    def plan(self, settings: BuildSettings, *, output_dir: Path | None, resume: bool) -> Plan:
        self._record("plan", settings, output_dir=output_dir, resume=resume)
        return Plan(
            run_dir=Path("runs/x"),
            images="fashion-mnist: 8500 images of 1x28x28",
            space="mobile",
            phases=(PlannedPhase(name="search", seconds=185.0),),
            total_seconds=185.0,
            images_per_second=900.0,
            feasibility=tuple(feasibility(name, feasible=self.feasible) for name in settings.profiles),
        )

    def check_profile(self, profile: HardwareProfile, **options: object) -> Feasibility:
        self._record("check_profile", profile.name, **options)
        return feasibility(profile.name, feasible=self.feasible)

    def verify_run(self, run_dir: Path, observer: Observer) -> dict[str, Verification]:
        self._record("verify_run", run_dir)
        return {"good": verification(), "other": verification(passed=self.passed)}

    def report(self, run_dir: Path) -> Path:
        self._record("report", run_dir)
        return run_dir / "report" / "index.html"


def run(*arguments: str, pipeline: FakePipeline | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), obj=pipeline or FakePipeline())


def assert_one_error(result: Result, code: int) -> str:
    """Check for one line of error and no traceback; return it."""
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    return errors[0]


# ---- start-up -------------------------------------------------------------------------------------------------


def test_help_lists_the_verbs_and_exit_codes():
    result = run("--help")
    assert result.exit_code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in result.stdout
    for code in range(7):
        assert f"\n    {code}  " in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_begins_like_its_line_in_the_table(verb: str):
    command = main.get_command(None, verb)
    assert command.name == verb
    assert command.help.split()[0] == VERBS[verb][1].split()[0]
    assert run(verb, "--help").exit_code == 0


def test_version():
    assert run("--version").stdout == f"nasdeploy {nasdeploy.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["profiles", "--help"], ["--version"]])
def test_help_imports_no_library_but_click(arguments: list[str]):
    code = (
        "import sys\nfrom nasdeploy.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'onnx', 'onnxruntime', 'matplotlib', 'pydantic', 'rich', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


# ---- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (NasdeployError, 1),
        (ConfigError, 2),
        (DataError, 2),
        (RunFolderError, 2),
        (InfeasibleError, 3),
        (BudgetViolatedError, 3),
        (GateError, 4),
        (NoisyMeasurementError, 5),
        (InterruptedRunError, 6),
    ],
)
@pytest.mark.parametrize("verb", ["build", "search"])
def test_errors_on_purpose_are_one_line_and_their_code(kind: type[NasdeployError], code: int, verb: str):
    result = run(verb, "--json", pipeline=FakePipeline(error=kind("what is wrong")))
    assert assert_one_error(result, code) == "error: what is wrong"
    assert result.stdout == ""


def test_bug_is_announced_before_its_traceback():
    result = run("build", "-q", pipeline=FakePipeline(error=ZeroDivisionError("oops")))
    _, first, second, *_ = result.stderr.splitlines()
    assert result.exit_code == 1
    assert first.startswith("error: this is a bug in nasdeploy; please report it")
    assert second.startswith("Traceback")
    assert result.stderr.endswith("ZeroDivisionError: oops\n")


def test_interrupted_build_says_that_the_same_command_continues():
    result = run("build", pipeline=FakePipeline(error=KeyboardInterrupt()))
    assert assert_one_error(result, 6).endswith("the same command continues")


def test_interrupted_build_that_started_over_continues_without_that_option():
    result = run("build", "--no-resume", pipeline=FakePipeline(error=KeyboardInterrupt()))
    assert assert_one_error(result, 6).endswith("the same command without --no-resume continues")


def test_interruption_elsewhere_promises_nothing(tmp_path: Path):
    result = run("report", str(tmp_path), pipeline=FakePipeline(error=KeyboardInterrupt()))
    assert assert_one_error(result, 6) == "error: interrupted"


def test_termination_is_an_interruption():
    class Terminated(FakePipeline):
        def search(self, settings: BuildSettings, **options: object) -> SearchResult:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was ignored")

    before = signal.getsignal(signal.SIGTERM)
    assert_one_error(run("search", pipeline=Terminated()), 6)
    assert signal.getsignal(signal.SIGTERM) is before


def test_reader_that_has_gone_is_no_error():
    code = "from nasdeploy.cli import main; main(['profiles', 'schema'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == ""


def test_broken_pipe_within_the_work_is_a_bug_like_any_other():
    result = run("build", "-q", pipeline=FakePipeline(error=BrokenPipeError("a worker")))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["bild"], ["build", "--nonsense"], ["build", "--device", "tpu"], ["build", "-v", "-q"]]
)
def test_usage_errors_exit_with_2(arguments: list[str]):
    pipeline = FakePipeline()
    result = run(*arguments, pipeline=pipeline)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""
    assert pipeline.calls == []


# ---- build and search -----------------------------------------------------------------------------------------


def test_build_prints_one_line_a_profile_with_its_caps():
    result = run("build")
    header, row, *_, report = result.stdout.splitlines()
    assert result.exit_code == 0
    assert header.split("  ")[0] == "profile"
    assert (
        row.split()
        == ("edge certified fp32 87.65 % 0.52ms (at 12.4%, cap 15%) 51k (cap 60k) 2M 210kB")
        .replace("0.52ms", "520us")
        .split()
    )
    assert report == f"report: {Path('runs/x/report/index.html')}"


def test_build_prints_memory_where_a_budget_names_it():
    cap = CapResult(
        metric="peak_memory", cap=13e6, value=12e6, bound=12.1e6, status="holds", unit="bytes", text=""
    )
    profiles = (
        replace(profile_result("small"), peak_memory=12_000_000, caps=(cap,)),
        profile_result("other"),
    )
    made = BuildResult(run_dir=Path("r"), profiles=profiles, report=Path("r/i"))
    header, small, other, *_ = run("build", pipeline=FakePipeline(result=made)).stdout.splitlines()
    assert header.endswith("  peak memory")
    assert small.endswith("  12MB (cap 13MB)")
    assert other.split()[-1] == NOTHING
    assert "peak memory" not in run("build").stdout


def test_build_as_json_is_one_object_and_nothing_else():
    made = json.loads(run("build", "--json").stdout)
    assert made["schema"] == "nasdeploy/build-result/1"
    assert made["exit_code"] == 0
    assert made["run_dir"] == str(Path("runs/x"))
    assert made["report"] == str(Path("runs/x/report/index.html"))
    (profile,) = made["profiles"]
    assert profile["accuracy"] == 0.8765
    assert profile["model"] == str(Path("runs/x/models/edge/model.onnx"))
    assert profile["caps"][0]["metric"] == "params"


def test_progress_and_prints_of_libraries_go_to_stderr():
    result = run("build")
    for text in (
        "search: started, 10 steps",
        "a note",
        "a library that prints",
        "search: done in 0 s, loss 0.5",
    ):
        assert text in result.stderr
        assert text not in result.stdout


def test_quiet_build_says_nothing_beside_its_result():
    result = run("build", "-q")
    assert result.stderr == "a library that prints\n"
    assert "certified" in result.stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_most_serious_profile_decides_the_exit_code(as_json: list[str]):
    profiles = (
        profile_result("fine"),
        profile_result("tight", status="noisy", exit_code=5),
        profile_result("worse", status="gate-failed", exit_code=4),
    )
    result = run(
        "build",
        *as_json,
        pipeline=FakePipeline(result=BuildResult(run_dir=Path("r"), profiles=profiles, report=Path("r/i"))),
    )
    assert result.exit_code == 4
    assert "error: tight: params = 70k: expected <= 60k (noisy)\n" in result.stderr
    assert "error: worse: " in result.stderr
    assert "error: fine" not in result.stderr


def test_output_folder_and_resuming_reach_the_pipeline(tmp_path: Path):
    pipeline = FakePipeline()
    run("build", "-o", str(tmp_path), "--no-resume", pipeline=pipeline)
    run("search", pipeline=pipeline)
    assert [options for _, _, options in pipeline.calls] == [
        {"output_dir": tmp_path, "resume": False},
        {"output_dir": None, "resume": True},
    ]


def test_search_prints_accuracy_and_costs():
    lines = run("search").stdout.splitlines()
    assert lines[1].split() == ["edge", "81.00", "%", "51k", "500us"]
    assert lines[-1] == f"400 steps in 1 min 15 s; run folder: {Path('runs/x')}"


def test_search_as_json():
    made = json.loads(run("search", "--json").stdout)
    assert made["schema"] == "nasdeploy/search-result/1"
    assert made["architectures"] == {"edge": {"width": "8"}}


def test_dry_run_plans_and_builds_nothing():
    pipeline = FakePipeline()
    result = run("build", "--dry-run", "-p", "cpu-tight", pipeline=pipeline)
    assert [verb for verb, _, _ in pipeline.calls] == ["plan"]
    assert result.exit_code == 0
    assert "search  about 3 min 05 s" in result.stdout
    assert "cpu-tight: feasible" in result.stdout


def test_dry_run_of_an_infeasible_build_shows_the_plan_and_exits_with_3():
    result = run("build", "--dry-run", "--json", "-p", "cpu-tight", pipeline=FakePipeline(feasible=False))
    assert "nearest: 300us" in assert_one_error(result, 3)
    made = json.loads(result.stdout)
    assert made["schema"] == "nasdeploy/plan/1"
    assert made["feasibility"][0]["rows"][0]["nearest"] == 0.3


# ---- profiles -------------------------------------------------------------------------------------------------


def test_profiles_list_names_every_profile_with_its_budget():
    lines = run("profiles", "list").stdout.splitlines()
    row = next(line for line in lines if line.startswith("gateway-cpu-2t "))
    assert "flops <= 30M, latency p90 <= 1ms" in row
    assert any("flops weight 0.1" in line for line in lines)


def test_profiles_list_as_json():
    made = json.loads(run("profiles", "list", "--json").stdout)
    assert made["profiles"][0] == load_profile(made["profiles"][0]["name"]).to_dict()


def test_profiles_show_prints_toml_that_is_the_profile():
    result = run("profiles", "show", "tiny-flash")
    assert HardwareProfile.from_dict(tomllib.loads(result.stdout)) == load_profile("tiny-flash")


def test_profiles_show_as_json_is_the_profile_behind_its_schema():
    made = json.loads(run("profiles", "show", "tiny-flash", "--json").stdout)
    assert made.pop("schema") == "nasdeploy/profile/1"
    assert HardwareProfile.from_dict(made) == load_profile("tiny-flash")


def test_unknown_profile_is_one_line_with_a_suggestion():
    assert 'did you mean "cpu-tight"?' in assert_one_error(run("profiles", "show", "cpu-tigth"), 2)


def test_profiles_check_prints_the_range_of_the_space():
    pipeline = FakePipeline()
    result = run("profiles", "check", "cpu-tight", "tiny-flash", "--image-size", "32", pipeline=pipeline)
    assert result.exit_code == 0
    assert "latency  300us     600us   1.2ms    2ms  yes          -" in result.stdout
    assert [name for _, name, _ in pipeline.calls] == ["cpu-tight", "tiny-flash"]
    assert pipeline.calls[0][2] == {
        "space": "mobile",
        "image_shape": (1, 32, 32),
        "num_classes": 10,
        "image_sizes": (),
    }


def test_profiles_check_takes_the_size_of_the_space_from_data():
    pipeline = FakePipeline()
    run("profiles", "check", "cpu-tight", "--data", "fashion-mnist", pipeline=pipeline)
    assert pipeline.calls[0][2] == {
        "space": "mobile",
        "image_shape": (1, 28, 28),
        "num_classes": 10,
        "image_sizes": (),
    }

    pipeline = FakePipeline()
    run("profiles", "check", "cpu-tight", "--image-size", "128", "--image-size", "96", pipeline=pipeline)
    assert pipeline.calls[0][2]["image_shape"] == (1, 128, 128)
    assert pipeline.calls[0][2]["image_sizes"] == (96, 128)


def test_profiles_check_of_an_infeasible_profile_exits_with_3():
    result = run("profiles", "check", "cpu-tight", "--json", pipeline=FakePipeline(feasible=False))
    assert "nearest: 300us" in assert_one_error(result, 3)
    (profile,) = json.loads(result.stdout)["profiles"]
    assert profile["feasible"] is False


def test_new_profile_is_valid_and_never_overwrites(tmp_path: Path):
    file = tmp_path / "my-device.toml"
    result = run("profiles", "new", str(file))
    assert result.stdout == f"{file}\n"
    assert load_profile(file).name == "my-device"
    file.write_text("mine")
    assert "exists already" in assert_one_error(run("profiles", "new", str(file)), 2)
    assert file.read_text() == "mine"


def test_new_profile_with_a_name_as_json(tmp_path: Path):
    file = tmp_path / "a.toml"
    assert json.loads(run("profiles", "new", str(file), "--name", "box", "--json").stdout)["file"] == str(
        file
    )
    assert load_profile(file).name == "box"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("box", 'such as "box.toml"'),
        ("missing/box.toml", "existing folder"),
        ("-x.toml", "expected up to 64"),
    ],
)
def test_new_profile_at_a_wrong_place_is_one_line(
    file: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert expected in assert_one_error(run("profiles", "new", "--", file), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "key"), [("profile", "budget"), ("settings", "search")])
def test_schema_is_that_of_the_kind(kind: str, key: str):
    assert key in json.loads(run("profiles", "schema", "--of", kind).stdout)["properties"]


# ---- verify and report ----------------------------------------------------------------------------------------


def test_verify_run_prints_every_check(tmp_path: Path):
    result = run("verify", str(tmp_path))
    assert result.exit_code == 0
    assert "good: passed\n  ok    top1_agreement = 1 >= 0.999" in result.stdout


def test_verify_run_that_fails_exits_with_4(tmp_path: Path):
    result = run("verify", str(tmp_path), pipeline=FakePipeline(passed=False))
    assert assert_one_error(result, 4) == "error: other: top1_agreement = 0.5; expected >= 0.999"
    assert "other: failed\n  FAIL  top1_agreement" in result.stdout


def test_verify_run_as_json(tmp_path: Path):
    result = run("verify", str(tmp_path), "--json", pipeline=FakePipeline(passed=False))
    made = json.loads(result.stdout)
    assert result.exit_code == 4
    assert made["profiles"]["good"]["passed"] is True
    assert made["profiles"]["other"]["passed"] is False


@pytest.mark.parametrize("option", [["--data", "x"], ["--image-size", "28"], ["--seed", "1"]])
def test_verify_run_refuses_other_data(option: list[str], tmp_path: Path):
    pipeline = FakePipeline()
    assert run("verify", str(tmp_path), *option, pipeline=pipeline).exit_code == 2
    assert pipeline.calls == []


@pytest.mark.parametrize("verb", ["verify", "report"])
def test_missing_target_is_a_usage_error(verb: str, tmp_path: Path):
    result = run(verb, str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_report_prints_its_path(tmp_path: Path):
    page = tmp_path / "report" / "index.html"
    assert run("report", str(tmp_path)).stdout == f"{page}\n"
    assert json.loads(run("report", str(tmp_path), "--json").stdout)["report"] == str(page)
