"""Build for two devices from Python: one own profile, one built in, on a small part of the sample images.

Run it with ``python examples/python_api.py [FOLDER]``. The schedule is cut to seconds, so the accuracy is poor.
"""

# CI: run

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nasdeploy

PROFILE = """
name = "door-camera"
description = "one core of a small camera; the file must fit into a flash partition"

[runtime]
threads = 1
channel_multiple = 8

[budget]
latency   = { max = "30%" }
params    = { max = "100k" }
file_size = { max = "500kB" }
"""


def main(folder: Path) -> int:
    """Build into ``folder``; return the exit code that the command line would give."""
    profile = folder / "door-camera.toml"
    profile.write_text(PROFILE, encoding="utf-8")
    result = nasdeploy.build(
        profiles=(str(profile), "cpu-roomy"),
        output_dir=folder / "run",
        search={"num_steps": 30, "num_finalists": 2},
        retrain={"num_steps": 30},
        measure={"min_seconds": 0.1},
    )
    for one in result.profiles:
        accuracy = "n/a" if one.accuracy is None else f"{100 * one.accuracy:.1f} %"
        print(f"{one.profile}: {one.status}, {accuracy}, {one.params} parameters, {one.model}")
        for cap in one.caps:
            print(f"  {cap.text}")
    print(f"report: {result.report}")
    return result.exit_code


if __name__ == "__main__":
    if len(sys.argv) > 1:
        chosen = Path(sys.argv[1])
        chosen.mkdir(parents=True, exist_ok=True)
        sys.exit(main(chosen))
    with tempfile.TemporaryDirectory() as name:
        sys.exit(main(Path(name)))
