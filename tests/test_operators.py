"""Where the time of a file goes: the profiler's file read, summed up, and made for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nasdeploy.costs.device.profiling import (
    MAX_SECONDS,
    WARM_RUNS,
    own_times,
    read_trace,
    run_for_profile,
    split_runs,
)
from nasdeploy.costs.latency import write_reference_model
from nasdeploy.costs.operators import operator_request, profile_operators, summarise_nodes
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime


def node(
    name: str, ts: int, dur: int, *, op: str = "Conv", index: int = 0, kind: str = "kernel_time"
) -> dict[str, Any]:
    return {
        "cat": "Node",
        "name": f"{name}_{kind}",
        "ts": ts,
        "dur": dur,
        "args": {"op_name": op, "provider": "CPUExecutionProvider", "node_index": str(index)},
    }


def run_end(dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": 0, "dur": dur, "args": {}}


def test_runs_are_split_where_they_end_and_only_kernels_count() -> None:
    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9, "args": {}},
        node("a", 0, 5),
        node("a", 5, 1, kind="fence_after"),  # of older versions
        run_end(7),
        node("a", 10, 4),
        run_end(6),
        node("a", 20, 4),  # of a run that did not end
    ]
    assert [([n["dur"] for n in nodes], us) for nodes, us in split_runs(events)] == [([5], 7.0), ([4], 6.0)]


def test_a_node_with_a_graph_inside_has_only_its_own_time() -> None:
    nodes = [
        node("inner", 11, 3, index=1),
        node("inner", 14, 4, index=1),
        node("deep", 15, 1, index=2),
        node("loop", 10, 10, op="Loop"),
        node("next", 20, 2, index=3),
    ]
    spent = [(key[0], us) for key, us in own_times(nodes)]
    assert spent == [("loop", 3), ("inner", 3), ("inner", 3), ("deep", 1), ("next", 2)]


def test_medians_are_taken_over_the_last_runs_and_nodes_without_a_name_are_kept_apart(tmp_path: Path) -> None:
    events = []
    for first, second in ((900, 900), (5, 2), (9, 3), (6, 1)):  # the first run warms up
        events += [
            node("", 0, first, index=1),
            node("", 1000, second, index=2, op="Relu"),
            run_end(first + second),
        ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(events))
    assert read_trace(str(path), 3) == {
        "runs": 3,
        "run_us": 7.0,
        "nodes": [
            {"name": "", "op_type": "Conv", "provider": "CPUExecutionProvider", "calls": 1, "median_us": 6.0},
            {"name": "", "op_type": "Relu", "provider": "CPUExecutionProvider", "calls": 1, "median_us": 2.0},
        ],
    }


def test_a_node_that_is_called_twice_has_the_sum_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([node("a", 0, 2), node("a", 5, 3), run_end(9)]))
    (row,) = read_trace(str(path), 1)["nodes"]
    assert (row["calls"], row["median_us"]) == (2, 5.0)


@pytest.mark.parametrize(
    ("run_s", "warm", "counted"), [(0.01, 10, 50), (1.0, 10, 30), (15.0, 2, 1), (90.0, 1, 1)]
)
def test_a_slow_model_is_profiled_in_fewer_runs(run_s: float, warm: int, counted: int) -> None:
    now = 0.0
    made = 0

    def run() -> None:
        nonlocal now, made
        now += run_s
        made += 1

    assert run_for_profile(run, 50, clock=lambda: now) == counted
    assert made == warm + counted
    assert (WARM_RUNS, MAX_SECONDS) == (10, 40.0)


def row(name: str, op_type: str, us: float, *, calls: int = 1) -> dict[str, Any]:
    return {"name": name, "op_type": op_type, "provider": "CPU", "calls": calls, "median_us": us}


def test_nodes_are_summed_by_type_the_longest_first() -> None:
    nodes = [
        row("a", "Conv", 2.0),
        row("b", "Cast", 5.0, calls=2),
        row("c", "Conv", 3.0),
        row("d", "Relu", 0.0),
    ]
    found = summarise_nodes({"models": {"model": {"operators": {"runs": 4, "run_us": 12.0, "nodes": nodes}}}})
    assert [(one.op_type, one.num_nodes, one.calls, one.median_us, one.share) for one in found.by_type] == [
        ("Cast", 1, 2, 5.0, 0.5),
        ("Conv", 2, 2, 5.0, 0.5),
        ("Relu", 1, 1, 0.0, 0.0),
    ]
    assert [(one.name, one.share) for one in found.nodes] == [("b", 0.5), ("c", 0.3), ("a", 0.2), ("d", 0.0)]
    assert found.to_json()["nodes"][0] == row("b", "Cast", 5.0, calls=2) | {"share": 0.5}
    assert (found.runs, found.run_us) == (4, 12.0)


def test_nodes_that_take_no_time_at_all_have_no_share() -> None:
    found = summarise_nodes(
        {"models": {"model": {"operators": {"runs": 1, "run_us": 0.0, "nodes": [row("a", "Cast", 0.0)]}}}}
    )
    assert found.by_type[0].share == 0.0


def test_the_request_is_that_of_a_start_with_a_profile(tmp_path: Path) -> None:
    request = operator_request(tmp_path / "m.onnx", Runtime(threads=2), runs=9, shapes={"x": (1, 3)})
    assert (request["plan"], request["operators"], request["threads"]) == (None, {"runs": 9}, 2)
    assert request["shapes"] == {"model": {"x": [1, 3]}}


def test_a_real_profile_names_what_the_runtime_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reference.onnx"
    write_reference_model(path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    found = profile_operators(path, Runtime(), runs=6)
    assert found.runs == 6
    assert {one.op_type for one in found.nodes} >= {"Gemm", "Flatten"}
    assert sum(one.num_nodes for one in found.by_type) == len(found.nodes)
    assert sum(one.share for one in found.by_type) == pytest.approx(1.0)
    assert 0.0 < sum(one.median_us for one in found.nodes) <= found.run_us * 1.5
    assert list(scratch.iterdir()) == []


def test_a_file_that_cannot_be_profiled_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"broken\.onnx: onnxruntime cannot load it"):
        profile_operators(path, Runtime(), runs=1)
