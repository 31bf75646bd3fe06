"""``nasdeploy measure``: the latency tables of a search space under the runtimes of profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasdeploy.costs.latency_table import MAX_CEILING, LatencyTable
from nasdeploy.costs.sessions import HERE, Device, check_runtime_available
from nasdeploy.costs.table_store import TableStore
from nasdeploy.data import load_dataset
from nasdeploy.errors import ConfigError, NoisyMeasurementError
from nasdeploy.exporters.opsets import check_opset
from nasdeploy.pipeline.devices import device_of, where
from nasdeploy.pipeline.latency_tables import FoundTable, table_for, table_store
from nasdeploy.profiles import DEFAULT_PROFILES, HardwareProfile, Runtime, load_profile
from nasdeploy.progress import Observer, Silent
from nasdeploy.spaces import SearchSpace, make_space

__all__ = ["MeasureResult", "MeasuredRuntime", "RuntimeOf", "group_by_runtime", "measure", "space_to_measure"]

SCHEMA = "nasdeploy/measure/1"
DEFAULT_IMAGE_SHAPE, DEFAULT_NUM_CLASSES = (1, 28, 28), 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOf:
    """A runtime, a device, and the names of the profiles that share the latency table of both."""

    runtime: Runtime
    profiles: tuple[str, ...]
    profile: HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRuntime:
    """The table of a runtime, and where it came from."""

    runtime: Runtime
    profiles: tuple[str, ...]
    found: FoundTable

    @property
    def table(self) -> LatencyTable:
        """The table itself."""
        return self.found.table

    @property
    def noise(self) -> str:
        """Why the machine is too noisy for it, in one line; empty where it is not."""
        ceiling = self.table.accuracy.ceiling
        if ceiling <= MAX_CEILING:
            return ""
        return (
            f"{', '.join(self.profiles)}: two measurements of one network differ by {100 * ceiling:.1f} % on average; "
            f"expected at most {100 * MAX_CEILING:.0f} %: a machine with less other work"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "profiles": list(self.profiles),
            "origin": self.found.origin,
            "stored": None if self.found.stored is None else str(self.found.stored),
            "table": self.table.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureResult:
    """The tables of a space, one for each runtime. device: its name in messages."""

    space: str
    image_shape: tuple[int, int, int]
    image_sizes: tuple[int, ...]
    num_classes: int
    device: str
    runtimes: tuple[MeasuredRuntime, ...]

    @property
    def noise(self) -> str:
        """Which tables the machine was too noisy for, in one line; empty for none."""
        return "; ".join(one.noise for one in self.runtimes if one.noise)

    @property
    def exit_code(self) -> int:
        """5 where the machine was too noisy for a table, else 0."""
        return NoisyMeasurementError.exit_code if self.noise else 0

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, after ``schemas/measure.schema.json``."""
        return {
            "schema": SCHEMA,
            "space": self.space,
            "image_shape": list(self.image_shape),
            "image_sizes": list(self.image_sizes),
            "num_classes": self.num_classes,
            "device": self.device,
            "runtimes": [one.to_json() for one in self.runtimes],
        }


def measure(
    profiles: Sequence[HardwareProfile | str | Path] = DEFAULT_PROFILES,
    *,
    data: str | None = None,
    space: str = "mobile",
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    image_sizes: Sequence[int] = (),
    seed: int = 0,
    fresh: bool = False,
    device: Device | None = None,
    observer: Observer | None = None,
) -> MeasureResult:
    """Measure how long each layer of a space takes under the runtime of each profile; ``build`` finds the tables again.

    data: its images and classes fix the size of the space; instead of it ``image_shape`` (channels, height, width)
    and ``num_classes``, grey images of 28x28 pixels and ten classes where left out. image_sizes: sides in pixels; of
    several the search chooses. seed: of the networks that the tables are fitted to and tested on. fresh: measure
    even what was measured before. device: where; None: on that of each profile. Profiles with one runtime and device
    share a table. Raises ConfigError or DataError; a machine that is too noisy is in the result's ``exit_code``, and
    its table is not kept for later.
    """
    observer = observer or Silent()
    groups = group_by_runtime(profiles)
    devices = [device or device_of(group.profile, note=observer.note) for group in groups]
    for group, used in zip(groups, devices, strict=True):
        if used is HERE:
            check_runtime_available(group.runtime)
    made = space_to_measure(
        space, data=data, image_shape=image_shape, num_classes=num_classes, image_sizes=image_sizes, seed=seed
    )
    store = table_store(observer)
    return MeasureResult(
        space=made.name,
        image_shape=made.image_shape,
        image_sizes=tuple(sorted(set(image_sizes))),
        num_classes=made.num_classes,
        device=", ".join(dict.fromkeys(used.name for used in devices)),
        runtimes=tuple(
            _measured(group, made, seed=seed, fresh=fresh, device=used, observer=observer, store=store)
            for group, used in zip(groups, devices, strict=True)
        ),
    )


def _measured(
    group: RuntimeOf,
    space: SearchSpace,
    *,
    seed: int,
    fresh: bool,
    device: Device,
    observer: Observer,
    store: TableStore,
) -> MeasuredRuntime:
    found = table_for(
        space, group.runtime, seed=seed, fresh=fresh, device=device, observer=observer, store=store
    )
    return MeasuredRuntime(runtime=group.runtime, profiles=group.profiles, found=found)


def group_by_runtime(profiles: Sequence[HardwareProfile | str | Path]) -> list[RuntimeOf]:
    """Return the different runtimes of ``profiles``, in order. Raises ConfigError for a profile that is none."""
    if not profiles:
        raise ConfigError("profiles: none; expected at least one, such as 'cpu-tight'")
    shared: dict[tuple[str, int, str], dict[str, HardwareProfile]] = {}
    for profile in profiles:
        loaded = profile if isinstance(profile, HardwareProfile) else load_profile(profile)
        check_opset(loaded.runtime.opset)
        key = loaded.runtime.key(), loaded.runtime.channel_multiple, where(loaded)
        shared.setdefault(key, {})[loaded.name] = loaded
    firsts = [next(iter(by.values())) for by in shared.values()]
    return [
        RuntimeOf(runtime=first.runtime, profiles=tuple(by), profile=first)
        for first, by in zip(firsts, shared.values(), strict=True)
    ]


def space_to_measure(
    space: str = "mobile",
    *,
    data: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    image_sizes: Sequence[int] = (),
    seed: int = 0,
) -> SearchSpace:
    """Return the space that a build with the same arguments searches; see :func:`measure`."""
    sizes = tuple(sorted(set(image_sizes)))
    if data is not None:
        if image_shape is not None or num_classes is not None:
            raise ConfigError(
                f"data = '{data}': has its own image shape and classes; expected one or the other"
            )
        dataset = load_dataset(data, image_size=sizes[-1] if sizes else None, seed=seed)
        image_shape, num_classes = dataset.image_shape, dataset.num_classes
    channels, height, width = image_shape or DEFAULT_IMAGE_SHAPE
    if sizes:
        height = width = sizes[-1]
    return make_space(
        space,
        (channels, height, width),
        num_classes or DEFAULT_NUM_CLASSES,
        image_sizes=sizes if len(sizes) > 1 else (),
    )
