"""Describe a device in TOML, ask which limits can be met at all, and build for it.

Run it with ``python examples/own_profile.py [FOLDER]``. The schedule is cut to seconds, so the accuracy is poor.
"""

# CI: run

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nasdeploy
from nasdeploy.profiles import format_quantity

# Every key is explained by `nasdeploy profiles new`, which writes such a file, and by `nasdeploy profiles schema`.
PROFILE = """
name = "thermostat"
description = "one core of a wall thermostat; the flash has little room left"

[runtime]
threads = 1
channel_multiple = 8                  # every channel count is a multiple of this

[budget]
file_size = { max = "FILE_SIZE" }     # a hard cap, in absolute terms
latency = { max = "50%" }             # a hard cap, between the smallest (0 %) and the largest (100 %) network
flops = { coefficient = 0.1 }         # a price: cheaper networks win where the loss is about the same
"""


def main(folder: Path) -> int:
    """Build into ``folder``; return the exit code that the command line would give."""
    path = folder / "thermostat.toml"
    for file_size in ("20kB", "150kB"):
        path.write_text(PROFILE.replace("FILE_SIZE", file_size), encoding="utf-8")
        profile = nasdeploy.load_profile(path)
        # Takes seconds, and trains nothing: what the smallest and the largest network of the space cost here.
        found = nasdeploy.check_profile(profile)
        print(f"{profile.name} with {file_size}: {'can be met' if found.feasible else found.message}")
    for row in found.rows:
        ends = (format_quantity(value, row.metric) for value in (row.smallest, row.largest))
        print(f"  {row.metric}: {' to '.join(ends)}")

    result = nasdeploy.build(
        profiles=(str(path),),  # one path or name a device; all of them share one search
        output_dir=folder / "run",
        search={"num_steps": 20, "num_finalists": 1},
        retrain={"num_steps": 20},
        measure={"min_seconds": 0.1},
    )
    (one,) = result.profiles
    print(f"{one.profile}: {one.status}, {one.model}")
    for cap in one.caps:
        print(f"  {cap.text}")
    return result.exit_code


if __name__ == "__main__":
    if len(sys.argv) > 1:
        chosen = Path(sys.argv[1])
        chosen.mkdir(parents=True, exist_ok=True)
        sys.exit(main(chosen))
    with tempfile.TemporaryDirectory() as name:
        sys.exit(main(Path(name)))
