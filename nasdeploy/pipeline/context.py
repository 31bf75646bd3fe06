"""What every phase of a build works on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasdeploy import __version__
from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.costs.sessions import check_runtime_available
from nasdeploy.costs.table import CostTable
from nasdeploy.data import Dataset, TrainingBatches, load_dataset, make_augmentation, training_batches
from nasdeploy.data.metrics import is_unbalanced
from nasdeploy.data.types import Split
from nasdeploy.errors import ConfigError
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.opsets import check_opset
from nasdeploy.networks import Normalise
from nasdeploy.profiles import HardwareProfile, load_profile
from nasdeploy.progress import Observer
from nasdeploy.runs import RunFolder
from nasdeploy.settings import BuildSettings, parse_duration
from nasdeploy.spaces import SearchSpace, make_space
from nasdeploy.training.memory import keep_freed_memory
from nasdeploy.training.precision import resolve_device
from nasdeploy.training.recalibration import MIN_IMAGES

AUGMENTATION = {"fashion-mnist": "none"}
"""In the few epochs of the default schedule every augmentation costs accuracy there (1 to 4 points)."""

_VERSIONED = ("torch", "torchvision", "onnx", "onnxruntime", "fvcore", "numpy")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings and everything that follows from them; computed once, changed by no phase."""

    settings: BuildSettings
    folder: RunFolder
    observer: Observer
    profiles: tuple[HardwareProfile, ...]
    dataset: Dataset
    space: SearchSpace
    device: torch.device
    threads: int

    def with_(self, *, settings: BuildSettings, observer: Observer, threads: int) -> Job:
        """Return this job with its resolved settings, observer and threads."""
        return replace(self, settings=settings, observer=observer, threads=threads)

    @cached_property
    def train(self) -> Split:
        """The training images on the training device."""
        return self.dataset.train.to(self.device)

    @cached_property
    def valid(self) -> Split:
        """The validation images on the training device."""
        return self.dataset.valid.to(self.device)

    @cached_property
    def recalibration_images(self) -> Tensor:
        """Training images for batch-norm statistics: drawn at random, because splits may be sorted by class."""
        order = torch.randperm(len(self.train), generator=self.generator("recalibration"))
        return self.train.images[order[:MIN_IMAGES].to(self.device)]

    @cached_property
    def counts(self) -> dict[str, CostTable]:
        """Exact tables of params and FLOPs."""
        return dict(counting_tables(self.space))

    def normalise(self) -> Normalise:
        """Return a new normalisation layer of the training images."""
        found = self.dataset.normalisation()
        return Normalise(found.mean, found.std)

    def seed(self, purpose: str) -> int:
        """Return a seed for one purpose, so that no two parts draw from one stream."""
        digest = hashlib.sha256(f"{self.settings.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:6], "little")

    def generator(self, purpose: str) -> torch.Generator:
        """Return a fresh CPU generator for ``purpose``."""
        return torch.Generator().manual_seed(self.seed(purpose))

    def batches(self, split: Split, *, purpose: str, batch_size: int, augment: bool) -> TrainingBatches:
        """Return endless batches of ``split``, augmented as the settings say where ``augment``."""
        name = self.augmentation if augment else "none"
        return training_batches(
            split,
            batch_size=batch_size,
            generator=self.generator(purpose),
            augment=make_augmentation(name, self.dataset.image_shape),
        )

    def fingerprint(self) -> str:
        """Return a short hash of all that the build depends on: settings, profiles and data."""
        parts = [
            self.settings.fingerprint(),
            *(p.fingerprint() for p in self.profiles),
            self.dataset.fingerprint(),
        ]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    @property
    def augmentation(self) -> str:
        """The augmentation by name."""
        return self.settings.augment or AUGMENTATION.get(self.settings.data, "light")


def prepare(
    settings: BuildSettings,
    *,
    folder: RunFolder,
    observer: Observer,
    profiles: tuple[HardwareProfile, ...] | None = None,
) -> Job:
    """Load and check everything that a build needs, before anything is written.

    profiles: those of a stored run; None: those that the settings name. Raises ConfigError or DataError.
    """
    make_exporter(settings.exporter)
    if settings.time_budget is not None:
        parse_duration(settings.time_budget)
    profiles = profiles or _profiles(settings)
    _check_borrowed(settings, profiles)
    device = resolve_device(settings.device)
    dataset = load_dataset(settings.data, image_size=settings.image_size, seed=settings.seed)
    return Job(
        settings=settings,
        folder=folder,
        observer=observer,
        profiles=profiles,
        dataset=dataset,
        space=make_space(settings.space, dataset.image_shape, dataset.num_classes),
        device=device,
        threads=settings.threads or default_threads(),
    )


def _profiles(settings: BuildSettings) -> tuple[HardwareProfile, ...]:
    profiles = tuple(load_profile(name) for name in settings.profiles)
    seen: dict[str, str] = {}
    for profile, source in zip(profiles, settings.profiles, strict=True):
        if profile.name in seen:
            raise ConfigError(
                f"--profile {source}: is called '{profile.name}', like {seen[profile.name]}; expected different names"
            )
        seen[profile.name] = source
        check_buildable(profile)
    return profiles


def check_buildable(profile: HardwareProfile) -> None:
    """Raise ConfigError where no file for ``profile`` can be made or measured here."""
    check_runtime_available(profile.runtime)
    check_opset(profile.runtime.opset)
    if profile.runtime.precision != "fp32":
        raise ConfigError(
            f"{profile.name}: runtime.precision = '{profile.runtime.precision}': this version exports fp32 only; "
            "expected 'fp32'"
        )


def default_threads() -> int:
    """Return the cores that this process may use: more threads than cores make training several times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = machine_fingerprint()["cpu_quota"]
    return cores if not isinstance(quota, int | float) else max(1, min(cores, int(quota)))


def _check_borrowed(settings: BuildSettings, profiles: tuple[HardwareProfile, ...]) -> None:
    """Raise ConfigError unless the run of ``latency_from`` has a latency table for every profile."""
    if settings.latency_from is None:
        return
    other = RunFolder(Path(settings.latency_from))
    for profile in profiles:
        if not other.latency(profile.name).exists():
            raise ConfigError(
                f"--latency-from {settings.latency_from}: has no latency table of '{profile.name}'; expected a run "
                "folder of a build with this profile"
            )


@contextmanager
def torch_environment(job: Job) -> Iterator[None]:
    """Set the threads of torch for the time of a build, and let it keep its memory."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def package_versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {"nasdeploy": __version__, **{name: version(name) for name in _VERSIONED}}


def default_folder(settings: BuildSettings) -> Path:
    """Return the run folder of ``settings``: the same settings find the same folder, others another one."""
    return Path("runs") / f"{Path(settings.data).stem or 'data'}-{settings.fingerprint()[:8]}"


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Return what ``run.json`` says of the data."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "fingerprint": dataset.fingerprint(),
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "num_train": len(dataset.train),
        "num_valid": len(dataset.valid),
        "num_test": len(dataset.test),
        "balanced": not is_unbalanced(dataset.train.labels.numpy()),
    }
