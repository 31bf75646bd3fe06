"""Image sets in folders: ``train/<class>/…``, maybe ``valid/`` (``val/``), ``test/``; or ``<class>/…``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nasdeploy.data.contents import Contents, Request
from nasdeploy.data.encoded import ImageFiles, decode_parts
from nasdeploy.data.images import image_suffixes
from nasdeploy.errors import DataError

PART_OF_FOLDER = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
DESKTOP_FILES = frozenset(
    {"thumbs.db", "desktop.ini", "__macosx"}
)  # left behind by file managers; so are .hidden ones


@dataclass(frozen=True, slots=True, kw_only=True)
class FileList:
    """Image files of one split, in a fixed order, with their labels."""

    paths: list[str]
    labels: list[int]


def is_class_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with folders in it."""
    return path.is_dir() and bool(_subfolders(path))


def load_folder(request: Request) -> Contents:
    """Return the image set under ``request.path``; classes are the sorted names of the class folders of train.

    One channel if all images of all splits are grey, else three. Without ``image_size`` all images must be
    squares of one size. Raises DataError naming the file or folder that is wrong.
    """
    folders = _part_folders(request.path)
    class_names = [folder.name for folder in _subfolders(folders["train"])]
    files = {part: _list_files(folder, class_names) for part, folder in folders.items()}
    encoded = ImageFiles([path for listed in files.values() for path in listed.paths])
    labels = {part: listed.labels for part, listed in files.items()}
    splits = decode_parts(encoded, labels, request)
    return Contents(class_names=tuple(class_names), **splits)


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
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not _is_clutter(entry.name)]
    return [folder / name for name in sorted(names)]


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in DESKTOP_FILES


def _list_files(folder: Path, class_names: Sequence[str]) -> FileList:
    """Return the images of one split, class by class. Valid and test may lack a class, not add one."""
    paths: list[str] = []
    labels: list[int] = []
    class_folders = _subfolders(folder)
    if not class_folders:
        raise DataError(f"{folder}: no class folders; expected {folder.name}/<class>/<image>")
    for class_folder in class_folders:
        if class_folder.name not in class_names:
            raise DataError(
                f"{class_folder}: class '{class_folder.name}' is not in train; expected a class of train"
            )
        found = _images_below(str(class_folder))
        if not found:
            raise DataError(f"{class_folder}: no images in this class folder; add some or remove the folder")
        paths += found
        labels += [class_names.index(class_folder.name)] * len(found)
    return FileList(paths=paths, labels=labels)


def _images_below(folder: str) -> list[str]:
    """Return the paths, as text: a large set has more of them than would fit into memory as objects with parts."""
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _is_clutter(entry.name):
                continue
            if entry.is_dir():
                found += _images_below(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in image_suffixes():
                found.append(entry.path)
            else:
                raise DataError(
                    f"{entry.path}: not an image by its suffix; expected .png, .jpg or another that Pillow opens"
                )
    return found
