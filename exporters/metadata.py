"""What an exported file says about itself: the metadata of the ONNX model.

Keys, each with the prefix ``nasdeploy.`` in the file, values in JSON::

    schema              "nasdeploy/metadata/1"
    profile             name of the hardware profile that the file was made for
    precision           "fp32", "fp16" or "int8"
    budget              {metric: {"max": …, "coefficient": …, …}} as the profile states it
    space               name of the search space
    architecture        {decision: candidate}
    architecture_hash   first 16 hexadecimal digits of SHA-256 over space and architecture
    dataset             fingerprint of the image set
    seed                seed of the run
    versions            {package: version} that made the file
    input               name, layout "NCHW", dtype "float32", shape [C, H, W], range [0, 255]
    preprocessing       what was done to the images before they became that input (resizing, colour)
    normalisation       {"inside_model": true, "mean": [C numbers], "std": [C numbers]} in units of the pixels
    labels              names of the classes, in the order of the logits

No times and no clock: the same training gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nasdeploy.errors import UsageError
from nasdeploy.exporters.base import INPUT_NAME
from nasdeploy.exporters.files import read_model

PREFIX = "nasdeploy."
SCHEMA = "nasdeploy/metadata/1"


def architecture_hash(space: str, architecture: Mapping[str, str]) -> str:
    """Return the short hash of an architecture by names, ``space.to_names(architecture)``."""
    return hashlib.sha256(_to_json([space, dict(architecture)]).encode()).hexdigest()[:16]


def model_metadata(
    *,
    profile: str,
    precision: str,
    budget: Mapping[str, Any],
    space: str,
    architecture: Mapping[str, str],
    dataset: str,
    seed: int,
    versions: Mapping[str, str],
    image_shape: tuple[int, int, int],
    preprocessing: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    labels: Sequence[str],
) -> dict[str, str]:
    """Return the metadata of an exported file, keys and JSON values as in the module's docstring.

    image_shape: (channels, height, width). mean, std: one value a channel, in units of the pixels (0 to 255).
    """
    values = {
        "schema": SCHEMA,
        "profile": profile,
        "precision": precision,
        "budget": dict(budget),
        "space": space,
        "architecture": dict(architecture),
        "architecture_hash": architecture_hash(space, architecture),
        "dataset": dataset,
        "seed": seed,
        "versions": dict(versions),
        "input": {
            "name": INPUT_NAME,
            "layout": "NCHW",
            "dtype": "float32",
            "shape": list(image_shape),
            "range": [0, 255],
        },
        "preprocessing": dict(preprocessing),
        "normalisation": {"inside_model": True, "mean": list(mean), "std": list(std)},
        "labels": list(labels),
    }
    return {PREFIX + key: _to_json(value) for key, value in values.items()}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of an exported file, prefix removed and values parsed; {} for a file of others.

    Raises UsageError for a file that is not ONNX, or whose metadata is damaged.
    """
    entries = {entry.key: entry.value for entry in read_model(path).metadata_props}
    try:
        return {
            key.removeprefix(PREFIX): json.loads(entries[key]) for key in entries if key.startswith(PREFIX)
        }
    except ValueError as error:
        raise UsageError(
            f"{path}: its metadata under '{PREFIX}' is not JSON ({error}); export it again"
        ) from error


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
