"""The gate alone, on a finished run: its networks against its files, in a later process."""

from __future__ import annotations

from pathlib import Path

from nasdeploy.errors import RunFolderError
from nasdeploy.exporters.verification import Verification
from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import finished_job
from nasdeploy.pipeline.models import verify_network
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.progress import Observer, Silent


def verify_run(run_dir: str | Path, observer: Observer | None = None) -> dict[str, Verification]:
    """Return the checks of every exported file of a run against its network, rebuilt from its stored weights.

    Raises RunFolderError where there is no run, or its data has changed.
    """
    job = finished_job(run_dir, observer or Silent())
    folder = job.folder
    results = {}
    for profile in job.profiles:
        model = folder.model(profile.name)
        if not model.model.exists():
            raise RunFolderError(f"{model.model}: not found; nasdeploy build into the same folder makes it")
        architecture = stored_architecture(job, profile.name)
        network = build_network(job.space, architecture, job.normalise())
        network.load_state_dict(folder.load_tensors(model.weights))
        results[profile.name] = verify_network(job.at(architecture), network.eval(), model.model, profile)
    return results
