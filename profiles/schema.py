"""The JSON Schema of a profile, for editors and pipelines, and the TOML that ``profiles new`` starts from."""

from __future__ import annotations

import copy
import re
from typing import Any

from nasdeploy.errors import ConfigError
from nasdeploy.profiles.model import EXPECTED, NAME_PATTERN, HardwareProfile
from nasdeploy.profiles.units import METRICS, limit_json_schema, show_value

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_TEMPLATE = """\
# A hardware profile of nasdeploy: how the model will run on a device, and what it may cost there.
# `nasdeploy profiles check` shows whether a search space can meet it.

name = "{name}" # letters, digits, ".", "_", "-": a folder of each run is called so
description = "describe the device in one line"

[runtime]
engine = "onnxruntime"
provider = "CPUExecutionProvider" # an ONNX Runtime execution provider; no fallback to another
threads = 1
batch_size = 1 # latency is that of one run, a whole batch
precision = "fp32" # or "int8", "fp16": ship only where faster than fp32 and about as accurate
# max_accuracy_drop = "1%" # of int8 and fp16, on validation images
channel_multiple = 8 # the search takes only channel counts that are multiples of this
opset = 18 # 18 or more

# [device] # where it is not the machine of the build
# host = "user@board" # ssh connects there without a password; its Python needs numpy and onnxruntime
# python = "python3"
# by_hand = true # or so: carry packs there and results back

[budget]
# At least one metric, each with a hard cap (max), a soft weight (coefficient), or both.
# A cap is a quantity with its unit, or a share of the way from the smallest network (0%) to the largest.
latency = {{ max = "40%" }} # "15ms", "800us", "1.2s"; with percentile = 90 the p90 is capped, not the median
params = {{ max = "40%" }} # "1.5M", "60k", 60000: parameters of the PyTorch module
# flops = {{ max = "60M" }} # one multiply-add is one FLOP, per image
# file_size = {{ max = "4MB" }} # of the exported file; "200kB", "1MiB"
# peak_memory = {{ max = "40MB" }} # what the file adds to a process at its peak, measured; the runtime takes some 10 MB

# The weight adds coefficient * metric / reference to the loss; without a reference: the largest network.
# flops = {{ coefficient = 0.3, reference = "60M" }}
"""


def profile_template(name: str) -> str:
    """Return a commented TOML file for a new profile, valid as it stands. Raises ConfigError: bad name."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"name = {show_value(name)}: expected {EXPECTED['name']}")
    return _TEMPLATE.format(name=name)


def profile_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a profile's TOML, with the strings that people write for limits."""
    schema: dict[str, Any] = _without_null(HardwareProfile.model_json_schema())
    definitions = schema["$defs"]
    shared = definitions.pop("MetricBudget")
    for metric in METRICS:
        title = f"{metric.title().replace('_', '')}Budget"
        definitions[title] = _metric_schema(metric, shared) | {"title": title}
        definitions["Budget"]["properties"][metric]["$ref"] = f"#/$defs/{title}"
    definitions["Budget"]["minProperties"] = 1
    # Written out, because versions of pydantic place a description beside a $ref differently.
    for field, definition, description in (
        ("runtime", "Runtime", "How the model will run."),
        ("device", "DeviceAccess", "How the device is reached; left out: it is the machine of the build."),
        ("budget", "Budget", "What it may cost."),
    ):
        schema["properties"][field] = {"$ref": f"#/$defs/{definition}", "description": description}
    definitions["DeviceAccess"] |= {
        "oneOf": [{"required": ["host"]}, {"required": ["by_hand"]}],
        "dependentRequired": {"python": ["host"]},
    }
    definitions["DeviceAccess"]["properties"]["by_hand"]["const"] = True
    return {"$schema": _DIALECT} | schema | {"title": "nasdeploy hardware profile"}


def _metric_schema(metric: str, shared: dict[str, Any]) -> dict[str, Any]:
    schema = copy.deepcopy(shared)
    properties = schema["properties"]
    for field in ("max", "reference"):
        kept = {key: properties[field][key] for key in ("title", "description")}
        properties[field] = kept | limit_json_schema(metric)
    needs = {"reference": ["coefficient"], "percentile": ["max"]}
    if metric != "latency":
        del properties["percentile"], needs["percentile"]
    return schema | {
        "anyOf": [{"required": ["max"]}, {"required": ["coefficient"]}],
        "dependentRequired": needs,
    }


def _without_null(schema: Any) -> Any:
    """Drop what pydantic says of None: TOML has no null, an optional key is left out."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rows = {
        key: _without_null(value) for key, value in schema.items() if not (key == "default" and value is None)
    }
    options = [option for option in rows.get("anyOf", []) if option != {"type": "null"}]
    if len(options) == 1:
        del rows["anyOf"]
        rows |= options[0]
    elif options:
        rows["anyOf"] = options
    return rows
