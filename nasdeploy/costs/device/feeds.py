"""What a session is fed with: random values of the shapes and types that it asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

INPUT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
    "tensor(uint32)": np.uint32,
    "tensor(int32)": np.int32,
    "tensor(uint64)": np.uint64,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
# Integers wider than a pixel are mostly indices, and these two are in range nearly everywhere.
PIXELS = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(uint8)", "tensor(int8)")
PIXEL_LIMIT, INDEX_LIMIT = 128, 2


class SessionError(Exception):
    """The request cannot be carried out; the message is one line for the user."""


def make_feed(
    session: Any, path: str, batch_size: int, rng: np.random.Generator, shapes: dict[str, list[int]]
) -> dict[str, np.ndarray]:
    """Return random values for every input: pixels, or 0 and 1 for indices.

    shapes: {input: shape}; for an input that is not in it, dynamic dimensions become ``batch_size``.
    """
    feed: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.type not in INPUT_TYPES:
            raise SessionError(
                f"{path}: input '{value.name}' is a {value.type}; expected a tensor of numbers"
            )
        shape = [size if isinstance(size, int) else batch_size for size in value.shape]
        limit = PIXEL_LIMIT if value.type in PIXELS else INDEX_LIMIT
        values = rng.integers(0, limit, shapes.get(value.name, shape))
        feed[value.name] = np.asarray(values).astype(INPUT_TYPES[value.type])
    return feed


def batch_of(feed: dict[str, np.ndarray], batch_size: int) -> int:
    """Return how many items one run takes: the first dimension of the first input, unless that is a vector."""
    first = next(iter(feed.values()), None)
    return batch_size if first is None or first.ndim < 2 else int(first.shape[0])
