"""SHA256SUMS in the format of sha256sum: ``sha256sum -c SHA256SUMS`` inside the folder checks every file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from nasdeploy.errors import RunFolderError
from nasdeploy.files import write_whole

__all__ = ["CHECKSUMS", "read_checksums", "write_checksums"]

CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(r"(?P<sum>[0-9a-f]{64})  (?P<name>.+)")


def write_checksums(folder: Path) -> Path:
    """Write SHA256SUMS over every other file of ``folder`` and below; return its path.

    Hidden files are left out: they are other programs' or half-written. Raises RunFolderError for an empty
    folder, and for a file name that the format cannot hold.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _left_out(path, folder))
    if not files:
        raise RunFolderError(f"{folder}: holds no files; expected a model folder")
    lines = [f"{_sha256(path)}  {_name(path, folder)}\n" for path in files]
    write_whole(folder / CHECKSUMS, "".join(lines).encode())
    return folder / CHECKSUMS


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Return {file: SHA-256} as SHA256SUMS says, None where it is missing. Raises RunFolderError when damaged."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); delete it and build again") from error
    sums = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise RunFolderError(f"{path}: {line[:80]!r}; expected a line of sha256sum; build again")
        sums[match["name"]] = match["sum"]
    return sums


def _left_out(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return parts == (CHECKSUMS,) or any(part.startswith(".") for part in parts)


def _name(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix()
    if "\\" in name or not name.isprintable():
        raise RunFolderError(f"{folder}: file name {name!r}; expected printable characters and no backslash")
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
