"""Which machine a time was measured on: a latency table is worth nothing on another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from nasdeploy.costs.device.machine import machine_fingerprint

__all__ = ["DECISIVE", "describe_difference", "fingerprint_hash", "machine_fingerprint"]

Fingerprint = Mapping[str, str | int | float | None]

# A table measured under other values of these is refused; the rest is written down for the reader.
# cores: that were asked for on a device, as text; not there where those were taken that a request takes by itself.
DECISIVE = (
    "cpu",
    "cpu_flags",
    "architecture",
    "logical_cores",
    "cpu_quota",
    "system",
    "onnxruntime",
    "cores",
)


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
