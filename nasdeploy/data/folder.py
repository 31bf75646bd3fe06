"""Image sets in folders: ``train/<class>/…``, maybe ``valid/`` (``val/``), ``test/``; or ``<class>/…``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nasdeploy.data.assembly import LabelledImages, assemble_dataset
from nasdeploy.data.images import image_suffixes, in_threads, read_image, stack_pixels, stored_size
from nasdeploy.data.types import Dataset
from nasdeploy.errors import DataError
from nasdeploy.spaces.mobile import MAX_SIZE

PART_OF_FOLDER = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
DESKTOP_FILES = frozenset(
    {"thumbs.db", "desktop.ini", "__macosx"}
)  # left behind by file managers; so are .hidden ones


@dataclass(frozen=True, slots=True, kw_only=True)
class FileList:
    """Image files of one split, in a fixed order, with their labels."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def load_folder(
    root: Path, *, name: str, source: str, image_size: int | None, seed: int, valid_fraction: float
) -> Dataset:
    """Return the image set under ``root``; classes are the sorted names of the class folders of train.

    One channel if all images of all splits are grey, else three. Without ``image_size`` all images must be
    squares of one size. Raises DataError naming the file or folder that is wrong.
    """
    folders = _part_folders(root)
    class_names = [folder.name for folder in _subfolders(folders["train"])]
    files = {part: _list_files(folder, class_names) for part, folder in folders.items()}
    parts = _read_parts(files, image_size)
    return assemble_dataset(
        name=name,
        source=source,
        class_names=class_names,
        train=parts["train"],
        valid=parts.get("valid"),
        test=parts.get("test"),
        seed=seed,
        valid_fraction=valid_fraction,
    )


def _part_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; {"train": root} where the classes lie directly under ``root``."""
    subfolders = _subfolders(root)
    parts = {folder.name: folder for folder in subfolders if folder.name in PART_OF_FOLDER}
    if not parts:
        return {"train": root}
    if "train" not in parts:
        raise DataError(
            f"{root}: has {', '.join(sorted(parts))} but no train; expected train/<class>/<image>"
        )
    if {"valid", "val"} <= parts.keys():
        raise DataError(f"{root}: has both valid and val; expected one of them")
    for folder in subfolders:
        # Passing over 'testing/' in silence would replace the user's test images by a random share of train.
        if folder.name not in parts:
            raise DataError(
                f"{folder}: unexpected folder beside train; expected only valid (or val) and test"
            )
    return {PART_OF_FOLDER[name]: folder for name, folder in parts.items()}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_clutter(path))


def _is_clutter(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in DESKTOP_FILES


def _list_files(folder: Path, class_names: Sequence[str]) -> FileList:
    """Return the images of one split, class by class. Valid and test may lack a class, not add one."""
    paths: list[Path] = []
    labels: list[int] = []
    class_folders = _subfolders(folder)
    if not class_folders:
        raise DataError(f"{folder}: no class folders; expected {folder.name}/<class>/<image>")
    for class_folder in class_folders:
        if class_folder.name not in class_names:
            raise DataError(
                f"{class_folder}: class '{class_folder.name}' is not in train; expected a class of train"
            )
        found = _images_below(class_folder)
        if not found:
            raise DataError(f"{class_folder}: no images in this class folder; add some or remove the folder")
        paths += found
        labels += [class_names.index(class_folder.name)] * len(found)
    return FileList(paths=tuple(paths), labels=tuple(labels))


def _images_below(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if _is_clutter(path):
            continue
        if path.is_dir():
            found += _images_below(path)
        elif path.suffix.lower() in image_suffixes():
            found.append(path)
        else:
            raise DataError(
                f"{path}: not an image by its suffix; expected .png, .jpg or another that Pillow opens"
            )
    return found


def _read_parts(files: dict[str, FileList], image_size: int | None) -> dict[str, LabelledImages]:
    """Decode all splits together: whether they are grey, and their size, is one fact about the whole set."""
    paths = [path for listed in files.values() for path in listed.paths]
    if image_size is None:
        _check_sizes(paths)
    images = stack_pixels(in_threads(partial(read_image, image_size=image_size), paths))
    parts = {}
    start = 0
    for part, listed in files.items():
        stop = start + len(listed.paths)
        labels = np.array(listed.labels, dtype=np.int64)
        parts[part] = LabelledImages(images=images[start:stop], labels=labels)
        start = stop
    return parts


def _check_sizes(paths: Sequence[Path]) -> None:
    """Raise DataError unless all images are squares of one size. Reads only headers: it fails early."""
    sizes = in_threads(stored_size, paths)
    suggestion = f"--image-size {min(MAX_SIZE, *(min(size) for size in sizes))} resizes and crops them"
    first = sizes[0]
    for path, size in zip(paths, sizes, strict=True):
        if size != first:
            raise DataError(
                f"{paths[0]} is {first[0]}x{first[1]} pixels but {path} is {size[0]}x{size[1]}; "
                f"expected squares of one size; {suggestion}"
            )
    if first[0] != first[1]:
        raise DataError(
            f"{paths[0]} is {first[0]}x{first[1]} pixels, as are all; expected squares; {suggestion}"
        )
