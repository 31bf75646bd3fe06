"""Hardware profiles: how a model runs on a device and what it may cost there. Needs only pydantic."""

from __future__ import annotations

from nasdeploy.profiles.loading import (
    BUILTIN_PROFILES,
    DEFAULT_PROFILES,
    builtin_profiles,
    load_profile,
    profile_names,
)
from nasdeploy.profiles.model import Budget, DeviceAccess, HardwareProfile, MetricBudget, Runtime
from nasdeploy.profiles.schema import profile_json_schema, profile_template
from nasdeploy.profiles.units import (
    METRICS,
    Limit,
    Percent,
    Quantity,
    format_limit,
    format_quantity,
    parse_limit,
    parse_quantity,
)

__all__ = [
    "BUILTIN_PROFILES",
    "DEFAULT_PROFILES",
    "METRICS",
    "Budget",
    "DeviceAccess",
    "HardwareProfile",
    "Limit",
    "MetricBudget",
    "Percent",
    "Quantity",
    "Runtime",
    "builtin_profiles",
    "format_limit",
    "format_quantity",
    "load_profile",
    "parse_limit",
    "parse_quantity",
    "profile_json_schema",
    "profile_names",
    "profile_template",
]
