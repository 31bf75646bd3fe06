"""Which machine a time was measured on: a latency table is worth nothing on another one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["DECISIVE", "describe_difference", "fingerprint_hash", "machine_fingerprint"]

Fingerprint = Mapping[str, str | int | float | None]

# A table measured under other values of these is refused; the rest is written down for the reader.
DECISIVE = ("cpu", "architecture", "logical_cores", "cpu_quota", "system", "onnxruntime")


def machine_fingerprint(root: Path = Path("/")) -> dict[str, str | int | float | None]:
    """Return what is known about this machine; None where the system does not tell.

    root: where /proc and /sys are looked for.
    """
    return {
        "cpu": _cpu_model(root),
        "architecture": platform.machine(),
        "logical_cores": os.cpu_count(),
        "allowed_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_quota": _cpu_quota(root),
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": platform.system(),
        "release": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": _version("onnxruntime"),
        "onnx": _version("onnx"),
        "numpy": _version("numpy"),
    }


def fingerprint_hash(fingerprint: Fingerprint) -> str:
    """Return a short hash of the values in :data:`DECISIVE`."""
    content = {key: fingerprint.get(key) for key in DECISIVE}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def describe_difference(stored: Fingerprint, here: Fingerprint) -> str:
    """Return which decisive values differ, as "key: stored value, here value; …"; empty when none does."""
    return "; ".join(
        f"{key}: {stored.get(key)} there, {here.get(key)} here"
        for key in DECISIVE
        if stored.get(key) != here.get(key)
    )


def _cpu_model(root: Path) -> str | None:
    lines = (_read(root / "proc/cpuinfo") or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model\t"))]
    # Processors of one family share a name on virtual machines: stepping and model tell them apart.
    details = [
        line.partition(":")[2].strip()
        for line in lines
        if line.startswith(("cpu family", "model\t", "CPU implementer", "CPU part"))
    ]
    if names or details:
        return " ".join([*names[:1], *details[:2]])
    return platform.processor() or None


def _cpu_quota(root: Path) -> float | None:
    """Return how many cores the control group may use; None for no limit."""
    quota, _, period = (_read(root / "sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota.isdigit() and period.isdigit():
        return int(quota) / int(period)
    v1 = root / "sys/fs/cgroup/cpu"
    quota, period = _read(v1 / "cpu.cfs_quota_us") or "", _read(v1 / "cpu.cfs_period_us") or ""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
