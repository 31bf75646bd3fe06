"""Decoded and resized images in files, so that a large set is made once: whole files or none.

A file is a plain .npy of uint8 (N, C, H, W). Its name says what it is of: the path and the image size, then a hash of
all files that were read, their sizes and times. It may be deleted at any time, and is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt
import torch

from nasdeploy.data.stored import Images, PixelFile, StoredImages
from nasdeploy.errors import DataError
from nasdeploy.files import CACHE_VARIABLE, cache_folder

FORMAT = 1

Shape = tuple[int, int, int, int]

Write = Callable[[int, npt.NDArray[np.uint8]], None]
"""Takes the number of the first image and images (n, C, H, W); from any thread, in any order."""


def cache_entry(path: Path, files: Sequence[str], *, image_size: int | None) -> CacheEntry:
    """Return the place for the images that are made of ``path``, which are in ``files``: ask before reading these.

    Raises DataError if one is gone.
    """
    whole = path.resolve()
    place = _digest(f"{whole}\0{image_size}")
    # Pillow's decoders differ in a pixel here and there from version to version.
    key = hashlib.sha256(f"{FORMAT}\0{version('pillow')}\0{place}".encode())
    for file in files:
        try:
            found = os.stat(file)
        except OSError as error:
            raise DataError(
                f"{file}: {error.strerror}; expected files that nobody changes meanwhile"
            ) from error
        inside = file.removeprefix(str(path))  # however the path is written, and wherever one is
        key.update(f"\0{inside}\0{found.st_size}\0{found.st_mtime_ns}".encode(errors="surrogateescape"))
    return CacheEntry(folder=cache_folder(), place=place, key=key.hexdigest()[:16])


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """A file of decoded images that exists or not. place: which set; key: its present state."""

    folder: Path
    place: str
    key: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.place}-{self.key}.npy"

    def part(self, name: str) -> CacheEntry:
        """Return the place of one part of the set, a file of its own."""
        # No "-": what begins with "place-" are the files of the whole set.
        return replace(self, place=f"{self.place}.{name}")

    def find(self) -> PixelFile | None:
        """Return the file if it is there and whole."""
        try:
            return PixelFile(self.path)
        except (OSError, ValueError):
            return None

    def make(self, shape: Shape, fill: Callable[[Write], None]) -> PixelFile:
        """Return the file, filled by ``fill`` unless another process has made it meanwhile.

        Raises DataError where the folder cannot be written or is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.path.with_suffix(".lock")):
                return self.find() or self._make(shape, fill)
        except OSError as error:
            gibibytes = np.prod(shape, dtype=np.int64) / 2**30
            raise DataError(
                f"{self.folder}: cannot hold the decoded images, {gibibytes:.1f} GiB ({error.strerror or error}); "
                f"free the space, or set {CACHE_VARIABLE} to a folder that has it"
            ) from error

    def _make(self, shape: Shape, fill: Callable[[Write], None]) -> PixelFile:
        self._remove_leftovers()
        part = self.path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                start = file.tell()
                image_bytes = int(np.prod(shape[1:]))
                _reserve(file.fileno(), start + shape[0] * image_bytes)

                def write(first: int, images: npt.NDArray[np.uint8]) -> None:
                    _write_at(file.fileno(), images.tobytes(), start + first * image_bytes)

                fill(write)
                os.fsync(file.fileno())
            pixels = PixelFile(part)  # before it has its name: another process may then replace it
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        self._remove_older()
        return pixels

    def _remove_leftovers(self) -> None:
        """Delete what processes left that were killed: those that live hold the lock."""
        for part in self.folder.glob("*.part"):
            if part == self.path.with_suffix(".part"):
                part.unlink(missing_ok=True)
                continue
            try:
                with filelock.FileLock(part.with_suffix(".lock"), timeout=0):
                    part.unlink(missing_ok=True)
            except filelock.Timeout:
                continue

    def _remove_older(self) -> None:
        """Delete the images of the same place as it was before. Who reads them holds them open, and reads on."""
        for path in self.folder.glob(f"{self.place}-*.npy"):
            if path != self.path:
                path.unlink(missing_ok=True)


def make_images(shape: Shape, fill: Callable[[Write], None], *, entry: CacheEntry | None) -> Images:
    """Return the images (N, C, H, W) that ``fill`` writes: in memory, or in the file of ``entry`` if one is given.

    A file that is there is taken as it is. Raises DataError as :meth:`CacheEntry.make` does.
    """
    if entry is not None:
        return StoredImages(entry.find() or entry.make(shape, fill))
    images = np.empty(shape, np.uint8)

    def write(first: int, pixels: npt.NDArray[np.uint8]) -> None:
        images[first : first + len(pixels)] = pixels

    fill(write)
    return torch.from_numpy(images)


def _reserve(descriptor: int, size: int) -> None:
    """Make the file ``size`` bytes long, on the disk where the system can: a full disk shows before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
