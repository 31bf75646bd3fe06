"""What the search is worth: a random and a uniformly narrowed network within the same caps, by the same recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nasdeploy.data.metrics import accuracy_metrics
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.runtime import onnx_predictions
from nasdeploy.files import write_json
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.models import Builder
from nasdeploy.pipeline.objectives import make_objective
from nasdeploy.pipeline.reducing import in_fp32, reduce_model
from nasdeploy.pipeline.tables import ProfileCosts, metadata_of
from nasdeploy.spaces.base import Architecture

SCHEMA = "nasdeploy/baseline/1"
MAX_DRAWS = 100_000
NUM_WIDTHS = 101


def build_baselines(job: Job, costs: Mapping[str, ProfileCosts], builder: Builder) -> None:
    """Train and evaluate the baselines of every profile that are not stored yet; one that does not exist is noted."""
    for name, one in costs.items():
        for kind, architecture in (("random", _random(job, one)), ("uniform", _uniform(one))):
            if architecture is None:
                job.observer.note(f"{name}: no {kind} baseline within the caps was found")
            elif not job.folder.baseline(name, kind).exists():
                _build(job, one, builder, kind, architecture)
            job.folder.baseline_checkpoint(name, kind).unlink(missing_ok=True)


def _build(job: Job, costs: ProfileCosts, builder: Builder, kind: str, architecture: Architecture) -> None:
    name = costs.profile.name
    checkpoint = job.folder.baseline_checkpoint(name, kind)
    network, _ = builder.retrain(f"{name} ({kind} baseline)", architecture, checkpoint=checkpoint)
    with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
        sized, profile = job.at(architecture), costs.profile
        made = make_exporter(job.settings.exporter).export(
            network,
            image_shape=job.space.input_shape(architecture),
            path=Path(folder, "model.onnx"),
            opset=profile.runtime.opset,
            batch_size=None,
            metadata=metadata_of(job, in_fp32(profile), architecture),
        )
        if (
            job.folder.model(name).shipped() != job.folder.model(name).model
        ):  # in the format of the searched one
            made = reduce_model(
                sized,
                made,
                precision=profile.runtime.precision,
                path=Path(folder, "reduced.onnx"),
                batch_size=None,
                metadata=metadata_of(job, profile, architecture),
            )
        test = sized.dataset.test
        predictions = onnx_predictions(made.path, test.images)
    labels = test.labels.numpy()
    accuracy = accuracy_metrics(predictions, labels, num_classes=job.dataset.num_classes)
    choices = np.array([architecture.choices])
    write_json(
        job.folder.baseline(name, kind),
        {
            "schema": SCHEMA,
            "profile": name,
            "kind": kind,
            "architecture": job.space.to_names(architecture),
            "predicted": {metric: float(table.of(choices)[0]) for metric, table in costs.tables.items()},
            "top1": accuracy.top1,
            "macro": accuracy.macro,
        },
    )


def _random(job: Job, costs: ProfileCosts) -> Architecture | None:
    """Return the first feasible one of uniformly drawn architectures."""
    rng = np.random.default_rng(job.seed(f"baseline/{costs.profile.name}"))
    choices = np.stack([rng.choice(np.flatnonzero(row), size=MAX_DRAWS) for row in costs.mask], axis=1)
    feasible = make_objective(costs).feasible(choices)
    return Architecture(tuple(choices[int(feasible.argmax())].tolist())) if feasible.any() else None


def _uniform(costs: ProfileCosts) -> Architecture | None:
    """Return the largest feasible network whose every decision stands at the same share of its range."""
    candidates = [np.flatnonzero(row) for row in costs.mask]
    shares = np.linspace(0.0, 1.0, NUM_WIDTHS)
    choices = np.array([[row[round(share * (len(row) - 1))] for row in candidates] for share in shares])
    feasible = np.flatnonzero(make_objective(costs).feasible(choices))
    return Architecture(tuple(choices[feasible[-1]].tolist())) if feasible.size else None
