"""What a device can afford and how a model runs there, as the types of a profile's TOML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from nasdeploy.errors import ConfigError
from nasdeploy.profiles.messages import FieldError, read_model
from nasdeploy.profiles.units import (
    METRICS,
    Limit,
    Percent,
    Quantity,
    format_limit,
    format_share,
    read_limit,
    read_share,
    share_json_schema,
    show_value,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of profile names: they become folder names."""

HOST_PATTERN = r"^([A-Za-z0-9_][A-Za-z0-9_.+-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,252}$"
"""Of what ssh is given as its destination: never an option, never anything for a shell."""

PYTHON_PATTERN = r"^[A-Za-z0-9_./~][A-Za-z0-9_./+ ~-]{0,511}$"
"""Of a command or path on the device; "~/" is the home of the user there."""

EXPECTED: dict[str, str] = {
    "name": 'up to 64 letters, digits, ".", "_", "-", the first a letter or digit, such as "my-device"',
    "description": 'a text, such as "one core of an edge box"',
    "runtime": "a table such as [runtime] with the line threads = 1",
    "runtime.engine": '"onnxruntime"',
    "runtime.provider": 'the full name of an ONNX Runtime execution provider, such as "CPUExecutionProvider"',
    "runtime.threads": "a whole number of 1 or more, such as 1",
    "runtime.batch_size": "a whole number of 1 or more, such as 1",
    "runtime.precision": '"fp32", "fp16" or "int8"',
    "runtime.channel_multiple": "a whole number of 1 or more, such as 8",
    "runtime.max_accuracy_drop": 'a share of the images, such as "1%" or 0.01',
    "runtime.opset": "a whole number of 18 or more (the exporter writes no lower one), such as 18",
    "device": 'a table such as [device] with the line host = "user@board"',
    "device.host": 'what ssh connects to, such as "user@board" or a Host of ~/.ssh/config',
    "device.python": 'the Python of the device, such as "python3" or "~/venv/bin/python"',
    "device.by_hand": "true, for packs that people carry to the device and back",
    "budget": 'a table such as [budget] with the line latency = { max = "15ms" }',
    "budget.params": 'a table such as { max = "1.5M" }',
    "budget.flops": 'a table such as { max = "60M" }',
    "budget.latency": 'a table such as { max = "15ms" }',
    "budget.file_size": 'a table such as { max = "4MB" }',
    "budget.peak_memory": 'a table such as { max = "40MB" }',
} | {
    f"budget.{metric}.{field}": wanted
    for metric in METRICS
    for field, wanted in (
        ("coefficient", "a finite number of 0 or more, such as 0.3"),
        ("percentile", "50, 90, 95 or 99, such as 90"),
    )
}
"""By key what belongs there; what `max` and `reference` expect is said where their text is read."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Share = Annotated[
    float,
    BeforeValidator(read_share),
    PlainSerializer(format_share, return_type=str),
    WithJsonSchema(share_json_schema(), mode="validation"),
]


class Runtime(_Model):
    """How the exported model will run on the device."""

    engine: Annotated[
        Literal["onnxruntime"],
        WithJsonSchema({"type": "string", "enum": ["onnxruntime"]}),  # as all pydantic 2.x
    ] = Field(default="onnxruntime", description="The inference runtime.")
    provider: StrictStr = Field(
        default="CPUExecutionProvider",
        pattern=r"^[A-Za-z0-9]+ExecutionProvider$",
        description="The ONNX Runtime execution provider; there is no silent fallback to another.",
        examples=["CPUExecutionProvider", "CUDAExecutionProvider"],
    )
    threads: StrictInt = Field(default=1, ge=1, description="Threads inside an operator.")
    batch_size: StrictInt = Field(
        default=1, ge=1, description="Images in one run; latency is that of one run."
    )
    precision: Literal["fp32", "fp16", "int8"] = Field(
        default="fp32",
        description="Number format of weights and activations; a file in fp16 or int8 ships only where it is faster "
        "than that in fp32 and about as accurate.",
    )
    channel_multiple: StrictInt = Field(
        default=8, ge=1, description="The search takes only channel counts that are multiples of this."
    )
    opset: StrictInt = Field(default=18, ge=18, description="ONNX operator set of the exported file.")
    max_accuracy_drop: _Share | None = Field(
        default=None,
        description="Accuracy on validation images that the network may lose by its number format, as a share of all "
        "images; left out: 1% for int8, 0.5% for fp16.",
    )

    @model_validator(mode="after")
    def _check(self) -> Runtime:
        if self.max_accuracy_drop is not None and self.precision == "fp32":
            raise FieldError(
                'expected precision = "int8" or "fp16" beside it: a file in fp32 must compute what its network does',
                under="max_accuracy_drop",
            )
        return self

    def key(self) -> str:
        """Return a text that is equal for profiles which can share a latency table."""
        sizes = f"t{self.threads}-b{self.batch_size}"
        return f"{self.engine}-{self.provider}-{sizes}-{self.precision}-opset{self.opset}"


@dataclass(frozen=True, slots=True)
class _Written:
    """A limit as it stands in the file, with the metric whose units it is written in."""

    metric: str
    value: object


# Its JSON Schema depends on the metric: nasdeploy.profiles.schema fills it in.
_LimitField = Annotated[InstanceOf[Quantity] | InstanceOf[Percent], WithJsonSchema({})]


class MetricBudget(_Model):
    """What one metric may cost: a hard cap, a soft weight, or both."""

    max: _LimitField | None = Field(
        default=None,
        description="Hard cap. A percentage lies between the smallest (0 %) and the largest (100 %) network "
        "of the search space on this device.",
    )
    coefficient: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Soft weight: the objective is the loss + coefficient * metric / reference."
    )
    reference: _LimitField | None = Field(
        default=None,
        description="What the coefficient is relative to; left out: the largest network of the space.",
    )
    percentile: Literal[50, 90, 95, 99] = Field(
        default=50, description="Percentile of the latency that must stay below `max` (latency only)."
    )

    @field_validator("max", "reference", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if not isinstance(value, _Written):
            return value
        is_limit = isinstance(value.value, Quantity | Percent)
        return value.value if is_limit else read_limit(value.value, value.metric)

    @model_validator(mode="after")
    def _check(self) -> MetricBudget:
        if self.max is None and self.coefficient is None:
            raise FieldError(
                'expected a hard cap such as max = "40%", or a weight such as coefficient = 0.3', under=""
            )
        if self.reference is not None and self.coefficient is None:
            raise FieldError("expected a coefficient beside it, such as coefficient = 0.3", under="reference")
        if self.max is None and self.coefficient == 0:
            raise FieldError(
                'expected more than 0, such as 0.3, or a cap beside it such as max = "40%": 0 weighs nothing',
                under="coefficient",
            )
        if self.max is None and "percentile" in self.model_fields_set:
            raise FieldError(
                'expected a cap beside it for it to apply to, such as max = "15ms"', under="percentile"
            )
        return self


class Budget(_Model):
    """What the model may cost. Each metric: a hard cap, a coefficient, or both; at least one metric."""

    params: MetricBudget | None = Field(
        default=None, description="Parameters of the PyTorch module, a count."
    )
    flops: MetricBudget | None = Field(
        default=None, description="FLOPs per image as fvcore counts them: one multiply-add is one FLOP."
    )
    latency: MetricBudget | None = Field(
        default=None, description="Time of one run of the exported file in the runtime, a whole batch."
    )
    file_size: MetricBudget | None = Field(
        default=None, description="Size of the exported file (1 kB = 1000 bytes)."
    )
    peak_memory: MetricBudget | None = Field(
        default=None,
        description="What the exported file adds to the memory of a process: its peak resident size while the file is "
        "loaded and run, less that before. Measured; ONNX Runtime needs some 10 MB of it for any file.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_metrics(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: _with_metric(key, value) for key, value in data.items()}

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if not self.items():
            example = 'latency = { max = "15ms" }'
            raise FieldError(f"expected at least one of {', '.join(METRICS)}, such as {example}", under="")
        for metric, limits in self.items():
            if metric != "latency" and "percentile" in limits.model_fields_set:
                raise FieldError(
                    'expected none here: only latency has one, such as { max = "15ms", percentile = 90 }',
                    under=f"{metric}.percentile",
                )
        return self

    def items(self) -> list[tuple[str, MetricBudget]]:
        """Return (metric, its budget) for those that are set, in the order of METRICS."""
        rows = ((metric, getattr(self, metric)) for metric in METRICS)
        return [(metric, limits) for metric, limits in rows if limits is not None]

    @model_serializer
    def _written(self) -> dict[str, Any]:
        return {metric: _metric_dict(metric, limits) for metric, limits in self.items()}


class DeviceAccess(_Model):
    """How a device is reached that is not the machine of the build: over ssh, or by hand."""

    host: StrictStr | None = Field(
        default=None,
        pattern=HOST_PATTERN,
        description="What ssh connects to: a name or address, or a Host of ~/.ssh/config (which also holds the port "
        "and the key).",
        examples=["user@board"],
    )
    python: StrictStr | None = Field(
        default=None,
        pattern=PYTHON_PATTERN,
        description='The Python there, with numpy and onnxruntime; left out: "python3".',
        examples=["python3", "~/venv/bin/python"],
    )
    by_hand: StrictBool | None = Field(
        default=None, description="Packs are carried to the device and their results back by hand."
    )

    @model_validator(mode="after")
    def _check(self) -> DeviceAccess:
        if self.by_hand is False:
            raise FieldError("expected true, or no such line", under="by_hand")
        if self.by_hand and self.host is not None:
            raise FieldError("expected none beside by_hand = true: one or the other", under="host")
        if not self.by_hand and self.host is None:
            raise FieldError('expected host = "user@board" for ssh, or by_hand = true', under="")
        if self.python is not None and self.host is None:
            raise FieldError('expected a host beside it, such as host = "user@board"', under="python")
        return self


class HardwareProfile(_Model):
    """A device: how a model runs there and what it may cost.

    Calling the class raises pydantic's ValidationError; ``from_dict`` and ``load_profile`` raise ConfigError.
    """

    model_config = ConfigDict(
        json_schema_extra={"description": "A device: how a model runs there and what it may cost."}
    )

    name: StrictStr = Field(
        pattern=NAME_PATTERN, description="Name of the profile, and of its folder in a run."
    )
    description: StrictStr = Field(default="", description="What the device is.")
    runtime: Runtime = Field(default_factory=Runtime)
    device: DeviceAccess | None = Field(
        default=None, description="How the device is reached; left out: it is the machine of the build."
    )
    budget: Budget

    def to_dict(self) -> dict[str, Any]:
        """Return the one canonical form, which JSON and TOML can hold: defaults filled in, limits as exact text."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_dict(cls, data: object, *, source: str = "profile") -> HardwareProfile:
        """Return the profile that ``data``, as read from TOML or made by ``to_dict``, describes.

        source: named first in errors. Raises ConfigError.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{source} = {show_value(data)}: expected a table with the keys name, runtime and budget"
            )
        return read_model(cls, data, source=source, expected=EXPECTED)

    def fingerprint(self) -> str:
        """Return a short hash of the canonical form."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _with_metric(metric: str, table: object) -> object:
    if metric not in METRICS or not isinstance(table, Mapping):
        return table
    return {
        key: _Written(metric, value) if key in ("max", "reference") else value for key, value in table.items()
    }


def _limit_text(limit: Limit | None, metric: str) -> str | None:
    return None if limit is None else format_limit(limit, metric)


def _metric_dict(metric: str, limits: MetricBudget) -> dict[str, str | float | int]:
    row: dict[str, str | float | int | None] = {
        "max": _limit_text(limits.max, metric),
        "coefficient": limits.coefficient,
        "reference": _limit_text(limits.reference, metric),
        "percentile": limits.percentile if metric == "latency" and limits.max is not None else None,
    }
    return {key: value for key, value in row.items() if value is not None}
