"""The JSON Schemas of the files that nasdeploy writes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def load_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema ``name``, such as "verify". Raises FileNotFoundError where there is none."""
    schema: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.schema.json").read_text("utf-8"))
    return schema
