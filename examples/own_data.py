"""Build from a folder of one's own images: any shapes, grey and colour, and classes of unequal size.

Run it with ``python examples/own_data.py [FOLDER]``. It draws the images first; a real folder looks the same:
one sub-folder a class. The schedule is cut to seconds, so the accuracy is poor.
"""

# CI: run

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

import nasdeploy

IMAGES_PER_CLASS = {"bolt": 120, "nut": 80, "washer": 40}
SHAPES = ((40, 40), (36, 48), (64, 44))  # height, width


def write_images(folder: Path) -> None:
    """Write every third image in colour as JPEG, the others in grey as PNG."""
    rng = np.random.default_rng(0)
    for label, count in IMAGES_PER_CLASS.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = draw(label, SHAPES[number % len(SHAPES)], rng)
            image = Image.fromarray(pixels)
            if number % 3 == 0:
                image.convert("RGB").save(folder / label / f"{number:03}.jpg")
            else:
                image.save(folder / label / f"{number:03}.png")


def draw(label: str, shape: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a grey image (height, width) of one part somewhere near the middle, with noise."""
    rows, columns = np.indices(shape)
    y, x = np.array(shape) / 2 + rng.uniform(-4, 4, 2)
    distance = np.hypot(rows - y, columns - x)
    part = {
        "bolt": (np.abs(columns - x) < 4) | (distance < 7),
        "nut": (np.maximum(np.abs(rows - y), np.abs(columns - x)) < 12) & (distance > 5),
        "washer": (distance < 14) & (distance > 8),
    }[label]
    return np.clip(np.where(part, 170, 60) + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)


def main(folder: Path) -> int:
    """Build into ``folder``; return the exit code that the command line would give."""
    images = folder / "parts"
    if not images.exists():
        write_images(images)
    result = nasdeploy.build(
        data=str(images),  # there is no test/ in it: some images of each class are set aside, by the seed
        image_size=32,  # the shorter side becomes 32 pixels, and the centre is cropped
        augment="standard",  # crops, flips, erased rectangles, colours
        profiles=("cpu-middle",),
        output_dir=folder / "run",
        search={"num_steps": 20, "batch_size": 32, "num_finalists": 1},
        retrain={"num_steps": 40, "batch_size": 32},
        measure={"min_seconds": 0.1},
    )
    (one,) = result.profiles
    accuracy = "n/a" if one.accuracy is None else f"{100 * one.accuracy:.1f} %"
    print(f"{one.profile}: {one.status}, {accuracy}, {one.model}")
    print(f"report, with the accuracy of each class: {result.report}")
    return result.exit_code


if __name__ == "__main__":
    if len(sys.argv) > 1:
        chosen = Path(sys.argv[1])
        chosen.mkdir(parents=True, exist_ok=True)
        sys.exit(main(chosen))
    with tempfile.TemporaryDirectory() as name:
        sys.exit(main(Path(name)))
