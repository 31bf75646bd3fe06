"""What every phase of a build works on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
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
from nasdeploy.data import (
    Dataset,
    Normalisation,
    TrainingBatches,
    load_dataset,
    make_augmentation,
    training_batches,
)
from nasdeploy.data.metrics import class_weights, is_unbalanced
from nasdeploy.data.types import Split
from nasdeploy.errors import ConfigError, DataError, RunFolderError
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.opsets import check_opset
from nasdeploy.networks import Normalise
from nasdeploy.profiles import HardwareProfile, load_profile
from nasdeploy.profiles.messages import read_model
from nasdeploy.progress import Observer
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import EXPECTED, BuildSettings, parse_duration
from nasdeploy.spaces import Architecture, SearchSpace, make_space
from nasdeploy.training.memory import keep_freed_memory
from nasdeploy.training.precision import resolve_device
from nasdeploy.training.recalibration import MIN_IMAGES

AUGMENTATION = {"fashion-mnist": "none"}
"""In the few epochs of the default schedule every augmentation costs accuracy there (1 to 4 points)."""

DECODE_PHASE = "decode images"

_VERSIONED = ("torch", "torchvision", "onnx", "onnxruntime", "fvcore", "numpy")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings and everything that follows from them; computed once, changed by no phase.

    profiles: what this call is to build. searched: what the search of the run is for, in the order of its
    distributions. dataset: at the largest image size; :meth:`at` gives the job of another one. data_fingerprint,
    normalisation: of the dataset at its largest size, for networks of all sizes.
    """

    settings: BuildSettings
    folder: RunFolder
    observer: Observer
    profiles: tuple[HardwareProfile, ...]
    searched: tuple[HardwareProfile, ...]
    dataset: Dataset
    data_fingerprint: str
    normalisation: Normalisation
    space: SearchSpace
    device: torch.device
    threads: int

    def with_(
        self,
        *,
        settings: BuildSettings,
        observer: Observer,
        searched: tuple[HardwareProfile, ...],
        threads: int,
    ) -> Job:
        """Return this job with its resolved settings, observer, searched profiles and threads."""
        return replace(self, settings=settings, observer=observer, searched=searched, threads=threads)

    def at(self, architecture: Architecture) -> Job:
        """Return this job with the images at the size that ``architecture`` takes, read from their source again."""
        size = self.space.input_shape(architecture)[1]
        if size == self.dataset.image_shape[1]:
            return self
        if size not in self._sized:
            dataset = _load(self.settings, size, self.observer)
            _check_same_images(self.settings.data, self.dataset, dataset, size)
            self._sized[size] = replace(self, dataset=dataset, data_fingerprint=self.data_fingerprint)
        return self._sized[size]

    @cached_property
    def _sized(self) -> dict[int, Job]:
        return {}

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
        images, order = self.train.images, order[:MIN_IMAGES]
        return images[order.to(self.device) if isinstance(images, Tensor) else order]

    @cached_property
    def counts(self) -> dict[str, CostTable]:
        """Exact tables of params and FLOPs."""
        return dict(counting_tables(self.space))

    @cached_property
    def file_sizes(self) -> dict[tuple[str, int], CostTable]:
        """Tables of file sizes that were computed before, by precision and opset, without the metadata."""
        return {}

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The sizes that the search chooses among, in pixels, or the one that there is."""
        return self.settings.image_sizes or (self.dataset.image_shape[1],)

    @cached_property
    def class_weights(self) -> Tensor | None:
        """The weight of each class in the losses (num_classes,), None where all count alike."""
        if self.settings.class_weights == "none":
            return None
        weights = class_weights(self.dataset.train.labels.numpy(), num_classes=self.dataset.num_classes)
        return torch.from_numpy(weights).to(device=self.device, dtype=torch.float32)

    def normalise(self) -> Normalise:
        """Return a new normalisation layer of the training images."""
        return Normalise(self.normalisation.mean, self.normalisation.std)

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
        """Return a short hash of all that every profile of a run depends on: settings, data and space."""
        parts = [self.settings.fingerprint(), self.data_fingerprint, self.space.fingerprint()]
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
    known: Mapping[str, Any] | None = None,
    measures: bool = True,
) -> Job:
    """Load and check everything that a build needs, before anything is written.

    known: the content of ``run.json`` of the run that is continued, which defines its profiles by their names.
    measures: whether the runtimes of the profiles are needed here. Raises ConfigError or DataError.
    """
    make_exporter(settings.exporter)
    if settings.time_budget is not None:
        parse_duration(settings.time_budget)
    profiles = _profiles(settings, {} if known is None else known["profiles"])
    if measures:
        for profile in profiles:
            check_buildable(profile)
    if known is None:  # a profile that is added to a run is measured where the other run has it not
        _check_borrowed(settings, profiles, folder)
    device = resolve_device(settings.device)
    sizes = settings.image_sizes
    dataset = _load(settings, max(sizes, default=None), observer)
    return Job(
        settings=settings,
        folder=folder,
        observer=observer,
        profiles=profiles,
        searched=profiles,
        dataset=dataset,
        data_fingerprint=dataset.fingerprint(),
        normalisation=dataset.normalisation(),
        space=make_space(
            settings.space,
            dataset.image_shape,
            dataset.num_classes,
            image_sizes=sizes if len(sizes) > 1 else (),
        ),
        device=device,
        threads=settings.threads or default_threads(),
    )


def finished_job(run_dir: str | Path, observer: Observer) -> Job:
    """Return the job of a stored run, to read from.

    Raises RunFolderError where there is none, or its data has changed.
    """
    folder = RunFolder(Path(run_dir))
    stored = read_json(folder.run, schema="nasdeploy/run/2")
    settings = read_model(BuildSettings, stored["settings"], source=str(folder.run), expected=EXPECTED)
    # Nothing is trained: no GPU is needed. The tables were copied: the run that they came from may be gone.
    changes = {"device": "auto", "latency_from": None, "profiles": tuple(stored["profiles"])}
    job = prepare(
        settings.model_copy(update=changes), folder=folder, observer=observer, known=stored, measures=False
    )
    if job.data_fingerprint != stored["dataset"]["fingerprint"]:
        raise RunFolderError(
            f"{folder.run}: the data in {job.settings.data} has changed since the build "
            f"(fingerprint {job.data_fingerprint}, expected {stored['dataset']['fingerprint']})"
        )
    return job


def _load(settings: BuildSettings, image_size: int | None, observer: Observer) -> Dataset:
    """Return the images at one size; the observer is told of decoding that takes a while."""
    shown = -1

    def progress(share: float) -> None:
        nonlocal shown
        if shown < 0:
            observer.start(DECODE_PHASE, 100)
        if int(100 * share) > shown:
            shown = int(100 * share)
            observer.advance(DECODE_PHASE, shown, {})

    dataset = load_dataset(settings.data, image_size=image_size, seed=settings.seed, progress=progress)
    if shown >= 0:
        observer.finish(DECODE_PHASE, {})
    return dataset


def _check_same_images(source: str, largest: Dataset, other: Dataset, size: int) -> None:
    """Raise DataError unless ``other`` is the same set, divided in the same way, at ``size`` pixels."""
    if other.image_shape[1:] != (size, size):
        raise DataError(
            f"{source}: gives images of {other.image_shape[2]}x{other.image_shape[1]} pixels; "
            f"expected {size}x{size}, as --image-size asks for"
        )
    for part in ("train", "valid", "test"):
        if not torch.equal(getattr(largest, part).labels, getattr(other, part).labels):
            raise DataError(
                f"{source}: at {size} pixels its {part} split is another one than at {largest.image_shape[1]}; "
                "expected the same images, in the same order, at every --image-size"
            )


def _profiles(settings: BuildSettings, known: Mapping[str, Any]) -> tuple[HardwareProfile, ...]:
    profiles = tuple(
        HardwareProfile.from_dict(known[source]) if source in known else load_profile(source)
        for source in settings.profiles
    )
    seen: dict[str, str] = {}
    for profile, source in zip(profiles, settings.profiles, strict=True):
        if profile.name in seen:
            raise ConfigError(
                f"--profile {source}: is called '{profile.name}', like {seen[profile.name]}; expected different names"
            )
        seen[profile.name] = source
    return profiles


def check_buildable(profile: HardwareProfile) -> None:
    """Raise ConfigError where no file for ``profile`` can be made or measured here."""
    if profile.device is None:
        check_runtime_available(profile.runtime)
    check_opset(profile.runtime.opset)


def default_threads() -> int:
    """Return the cores that this process may use: more threads than cores make training several times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = machine_fingerprint()["cpu_quota"]
    return cores if not isinstance(quota, int | float) else max(1, min(cores, int(quota)))


def _check_borrowed(
    settings: BuildSettings, profiles: tuple[HardwareProfile, ...], folder: RunFolder
) -> None:
    """Raise ConfigError unless the run of ``latency_from`` has a latency table for every profile."""
    if settings.latency_from is None:
        return
    other = RunFolder(Path(settings.latency_from))
    if other.path.resolve() == folder.path.resolve():
        raise ConfigError(
            f"--latency-from {settings.latency_from}: is the run folder itself; expected that of another build"
        )
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
    """Return the run folder of ``settings``: the same settings find the same folder, whatever the profiles."""
    return Path("runs") / f"{Path(settings.data).stem or 'data'}-{settings.fingerprint()[:8]}"


def dataset_facts(job: Job) -> dict[str, Any]:
    """Return what ``run.json`` says of the data."""
    dataset = job.dataset
    return {
        "name": dataset.name,
        "source": dataset.source,
        "fingerprint": job.data_fingerprint,
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "num_train": len(dataset.train),
        "num_valid": len(dataset.valid),
        "num_test": len(dataset.test),
        "balanced": not is_unbalanced(dataset.train.labels.numpy()),
    }
