"""Packs of latency tables, and what comes back from devices: ``nasdeploy measure --pack`` and ``--import``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nasdeploy.costs.by_hand import ByHandDevice, NotMeasuredError, packed
from nasdeploy.costs.memory import measure_memory_table
from nasdeploy.costs.packs import Pack, PackResult, read_result
from nasdeploy.costs.sessions import HERE
from nasdeploy.errors import ConfigError, UsageError
from nasdeploy.pipeline.devices import CERTIFY, keep_result, where
from nasdeploy.pipeline.latency_tables import conversion_to, table_for
from nasdeploy.pipeline.measuring import MeasureResult, measure, space_to_measure
from nasdeploy.plugins import is_reference
from nasdeploy.profiles import HardwareProfile, load_profile
from nasdeploy.progress import Observer, Silent
from nasdeploy.spaces import SearchSpace

__all__ = ["BENCH", "KeptResult", "WrittenPack", "import_result", "pack_table", "written"]

TABLE, BENCH = "latency-table", "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPack:
    """A pack that waits for its device."""

    path: Path
    file_size: int
    num_models: int
    num_requests: int

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return {
            "path": str(self.path),
            "file_size": self.file_size,
            "num_models": self.num_models,
            "num_requests": self.num_requests,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptResult:
    """A result that the builds of ``profile`` find now."""

    profile: str
    path: Path


class _TablePurpose(BaseModel):
    """What the pack of a table was written for: a profile, and all that its space follows from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["latency-table"]
    profile: dict[str, Any]
    space: str
    image_shape: list[int]
    num_classes: int
    image_sizes: list[int]
    seed: int


def pack_table(
    profile: HardwareProfile | str | Path,
    path: Path,
    *,
    data: str | None = None,
    space: str = "mobile",
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    image_sizes: Sequence[int] = (),
    seed: int = 0,
) -> WrittenPack:
    """Write the pack that measures the latency table of a space for ``profile`` on its device to ``path``.

    Also what its memory table needs, where its budget names peak_memory. Arguments as in
    :func:`nasdeploy.pipeline.measuring.measure`. Raises ConfigError, also for a profile without a device, DataError,
    and UsageError for a path that cannot be written.
    """
    loaded = profile if isinstance(profile, HardwareProfile) else load_profile(profile)
    _require_device(loaded)
    made = space_to_measure(
        space, data=data, image_shape=image_shape, num_classes=num_classes, image_sizes=image_sizes, seed=seed
    )
    pack = packed(
        lambda device: table_for(
            made, loaded.runtime, seed=seed, observer=Silent(), store=None, device=device
        ),
        lambda device: _memory_table(loaded, made, seed=seed, device=device),
    )
    purpose = {
        "kind": TABLE,
        "profile": loaded.to_dict(),
        "space": space,
        "image_shape": list(made.image_shape),
        "num_classes": made.num_classes,
        "image_sizes": sorted(set(image_sizes)),
        "seed": seed,
    }
    return written(pack, path, purpose=purpose)


def _memory_table(
    profile: HardwareProfile, space: SearchSpace, *, seed: int, device: ByHandDevice | Any
) -> None:
    if profile.budget.peak_memory is not None:
        convert = conversion_to(profile.runtime.precision)
        measure_memory_table(space, profile.runtime, seed=seed, convert=convert, device=device)


def written(pack: Pack, path: Path, *, purpose: dict[str, Any]) -> WrittenPack:
    """Write ``pack`` to ``path``. Raises UsageError where it cannot be written."""
    pack.write(path, purpose=purpose)
    return WrittenPack(
        path=path,
        file_size=path.stat().st_size,
        num_models=len(pack.models),
        num_requests=len(pack.requests),
    )


