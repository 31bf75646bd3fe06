"""``nasdeploy bench`` on a device that packs are carried to: ``--pack`` and ``--import``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nasdeploy.costs.by_hand import ByHandDevice, NotMeasuredError, packed
from nasdeploy.costs.comparison import FULL, BenchProtocol
from nasdeploy.costs.packs import read_result
from nasdeploy.costs.sessions import Device
from nasdeploy.errors import UsageError
from nasdeploy.pipeline.bench_results import BenchResult
from nasdeploy.pipeline.benching import Work, bench, prepare_work
from nasdeploy.pipeline.packing import BENCH, WrittenPack, written
from nasdeploy.profiles import HardwareProfile, load_profile
from nasdeploy.progress import Observer, Silent

__all__ = ["import_bench", "pack_bench"]


class _Purpose(BaseModel):
    """The arguments of :func:`nasdeploy.pipeline.benching.bench`; profile: as plain data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["bench"]
    models: list[str]
    profile: dict[str, Any] | None
    threads: int | None
    batch_size: int | None
    shapes: dict[str, tuple[int, ...]]
    protocol: BenchProtocol
    check_cap: bool
    operators: bool
    seed: int


def pack_bench(
    models: Sequence[str | Path],
    path: Path,
    *,
    profile: HardwareProfile | str | Path | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    protocol: BenchProtocol = FULL,
    check_cap: bool = False,
    operators: bool = False,
    seed: int = 0,
) -> WrittenPack:
    """Write the pack that measures ONNX files on a device to ``path``.

    Arguments and errors as in :func:`nasdeploy.pipeline.benching.bench`; everything is measured once.
    """
    loaded = load_profile(profile) if isinstance(profile, str | Path) else profile
    protocol = replace(protocol, attempts=1)
    device = ByHandDevice(name="a pack", remedy="")
    work, longer, _ = prepare_work(
        models,
        profile=loaded,
        threads=threads,
        batch_size=batch_size,
        shapes=shapes,
        protocol=protocol,
        check_cap=check_cap,
        seed=seed,
        device=device,
        observer=Silent(),
    )
    purpose = {
        "kind": BENCH,
        "models": [str(model) for model in models],
        "profile": None if loaded is None else loaded.to_dict(),
        "threads": threads,
        "batch_size": batch_size,
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
        "protocol": asdict(protocol),
        "check_cap": check_cap,
        "operators": operators,
        "seed": seed,
    }
    return written(packed(*_measurements(work, longer, operators=operators)), path, purpose=purpose)


def _measurements(
    work: Work, protocol: BenchProtocol, *, operators: bool
) -> list[Callable[[Device], object]]:
    """Return all that is measured, each to be asked of a device alone."""

    def alone(device: Device, position: int) -> Work:
        return replace(work, device=device, files=[work.files[position]])

    measurements: list[Callable[[Device], object]] = [
        lambda device, n=n: alone(device, n).start_all(protocol.num_starts, num_blocks=0)  # type: ignore[misc]
        for n in range(len(work.files))
    ]
    measurements.append(lambda device: replace(work, device=device).compare(protocol, cap=None))
    if operators:
        measurements += [
            lambda device, n=n: alone(device, n).profile_all()  # type: ignore[misc]
            for n in range(len(work.files))
        ]
    return measurements


def import_bench(path: Path, *, observer: Observer | None = None) -> BenchResult:
    """Return what a pack of :func:`pack_bench` measured on its device.

    The files are read again, from where they were. Raises UsageError for a result that is damaged, changed, or of
    other files.
    """
    result = read_result(path)
    try:
        purpose = _Purpose.model_validate(dict(result.purpose))
    except ValidationError as error:
        raise UsageError(
            f"{path}: its pack was written for {result.purpose.get('kind')!r}; expected one of nasdeploy bench --pack"
        ) from error
    profile = None
    if purpose.profile is not None:
        profile = HardwareProfile.from_dict(purpose.profile, source=str(path))
    try:
        return bench(
            purpose.models,
            profile=profile,
            threads=purpose.threads,
            batch_size=purpose.batch_size,
            shapes=purpose.shapes,
            protocol=purpose.protocol,
            check_cap=purpose.check_cap,
            operators=purpose.operators,
            seed=purpose.seed,
            device=ByHandDevice(name=f"the device of {path.name}", remedy="", results=(result,)),
            observer=observer,
        )
    except NotMeasuredError as error:
        raise UsageError(
            f"{path}: was not measured of {', '.join(purpose.models)} as they are now; expected the files of its pack, "
            "unchanged, and this version of nasdeploy"
        ) from error
