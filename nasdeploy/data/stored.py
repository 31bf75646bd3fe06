"""Images that stay in a file: read by index, so that memory holds one batch and not the whole set.

Notation: N images, B of a batch, C channels, H = W pixels.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nasdeploy.errors import DataError

MAX_READ_BYTES = 2**30  # of one system call: macOS refuses over 2 GiB, Linux gives less than was asked for
CHUNK_BYTES = 2**22  # of a chunk of pixels; what is computed from it takes several times that

Rows = npt.NDArray[np.int64]


class PixelFile:
    """A file in NumPy's .npy format, open for reading: uint8 (N, C, H, W).

    Raises OSError where it cannot be opened, ValueError where it is something else or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        with open(self._descriptor, "rb", closefd=False) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{path}: not of version 1.0 of the .npy format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        self.shape = tuple(shape)
        self._image_bytes = int(np.prod(self.shape[1:]))
        whole = self._start + len(self) * self._image_bytes
        if dtype != np.uint8 or len(self.shape) != 4 or os.fstat(self._descriptor).st_size != whole:
            raise ValueError(f"{path}: holds {dtype} of shape {self.shape}, or is not whole")

    def __len__(self) -> int:
        return int(self.shape[0])

    def read(self, rows: Rows, *, pinned: bool = False) -> Tensor:
        """Return the images at ``rows`` (B,) as uint8 (B, C, H, W), in pinned memory if asked for.

        Neighbours in ``rows`` that are neighbours in the file are read together. Raises DataError where that fails.
        """
        batch = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        flat = batch.numpy().reshape(len(rows), self._image_bytes)
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]
        begin = 0
        for end in ends if len(rows) else ():
            self._fill(flat[begin:end].reshape(-1), self._start + int(rows[begin]) * self._image_bytes)
            begin = end
        return batch

    def _fill(self, target: npt.NDArray[np.uint8], offset: int) -> None:
        done = 0
        while done < len(target):
            try:
                part = os.pread(self._descriptor, min(len(target) - done, MAX_READ_BYTES), offset + done)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read ({error.strerror}); remove it") from error
            if not part:
                raise DataError(f"{self.path}: has become shorter; expected a file that nobody changes")
            target[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)


class StoredImages:
    """uint8 (N, C, H, W) in a file, with as much of a tensor's surface as splits and batches need.

    ``images[a:b]`` and ``images[indices]`` (int64, (B,)) read these images and return a tensor on ``device``: on a
    GPU by way of pinned memory, without waiting for the copy. Indices on a GPU are read back: keep them on the CPU.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(
        self, file: PixelFile, *, rows: Rows | None = None, device: torch.device | None = None
    ) -> None:
        self._file = file
        self._rows = np.arange(len(file)) if rows is None else rows
        self.device = device or torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self._file.shape[1:]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | slice | Tensor) -> Tensor:
        if isinstance(key, int):
            return self._read(self._rows[[key]])[0]
        if isinstance(key, slice):
            return self._read(self._rows[key])
        if key.dtype != torch.int64 or key.ndim != 1:
            raise TypeError(f"stored images: index of {key.dtype}, {key.ndim}-d; expected torch.int64, 1-d")
        return self._read(self._rows[key.cpu().numpy()])

    def select(self, indices: npt.NDArray[np.intp]) -> StoredImages:
        """Return the images at ``indices`` without reading them."""
        return StoredImages(self._file, rows=self._rows[indices], device=self.device)

    def to(self, device: torch.device | str) -> StoredImages:
        """Return the same images; their batches arrive on ``device``."""
        return StoredImages(self._file, rows=self._rows, device=torch.device(device))

    def _read(self, rows: Rows) -> Tensor:
        batch = self._file.read(rows, pinned=self.device.type == "cuda")
        return batch if self.device.type == "cpu" else batch.to(self.device, non_blocking=True)


Images = Tensor | StoredImages
"""uint8 (N, C, H, W), in memory or in a file."""


def take(images: Images, indices: Tensor) -> Tensor:
    """Return ``images[indices]`` for int64 indices (B,): index_select is several times faster for tensors."""
    return images[indices] if isinstance(images, StoredImages) else images.index_select(0, indices)


def image_chunks(images: Images, size: int | None = None) -> Iterator[Tensor]:
    """Yield all images in order, (B, C, H, W): ``size`` at once, or about 4 MiB; the last chunk may be smaller."""
    step = size or max(1, CHUNK_BYTES // max(1, images.shape[1:].numel()))
    for start in range(0, len(images), step):
        yield images[start : start + step]
