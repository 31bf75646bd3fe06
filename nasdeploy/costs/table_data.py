"""What a latency table holds, as it is stored: the layers, the calibration, and how far they can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nasdeploy.costs.calibration import TERMS, Accuracy, Calibration
from nasdeploy.costs.machine import describe_difference
from nasdeploy.costs.table import CostTable, tabulate
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import LayerSpec, SearchSpace

__all__ = [
    "MAX_CEILING",
    "MAX_MAPE",
    "REMEDY",
    "SCHEMA",
    "Bridge",
    "LatencyTable",
    "LayerTime",
    "NetworkTime",
]

SCHEMA = "nasdeploy/latency-table/2"
REMEDY = "nasdeploy build --no-resume"

MAX_MAPE = MAX_CEILING = 0.05
"""What a table must keep to be used again: the goal for its error, and the noise beyond which nothing is certified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """A layer alone in a session, without the session's call.

    spread: of the blocks, relative. reused: taken from an older table and scaled, not measured for this one.
    """

    spec: LayerSpec
    ms: float
    spread: float
    reused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTime:
    """A whole network that the calibration did not see."""

    choices: tuple[int, ...]
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """The layers that an older table holds and that were measured again.

    drift: median of new over old times; what the reused times were multiplied by. spread: range of the middle half
    of these ratios over their median. measured_at: when the older table was measured.
    """

    num_layers: int
    drift: float
    spread: float
    measured_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """The measured latency of a space on one machine and runtime; times in ms of one run of a batch.

    measured_at: UTC, ISO 8601. bridge: None where nothing was reused. smallest_ms, largest_ms: the anchors of
    percentage caps, measured beside the layers.
    """

    runtime_key: str
    channel_multiple: int
    space_name: str
    space_fingerprint: str
    machine: Mapping[str, str | int | float | None]
    seed: int
    measured_at: str
    seconds: float
    entries: tuple[LayerTime, ...]
    bridge: Bridge | None
    calibration: Calibration
    accuracy: Accuracy
    held_out: tuple[NetworkTime, ...]
    smallest_ms: float
    largest_ms: float

    @property
    def num_reused(self) -> int:
        """How many layers were taken from an older table."""
        return sum(entry.reused for entry in self.entries)

    @property
    def weakness(self) -> str:
        """Why it is not to be used again, in a few words; empty where it is good enough."""
        accuracy = self.accuracy
        if accuracy.ceiling > MAX_CEILING:
            return (
                f"two measurements of one network differ by {100 * accuracy.ceiling:.1f} %, "
                f"more than {100 * MAX_CEILING:.0f} %"
            )
        if accuracy.mape > MAX_MAPE:
            return f"its error is {100 * accuracy.mape:.1f} %, more than {100 * MAX_MAPE:.0f} %"
        return ""

    def cost_table(self, space: SearchSpace) -> CostTable:
        """Return the latency of every architecture in ms. Raises ConfigError for another space."""
        self._check("search space", self.space_fingerprint, space.fingerprint())
        alone = {entry.spec: entry.ms for entry in self.entries}
        return tabulate(
            space,
            lambda spec: self.calibration.layer_ms(spec, alone[spec]),
            constant=self.calibration.constant_ms,
        )

    def check_matches(
        self, space: SearchSpace, runtime: Runtime, *, machine: Mapping[str, str | int | float | None]
    ) -> None:
        """Raise ConfigError unless the table was measured for this space, runtime and machine."""
        self._check("search space", self.space_fingerprint, space.fingerprint())
        self._check("runtime", self.runtime_key, runtime.key())
        self._check("runtime.channel_multiple", self.channel_multiple, runtime.channel_multiple)
        if missing := set(space.distinct_layers()) - {entry.spec for entry in self.entries}:
            raise ConfigError(
                f"latency table: lacks {len(missing)} layers of the space; {REMEDY} makes a new one"
            )
        if difference := describe_difference(self.machine, machine):
            raise ConfigError(
                f"latency table: measured on another machine ({difference}); {REMEDY} makes a new one"
            )

    def is_of(self, machine: Mapping[str, str | int | float | None]) -> bool:
        """Return whether the table was measured on ``machine``."""
        return not describe_difference(self.machine, machine)

    def _check(self, what: str, stored: object, here: object) -> None:
        if stored != here:
            raise ConfigError(
                f"latency table: measured for {what} {stored}; expected {here}; {REMEDY} makes a new one"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data; that a layer has one input goes without saying, as in older tables."""
        rows = asdict(self)
        for entry in rows["entries"]:
            if entry["spec"]["num_inputs"] == 1:
                del entry["spec"]["num_inputs"]
        return {"schema": SCHEMA, **rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Return what :meth:`to_json` gave. Raises ConfigError for another schema, wrong keys, types or values."""
        if data.get("schema") != SCHEMA:
            raise ConfigError(
                f"latency table: schema {data.get('schema')!r}; expected '{SCHEMA}'; {REMEDY} makes a new one"
            )
        try:
            return _read(data)
        except ValueError as error:
            raise ConfigError(f"latency table: {error}; {REMEDY} makes a new one") from error


@cache
def _reader() -> TypeAdapter[LatencyTable]:
    return TypeAdapter(LatencyTable)


def _read(content: Mapping[str, Any]) -> LatencyTable:
    """Return the table that ``content`` describes exactly. Raises ValueError with the first thing that is wrong."""
    rest = {key: value for key, value in content.items() if key != "schema"}
    text = json.dumps(rest, allow_nan=False)
    try:
        table = _reader().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"'{place}': {first['msg'][:1].lower()}{first['msg'][1:]}") from error
    if json.loads(json.dumps(table.to_json())) != json.loads(json.dumps(content)):
        raise ValueError("holds keys that do not belong there")
    _check_values(table)
    return table


def _check_values(table: LatencyTable) -> None:
    if unknown := set(table.calibration.coefficients) - TERMS.keys():
        raise ValueError(f"'calibration.coefficients': unknown term '{min(unknown)}'")
    times = [table.smallest_ms, table.largest_ms, *(entry.ms for entry in table.entries)]
    times += [row.measured_ms for row in table.held_out]
    if not all(ms > 0.0 for ms in times) or not math.isfinite(sum(times)):
        raise ValueError("holds a time that is not above 0")
