"""Build for three profiles on an image set in packed form and print a table.

    python tests/benchmarks/image_set.py cifar10.npz --train 5000 --output-dir runs/cifar10 [--time-budget 10min]

The file holds ``train_blob``/``train_offsets`` (encoded images one after the other) or ``train_images`` (pixels), and
likewise ``test_*``. ``--train`` takes that many training images, the same number of every class; all test images count.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import nasdeploy


def _images(data: Any, part: str, chosen: np.ndarray) -> np.ndarray:
    if f"{part}_images" in data:
        return np.asarray(data[f"{part}_images"])[chosen]
    blob, offsets = data[f"{part}_blob"], data[f"{part}_offsets"]
    decoded = [
        np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes()))) for i in chosen
    ]
    return np.stack(decoded)


def _balanced(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    classes = np.unique(labels)
    each = count // len(classes)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes])


def repack(source: Path, target: Path, *, num_train: int) -> None:
    """Write ``source`` as pixels, with ``num_train`` training images, the same number of every class."""
    data = np.load(source, allow_pickle=False)
    chosen = _balanced(data["train_labels"], num_train, np.random.default_rng(0))
    everything = np.arange(len(data["test_labels"]))
    np.savez(
        target,
        train_images=_images(data, "train", chosen),
        train_labels=data["train_labels"][chosen],
        test_images=_images(data, "test", everything),
        test_labels=data["test_labels"],
        class_names=data["class_names"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--time-budget", default=None)
    parser.add_argument("--augment", default="standard")
    parser.add_argument("--image-size", type=int, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, f"{arguments.source.stem}.npz")
        repack(arguments.source, packed, num_train=arguments.train)
        started = time.perf_counter()
        result = nasdeploy.build(
            data=str(packed),
            output_dir=arguments.output_dir,
            time_budget=arguments.time_budget,
            augment=arguments.augment,
            image_size=arguments.image_size,
        )
        seconds = time.perf_counter() - started
    print("| profile | status | top-1 (ONNX, test) | latency p50 | params | FLOPs | file |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in result.profiles:
        accuracy = "n/a" if one.accuracy is None else f"{100 * one.accuracy:.2f} %"
        print(
            f"| {one.profile} | {one.status} | {accuracy} | {one.latency_ms:.3f} ms | {one.params} | {one.flops} "
            f"| {one.file_size} B |"
        )
    print(json.dumps({"seconds": round(seconds, 1), "train": arguments.train}))


if __name__ == "__main__":
    main()
