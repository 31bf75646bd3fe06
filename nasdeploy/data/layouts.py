"""The layouts of image sets on disk: how each is recognised, and what reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nasdeploy.data.cifar import is_binary_cifar, is_python_cifar, load_cifar
from nasdeploy.data.contents import Contents, Request
from nasdeploy.data.folder import is_class_folder, load_folder
from nasdeploy.data.idx import is_idx_folder, load_idx
from nasdeploy.data.npz import is_npz, load_npz
from nasdeploy.data.parquet import is_parquet, load_parquet
from nasdeploy.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """detect: whether a path that exists is of this layout, from names alone. load: raises DataError."""

    name: str
    detect: Callable[[Path], bool]
    load: Callable[[Request], Contents]


# The first that fits is taken: class folders last, because any folder with folders in it looks like them.
LAYOUTS = (
    Layout(name="an .npz file (train_images or train_blob)", detect=is_npz, load=load_npz),
    Layout(name="parquet (train-*.parquet, or one file)", detect=is_parquet, load=load_parquet),
    Layout(name="CIFAR binary (data_batch_1.bin or train.bin)", detect=is_binary_cifar, load=load_cifar),
    Layout(name="CIFAR python (data_batch_1 or train)", detect=is_python_cifar, load=load_cifar),
    Layout(name="IDX (train-images-idx3-ubyte)", detect=is_idx_folder, load=load_idx),
    Layout(
        name="class folders (<class>/<image> or train/<class>/<image>)",
        detect=is_class_folder,
        load=load_folder,
    ),
)


def load_contents(request: Request, *, source: str) -> Contents:
    """Return what the file or folder ``request.path`` holds; source: as the user wrote it.

    Raises DataError where it is of no known layout, and for what is wrong with the data.
    """
    try:
        for layout in LAYOUTS:
            if layout.detect(request.path):
                return layout.load(request)
    except OSError as error:  # a folder that may not be listed, a loop of links
        raise DataError(
            f"data: {error.filename or source}: {error.strerror or error}; expected files that can be read"
        ) from error
    kind = "a folder" if request.path.is_dir() else "a file"
    known = "; ".join(layout.name for layout in LAYOUTS)
    raise DataError(f"data: '{source}' is {kind} of no known layout; expected one of: {known}")
