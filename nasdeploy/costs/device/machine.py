"""What is known about the machine on which a time was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

# Kernels of the runtime are chosen by these: x86 first, then Arm.
ARITHMETIC_FLAGS = (
    "sse4_1",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def machine_fingerprint(root: str | os.PathLike[str] = "/") -> dict[str, str | int | float | None]:
    """Return what is known about this machine; None where the system does not tell.

    root: where /proc and /sys are looked for.
    """
    return {
        "cpu": _cpu_model(root),
        "cpu_flags": _cpu_flags(root),
        "architecture": platform.machine(),
        "logical_cores": os.cpu_count(),
        "allowed_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_quota": _cpu_quota(root),
        "governor": _read(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": platform.system(),
        "release": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": _version("onnxruntime"),
        "onnx": _version("onnx"),
        "numpy": _version("numpy"),
    }


def _cpu_model(root: str | os.PathLike[str]) -> str | None:
    lines = (_read(root, "proc/cpuinfo") or "").splitlines()
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


def _cpu_flags(root: str | os.PathLike[str]) -> str | None:
    """Return which of the instruction sets that decide on arithmetic the processor has, None where it does not tell."""
    for line in (_read(root, "proc/cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            flags = line.partition(":")[2].split()
            return " ".join(flag for flag in ARITHMETIC_FLAGS if flag in flags)
    return None


def _cpu_quota(root: str | os.PathLike[str]) -> float | None:
    """Return how many cores the control group may use; None for no limit."""
    quota, _, period = (_read(root, "sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota.isdigit() and period.isdigit():
        return int(quota) / int(period)
    v1 = "sys/fs/cgroup/cpu"
    quota, period = _read(root, f"{v1}/cpu.cfs_quota_us") or "", _read(root, f"{v1}/cpu.cfs_period_us") or ""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _read(root: str | os.PathLike[str], path: str) -> str | None:
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
