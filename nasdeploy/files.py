"""Files that are written whole or not at all, and the folder of those that are kept for later."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "NASDEPLOY_CACHE"


def cache_folder() -> Path:
    """Return ``$NASDEPLOY_CACHE``, ``$XDG_CACHE_HOME/nasdeploy`` or ``~/.cache/nasdeploy``."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "nasdeploy"


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all: temporary file beside it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` as readable JSON, keys in their order. NaN is refused: it is not JSON."""
    write_whole(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
