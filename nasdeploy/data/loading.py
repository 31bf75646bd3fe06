"""Where image sets come from: a known name, a folder or an .npz file."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol

from nasdeploy.data.embedded import FASHION_MNIST
from nasdeploy.data.types import Dataset
from nasdeploy.errors import ConfigError, DataError

ENTRY_POINT_GROUP = "nasdeploy.datasets"
DEFAULT_VALID_FRACTION = 0.15


class DatasetLoader(Protocol):
    """What an entry point of the group ``nasdeploy.datasets`` loads to."""

    def __call__(self, *, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
        """Return the dataset; :func:`nasdeploy.data.assembly.assemble_dataset` does the dividing."""


def fashion_mnist(*, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
    """Return the embedded part of Fashion-MNIST: 10 000 + 2 000 (test) images, 28x28, grey, balanced."""
    # Here and below: Pillow is imported when images are read, not when somebody wants the types.
    from nasdeploy.data.npz import load_npz

    return load_npz(
        FASHION_MNIST,
        name="fashion-mnist",
        source="fashion-mnist",
        image_size=image_size,
        seed=seed,
        valid_fraction=valid_fraction,
    )


BUILTIN_DATASETS: dict[str, DatasetLoader] = {
    "fashion-mnist": fashion_mnist,
}


def plugin_datasets(points: Iterable[EntryPoint]) -> dict[str, EntryPoint]:
    """Return the entry points by name. Raises ConfigError for one that a built-in or another plug-in has."""
    found: dict[str, EntryPoint] = {}
    for point in points:
        taken = found[point.name].value if point.name in found else None
        if point.name in BUILTIN_DATASETS:
            taken = "nasdeploy itself"
        if taken is not None:
            raise ConfigError(
                f"dataset '{point.name}' is defined twice: by {taken} and by {point.value}; uninstall one"
            )
        found[point.name] = point
    return found


def dataset_names() -> tuple[str, ...]:
    """Return the names that :func:`load_dataset` knows."""
    return (*BUILTIN_DATASETS, *plugin_datasets(entry_points(group=ENTRY_POINT_GROUP)))


def load_dataset(
    source: str, *, image_size: int | None = None, seed: int, valid_fraction: float = DEFAULT_VALID_FRACTION
) -> Dataset:
    """Return the image set ``source``: a known name (wins over a path: write ``./name``), a folder, an .npz.

    image_size: the side in pixels to resize to (shorter side, bilinear, antialias; centre crop), or None
    where the images are squares of one size already. seed: of the division where the data has no splits.
    Raises DataError for anything wrong with the data, ConfigError for a wrong argument.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size = {image_size}; expected a positive number of pixels, such as 32")
    plugins = plugin_datasets(entry_points(group=ENTRY_POINT_GROUP))
    if source in BUILTIN_DATASETS:
        return BUILTIN_DATASETS[source](image_size=image_size, seed=seed, valid_fraction=valid_fraction)
    if source in plugins:
        loader: DatasetLoader = plugins[source].load()
        return loader(image_size=image_size, seed=seed, valid_fraction=valid_fraction)
    return _load_path(source, image_size=image_size, seed=seed, valid_fraction=valid_fraction)


def _load_path(source: str, *, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
    path = Path(source).expanduser()
    if path.is_dir():
        from nasdeploy.data.folder import load_folder

        return load_folder(
            path,
            name=path.resolve().name,
            source=source,
            image_size=image_size,
            seed=seed,
            valid_fraction=valid_fraction,
        )
    if path.is_file() and path.suffix.lower() == ".npz":
        from nasdeploy.data.npz import load_npz

        return load_npz(
            path,
            name=path.stem,
            source=source,
            image_size=image_size,
            seed=seed,
            valid_fraction=valid_fraction,
        )
    problem = "is neither a folder nor an .npz file" if path.exists() else "not found"
    names = ", ".join(dataset_names())
    raise DataError(
        f"data: '{source}' {problem}; expected a folder of images, an .npz file or one of {names}"
    )
