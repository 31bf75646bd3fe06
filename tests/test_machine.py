"""Which machine a time was measured on."""

from __future__ import annotations

import json
from pathlib import Path

from nasdeploy.costs.machine import describe_difference, fingerprint_hash, machine_fingerprint


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_fingerprint_reads_what_linux_tells(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Some CPU @ 2 GHz\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        },
    )
    found = machine_fingerprint(root)
    assert found["cpu"] == "Some CPU @ 2 GHz 26 2"
    assert found["cpu_quota"] == 1.5
    assert found["governor"] == "powersave"


def test_unlimited_or_unknown_values_are_none(tmp_path: Path) -> None:
    assert machine_fingerprint(write(tmp_path, {"sys/fs/cgroup/cpu.max": "max 100000"}))["cpu_quota"] is None
    assert machine_fingerprint(tmp_path / "empty")["governor"] is None


def test_quota_of_the_first_control_groups(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu/"
    root = write(tmp_path, {f"{folder}cpu.cfs_quota_us": "50000\n", f"{folder}cpu.cfs_period_us": "100000\n"})
    assert machine_fingerprint(root)["cpu_quota"] == 0.5


def test_hash_depends_on_what_matters_and_on_nothing_else() -> None:
    here = machine_fingerprint()
    assert fingerprint_hash(here) == fingerprint_hash(json.loads(json.dumps(here)))
    assert fingerprint_hash(here) == fingerprint_hash({**here, "release": "another kernel", "onnx": "0"})
    assert fingerprint_hash(here) != fingerprint_hash({**here, "onnxruntime": "0"})


def test_difference_names_key_and_both_values() -> None:
    here = machine_fingerprint()
    assert describe_difference(here, here) == ""
    assert describe_difference({**here, "cpu": "A"}, {**here, "cpu": "B"}) == "cpu: A there, B here"
