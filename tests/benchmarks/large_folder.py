"""Peak memory of a build on a small and on a large folder of images: it must not grow with the folder.

    python tests/benchmarks/large_folder.py [--files 5000 50000] [--image-size 64] [--steps 60] [--folder DIR]

Each folder holds JPEG files of about 100x100 pixels in ten classes: gratings of ten directions and colours, in random
phase, with noise. It is loaded twice, without and with a cache of its own, and then ``nasdeploy build`` runs on it with
a short schedule; each in a process of its own. Peak memory is the resident set of that process at its highest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 10
MIBI = 2**20
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
LOADING = (
    "import sys; from nasdeploy.data import load_dataset; "
    "load_dataset(sys.argv[1], image_size=int(sys.argv[2]), seed=0).fingerprint()"
)


def make_folder(root: Path, *, num_files: int, seed: int = 0) -> Path:
    """Write ``num_files`` images below ``root``, as many of every class as of any other."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:120, 0:120] / 16.0
    angles = np.pi * np.arange(NUM_CLASSES) / NUM_CLASSES
    waves = [np.cos(a) * x + np.sin(a) * y for a in angles]
    colours = 60.0 + 60.0 * np.stack([np.cos(2 * angles), np.sin(2 * angles), np.cos(4 * angles)], axis=1)
    noise = rng.normal(0.0, 25.0, (200, 120, 120, 1))
    for label in range(NUM_CLASSES):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
    for n in range(num_files):
        label = n % NUM_CLASSES
        wave = 60.0 * np.sin(2 * np.pi * (waves[label] + rng.uniform()))[:, :, np.newaxis]
        pixels = np.clip(colours[label] + wave + noise[rng.integers(len(noise))] + 30.0, 0, 255).astype(
            np.uint8
        )
        height, width = rng.integers(90, 121, 2)
        Image.fromarray(pixels[:height, :width]).save(root / f"class{label}" / f"{n:06}.jpg", quality=80)
    return root


def run(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Return the seconds and the peak memory in bytes of ``command``."""
    started = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 3):  # 3: a budget that this machine does not meet
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * MAXRSS_UNIT


def build_command(images: Path, output: Path, arguments: argparse.Namespace) -> list[str]:
    steps = arguments.steps
    settings = [
        f"search.num_steps={steps}",
        f"retrain.num_steps={steps}",
        "search.num_finalists=2",
        "measure.min_seconds=0.2",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    return [
        *(sys.executable, "-m", "nasdeploy", "build", "--data", str(images), "-o", str(output), "-q"),
        *("--image-size", str(arguments.image_size), "-p", "cpu-roomy", "--seed", "0", *options),
    ]


def measure(folder: Path, num_files: int, arguments: argparse.Namespace) -> str:
    """Return a row of the table."""
    images = make_folder(folder / f"images{num_files}", num_files=num_files)
    environment = os.environ | {"NASDEPLOY_CACHE": str(folder / f"cache{num_files}")}
    loading = [sys.executable, "-c", LOADING, str(images), str(arguments.image_size)]
    first, _ = run(loading, environment)
    again, loaded = run(loading, environment)
    output = folder / f"run{num_files}"
    seconds, peak = run(build_command(images, output, arguments), environment)
    metrics = json.loads((output / "models" / "cpu-roomy" / "metrics.json").read_text(encoding="utf-8"))
    cached = sum(path.stat().st_size for path in folder.glob(f"cache{num_files}/*.npy"))
    return (
        f"| {num_files} | {cached / MIBI:.0f} MiB | {first:.1f} s | {again:.1f} s | {loaded / MIBI:.0f} MiB "
        f"| {seconds:.0f} s | {peak / MIBI:.0f} MiB | {100 * metrics['accuracy']['top1']:.1f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, nargs="+", default=[5_000, 50_000])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="where the images go; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="nasdeploy-") as name:
        rows = [measure(Path(name), num_files, arguments) for num_files in arguments.files]
    print("| files | cache | first load | next load | peak of it | build | peak of it | top-1 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
