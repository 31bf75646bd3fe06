"""The gate alone, on a finished run: its networks against its files, in a later process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from nasdeploy.errors import RunFolderError
from nasdeploy.exporters.structure import inspect_model
from nasdeploy.exporters.verification import Verification
from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import Job, finished_job
from nasdeploy.pipeline.models import reduced_accuracy, verify_network
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.profiles import HardwareProfile
from nasdeploy.progress import Observer, Silent


def verify_run(run_dir: str | Path, observer: Observer | None = None) -> dict[str, Verification]:
    """Return the checks of every exported file of a run against its network, rebuilt from its stored weights.

    Where a file in a smaller number format ships, its own checks stand first, its accuracy on validation images among
    them; those of the file in float32, which it was made from, follow with "fp32" before their names. Raises
    RunFolderError where there is no run, a file is missing, or the data has changed.
    """
    job = finished_job(run_dir, observer or Silent())
    folder = job.folder
    results = {}
    for profile in job.profiles:
        model = folder.model(profile.name)
        shipped = model.shipped()
        for path in dict.fromkeys((model.model, shipped)):
            if not path.exists():
                raise RunFolderError(f"{path}: not found; nasdeploy build into the same folder makes it")
        architecture = stored_architecture(job, profile.name)
        network = build_network(job.space, architecture, job.normalise())
        network.load_state_dict(folder.load_tensors(model.weights))
        sized = job.at(architecture)
        parity = verify_network(sized, network.eval(), model.model, profile)
        same = shipped == model.model
        results[profile.name] = parity if same else _of_reduced(sized, profile, network, shipped, parity)
    return results


def _of_reduced(
    job: Job, profile: HardwareProfile, network: nn.Module, path: Path, parity: Verification
) -> Verification:
    """Return the checks of the reduced file ``path``, and behind them those of the file that it was made from."""
    gate = reduced_accuracy(job, profile, network, path)
    of_fp32 = tuple(replace(check, name=f"fp32 {check.name}") for check in parity.checks)
    return Verification(
        structure=inspect_model(path),
        checks=gate.checks + of_fp32,
        num_images=gate.num_images,
        accuracy=gate.accuracy,
        network_accuracy=gate.before,
    )
