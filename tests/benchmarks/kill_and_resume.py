"""Kill a small build at random moments and repeat the command: python tests/benchmarks/kill_and_resume.py

Every killed build gets SIGKILL once, at a random share of the time of an undisturbed one, and then the same command.
They use the latency tables of the first, as ``--latency-from`` does, and must end with the same files. A few more are
killed in the first third of their time without a stored table: another table may lead to other networks, so that these
must only end well.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = [
    *("--set", "search.num_steps=240", "--set", "search.num_finalists=3", "--set", "retrain.num_steps=240"),
    *("--set", "measure.min_seconds=0.2", "-p", "cpu-middle", "-p", "cpu-roomy", "-q"),
]
FILES = ("model.onnx", "weights.safetensors", "architecture.json")


def _command(folder: Path, borrowed: Path | None) -> list[str]:
    borrow = ["--latency-from", str(borrowed)] if borrowed else []
    return [sys.executable, "-m", "nasdeploy", "build", "-o", str(folder), *SETTINGS, *borrow]


def _contents(folder: Path) -> dict[str, bytes]:
    profiles = sorted(path.name for path in (folder / "models").iterdir())
    return {f"{p}/{file}": (folder / "models" / p / file).read_bytes() for p in profiles for file in FILES}


def _killed_after(seconds: float, command: list[str]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--fresh", type=int, default=3, help="kills of builds that measure their own table")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    differing = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        subprocess.run(_command(root / "first", None), check=True, stdout=subprocess.DEVNULL)
        started = time.perf_counter()
        subprocess.run(_command(root / "second", root / "first"), check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - started
        expected = _contents(root / "second")
        for kill in range(arguments.kills):
            folder = root / f"killed{kill}"
            moment = rng.uniform(0.05, 1.0) * whole
            command = _command(folder, root / "first")
            _killed_after(moment, command)
            code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
            wrong = (
                [] if code else [file for file, data in _contents(folder).items() if data != expected[file]]
            )
            differing += bool(code or wrong)
            print(
                f"killed after {moment:5.1f} of {whole:.1f} s: exit {code}, {wrong or 'the same files'}",
                flush=True,
            )
        for kill in range(arguments.fresh):
            command = _command(root / f"fresh{kill}", None)
            moment = rng.uniform(0.05, 0.35) * whole
            _killed_after(moment, command)
            code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
            differing += bool(code)
            print(f"no table stored, killed after {moment:5.1f} s: exit {code}", flush=True)
    print(f"{differing} of {arguments.kills + arguments.fresh} builds went wrong")
    return min(differing, 1)


if __name__ == "__main__":
    sys.exit(main())
