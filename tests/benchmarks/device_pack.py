"""A device without PyTorch, from the pack to the certified file, and how well its table agrees with one measured here.

    python tests/benchmarks/device_pack.py [--folder FOLDER] [--python python3.8 --onnxruntime any]

Makes a virtual environment that has only onnxruntime and numpy (and what pip installs with them): the device. Every
step is a command that a user would type: the pack of the default space's latency table, its run on one core of the
device, the import, a short build for the device, the run of that build's certification pack, the import, and the same
build again. Then the table is measured here as well, on the same core, and both predict 500 networks.

Needs the network once, for pip. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.calibration import rank_correlation
from nasdeploy.costs.latency_table import LatencyTable
from nasdeploy.costs.sessions import choose_cores
from nasdeploy.costs.table_models import stratified_architectures
from nasdeploy.pipeline.measuring import space_to_measure

DATA = "fashion-mnist"
NUM_NETWORKS = 500
PROFILE = '[runtime]\nthreads = 1\n{device}[budget]\nlatency = {{ max = "50%" }}\n'
SHORT_BUILD = ("search.num_steps=60", "retrain.num_steps=40", "baselines=false")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for all files; left out: one that is deleted")
    parser.add_argument("--python", default=sys.executable, help="of the device")
    parser.add_argument("--onnxruntime", default=version("onnxruntime"), help='version there, or "any"')
    parser.add_argument("--core", type=int, default=(choose_cores(1) or [0])[0], help="to measure on")
    return parser.parse_args()


class Desk:
    """The machine of the build, as its user sees it: commands in a folder, with a cache of its own."""

    def __init__(self, folder: Path, core: int) -> None:
        self.folder = folder
        self.core = core
        self.environment = {**os.environ, "NASDEPLOY_CACHE": str(folder / "cache")}
        root = str(Path(__file__).resolve().parent.parent.parent)
        self.environment["PYTHONPATH"] = root
        for name, device in (("board", "[device]\nby_hand = true\n"), ("here", "")):
            text = f'name = "{name}"\n' + PROFILE.format(device=device)
            (folder / f"{name}.toml").write_text(text, encoding="utf-8")

    def nasdeploy(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
        """Run a verb with --json and return what it prints."""
        text = self.run(sys.executable, "-m", "nasdeploy", *arguments, "--json", "-q", codes=codes)
        data: dict[str, Any] = json.loads(text)
        return data

    def run(self, *command: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run a command in the folder; return its standard output."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in codes:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout


class Device:
    """A Python with onnxruntime and numpy, and none of this process's environment."""

    def __init__(self, folder: Path, python: str, onnxruntime: str) -> None:
        subprocess.run([python, "-m", "venv", folder], check=True)
        self.python = folder / "bin" / "python"
        wanted = "onnxruntime" if onnxruntime == "any" else f"onnxruntime=={onnxruntime}"
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted, "numpy"]
        subprocess.run(pip, check=True)

    def packages(self) -> list[str]:
        """Return the names of what is installed."""
        command = [self.python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return sorted(row["name"] for row in json.loads(listed))

    def run(self, pack: Path, output: Path, core: int) -> float:
        """Run a pack on one core; return the seconds it took."""
        started = time.perf_counter()
        command = [self.python, pack, "--output", output, "--cores", str(core)]
        subprocess.run(command, cwd=output.parent, env={}, stderr=subprocess.DEVNULL, check=True)
        return time.perf_counter() - started


def table_of(measured: dict[str, Any]) -> LatencyTable:
    """Return the table that ``nasdeploy measure --json`` printed."""
    return LatencyTable.from_json(measured["runtimes"][0]["table"])


def compare(there: LatencyTable, here: LatencyTable) -> str:
    """Return how far the predictions of two tables lie apart."""
    space = space_to_measure(data=DATA)
    networks = stratified_architectures(space, NUM_NETWORKS, np.random.default_rng(7))
    choices = np.array([network.choices for network in networks])
    first, second = (table.cost_table(space).of(choices) for table in (there, here))
    ratio = first / second
    level = float(np.median(ratio))
    return (
        f"{len(networks)} networks predicted by both: device / here = {level:.3f} (median), mean difference "
        f"{100 * np.abs(ratio - 1).mean():.1f} %, {100 * np.abs(ratio / level - 1).mean():.1f} % beside that factor, "
        f"Spearman {rank_correlation(first, second):.4f}"
    )


def accuracy(name: str, table: LatencyTable) -> str:
    found = table.accuracy
    return (
        f"{name}: MAPE {100 * found.mape:.1f} %, Spearman {found.spearman:.3f} on {found.num_held_out} unseen "
        f"networks; measured twice {100 * found.ceiling:.1f} %; onnxruntime {table.machine['onnxruntime']}, "
        f"Python {table.machine['python']}"
    )


def certify(desk: Desk, device: Device) -> str:
    """Build for the device, carry the certification pack there and back, and build again."""
    settings = [part for setting in SHORT_BUILD for part in ("--set", setting)]
    command = ["build", "-p", "board.toml", "--data", DATA, "-o", "run", "--device", "cpu", *settings]
    first = desk.nasdeploy(*command, codes=(5,))["profiles"][0]
    seconds = device.run(
        desk.folder / "run/models/board/certify.zip", desk.folder / "certified.json", desk.core
    )
    desk.nasdeploy("measure", "--import", "certified.json")
    second = desk.nasdeploy(*command, codes=(0, 3, 5))["profiles"][0]
    return (
        f"build: {first['status']} (exit code {first['exit_code']}), {seconds:.0f} s on the device, then "
        f"{second['status']} (exit code {second['exit_code']}): {second['message']}"
    )


def report(desk: Desk, arguments: argparse.Namespace) -> None:
    device = Device(desk.folder / "device", arguments.python, arguments.onnxruntime)
    print(f"device: {', '.join(device.packages())}; core {desk.core}", flush=True)
    pack = desk.nasdeploy("measure", "-p", "board.toml", "--data", DATA, "--pack", "board.zip")
    print(
        f"pack: {pack['num_models']} models, {pack['num_requests']} requests, {pack['file_size'] / 1e6:.1f} MB"
    )
    seconds = device.run(desk.folder / "board.zip", desk.folder / "latency.json", desk.core)
    size = (desk.folder / "latency.json").stat().st_size
    started = time.perf_counter()
    there = table_of(desk.nasdeploy("measure", "--import", "latency.json"))
    imported = time.perf_counter() - started
    print(f"run: {seconds:.0f} s there, {size / 1e6:.1f} MB back, imported in {imported:.0f} s", flush=True)
    print(certify(desk, device), flush=True)
    here = table_of(desk.nasdeploy("measure", "-p", "here.toml", "--data", DATA, "--fresh"))
    print(accuracy("table of the device", there))
    print(accuracy("table measured here", here))
    print(compare(there, here))
    print(f"{here.machine['cpu']}, {here.machine['logical_cores']} cores, {here.machine['release']}")


def main() -> None:
    arguments = read_arguments()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        report(Desk(arguments.folder.resolve(), arguments.core), arguments)
        return
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        report(Desk(Path(folder), arguments.core), arguments)


if __name__ == "__main__":
    main()
