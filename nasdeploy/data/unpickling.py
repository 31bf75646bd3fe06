"""Reading pickles of plain data and arrays, from strangers: nothing else is built, and nothing is called.

NumPy's own unpickling is not used either: a crafted state makes its types misread memory.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nasdeploy.errors import DataError


def load_plain_pickle(path: Path) -> object:
    """Return what the pickle ``path`` holds: dicts, lists, tuples, text, bytes, numbers and NumPy arrays of numbers.

    Texts of Python 2 are read as Latin-1. Raises DataError for anything else, before it is built, and for a damaged
    file.
    """
    try:
        with path.open("rb") as file:
            return _unwrap(_PlainUnpickler(file, encoding="latin1").load())
    except _RefusedError as error:
        raise DataError(
            f"{path}: the pickle asks for {error}; only plain data and arrays of numbers are read, nothing is run"
        ) from error
    except Exception as error:  # damaged pickles make the unpickler raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable pickle ({reason}); unpack the archive again") from error


class _RefusedError(Exception):
    """What a pickle asked for."""


class _NumberType:
    """What ``numpy.dtype`` is called with, and the state that follows, for plain numbers."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        text = _text(code)
        if not re.fullmatch(r"[|<>=]?(b1|[iuf][1248])", text):
            raise _RefusedError(f"an array of {text[:20]!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(_text(state[1]) + self.dtype.str[1:])  # type: ignore[misc]  # (version, byte order, …)


class _Array:
    """What ``numpy.ndarray`` is rebuilt from: (version, shape, type, whether in Fortran's order, bytes)."""

    def __init__(self, *_: object) -> None:
        self.values: npt.NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, number, fortran, raw = state
        content = raw.encode("latin1") if isinstance(raw, str) else raw
        if len(content) != math.prod(shape) * number.dtype.itemsize:
            raise ValueError(f"{len(content)} bytes for an array of {shape}")
        order = "F" if fortran else "C"
        self.values = np.frombuffer(content, number.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _latin1(text: str, encoding: str) -> bytes:
    """The part of ``_codecs.encode`` that pickles of bytes use: protocols 0 to 2 have no bytes of their own."""
    if encoding != "latin1":
        raise _RefusedError(f"the encoding {str(encoding)[:20]!r}")
    return text.encode("latin1")


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # NumPy 2
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _NumberType,
    ("_codecs", "encode"): _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return ADMITTED[module, name]


def _unwrap(value: Any) -> Any:
    """Return ``value`` with arrays in place of what they are rebuilt from."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        return {key: _unwrap(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_unwrap, value))
    return value
