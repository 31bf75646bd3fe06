"""Where image sets come from: a known name, a function in a Python file, a plug-in, or a path."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Protocol

from nasdeploy.data.assembly import assemble_dataset
from nasdeploy.data.contents import MEMORY_LIMIT, Progress, Request
from nasdeploy.data.embedded import FASHION_MNIST
from nasdeploy.data.types import Dataset
from nasdeploy.errors import ConfigError, DataError
from nasdeploy.plugins import call_plugin, entry_points_of, is_reference, load_entry_point, load_reference

ENTRY_POINT_GROUP = "nasdeploy.datasets"
DEFAULT_VALID_FRACTION = 0.15
WHAT = "dataset"


class DatasetLoader(Protocol):
    """What an entry point of the group ``nasdeploy.datasets``, or "file.py:function", is."""

    def __call__(self, *, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
        """Return the dataset; :func:`nasdeploy.data.assembly.assemble_dataset` does the dividing."""


def fashion_mnist(*, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
    """Return the embedded part of Fashion-MNIST: 10 000 + 2 000 (test) images, 28x28, grey, balanced."""
    from nasdeploy.data.npz import load_npz

    contents = load_npz(Request(path=FASHION_MNIST, image_size=image_size))
    return assemble_dataset(
        name="fashion-mnist",
        source="fashion-mnist",
        class_names=contents.class_names,
        train=contents.train,
        test=contents.test,
        seed=seed,
        valid_fraction=valid_fraction,
    )


BUILTIN_DATASETS: dict[str, DatasetLoader] = {
    "fashion-mnist": fashion_mnist,
}


def dataset_names() -> tuple[str, ...]:
    """Return the names that :func:`load_dataset` knows. Raises ConfigError for one that is defined twice."""
    points = entry_points_of(ENTRY_POINT_GROUP, builtin_names=BUILTIN_DATASETS, what=WHAT)
    return (*BUILTIN_DATASETS, *points)


def load_dataset(
    source: str,
    *,
    image_size: int | None = None,
    seed: int,
    valid_fraction: float = DEFAULT_VALID_FRACTION,
    progress: Progress | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Dataset:
    """Return the image set ``source``: a known name, "file.py:function" (a :class:`DatasetLoader`), or a path.

    A name wins over a path: write ``./name``. image_size: the side in pixels to resize to (shorter side, bilinear,
    antialias; centre crop), or None where the images are squares of one size already. seed: of the division where
    the data has no splits. progress: told the share of the images that are decoded or resized. memory_limit: bytes of
    such images above which they stay in files of the cache (:mod:`nasdeploy.data.cache`); the dataset is the same.
    Raises DataError for anything wrong with the data, ConfigError for a wrong argument.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size = {image_size}; expected a positive number of pixels, such as 32")
    loader = _named_loader(source)
    if loader is not None:
        return _call(loader, source, image_size=image_size, seed=seed, valid_fraction=valid_fraction)
    path = Path(source).expanduser()
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        raise DataError(
            f"data: '{source}' not found; expected a folder, a file, a function such as my_data.py:load, or one of "
            f"{', '.join(dataset_names())}"
        )
    from nasdeploy.data.layouts import load_contents  # here: it imports Pillow, which the names do without

    request = Request(path=path, image_size=image_size, memory_limit=memory_limit, progress=progress)
    contents = load_contents(request, source=source)
    return assemble_dataset(
        name=path.resolve().name if path.is_dir() else path.stem,
        source=source,
        class_names=contents.class_names,
        train=contents.train,
        valid=contents.valid,
        test=contents.test,
        seed=seed,
        valid_fraction=valid_fraction,
    )


def _named_loader(source: str) -> object | None:
    """Return what a name or a reference stands for, None for a path."""
    if source in BUILTIN_DATASETS:
        return BUILTIN_DATASETS[source]
    if is_reference(source):
        return load_reference(source, what=WHAT)
    points = entry_points_of(ENTRY_POINT_GROUP, builtin_names=BUILTIN_DATASETS, what=WHAT)
    return load_entry_point(points[source], what=WHAT) if source in points else None


def _call(
    loader: object, source: str, *, image_size: int | None, seed: int, valid_fraction: float
) -> Dataset:
    if callable(loader):
        loader = partial(loader, image_size=image_size, seed=seed, valid_fraction=valid_fraction)
    dataset = call_plugin(loader, what=WHAT, source=source)
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{WHAT}: {source} returned a {type(dataset).__name__}; expected a nasdeploy.data.Dataset, as "
            "assemble_dataset makes it"
        )
    return dataset
