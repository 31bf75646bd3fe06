"""Make nasdeploy/data/embedded/fashion_mnist_12k.npz from the original Fashion-MNIST.

    python examples/make_embedded_fashion_mnist.py ORIGINAL [--out FILE]

ORIGINAL is the folder of the four ``*-ubyte.gz`` files (https://github.com/zalandoresearch/fashion-mnist), or
an .npz file with train_images, train_labels, test_images and test_labels. 1 000 training and 200 test images
of each class are drawn with a fixed seed and kept as they are. The same original gives the same file, byte
for byte, with the same zlib.
"""

from __future__ import annotations

import argparse
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGES_PER_CLASS = {"train": 1000, "test": 200}
IDX_PREFIX = {"train": "train", "test": "t10k"}
SEED = 2017
DEFAULT_OUT = Path(__file__).parents[1] / "nasdeploy" / "data" / "embedded" / "fashion_mnist_12k.npz"

Bytes = npt.NDArray[np.uint8]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the embedded subset of Fashion-MNIST.")
    parser.add_argument("original", type=Path, help="folder of the four .gz files, or an .npz file")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(SEED)
    members: dict[str, npt.NDArray[np.generic]] = {"class_names": np.array(CLASS_NAMES)}
    for part, count in IMAGES_PER_CLASS.items():
        images, labels = read_original(options.original, part)
        chosen = balanced_indices(labels, count, rng)
        members[f"{part}_images"], members[f"{part}_labels"] = images[chosen], labels[chosen]
    write_npz(options.out, members)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


def read_original(original: Path, part: str) -> tuple[Bytes, Bytes]:
    """Return images (N, 28, 28) and labels (N,) of ``part`` ("train" or "test")."""
    if original.is_dir():
        prefix = original / IDX_PREFIX[part]
        images = read_idx(Path(f"{prefix}-images-idx3-ubyte.gz"), num_axes=3)
        labels = read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"), num_axes=1)
    else:
        with np.load(original, allow_pickle=False) as archive:
            images, labels = archive[f"{part}_images"], archive[f"{part}_labels"]
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)


def read_idx(path: Path, *, num_axes: int) -> Bytes:
    """Return the array in a gzipped IDX file: 0, 0, type 8 (uint8), number of axes, sizes, data."""
    content = gzip.decompress(path.read_bytes())
    if content[:4] != bytes([0, 0, 8, num_axes]):
        raise SystemExit(
            f"{path}: begins with {content[:4].hex()}; expected an IDX file of uint8 with {num_axes} axes"
        )
    shape = np.frombuffer(content, ">u4", count=num_axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape.tolist())


def balanced_indices(labels: Bytes, per_class: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Return ``per_class`` random indices of each class; class by class, since that compresses better."""
    members = (np.flatnonzero(labels == label) for label in range(len(CLASS_NAMES)))
    return np.concatenate([np.sort(rng.permutation(indices)[:per_class]) for indices in members])


def write_npz(path: Path, members: dict[str, npt.NDArray[np.generic]]) -> None:
    """Write what numpy.savez_compressed would, but without the clock and the platform in the headers."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in members.items():
            content = io.BytesIO()
            np.lib.format.write_array(
                content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False
            )
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content.getvalue(), compresslevel=9)


if __name__ == "__main__":
    main()
