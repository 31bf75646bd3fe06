"""Reading pickles of plain data and arrays, from strangers: nothing else is built, and nothing is called.

NumPy's own unpickling is not used either: a crafted state makes its types misread memory.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nasdeploy.errors import DataError


def load_plain_pickle(path: Path) -> object:
    """Return what the pickle ``path`` holds: dicts, lists, tuples, text, bytes, numbers and NumPy arrays of numbers.

    Texts of Python 2 are read as Latin-1. Raises DataError for anything else, before it is built, for a list, tuple or
    dict that stands in two places, and for a damaged file.
    """
    try:
        with path.open("rb") as file:
            _check_sharing(file)
            file.seek(0)
            return _unwrap(_PlainUnpickler(file, encoding="latin1").load())
    except _RefusedError as error:
        raise DataError(
            f"{path}: the pickle asks for {error}; only plain data and arrays of numbers are read, nothing is run"
        ) from error
    except _SharedError as error:
        raise DataError(
            f"{path}: a list, tuple or dict of the pickle stands in two places; expected copies: write the file again"
        ) from error
    except Exception as error:  # damaged pickles make the unpickler raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable pickle ({reason}); unpack the archive again") from error


class _RefusedError(Exception):
    """What a pickle asked for."""


class _SharedError(Exception):
    """A container that a pickle puts into two places."""


# What is used twice is stored right after it was made, and taken from there.
STORING = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
TAKING = frozenset({"GET", "BINGET", "LONG_BINGET"})
BESIDE = frozenset({"PROTO", "FRAME"})  # of the format alone: these can stand between a value and its storing
MAY_BE_SHARED = frozenset(
    {"GLOBAL", "STACK_GLOBAL", "REDUCE"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)


def _check_sharing(file: BinaryIO) -> None:
    """Raise _SharedError where a container, or what may be one, is used twice.

    Forty lists, each twice in the next, are two hundred bytes here and 2^40 lists to whoever walks through them. The
    unpickler itself does where they are tuples and the key of a dict: hence the look at the file before it is read.
    """
    last = ""
    may_be_shared: dict[Any, bool] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in STORING:
            may_be_shared[len(may_be_shared) if name == "MEMOIZE" else argument] = last in MAY_BE_SHARED
        elif name == "DUP" or (name in TAKING and not may_be_shared.get(argument, False)):
            raise _SharedError
        if name not in BESIDE:
            last = name


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


class _Latin1:
    """The part of ``_codecs.encode`` that pickles of bytes use: protocols 0 to 2 have no bytes of their own.

    No function: a pickle can set the attributes of one, for the whole process.
    """

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise _RefusedError(f"the encoding {str(encoding)[:20]!r}")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:
        raise _RefusedError("a change of _codecs.encode")


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # NumPy 2
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _NumberType,
    ("_codecs", "encode"): _Latin1(),
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