def import_result(
    path: Path,
    *,
    profile: HardwareProfile | str | Path | None = None,
    space: str | None = None,
    observer: Observer | None = None,
) -> MeasureResult | KeptResult:
    """Take what a pack wrote on its device: a latency table, or the measurement of exported files.

    Builds of the profile find it from then on. The models of a table are made again and compared by their checksums
    with those that were measured. profile: must be the one of the pack; None: takes that. space: must be that of the
    table, and is needed where it is in a Python file, which is executed. Raises UsageError for a result that is
    damaged, changed, of other code or of other models than this version's, ConfigError for a profile without a device.
    """
    result = read_result(path)
    kind = result.purpose.get("kind")
    if kind == TABLE:
        return _import_table(result, profile, space, observer or Silent())
    if kind == CERTIFY:
        if space is not None:
            raise UsageError(
                f"{path}: certifies files, which needs no search space; leave out --space {space}"
            )
        name = _checked_profile(result, result.purpose.get("profile"), profile).name
        return KeptResult(profile=name, path=keep_result(result, name))
    wanted = f"nasdeploy bench --import {path}" if kind == BENCH else "a latency table or a certification"
    raise UsageError(f"{path}: its pack was written for {kind!r}; expected {wanted}")


def _import_table(
    result: PackResult, given: HardwareProfile | str | Path | None, space: str | None, observer: Observer
) -> MeasureResult:
    try:
        purpose = _TablePurpose.model_validate(result.purpose)
        channels, height, width = purpose.image_shape
    except (ValidationError, ValueError) as error:
        raise UsageError(
            f"{result.path}: does not say what it is the table of; write the pack again"
        ) from error
    profile = _checked_profile(result, purpose.profile, given)
    _check_space(result, purpose.space, space)
    device = ByHandDevice(name=profile.name, remedy="", results=(result,))
    try:
        found = measure(
            [profile],
            space=purpose.space,
            image_shape=(channels, height, width),
            num_classes=purpose.num_classes,
            image_sizes=purpose.image_sizes,
            seed=purpose.seed,
            fresh=True,
            device=device,
            observer=observer,
        )
        made = space_to_measure(
            purpose.space,
            image_shape=(channels, height, width),
            num_classes=purpose.num_classes,
            image_sizes=purpose.image_sizes,
        )
        _memory_table(profile, made, seed=purpose.seed, device=device)
    except NotMeasuredError as error:
        raise UsageError(
            f"{result.path}: its models or requests are not those that this version of nasdeploy makes for "
            f"'{profile.name}'; expected the result of a pack of this version: write the pack again and run it"
        ) from error
    if not found.noise:
        keep_result(result, profile.name)
    return found


def _require_device(profile: HardwareProfile) -> None:
    """Raise ConfigError for a profile that is measured here: no pack would ever be asked."""
    if profile.device is None:
        raise ConfigError(
            f"{profile.name}: device: none, so builds measure on this machine and would not use the pack; "
            "expected [device] with by_hand = true (or host) in the profile"
        )


def _check_space(result: PackResult, own: str, given: str | None) -> None:
    """Raise UsageError for another space than was asked for, and for a Python file that nobody here has named."""
    if given is None and is_reference(own):
        raise UsageError(
            f"{result.path}: its space is '{own}', a Python file that would be executed; expected "
            f"--space {shlex.quote(own)} beside --import, if you trust it"
        )
    if given is not None and given != own:
        raise UsageError(
            f"{result.path}: was measured for the space '{own}'; expected '{given}', as --space says"
        )


def _checked_profile(
    result: PackResult, stored: object, given: HardwareProfile | str | Path | None
) -> HardwareProfile:
    """Return the profile of a pack, or the ``given`` one of the same device and runtime. Raises ConfigError."""
    own = HardwareProfile.from_dict(stored, source=str(result.path))
    _require_device(own)
    if given is None:
        return own
    profile = given if isinstance(given, HardwareProfile) else load_profile(given)
    for key, there, here in (
        ("name", own.name, profile.name),
        ("runtime", own.runtime.key(), profile.runtime.key()),
        ("runtime.channel_multiple", own.runtime.channel_multiple, profile.runtime.channel_multiple),
        ("device", where(own), where(profile) or HERE.name),
    ):
        if there != here:
            raise ConfigError(
                f"{result.path}: was measured for {key} {there!r}; expected {here!r}, as in the profile {profile.name}"
            )
    return profile
